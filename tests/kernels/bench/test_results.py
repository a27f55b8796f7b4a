"""Results: tables, shares of the ceiling."""

from __future__ import annotations

import pytest

from megaseq.kernels.bench import results
from megaseq.kernels.bench.results import Machine
from megaseq.kernels.bench.timing import Ceiling, Measured
from megaseq.kernels.bench_case import Timed

BEST = Ceiling(bytes_per_second=4e12, flops_per_second=8e14)
MACHINE = Machine("NVIDIA H200", 90, {"torch": "2.11", "triton": "3.6"}, "2026-01-02", BEST)


def one(timed: Timed, *, seconds: float, peers: dict[str, Measured | str] | None = None) -> results.Result:
    return results.result(
        op="norm", case="large", timed=timed, own=Measured(seconds, 3 << 20, 2e-4), peers=peers or {}, best=BEST
    )


@pytest.mark.parametrize(
    ("flops", "bytes_", "share", "rate"),
    [(4e11, 1e8, 0.5, "400 TFLOP/s"), (4e10, 2e9, 0.5, "2e+03 GB/s"), (0.0, 4e9, 1.0, "4e+03 GB/s"), (0, 0, 0.0, "")],
)
def test_the_bound_that_is_nearer_counts(flops: float, bytes_: float, share: float, rate: str) -> None:
    found = one(Timed(lambda: None, flops=flops, bytes=bytes_), seconds=1e-3)
    assert found.share_of_ceiling == pytest.approx(share)
    assert found.rate == rate


def test_the_table() -> None:
    peers = {"plain": Measured(3e-3, 5 << 20), "flex": "RuntimeError: no"}
    found = one(Timed(lambda: None, bytes=1e9, goals={"plain": 4, "ceiling": 0.2}), seconds=1e-3, peers=peers)
    text = results.to_markdown(MACHINE, results=[found])
    assert "NVIDIA H200 (sm_90), torch 2.11, triton 3.6, 2026-01-02." in text
    assert "4000 GB/s copied, 800 TFLOP/s in bf16" in text
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells[:7] == ["norm", "large", "1 ms", "0.2 ms", "3 MiB", "1e+03 GB/s", "25%"]
    assert cells[7:] == ["plain 3.00 (5 MiB), flex: did not run", "plain 4"]
