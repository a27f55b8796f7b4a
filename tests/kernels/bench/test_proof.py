"""What counts as wrong, and that nothing wrong is timed."""

from __future__ import annotations

import os

import pytest
import torch

from megaseq.kernels.bench import runner
from megaseq.kernels.bench.proof import difference, forced, prove
from megaseq.kernels.bench.timing import Ceiling, Measured
from megaseq.kernels.bench_case import Timed, proof_dtype
from megaseq.kernels.checks import KernelError
from tests.kernels.bench.fakes import case, compared

HOST = torch.device("cpu")
INFINITY, NAN = float("inf"), float("nan")
BEST = Ceiling(bytes_per_second=1e12, flops_per_second=1e15)


@pytest.mark.parametrize(
    ("found", "expected", "distance"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.1, 0.5], [0.1, 0.2], 0.3),
        ([10.0, 30.0], [10.0, 20.0], 0.5),
        ([1.0, NAN], [1.0, 2.0], INFINITY),
        ([1.0, 2.0], [1.0, NAN], INFINITY),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, INFINITY], [1.0, INFINITY], 0.0),
        ([1.0, -INFINITY], [1.0, INFINITY], INFINITY),
        ([1.0, 3e38], [1.0, INFINITY], INFINITY),
        ([NAN], [NAN], 0.0),
        ([1.0, 2.0], [1.0], INFINITY),
        ([], [], 0.0),
        ([3, 4], [3, 5], 0.2),
    ],
)
def test_difference(found: list[float], expected: list[float], distance: float) -> None:
    assert difference(compared(found, expected)) == pytest.approx(distance)


def test_a_wrong_output_is_named() -> None:
    assert prove(case(), device=HOST) == []
    (sentence,) = prove(case(found=1.5), device=HOST)
    assert sentence == "dropout: output of shape is off by 5.0e-01 of its reference, of 1.0e-03 allowed"
    assert prove(case(check=lambda device: {}), device=HOST) == ["dropout: shape compares nothing"]


def test_the_kernels_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "auto")
    with forced("dropout"):
        assert os.environ["MEGASEQ_KERNELS"] == "dropout=triton"
    assert os.environ["MEGASEQ_KERNELS"] == "auto"
    monkeypatch.delenv("MEGASEQ_KERNELS")
    with forced("grouped_linear"):
        assert "MEGASEQ_KERNELS" not in os.environ
    assert "MEGASEQ_KERNELS" not in os.environ


def test_wrong_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(runner, "time_case", lambda case, **_: timed.append(case.name))

    def broken(device: torch.device) -> dict:
        raise RuntimeError("out of shared memory\nand more")

    with pytest.raises(KernelError, match=r"(?s)output of b is off.*c fails with RuntimeError: out of shared memory\n"):
        runner.time_all([case("a"), case("b", found=2.0), case("c", check=broken)], device=HOST, best=BEST)
    assert timed == []
    runner.time_all([case("a"), case("d")], device=HOST, best=BEST)
    assert timed == ["a", "d"]


def test_a_peer_that_cannot_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> None:
        raise NotImplementedError("no backward on this device")

    seconds = iter([1e-9, 3e-9])

    def measured(run: object, *, device: torch.device) -> Measured:
        run()
        return Measured(next(seconds), 1 << 20)

    monkeypatch.setattr(runner, "measure", measured)
    peers = {"flex": refuses, "plain": lambda: None}
    goals = {"plain": 2.5, "plain:memory": 1.5, "flex": 1.5, "ceiling": 0.9}
    timed = Timed(lambda: None, peers=peers, bytes=800.0, goals=goals)
    found = runner.time_case(case(timed=timed), device=HOST, best=BEST)
    assert found.peers["flex"] == "NotImplementedError: no backward on this device"
    assert found.ratio("plain") == pytest.approx(3) and found.ratio("flex") is None
    assert found.share_of_ceiling == pytest.approx(0.8) and found.rate == "800 GB/s"
    assert found.reached("plain:memory") == 1.0
    assert found.missed() == ["plain:memory", "flex", "ceiling"]


def test_host_proofs_are_in_float32() -> None:
    assert proof_dtype(torch.bfloat16, device=HOST) is torch.float32
    assert proof_dtype(torch.bfloat16, device=torch.device("cuda")) is torch.bfloat16
