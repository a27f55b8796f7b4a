"""What `megaseq bench kernels` proves of `scaled_linear` on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools

import torch

from megaseq.kernels.bench.passes import short
from megaseq.kernels.bench_case import BenchCase, Comparison
from megaseq.kernels.scaled_linear import scaled_linear
from megaseq.kernels.scaled_linear.cases import CASES, TOLERANCE, LinearCase
from megaseq.kernels.scaled_linear.reference import reference_scaled_linear


def proof_cases() -> list[BenchCase]:
    """All calls, into two types."""
    return [
        BenchCase("scaled_linear", f"{case.name}_{short(dtype)}", functools.partial(compare, case, dtype=dtype))
        for case in CASES
        for dtype in (torch.bfloat16, torch.float32)
    ]


def compare(case: LinearCase, device: torch.device, *, dtype: torch.dtype) -> dict[str, Comparison]:
    """The product beside that of the reference in float64."""
    x, weight, bias = case.tensors(device=device)
    y = scaled_linear(x, weight=weight, bias=bias, activation=case.activation, dtype=dtype)
    expected = reference_scaled_linear(x, weight=weight, bias=bias, activation=case.activation, dtype=torch.float64)
    return {"y": Comparison(y, expected, TOLERANCE[dtype])}
