"""Attention within the segments of packed rows by the compiled extension: in place, without padding."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from megaseq.base import native
from megaseq.kernels.attention.segments import PROBABILITY_BLOCK, SegmentPlan
from megaseq.kernels.functions import apply_one

HEAD_BLOCK = PROBABILITY_BLOCK
"""Divides the width of a head."""
DTYPES = (torch.float32, torch.bfloat16)
"""What the extension takes."""
MACS_PER_THREAD = 1 << 20
"""Multiply-adds that are worth a further thread; starting one takes about as long as half of these."""
_SUFFIX = {torch.float32: "", torch.bfloat16: "_bfloat16"}


def native_attention(query: Tensor, *, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
    """Attends within each segment of packed rows.

    Args:
        query: float32 or bfloat16 [B, T, N, H] in host memory, H a multiple of `HEAD_BLOCK`; arithmetic is fp32.
        key: [B, S, M, H], N a multiple of M.
        value: [B, S, M, H].
        plan: where the segments stand.
        scale: factor of the scores.

    Returns:
        [B, T, N, H]; zeros for pads.
    """
    return apply_one(_SegmentAttention, query, key, value, plan, scale)


class _SegmentAttention(torch.autograd.Function):
    """Keeps the probabilities for the backward pass: as short as segments are, they are smaller than the queries."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
        output = torch.zeros(query.shape, dtype=query.dtype)
        table, area = plan.table
        probabilities = torch.empty(area * query.shape[2])
        threads = _num_threads(area * query.shape[2] * query.shape[3])
        tensors = [_heads(tensor) for tensor in (query, key, value, output)]
        run = getattr(_extension(), f"attention_forward{_SUFFIX[query.dtype]}")
        run(*tensors, probabilities.numpy(), table, plan.causal, scale, threads)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities = ctx.saved_tensors
        table, area = ctx.plan.table
        results = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)]
        threads = _num_threads(3 * area * query.shape[2] * query.shape[3])
        inputs = [_heads(tensor) for tensor in (gradients[0], query, key, value)]
        outputs = [_heads(tensor) for tensor in results]
        run = getattr(_extension(), f"attention_backward{_SUFFIX[query.dtype]}")
        run(*inputs, probabilities.numpy(), *outputs, table, ctx.scale, threads)
        return (*results, None, None)


def _heads(tensor: Tensor) -> NDArray[Any]:
    """[B, T, N, H] as an array [B * T, N, H], without a copy where the strides allow it."""
    flat = tensor.detach().flatten(0, 1)
    if flat.shape[2] > 1 and flat.stride(2) != 1:
        flat = flat.contiguous()
    if flat.dtype is torch.bfloat16:
        flat = flat.view(torch.uint16)
    array: NDArray[Any] = flat.numpy()
    return array


def _num_threads(multiply_adds: int) -> int:
    return max(1, min(torch.get_num_threads(), 2 * multiply_adds // MACS_PER_THREAD))


def _extension() -> Any:
    extension = native.extension()
    if extension is None:
        raise RuntimeError("attention: the compiled extension must not go away while the process runs.")
    return extension
