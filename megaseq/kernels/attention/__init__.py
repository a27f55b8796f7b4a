"""Attention: queries [B, T, N, H] against keys and values [B, S, M, H]."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megaseq.base import native
from megaseq.kernels.attention import fused
from megaseq.kernels.attention.host import DTYPES, HEAD_BLOCK, native_attention, starts_fit
from megaseq.kernels.attention.mask import AttentionMask
from megaseq.kernels.attention.reference import reference_attention, reference_log_sum
from megaseq.kernels.attention.relative_bias import RelativeBias
from megaseq.kernels.attention.sdpa import sdpa_attention
from megaseq.kernels.attention.segments import SegmentPlan, segment_attention
from megaseq.kernels.checks import check_device, check_floating, check_like, check_rate, check_shape, fail
from megaseq.kernels.dispatch import choose, requested
from megaseq.kernels.dropout import DropoutMask

__all__ = ["AttentionMask", "RelativeBias", "attention", "attention_with_log_sum", "computes_bias"]

NATIVE_MAX_LENGTH = 192
"""The longest segment that the compiled extension attends to faster than a fused op with blocked matrix products."""
NATIVE_MAX_DROPPED_LENGTH = 1024
"""The same with dropout, which no fused op has: the alternative writes every weight of the full rows to memory."""
SEGMENTS_FROM_LENGTH = 128
"""Packed rows at least this long are attended to segment by segment: below, cutting costs as much as it saves."""
SEGMENTS_MAX_SHARE = 0.5
"""... if the groups of segments compute at most this share of the query-key pairs of the full rows."""


def attention(
    query: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None = None,
    bias: Tensor | RelativeBias | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: DropoutMask | None = None,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Args:
        query: [B, T, N, H].
        key: [B, S, M, H], N a multiple of M (grouped-query attention).
        value: [B, S, M, H].
        mask: who sees whom; None: every query sees every key.
        bias: added to the scores, by distance, or [1 or B, N, T, S]; it may need a gradient.
        scale: factor of the scores; None: 1 / sqrt(H).
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`, before bias and mask.
        dropout: which attention weights become zero; None outside training.

    Returns:
        [B, T, N, H]; zeros for queries that see no key.

    Raises:
        KernelError: for shapes, dtypes or devices that do not fit, or if `MEGASEQ_KERNELS` asks for an implementation
            that cannot run this call.
    """
    _check(query, key=key, value=value, mask=mask, bias=bias, soft_cap=soft_cap, dropout=dropout)
    batch, query_length, _, head_dim = query.shape
    key_length = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    if dropout is not None and dropout.rate == 0.0:
        dropout = None
    wanted = requested("attention")
    # The kernels have a place in a compiled graph, which cannot look at the mask's tensors to cut it up.
    looks = wanted != "triton"
    shortcut = None
    if mask is not None and looks:
        shortcut = mask.shortcut(query_length=query_length, key_length=key_length)
    if shortcut == "full":
        mask = None
    plain = soft_cap is None and dropout is None
    plan = None
    cuttable = bias is None or (isinstance(bias, RelativeBias) and query_length == key_length)
    on_host = looks and query.device.type == "cpu"
    if cuttable and soft_cap is None and on_host and mask is not None and shortcut is None:
        plan = mask.plan()
    unfit: str | None = "it is not made for this device"
    if wanted != "auto" or fused.preferred(query.device):
        unfit = fused.unfit(query, mask=mask, bias=bias, scale=scale, dropout=dropout)
    impossible = _impossible(query, bias=bias, plain=plain, plan=plan, dropout=dropout, unfit=unfit)
    flash = plain and bias is None and (mask is None or shortcut == "causal")
    if unfit is None and fused.preferred(query.device) and not flash:
        # What torch's flash attention computes without a mask in memory is left to it.
        automatic = "triton"
    else:
        sizes = (batch, query_length, key_length)
        automatic = _automatic(plan, sizes=sizes, plain=plain, biased=bias is not None, impossible=impossible)
    chosen = choose("attention", automatic=automatic, impossible=impossible)
    if chosen == "triton" and not isinstance(bias, Tensor):
        return fused.fused_attention(
            query, key=key, value=value, mask=mask, bias=bias, scale=scale, soft_cap=soft_cap, dropout=dropout
        )[0]
    if chosen == "native" and plan is not None:
        by_distance = bias if isinstance(bias, RelativeBias) else None
        return native_attention(query, key=key, value=value, plan=plan, scale=scale, dropout=dropout, bias=by_distance)
    if chosen == "segments" and plan is not None:
        return segment_attention(query, key=key, value=value, plan=plan, scale=scale)
    if isinstance(bias, RelativeBias):
        bias = bias.dense(query_length=query_length, key_length=key_length)
    if chosen == "sdpa":
        return sdpa_attention(
            query,
            key=key,
            value=value,
            mask=mask,
            causal=shortcut == "causal",
            bias=bias,
            scale=scale,
        )
    return reference_attention(
        query,
        key=key,
        value=value,
        allowed=_allowed(query, key=key, mask=mask),
        bias=bias,
        scale=scale,
        soft_cap=soft_cap,
        dropout_mask=dropout,
    )


