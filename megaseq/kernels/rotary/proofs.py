"""What `megaseq bench kernels` proves of rotary positions on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.kernels.bench.passes import compare_passes, in_types, short
from megaseq.kernels.bench_case import BenchCase, Comparison
from megaseq.kernels.rotary import rotate
from megaseq.kernels.rotary.cases import CASES, TOLERANCE, RotaryCase
from megaseq.kernels.rotary.reference import reference_rotate

IN_OTHER_TYPES = ("part", "many_heads_interleaved")
"""Names of cases that are proven in float32 and float16 too."""


def proof_cases() -> list[BenchCase]:
    """All calls."""
    return [
        BenchCase("rotary", f"{case.name}_{short(dtype)}", functools.partial(compare, case, dtype=dtype))
        for case, dtype in in_types(CASES, others_of=IN_OTHER_TYPES)
    ]


def compare(case: RotaryCase, device: torch.device, *, dtype: torch.dtype) -> dict[str, Comparison]:
    """Result and gradient beside those of the reference in float64, which turns by the same rounded angles."""

    def ours(inputs: Sequence[Tensor]) -> Tensor:
        return rotate(inputs[0], cosines=inputs[1], sines=inputs[2], interleaved=case.interleaved)

    def theirs(inputs: Sequence[Tensor]) -> Tensor:
        return reference_rotate(inputs[0], cosines=inputs[1], sines=inputs[2], interleaved=case.interleaved)

    inputs = case.tensors(dtype=dtype, device=device.type)
    return compare_passes(ours, reference=theirs, inputs=inputs, tolerance=TOLERANCE[dtype])
