"""Attention by Triton's kernels: from the arguments of `attention` to those of the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.attention.configs import MAX_HEAD, widest_head
from megaseq.kernels.attention.mask import AttentionMask
from megaseq.kernels.attention.op import attention_forward
from megaseq.kernels.attention.relative_bias import RelativeBias
from megaseq.kernels.dropout import DropoutMask, mix_key

UNBOUNDED = 1 << 30
"""A distance that no pair has."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unfit(
    query: Tensor,
    *,
    mask: AttentionMask | None,
    bias: Tensor | RelativeBias | None,
    scale: float,
    dropout: DropoutMask | None,
) -> str | None:
    """Why the kernels cannot run a call, as the end of "..., and"; None where they can."""
    reason: str | None = unable_on(query.device.type)
    if reason is not None:
        return reason
    if query.dtype not in DTYPES:
        return f"its kernels take float32, bfloat16 or float16, not {query.dtype}"
    widest = widest_on(query.device, query.dtype)
    if not 0 < query.shape[3] <= widest:
        return f"its kernels take heads of a width up to {widest}, not {query.shape[3]}"
    if isinstance(bias, Tensor):
        return "it computes a bias from distances (RelativeBias), and takes no tensor of the bias of every pair"
    if mask is not None and not (mask.query_positions is None and mask.key_positions is None):
        return "it takes places in the row for positions"
    if scale <= 0:
        return "it wants a scale above 0"
    if dropout is not None and not isinstance(dropout.offset, int):
        count, rows = dropout.offset.numel(), query.shape[0] * query.shape[1] * query.shape[2]
        if count and rows % count:
            return "it wants runs of dropout that begin at the first key of a query"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def widest_on(device: torch.device, dtype: torch.dtype) -> int:
    """The widest head that the kernels take in a dtype on a device."""
    if device.type != "cuda":
        return MAX_HEAD
    properties: Any = torch.cuda.get_device_properties(device)
    return widest_head(dtype, shared=properties.shared_memory_per_block_optin)


def preferred(device: torch.device) -> bool:
    """Whether the kernels are what `auto` takes on a device, if they can run a call."""
    return device.type == "cuda"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unable_on(device_type: str) -> str | None:
    """`triton_runtime.unable` for a kind of device; a constant for whoever traces the call."""
    return triton_runtime.unable(torch.empty(0, device=device_type))


def fused_attention(
    query: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    bias: RelativeBias | None,
    scale: float,
    soft_cap: float | None,
    dropout: DropoutMask | None,
) -> tuple[Tensor, Tensor]:
    """`attention` and its log-sum-exp, for calls that `unfit` has nothing against.

    Returns:
        [B, T, N, H], and float32 [B, N, T]: the logarithm of the sum over the keys of exp(score), minus infinity for
        queries that see no key.
    """
    sizes = (query.shape[1], key.shape[1])
    ranges = None if mask is None else mask.ranges(query_length=sizes[0], key_length=sizes[1])
    segments: tuple[Tensor | None, ...] = (None,) * 4
    if ranges is not None:
        segments = (ranges.query_ids, ranges.key_ids, ranges.key_ranges, ranges.query_ranges)
    low, high = -UNBOUNDED, UNBOUNDED
    if mask is not None and mask.window is not None:
        low, high = 1 - mask.window, mask.window - 1
    if mask is not None and mask.causal:
        high = 0
    biases = (None, None, 0) if bias is None else (*bias.readable(), bias.first)
    rate, seed, offset, runs = 0.0, 0, 0, None
    if dropout is not None:
        rate, seed = dropout.rate, mix_key(dropout.key)
        # As a signed number, which is what an operator takes.
        seed -= (seed >> 63) << 64
        if isinstance(dropout.offset, int):
            offset = dropout.offset
        else:
            runs = dropout.offset
    output, log_sum = attention_forward(
        query, key, value, *segments, *biases[:2], runs, float(scale), float(soft_cap or 0.0), sizes[1] - sizes[0],
        low, high, biases[2], rate, seed, offset,
    )  # fmt: skip
    return output, log_sum