def attention_with_log_sum(
    query: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None = None,
    bias: Tensor | RelativeBias | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: DropoutMask | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` to a part of the keys, and what it takes to join it with that to the others.

    The outputs of two parts are joined by the weights `exp(log_sum - total)`, where `total` is the logaddexp of both.

    Args:
        query: as of `attention`, and so are all others.
        key: [B, S, M, H].
        value: [B, S, M, H].
        mask: who sees whom.
        bias: added to the scores.
        scale: factor of the scores.
        soft_cap: bound of the scores.
        dropout: which attention weights become zero, which changes nothing in the second result.

    Returns:
        [B, T, N, H], and [B, N, T] in at least float32: the logarithm of the sum over the keys that a query sees of
        exp(score), minus infinity if it sees none. Both are differentiable.

    Raises:
        KernelError: as `attention`.
    """
    _check(query, key=key, value=value, mask=mask, bias=bias, soft_cap=soft_cap, dropout=dropout)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if dropout is not None and dropout.rate == 0.0:
        dropout = None
    unfit = fused.unfit(query, mask=mask, bias=bias, scale=scale, dropout=dropout)
    impossible = dict.fromkeys(("sdpa", "segments", "native"), "it does not return the log-sum-exp")
    if unfit is not None:
        impossible["triton"] = unfit
    automatic = "triton" if unfit is None and fused.preferred(query.device) else "reference"
    chosen = choose("attention", automatic=automatic, impossible=impossible)
    if chosen == "triton" and not isinstance(bias, Tensor):
        return fused.fused_attention(
            query, key=key, value=value, mask=mask, bias=bias, scale=scale, soft_cap=soft_cap, dropout=dropout
        )
    if isinstance(bias, RelativeBias):
        bias = bias.dense(query_length=query.shape[1], key_length=key.shape[1])
    allowed = _allowed(query, key=key, mask=mask)
    output = reference_attention(
        query,
        key=key,
        value=value,
        allowed=allowed,
        bias=bias,
        scale=scale,
        soft_cap=soft_cap,
        dropout_mask=dropout,
    )
    return output, reference_log_sum(query, key=key, allowed=allowed, bias=bias, scale=scale, soft_cap=soft_cap)


def computes_bias(device: torch.device) -> bool:
    """Whether attention on `device` computes a bias from distances, so that a dense one need not be made for it."""
    wanted = requested("attention")
    if device.type == "cpu" and wanted in ("auto", "native"):
        return native.available()
    if wanted == "auto":
        return fused.preferred(device) and fused.unable_on(device.type) is None
    return wanted == "triton"


def _allowed(query: Tensor, *, key: Tensor, mask: AttentionMask | None) -> Tensor | None:
    """Who sees whom, bool [B or 1, 1, T, S]."""
    if mask is None:
        return None
    return mask.allowed(query_length=query.shape[1], key_length=key.shape[1], device=query.device)


def _impossible(
    query: Tensor,
    *,
    bias: Tensor | RelativeBias | None,
    plain: bool,
    plan: SegmentPlan | None,
    dropout: DropoutMask | None,
    unfit: str | None,
) -> dict[str, str]:
    """Says which implementations cannot run a call, and why."""
    reasons = {} if unfit is None else {"triton": unfit}
    if not plain:
        reasons["sdpa"] = "it has neither a soft cap nor a reproducible dropout"
        reasons["segments"] = reasons["sdpa"]
    if bias is not None:
        reasons["segments"] = "it adds no bias"
    if plan is None:
        wants = "it wants padded or packed rows in host memory, without window, soft cap and bias of every pair"
        reasons["segments"] = reasons["native"] = wants
    elif query.dtype not in DTYPES or query.shape[3] % HEAD_BLOCK:
        reasons["native"] = f"it takes float32 or bfloat16 and heads of a width that {HEAD_BLOCK} divides"
    elif dropout is not None and not starts_fit(dropout, batch=query.shape[0]):
        reasons["native"] = "its dropout starts once a row"
    elif native.extension() is None:
        reasons["native"] = "the compiled extension is not there"
    return reasons


def _automatic(
    plan: SegmentPlan | None, *, sizes: tuple[int, int, int], plain: bool, biased: bool, impossible: Mapping[str, str]
) -> str:
    """Which implementation is the fastest without Triton's kernels, for rows of `sizes` (B, T, S)."""
    if plan is None:
        return "sdpa" if plain else "reference"
    limit = NATIVE_MAX_LENGTH if plain else NATIVE_MAX_DROPPED_LENGTH
    if "native" not in impossible and plan.longest <= limit:
        return "native"
    if not plain:
        return "reference"
    return "segments" if not biased and _worth_cutting(plan, sizes=sizes) else "sdpa"


def _worth_cutting(plan: SegmentPlan, *, sizes: tuple[int, int, int]) -> bool:
    """Whether attending by groups of segments is faster than masking the full rows, of `sizes` (B, T, S)."""
    batch, query_length, key_length = sizes
    if max(query_length, key_length) < SEGMENTS_FROM_LENGTH:
        return False
    return plan.area <= SEGMENTS_MAX_SHARE * batch * query_length * key_length


def _check(
    query: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    bias: Tensor | RelativeBias | None,
    soft_cap: float | None,
    dropout: DropoutMask | None,
) -> None:
    """Checks everything that `attention` takes.

    Raises:
        KernelError: at the first argument that does not fit.
    """
    op = "attention"
    check_floating(query, op=op, argument="query")
    check_shape(query, op=op, argument="query", shape=(None, None, None, None), legend="[B, T, N, H]")
    batch, query_length, num_heads, head_dim = query.shape
    if head_dim == 0:
        raise fail("query", op=op, expected="have heads of a width H above 0", came=0, remedy="Leave the call out")
    check_shape(key, op=op, argument="key", shape=(batch, None, None, head_dim), legend="[B, S, M, H]")
    check_shape(value, op=op, argument="value", shape=tuple(key.shape), legend="[B, S, M, H]")
    check_like(key, op=op, argument="key", other=query, other_name="query")
    check_like(value, op=op, argument="value", other=query, other_name="query")
    key_length, num_key_heads = key.shape[1], key.shape[2]
    if num_key_heads == 0 or num_heads % num_key_heads:
        raise fail(
            "key",
            op=op,
            expected=f"have a number of heads that divides the query's {num_heads}",
            came=num_key_heads,
            remedy="Choose num_key_value_heads so that it divides num_heads",
        )
    if isinstance(bias, RelativeBias):
        bias.check(num_heads=num_heads, like=query)
    elif bias is not None:
        check_floating(bias, op=op, argument="bias")
        check_shape(
            bias,
            op=op,
            argument="bias",
            shape=((1, batch), (1, num_heads), (1, query_length), key_length),
            legend="[1|B, N, T, S]",
        )
        check_device(bias, op=op, argument="bias", other=query, other_name="query")
    if mask is not None:
        mask.check(query=query, key_length=key_length)
    if dropout is not None:
        check_rate(dropout.rate, op=op)
        if isinstance(dropout.offset, Tensor):
            check_device(dropout.offset, op=op, argument="dropout.offset", other=query, other_name="query")
    if soft_cap is not None and not soft_cap > 0:
        raise fail("soft_cap", op=op, expected="be above 0", came=soft_cap, remedy="Use None for no cap")
