"""Time of a step: what a backward pass hides, and what is paid for memory of the host."""

from __future__ import annotations

import pytest

from megaseq.parallel.layout import Layout, Parallel
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.hardware import Hardware
from megaseq.train.planning.search import Estimate, estimate_of
from megaseq.train.planning.subject import Subject

from .test_search import small

HARDWARE = Hardware(devices=8, link_bandwidth=20.0, latency_us=0.0)
"""Links that are slow enough to be waited for."""


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(small(), precision="bf16")


def estimate(subject: Subject, *, micro_batches: int = 1, data: int = 8, pipe: int = 1, **zero: object) -> Estimate:
    params = Parallel.Params(pipe=pipe)
    for name, value in zero.items():
        params.set(f"zero.{name}", value, origin="the test")
    layout = Layout(data=data, pipe=pipe)
    candidate = Candidate(parallel=params, layout=layout, micro_batches=micro_batches)
    return estimate_of(subject, candidate=candidate, hardware=HARDWARE)


def test_stage_0_hides_all_but_the_last_bucket_behind_the_last_backward_pass(subject: Subject) -> None:
    after = estimate(subject, overlap=False).cost
    meanwhile = estimate(subject).cost
    assert meanwhile.sent == after.sent
    backward = 2 / 3 * after.seconds["compute"]
    hidden = after.seconds["data"] - meanwhile.seconds["data"]
    assert hidden == pytest.approx(min(backward, 7 / 8 * after.seconds["data"]), rel=0.05)
    # Of two micro-batches only the second one hides anything.
    halves = estimate(subject, micro_batches=2).cost.seconds
    assert after.seconds["data"] - halves["data"] < 0.7 * halves["compute"] / 2


def test_others_hide_what_they_are_asked_to(subject: Subject) -> None:
    for stage in (2, 3):
        own = estimate(subject, stage=stage, bucket_elements=100_000).cost.seconds["data"]
        assert estimate(subject, stage=stage, bucket_elements=100_000, overlap=True).cost.seconds["data"] < own
    assert (
        estimate(subject, data=4, pipe=2, micro_batches=2).cost.seconds["data"]
        == estimate(subject, data=4, pipe=2, micro_batches=2, overlap=False).cost.seconds["data"]
    )


def test_gradients_travel_for_each_micro_batch_from_stage_2_on(subject: Subject) -> None:
    one, two = (estimate(subject, stage=2, micro_batches=n).cost.sent["data"] for n in (1, 2))
    assert two == pytest.approx(1.5 * one, rel=0.05)  # The weights are gathered once.
    assert estimate(subject, stage=1, micro_batches=2).cost.sent["data"] == pytest.approx(one, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_what_is_offloaded_takes_time_and_no_memory_of_the_device(subject: Subject, device: str) -> None:
    here, there = estimate(subject, stage=2), estimate(subject, stage=2, offload_optimizer=device)
    moved = here.memory.optimizer + here.memory.gradients
    assert there.memory.total == pytest.approx(here.memory.total - moved, rel=0.01)
    assert there.memory.host == (moved if device == "cpu" else 0)
    assert there.cost.seconds["offload"] > here.cost.seconds["offload"] == 0.0
    assert there.cost.seconds["optimizer"] > here.cost.seconds["optimizer"]
    whole, away = estimate(subject, stage=3), estimate(subject, stage=3, offload_parameters=device)
    assert away.memory.parameters == 0 < whole.memory.parameters
    assert away.cost.sent == whole.cost.sent and away.cost.seconds["offload"] > 0


def test_a_disk_is_slower_than_memory_of_the_host(subject: Subject) -> None:
    memory, disk = (estimate(subject, stage=2, offload_optimizer=device).cost for device in ("cpu", "nvme"))
    assert disk.seconds["optimizer"] > 5 * memory.seconds["optimizer"]
