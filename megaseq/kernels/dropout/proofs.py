"""What `megaseq bench kernels` proves of dropout on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.kernels.bench.passes import compare_passes, short
from megaseq.kernels.bench_case import BenchCase, Comparison
from megaseq.kernels.dropout import dropout, dropout_add, mix_key
from megaseq.kernels.dropout.cases import CASES, DropoutCase
from megaseq.kernels.dropout.reference import keep_mask, keep_mask_of_runs, threshold_of

KEY = (2**40 + 1, 20, 2**62 + 300)


def proof_cases() -> list[BenchCase]:
    """All calls."""
    return [
        BenchCase("dropout", f"{case.name}_{short(dtype)}", functools.partial(compare, case, dtype=dtype))
        for case in CASES
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
    ]


def compare(case: DropoutCase, device: torch.device, *, dtype: torch.dtype) -> dict[str, Comparison]:
    """Results and gradients beside the definition; the same elements are zero."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(case.shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(2)]
    offset, count = case.offset(device=device.type), inputs[0].numel()
    key, threshold = mix_key(KEY), threshold_of(case.rate)
    if isinstance(offset, Tensor):
        width = count // offset.numel()
        kept = keep_mask_of_runs(offset, width=width, key=key, threshold=threshold)
    else:
        kept = keep_mask(count, key=key, offset=offset, threshold=threshold, device=device)
    kept = kept.view(case.shape)

    def ours(tensors: Sequence[Tensor]) -> list[Tensor]:
        values, residual = tensors
        alone = dropout(values, rate=case.rate, key=KEY, offset=offset)
        return [alone, dropout_add(values, residual=residual, rate=case.rate, key=KEY, offset=offset)]

    def theirs(tensors: Sequence[Tensor]) -> list[Tensor]:
        values, residual = tensors
        alone = torch.where(kept, values / (1 - case.rate), 0.0)
        return [alone, residual + alone]

    dropped = (ours([tensor.detach() for tensor in inputs])[0] == 0) & (inputs[0] != 0)
    comparisons = compare_passes(ours, reference=theirs, inputs=inputs)
    return {**comparisons, "what is zero": Comparison(dropped, ~kept & (inputs[0] != 0), 0.0)}
