"""Attention within the segments of packed rows by the compiled extension: in place, without padding."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from megaseq.base import native
from megaseq.kernels.attention.relative_bias import RelativeBias
from megaseq.kernels.attention.segments import PROBABILITY_BLOCK, SegmentPlan
from megaseq.kernels.dropout import DropoutMask, mix_key
from megaseq.kernels.dropout.reference import threshold_of
from megaseq.kernels.functions import apply_one

HEAD_BLOCK = PROBABILITY_BLOCK
"""Divides the width of a head."""
DTYPES = (torch.float32, torch.bfloat16)
"""What the extension takes."""
MACS_PER_THREAD = 1 << 20
"""Multiply-adds that are worth a further thread; starting one takes about as long as half of these."""
_SUFFIX = {torch.float32: "", torch.bfloat16: "_bfloat16"}


def native_attention(
    query: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    plan: SegmentPlan,
    scale: float,
    dropout: DropoutMask | None = None,
    bias: RelativeBias | None = None,
) -> Tensor:
    """Attends within each segment of packed rows.

    Args:
        query: float32 or bfloat16 [B, T, N, H] in host memory, H a multiple of `HEAD_BLOCK`; arithmetic is fp32.
        key: [B, S, M, H], N a multiple of M.
        value: [B, S, M, H].
        plan: where the segments stand.
        scale: factor of the scores.
        dropout: which weights [B, N, T, S] become zero; its offset is one number, or one for each row.
        bias: added to the scores; T and S must be equal. The gradient of its table is summed in fp32, in one order.

    Returns:
        [B, T, N, H]; zeros for pads.
    """
    table, first = (None, 0) if bias is None else bias.as_table(length=key.shape[1])
    return apply_one(_SegmentAttention, query, key, value, table, plan, scale, dropout, first)


class _SegmentAttention(torch.autograd.Function):
    """Keeps the probabilities for the backward pass: as short as segments are, they are smaller than the queries."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor | None,
        plan: SegmentPlan,
        scale: float,
        dropout: DropoutMask | None,
        first_distance: int,
    ) -> Tensor:
        output = torch.zeros(query.shape, dtype=query.dtype)
        segments, area = plan.table
        probabilities = torch.empty(area * query.shape[2])
        threads = _num_threads(area * query.shape[2] * query.shape[3])
        tensors = [_heads(tensor) for tensor in (query, key, value, output)]
        ctx.dropped = _dropout_arguments(dropout, query=query, key_length=key.shape[1])
        run = getattr(_extension(), f"attention_forward{_SUFFIX[query.dtype]}")
        by_distance = _bias_arguments(table, first=first_distance)
        run(*tensors, probabilities.numpy(), segments, plan.causal, scale, threads, ctx.dropped, by_distance)
        ctx.save_for_backward(query, key, value, probabilities, table)
        ctx.plan, ctx.scale, ctx.first_distance = plan, scale, first_distance
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities, table = ctx.saved_tensors
        segments, area = ctx.plan.table
        results = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)]
        of_table = torch.empty(0 if table is None else table.numel())
        threads = _num_threads(3 * area * query.shape[2] * query.shape[3])
        inputs = [_heads(tensor) for tensor in (gradients[0], query, key, value)]
        outputs = [_heads(tensor) for tensor in results]
        run = getattr(_extension(), f"attention_backward{_SUFFIX[query.dtype]}")
        by_distance = _bias_arguments(table, first=ctx.first_distance)
        run(
            *inputs, probabilities.numpy(), *outputs, segments, ctx.scale, threads, ctx.dropped, by_distance,
            of_table.numpy(),
        )  # fmt: skip
        of_bias = None if table is None else of_table.view(table.shape).to(table.dtype)
        return (*results, of_bias, None, None, None, None)


def starts_fit(dropout: DropoutMask, *, batch: int) -> bool:
    """Whether a mask's offset says where each of the B rows starts."""
    return isinstance(dropout.offset, int) or dropout.offset.numel() == batch


def _dropout_arguments(dropout: DropoutMask | None, *, query: Tensor, key_length: int) -> tuple[Any, ...] | None:
    """What the extension wants to know of a mask."""
    if dropout is None:
        return None
    batch, query_length, num_heads, _ = query.shape
    area = num_heads * query_length * key_length
    starts = dropout.offset
    if isinstance(starts, int):
        starts = torch.arange(starts, starts + batch * area, max(area, 1))[:batch]
    key, threshold = mix_key(dropout.key), threshold_of(dropout.rate)
    return key, threshold, 1.0 / (1.0 - dropout.rate), starts.numpy(), query_length, key_length


def _bias_arguments(table: Tensor | None, *, first: int) -> tuple[NDArray[Any], int] | None:
    """What the extension wants to know of a bias."""
    if table is None:
        return None
    array: NDArray[Any] = table.detach().float().contiguous().numpy()
    return array, first


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
