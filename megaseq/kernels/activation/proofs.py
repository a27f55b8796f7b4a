"""What `megaseq bench kernels` proves of the activations on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.kernels.activation import gated_activation
from megaseq.kernels.activation.cases import CASES, TOLERANCE, ActivationCase
from megaseq.kernels.activation.reference import reference_activation
from megaseq.kernels.bench.passes import compare_passes, in_types, short
from megaseq.kernels.bench_case import BenchCase, Comparison

IN_OTHER_TYPES = ("gelu", "silu")
"""Functions that are proven in float32 and float16 too."""


def proof_cases() -> list[BenchCase]:
    """All calls."""
    return [
        BenchCase(
            "activation",
            f"{case.name}{'_gated' * case.gated}{'_strided' * case.strided}_{case.shape[-1]}_{short(dtype)}",
            functools.partial(compare, case, dtype=dtype),
        )
        for case, dtype in in_types(CASES, others_of=IN_OTHER_TYPES)
    ]


def compare(case: ActivationCase, device: torch.device, *, dtype: torch.dtype) -> dict[str, Comparison]:
    """Result and gradient beside those of the reference in float64."""

    def ours(inputs: Sequence[Tensor]) -> Tensor:
        return gated_activation(inputs[0], name=case.name, gated=case.gated)

    def theirs(inputs: Sequence[Tensor]) -> Tensor:
        return reference_activation(inputs[0], name=case.name, gated=case.gated)

    inputs = [case.tensor(dtype=dtype, device=device.type)]
    return compare_passes(ours, reference=theirs, inputs=inputs, tolerance=TOLERANCE[dtype])
