"""Attention to a cache in plain torch: what every other implementation must compute."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.decode_attention.cache import KeyValueCache


def reference_decode_attention(
    query: Tensor,
    *,
    cache: KeyValueCache,
    lengths: Tensor | None,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> Tensor:
    """`decode_attention`, with scores, softmax and sums in at least fp32; see there.

    Args:
        query: [B, K, N, H].
        cache: keys and values of M heads.
        lengths: [B] or [B, K]; None: the capacity of the cache.
        bias: [N, D], the newest key's last.
        scale: factor of the scores.
        soft_cap: bound of the scores' magnitude, before the bias.
        window: newest keys that are seen.

    Returns:
        [B, K, N, H] in the dtype of `query`; zeros for rows of length 0.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    batch, num_hyps, num_heads, _ = query.shape
    device, capacity = query.device, cache.capacity
    places = torch.arange(capacity, device=device)
    if lengths is None:
        ends = torch.full((batch, num_hyps), capacity, device=device)
    else:
        ends = lengths.view(batch, -1).expand(batch, num_hyps).clamp(0, capacity).long()
    ends = ends.unsqueeze(-1)
    seen = places < ends  # [B, K, S]
    if window is not None:
        seen = seen & (places >= ends - window)
    keys, values = _gather(cache, read=seen, dtype=precise)
    repeats = num_heads // keys.shape[3]
    keys, values = (tensor.repeat_interleave(repeats, dim=3) for tensor in (keys, values))
    scores = torch.einsum("bknh,bksnh->bkns", query.to(precise) * scale, keys.expand(-1, num_hyps, -1, -1, -1))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        columns = (bias.shape[1] - ends + places).clamp(0, bias.shape[1] - 1)  # [B, K, S]
        scores = scores + bias.to(precise)[:, columns].movedim(0, 2)
    hidden = ~seen.unsqueeze(2)
    # A finite floor, not minus infinity: a row that sees nothing stays finite, and its weights become zero.
    weights = scores.masked_fill(hidden, torch.finfo(precise).min).softmax(dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("bkns,bksnh->bknh", weights, values.expand(-1, num_hyps, -1, -1, -1)).to(query.dtype)


def dequantise(entries: Tensor, *, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values [X, C, M, H] as `dtype`, times `scale` [M] or [X, C, M]."""
    result = entries.to(dtype)
    return result if scale is None else result * scale.to(dtype).unsqueeze(-1)


def _gather(cache: KeyValueCache, *, read: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [B, K or 1, S, M, H] in order; zeros where no row reads: `read` is [B, K, S]."""
    table = cache.table
    if not cache.own:
        read = read.any(dim=1, keepdim=True)
    pages = None
    if table is not None:
        pages = table.unsqueeze(1) if table.dim() == 2 else table
        used = read.view(*read.shape[:2], pages.shape[-1], cache.key.shape[1]).any(dim=-1)
        pages = pages.masked_fill(~used, 0).long()
    pair = []
    for entries, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        whole = dequantise(entries, scale=scale, dtype=dtype)
        found = whole.unsqueeze(1) if pages is None else whole[pages].flatten(2, 3)
        # Not multiplied: what is not read may be anything, NaN also.
        pair.append(found.masked_fill(~read[..., None, None], 0.0))
    return pair[0], pair[1]
