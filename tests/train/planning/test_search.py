"""The planner finds what a person would, says why the rest loses, and builds any rank of the run."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megaseq.base import registry
from megaseq.base.errors import ParamsError
from megaseq.cli.main import main
from megaseq.parallel.layout import Layout, Parallel
from megaseq.train.experiment import Run
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.dry_run import dry_run
from megaseq.train.planning.hardware import Hardware
from megaseq.train.planning.report import report
from megaseq.train.planning.search import estimate_of, search
from megaseq.train.planning.subject import Subject


def small(**changes: object) -> Run.Params:
    params = registry.params("mt.multi30k.Small")
    params.set("train_input.batching.rows", 16)
    for path, value in changes.items():
        params.set(path.replace("__", "."), value)
    return params


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(small(), precision="bf16")


def estimate(subject: Subject, **axes: int) -> tuple[int, float, float]:
    """(memory, seconds, share of waiting) of a layout without ZeRO."""
    layout = Layout(**axes)
    params = Parallel.Params(pipe=layout.pipe, tensor=layout.tensor, context=layout.context)
    candidate = Candidate(parallel=params, layout=layout, micro_batches=max(1, layout.pipe))
    found = estimate_of(subject, candidate=candidate, hardware=Hardware(devices=layout.world_size))
    return found.memory.total, found.cost.total, candidate.bubble()


def test_more_devices_need_less_memory_each(subject: Subject) -> None:
    one = estimate(subject)[0]
    assert estimate(subject, data=2)[0] < 1.05 * one
    assert estimate(subject, tensor=4)[0] < 0.6 * one
    assert estimate(subject, pipe=2)[0] < 0.8 * one


def test_bubble_is_that_of_the_schedules() -> None:
    def bubble(schedule: str, *, pipe: int, micro_batches: int) -> float:
        params = Parallel.Params(pipe=pipe)
        params.set("pipeline.schedule", schedule)
        return Candidate(parallel=params, layout=Layout(pipe=pipe), micro_batches=micro_batches).bubble()

    assert bubble("1f1b", pipe=4, micro_batches=8) == pytest.approx(3 / 11)
    assert bubble("interleaved", pipe=4, micro_batches=8) == pytest.approx(1.5 / 9.5)
    assert bubble("zero_bubble_v", pipe=4, micro_batches=8) < bubble("interleaved", pipe=4, micro_batches=8)
    assert bubble("gpipe", pipe=1, micro_batches=1) == 0.0


def test_micro_batches_in_flight() -> None:
    params = Parallel.Params(pipe=4)
    candidate = Candidate(parallel=params, layout=Layout(pipe=4), micro_batches=8)
    assert [candidate.alive(rank) for rank in range(4)] == [(4,), (3,), (2,), (1,)]
    params.set("pipeline.schedule", "gpipe")
    assert [candidate.alive(rank) for rank in range(4)] == [(8,), (8,), (8,), (8,)]
    params.set("pipeline.schedule", "interleaved")
    assert [candidate.alive(rank) for rank in range(4)] == [(7, 4), (5, 4), (4, 3), (4, 1)]


@pytest.mark.slow
def test_the_report_has_the_best_first_and_a_reason_for_all_others(subject: Subject) -> None:
    hardware = Hardware(devices=8)
    findings = search(subject, hardware=hardware)
    times = [found.cost.total for found in findings.fitting]
    assert times == sorted(times) and all(math.isfinite(time) for time in times)
    lines = list(report(subject, findings=findings, hardware=hardware, top=3))
    assert any(line.startswith("megaseq train mt.multi30k.Small parallel.") for line in lines)
    reasons = lines[lines.index("Why not the others") + 1 :]
    counted = sum(int(line.split()[0]) for line in reasons)
    impossible = sum(row.count for row in findings.rejected.values())
    assert counted == impossible + len(findings.too_large) + len(findings.fitting) - 1
    assert any("impossible: ZeRO 3 with `pipe`" in line for line in reasons)


@pytest.mark.slow
def test_what_does_not_fit_is_checkpointed_or_refused(subject: Subject) -> None:
    roomy = search(subject, hardware=Hardware(devices=2)).fitting
    needed = min(found.memory.total for found in roomy if found.candidate.checkpointing == "none") / (1 << 30)
    tight = search(subject, hardware=Hardware(devices=2, memory_gib=0.9 * needed))
    assert all(found.candidate.checkpointing != "none" for found in tight.fitting)
    nothing = search(subject, hardware=Hardware(devices=2, memory_gib=0.001))
    assert nothing.fitting == [] and nothing.too_large


def test_params_that_are_set_are_kept() -> None:
    params = small(parallel__tensor=2, parallel__zero__stage=1)
    findings = search(Subject(params, precision="bf16"), hardware=Hardware(devices=4))
    kept = {(found.candidate.layout.tensor, found.candidate.parallel.zero.stage) for found in findings.fitting}
    assert kept == {(2, 1)} or kept == {(2, 1), (2, 0)}


def test_what_training_takes_is_not_called_impossible() -> None:
    def told(devices: int, **changes: object) -> list[str]:
        hardware = Hardware(devices=devices, devices_per_machine=2)
        subject = Subject(small(parallel__zero__stage=1, **changes), precision="bf16")
        return list(report(subject, findings=search(subject, hardware=hardware), hardware=hardware, top=1))

    seven = told(7, train_input__batching__rows=128, parallel__data=7)
    assert [line.strip() for line in seven if "128 rows" in line and "data=7" in line] == [
        "1 not considered: 128 rows that cannot be dealt out equally; with another train_input.batching.rows they can "
        "(such as data=7)"
    ]
    few = [line for line in told(3, train_input__batching__rows=2, parallel__data=3) if "such as data=3" in line]
    assert len(few) == 1 and "impossible: fewer rows than data ranks: a rank without a row" in few[0]
    wide = told(4, parallel__pipe=1, parallel__context=1)
    assert any("not considered: more tensor ranks than the 2 devices of a machine" in line for line in wide)
    assert not any("considered: more tensor" in line for line in told(4, parallel__tensor=4))
    long = told(16, parallel__tensor=1, train_input__batching__rows=8)
    assert any("not considered: more than 8 context ranks" in line and "context=16" in line for line in long)


def experts(**changes: object) -> Run.Params:
    params = registry.params("mt.multi30k.Experts")
    params.set("train_input.batching.rows", 16)
    params.set("train_input.batching.source_length", 64)
    for path, value in changes.items():
        params.set(path.replace("__", "."), value)
    return params


def test_experts_are_shared_by_zero_and_cut_into_stages() -> None:
    findings = search(Subject(experts(parallel__expert=2), precision="bf16"), hardware=Hardware(devices=4))
    found = {(each.candidate.layout.pipe, each.candidate.parallel.zero.stage) for each in findings.fitting}
    assert {(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2)} <= found


def test_experts_that_one_rank_holds_are_not_summed() -> None:
    subject = Subject(experts(), precision="fp32")

    def sent(expert: int) -> float:
        params, layout = Parallel.Params(expert=expert), Layout(data=4, expert=expert)
        candidate = Candidate(parallel=params, layout=layout, micro_batches=1)
        return estimate_of(subject, candidate=candidate, hardware=Hardware(devices=4)).cost.sent["data"]

    others = sum(weight.elements for weight in subject.weights.values() if "expert" not in weight.axes)
    assert sent(4) == pytest.approx(2 * 4 * others * 3 / 4, rel=1e-3)
    assert sent(1) > sent(2) > sent(4)


def test_what_lies_on_a_disk_needs_no_memory() -> None:
    subject = Subject(small(), precision="bf16")

    def state(stage: int, offload: str) -> int:
        params = Parallel.Params()
        params.set("zero.stage", stage)
        params.set("zero.offload_optimizer", offload)
        candidate = Candidate(parallel=params, layout=Layout(data=2), micro_batches=1)
        return estimate_of(subject, candidate=candidate, hardware=Hardware(devices=2)).memory.optimizer

    assert state(3, "nvme") == 0
    # A copy of two bytes instead of a master of four and moments of eight.
    assert state(1, "nvme") < 0.2 * state(1, "none")


LAYOUTS = [{"tensor": 4}, {"pipe": 4}, {"pipe": 2, "tensor": 2, "zero.stage": 1}, {"data": 1024 // 4, "tensor": 4}]


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_dry_run_of_any_rank(axes: dict[str, int]) -> None:
    params = small()
    params.set("train_input.batching.rows", 1024)
    params.set("train_input.batching.source_length", 32)
    for name, value in axes.items():
        params.set(f"parallel.{name}", value)
    subject = Subject(params, precision="bf16")
    for rank in (0, 513, 1023):
        lines = list(dry_run(subject, hardware=Hardware(devices=1024), rank=rank))
        assert any("shapes are right" in line for line in lines)
        assert lines[-1].startswith("memory ")


def test_dry_run_of_experts_in_a_pipeline() -> None:
    params = experts(parallel__expert=2, parallel__pipe=2, parallel__zero__stage=1)
    subject = Subject(params, precision="bf16")
    for rank in (0, 3):
        lines = list(dry_run(subject, hardware=Hardware(devices=4), rank=rank))
        assert any("shapes are right" in line for line in lines)


def test_dry_run_refuses_what_a_run_would() -> None:
    subject = Subject(small(parallel__tensor=8), precision="bf16")
    with pytest.raises(ParamsError, match=r"parallel.tensor: must be one of \[1, 2, 4\]"):
        list(dry_run(subject, hardware=Hardware(devices=8), rank=0))
    with pytest.raises(ParamsError, match="--rank: must be from 0 to 7"):
        list(dry_run(subject, hardware=Hardware(devices=8), rank=8))


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "mt.multi30k.Small", "--devices", "2", "--memory-gib", "16", "--bandwidth", "25"]
    assert main([*arguments, "parallel.data=2", "--dry-run", "--rank", "1"]) == 0
    assert "rank 1 is data 1" in capsys.readouterr().out
    assert main(["plan", "mt.multi30k.Small", "--devices", "0"]) == 2
    assert "--devices: must be positive, but is 0." in capsys.readouterr().err


def test_hardware_defaults_and_links() -> None:
    hardware = Hardware(devices=16)
    assert hardware.speed(stride=1, size=8) == 450e9
    assert hardware.speed(stride=8, size=2) == 50e9
    assert hardware.speed(stride=1, size=16) == 400e9
    assert dataclasses.replace(hardware, bandwidth=12.5).speed(stride=8, size=2) == 12.5e9
