"""Attention in plain torch: what every other implementation must compute."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.dropout import DropoutMask, dropout


def reference_attention(
    query: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    dropout_mask: DropoutMask | None,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017), scores and softmax in at least fp32.

    Scores are `query . key * scale`, soft-capped as `cap * tanh(scores / cap)` (Gemma 2), then the bias is added and
    the mask applied.

    Args:
        query: [B, T, N, H].
        key: [B, S, M, H]; each of the M heads serves N / M neighbouring query heads (Ainslie et al. 2023).
        value: [B, S, M, H].
        allowed: bool [B or 1, 1, T, S], None for all.
        bias: [B or 1, N or 1, T, S].
        scale: factor of the scores.
        soft_cap: bound of the scores' magnitude.
        dropout_mask: which probabilities become zero; element index counts over [B, N, T, S].

    Returns:
        [B, T, N, H] in the dtype of `query`; zeros where a query sees nothing.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    # Autocast would make the products of scores and values less precise than the docstring says.
    with torch.autocast(query.device.type, enabled=False):
        scores = _scores(query, key=key, bias=bias, scale=scale, soft_cap=soft_cap)
        values = _of_query_heads(value, query=query)
        if allowed is None:
            weights = scores.softmax(dim=-1)
        else:
            # A finite floor, not minus infinity: a row that sees nothing stays finite, and its weights become zero.
            hidden = ~allowed
            weights = scores.masked_fill(hidden, torch.finfo(precise).min).softmax(dim=-1).masked_fill(hidden, 0.0)
        if dropout_mask is not None:
            weights = dropout(weights, rate=dropout_mask.rate, key=dropout_mask.key, offset=dropout_mask.offset)
        return (weights @ values).transpose(1, 2).to(query.dtype)


def reference_log_sum(
    query: Tensor, *, key: Tensor, allowed: Tensor | None, bias: Tensor | None, scale: float, soft_cap: float | None
) -> Tensor:
    """The logarithm of the sum over the keys of exp(score), [B, N, T] in at least float32; arguments as above."""
    with torch.autocast(query.device.type, enabled=False):
        scores = _scores(query, key=key, bias=bias, scale=scale, soft_cap=soft_cap)
        if scores.shape[3] == 0:
            return scores.new_full(scores.shape[:3], float("-inf"))
        if allowed is None:
            return scores.logsumexp(dim=-1)
        # Rows that see nothing are taken out before the sum, whose gradient would not be a number.
        empty = ~allowed.any(dim=-1)
        hidden = ~allowed & ~empty[..., None]
        return scores.masked_fill(hidden, float("-inf")).logsumexp(dim=-1).masked_fill(empty, float("-inf"))


def _scores(query: Tensor, *, key: Tensor, bias: Tensor | None, scale: float, soft_cap: float | None) -> Tensor:
    """[B, N, T, S], before the mask."""
    precise = torch.promote_types(query.dtype, torch.float32)
    queries = query.transpose(1, 2).to(precise) * scale
    scores = queries @ _of_query_heads(key, query=query).transpose(-1, -2)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias.to(precise)
    return scores


def _of_query_heads(tensor: Tensor, *, query: Tensor) -> Tensor:
    """Keys or values [B, S, M, H] as [B, N, S, H] in at least float32."""
    tensor = tensor.transpose(1, 2).to(torch.promote_types(query.dtype, torch.float32))
    repeats = query.shape[2] // tensor.shape[1]
    return tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor
