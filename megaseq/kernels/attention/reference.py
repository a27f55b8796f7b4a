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
        repeats = query.shape[2] // key.shape[2]
        queries = query.transpose(1, 2).to(precise) * scale
        keys = key.transpose(1, 2).to(precise)
        values = value.transpose(1, 2).to(precise)
        if repeats > 1:
            keys = keys.repeat_interleave(repeats, dim=1)
            values = values.repeat_interleave(repeats, dim=1)
        scores = queries @ keys.transpose(-1, -2)
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if bias is not None:
            scores = scores + bias.to(precise)
        if allowed is None:
            weights = scores.softmax(dim=-1)
        else:
            # A finite floor, not minus infinity: a row that sees nothing stays finite, and its weights become zero.
            hidden = ~allowed
            weights = scores.masked_fill(hidden, torch.finfo(precise).min).softmax(dim=-1).masked_fill(hidden, 0.0)
        if dropout_mask is not None:
            weights = dropout(weights, rate=dropout_mask.rate, key=dropout_mask.key, offset=dropout_mask.offset)
        return (weights @ values).transpose(1, 2).to(query.dtype)
