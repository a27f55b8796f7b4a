"""Attention: queries [B, T, N, H] against keys and values [B, S, M, H]."""

from __future__ import annotations

from torch import Tensor

from megaseq.base import native
from megaseq.kernels.attention.host import DTYPES, HEAD_BLOCK, native_attention, starts_fit
from megaseq.kernels.attention.mask import AttentionMask
from megaseq.kernels.attention.reference import reference_attention
from megaseq.kernels.attention.sdpa import sdpa_attention
from megaseq.kernels.attention.segments import SegmentPlan, segment_attention
from megaseq.kernels.checks import check_floating, check_like, check_shape, fail
from megaseq.kernels.dispatch import choose
from megaseq.kernels.dropout import DropoutMask

__all__ = ["AttentionMask", "attention"]

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
    bias: Tensor | None = None,
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
        bias: added to the scores, [1 or B, N, T, S]; it may need a gradient.
        scale: factor of the scores; None: 1 / sqrt(H).
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`, before bias and mask.
        dropout: which attention weights become zero; None outside training.

    Returns:
        [B, T, N, H]; zeros for queries that see no key.

    Raises:
        KernelError: for shapes, dtypes or devices that do not fit, or if `MEGASEQ_KERNELS` asks for an implementation
            that cannot run this call.
    """
    _check(query, key=key, value=value, mask=mask, bias=bias, soft_cap=soft_cap)
    batch, query_length, _, head_dim = query.shape
    key_length = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    if dropout is not None and dropout.rate == 0.0:
        dropout = None
    shortcut = None if mask is None else mask.shortcut(query_length=query_length, key_length=key_length)
    if shortcut == "full":
        mask = None
    plain = soft_cap is None and dropout is None
    plan = None
    if soft_cap is None and query.device.type == "cpu" and bias is None and mask is not None and shortcut is None:
        plan = mask.plan()
    impossible = _impossible(query, plain=plain, plan=plan, dropout=dropout)
    automatic = "reference"
    if plain:
        automatic = "sdpa"
        if plan is not None and "native" not in impossible and plan.longest <= NATIVE_MAX_LENGTH:
            automatic = "native"
        elif plan is not None and _worth_cutting(plan, sizes=(batch, query_length, key_length)):
            automatic = "segments"
    elif plan is not None and "native" not in impossible and plan.longest <= NATIVE_MAX_DROPPED_LENGTH:
        automatic = "native"
    chosen = choose("attention", automatic=automatic, impossible=impossible)
    if chosen == "native" and plan is not None:
        return native_attention(query, key=key, value=value, plan=plan, scale=scale, dropout=dropout)
    if chosen == "segments" and plan is not None:
        return segment_attention(query, key=key, value=value, plan=plan, scale=scale)
    if chosen == "sdpa":
        return sdpa_attention(
            query, key=key, value=value, mask=mask, causal=shortcut == "causal", bias=bias, scale=scale
        )
    allowed = None
    if mask is not None:
        allowed = mask.allowed(query_length=query_length, key_length=key_length, device=query.device)
    return reference_attention(
        query,
        key=key,
        value=value,
        allowed=allowed,
        bias=bias,
        scale=scale,
        soft_cap=soft_cap,
        dropout_mask=dropout,
    )


def _impossible(query: Tensor, *, plain: bool, plan: SegmentPlan | None, dropout: DropoutMask | None) -> dict[str, str]:
    """Says which implementations cannot run a call, and why."""
    reasons = {"triton": "its kernels are not part of this version"}
    if not plain:
        reasons["sdpa"] = "it has neither a soft cap nor a reproducible dropout"
        reasons["segments"] = reasons["sdpa"]
    if plan is None:
        unfit = "it wants padded or packed rows in host memory, without bias, window and soft cap"
        reasons["segments"] = reasons["native"] = unfit
    elif query.dtype not in DTYPES or query.shape[3] % HEAD_BLOCK:
        reasons["native"] = f"it takes float32 or bfloat16 and heads of a width that {HEAD_BLOCK} divides"
    elif dropout is not None and not starts_fit(dropout, batch=query.shape[0]):
        reasons["native"] = "its dropout starts once a row"
    elif native.extension() is None:
        reasons["native"] = "the compiled extension is not there"
    return reasons


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
    bias: Tensor | None,
    soft_cap: float | None,
) -> None:
    """Checks everything that `attention` takes.

    Raises:
        KernelError: at the first argument that does not fit.
    """
    op = "attention"
    check_floating(query, op=op, argument="query")
    check_shape(query, op=op, argument="query", shape=(None, None, None, None), legend="[B, T, N, H]")
    batch, query_length, num_heads, head_dim = query.shape
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
    if bias is not None:
        check_shape(
            bias,
            op=op,
            argument="bias",
            shape=((1, batch), (1, num_heads), (1, query_length), key_length),
            legend="[1|B, N, T, S]",
        )
    if mask is not None:
        mask.check(batch=batch, query_length=query_length, key_length=key_length)
    if soft_cap is not None and soft_cap <= 0:
        raise fail("soft_cap", op=op, expected="be above 0", came=soft_cap, remedy="Use None for no cap")
