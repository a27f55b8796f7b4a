"""What `megaseq bench kernels` proves of attention on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.kernels.attention import AttentionMask, RelativeBias, attention_with_log_sum
from megaseq.kernels.attention.cases import CASES, FUSED_CASES, AttentionCase
from megaseq.kernels.attention.reference import reference_attention, reference_log_sum
from megaseq.kernels.bench.passes import compare_passes, in_types, short
from megaseq.kernels.bench_case import BenchCase, Comparison

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
IN_OTHER_TYPES = ("table_packed_causal", "grouped", "soft_cap_table", "t5", "slopes_packed_causal", "head_128")
"""Names of cases that are proven in float32 and float16 too."""


def proof_cases() -> list[BenchCase]:
    """All calls but those with a bias of every pair, which the kernels do not take."""
    return [
        BenchCase("attention", f"{case.name}_{short(dtype)}", functools.partial(compare, case, dtype=dtype))
        for case, dtype in in_types((*CASES, *FUSED_CASES), others_of=IN_OTHER_TYPES)
        if not case.biased
    ]


def compare(case: AttentionCase, device: torch.device, *, dtype: torch.dtype) -> dict[str, Comparison]:
    """Output, log-sum-exp and gradients beside those of the reference in float64."""
    inputs = [tensor.detach().to(device).requires_grad_() for tensor in case.tensors(dtype=dtype)]
    relative = case.relative()
    slopes: Tensor | None = None
    if relative is not None and relative.table is not None:
        inputs.append(relative.table.detach().to(device).requires_grad_())
    elif relative is not None and relative.slopes is not None:
        slopes = relative.slopes.to(device)
    mask = case.mask(device=device)

    def bias(tensors: Sequence[Tensor]) -> RelativeBias | None:
        if slopes is not None:
            return RelativeBias(slopes=slopes.to(torch.promote_types(tensors[0].dtype, torch.float32)))
        return RelativeBias(table=tensors[3], first=case.table[0]) if case.table else None

    def ours(tensors: Sequence[Tensor]) -> list[Tensor]:
        query, key, value = tensors[:3]
        output, log_sum = attention_with_log_sum(
            query,
            key=key,
            value=value,
            mask=mask,
            bias=bias(tensors),
            scale=case.scale,
            soft_cap=case.soft_cap,
            dropout=case.dropout(),
        )
        # Infinite where nothing is seen, so that nothing is to come back through it.
        return [output, log_sum.detach()]

    def theirs(tensors: Sequence[Tensor]) -> list[Tensor]:
        return _reference(case, tensors=tensors, mask=mask, bias=bias(tensors))

    return compare_passes(ours, reference=theirs, inputs=inputs, tolerance=TOLERANCE[dtype])


def _reference(
    case: AttentionCase, *, tensors: Sequence[Tensor], mask: AttentionMask, bias: RelativeBias | None
) -> list[Tensor]:
    query, key, value = tensors[:3]
    sizes = {"query_length": case.query_length, "key_length": case.key_length}
    allowed = mask.allowed(**sizes, device=query.device)
    dense = None if bias is None else bias.dense(**sizes)
    scale = float(case.head_dim**-0.5) if case.scale is None else case.scale
    output = reference_attention(
        query,
        key=key,
        value=value,
        allowed=allowed,
        bias=dense,
        scale=scale,
        soft_cap=case.soft_cap,
        dropout_mask=case.dropout(),
    )
    log_sum = reference_log_sum(query, key=key, allowed=allowed, bias=dense, scale=scale, soft_cap=case.soft_cap)
    return [output, log_sum.detach()]
