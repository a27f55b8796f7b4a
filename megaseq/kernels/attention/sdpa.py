"""Attention by torch's fused op, which never stores the attention weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from megaseq.kernels.attention.mask import AttentionMask


def sdpa_attention(
    query: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    causal: bool,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """`attention` without soft cap and dropout.

    Args:
        query: [B, T, N, H].
        key: [B, S, M, H].
        value: [B, S, M, H].
        mask: who sees whom.
        causal: `mask` is exactly the lower triangle, so that the op's own causal mode computes the same.
        bias: [1 or B, N, T, S], added to the scores.
        scale: factor of the scores.

    Returns:
        [B, T, N, H].
    """
    sizes = (query.shape[1], key.shape[1])
    attn_mask: Tensor | None = None
    is_causal = causal and bias is None
    if mask is not None and not is_causal:
        if bias is None:
            attn_mask = mask.additive(query.dtype, query_length=sizes[0], key_length=sizes[1], device=query.device)
        else:
            attn_mask = mask.biased(bias, dtype=query.dtype, query_length=sizes[0], key_length=sizes[1])
    elif bias is not None:
        attn_mask = bias.to(query.dtype)
    grouped = False
    # Not the comparison itself, which in a graph of any sizes is a symbol, and the op wants a bool.
    if query.shape[2] != key.shape[2]:
        grouped = True
    return functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=grouped,
    ).transpose(1, 2)
