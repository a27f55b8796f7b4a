"""What counts as wrong."""

from __future__ import annotations

import os

import pytest
import torch

from megaseq.kernels.bench.proof import difference, forced, prove
from megaseq.kernels.bench.timing import Ceiling
from megaseq.kernels.bench_case import proof_dtype
from tests.kernels.bench.fakes import case, compared

HOST = torch.device("cpu")
INFINITY, NAN = float("inf"), float("nan")
BEST = Ceiling(bytes_per_second=1e12, flops_per_second=1e15)


@pytest.mark.parametrize(
    ("found", "expected", "distance"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.1, 0.5], [0.1, 0.2], 1.5),
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
        # Small results are judged by their own size, down to where nothing but rounding is left.
        ([2e-3, 0.0], [1e-3, 0.0], 1.0),
        ([2e-6, 0.0], [0.0, 0.0], 2e-3),
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


def test_host_proofs_are_in_float32() -> None:
    assert proof_dtype(torch.bfloat16, device=HOST) is torch.float32
    assert proof_dtype(torch.bfloat16, device=torch.device("cuda")) is torch.bfloat16
