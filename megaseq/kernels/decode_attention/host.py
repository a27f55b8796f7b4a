"""Attention to a cache by the compiled extension, where it computes the same."""

from __future__ import annotations

from torch import Tensor

from megaseq.kernels.attention.lookup import attend_places, attend_shared, fits_lookup
from megaseq.kernels.decode_attention.cache import KeyValueCache, check_pages


def unfit(
    query: Tensor,
    *,
    cache: KeyValueCache,
    lengths: Tensor | None,
    bias: Tensor | None,
    soft_cap: float | None,
    window: int | None,
) -> str | None:
    """Why the extension cannot run a call, as the end of "..., and"; None where it can."""
    if not fits_lookup(query, head_dims=(query.shape[3],)):
        return "the extension takes float32 in host memory and heads of a width that 8 divides"
    if cache.key.dtype is not query.dtype or soft_cap is not None:
        return "the extension has neither quantised caches nor a soft cap"
    if cache.capacity == 0 or query.numel() == 0:
        return "the extension wants at least one key"
    for tensor in (cache.key, cache.value):
        if tensor.stride(0) != tensor.shape[1] * tensor.stride(1):
            return "the extension wants pages behind each other"
    if cache.table is None:
        if bias is not None or window is not None or (lengths is not None and lengths.dim() == 2):
            return "the extension has neither bias nor window, nor lengths of hypotheses, for keys without a table"
        return None
    if not cache.own or cache.key.shape[1] != 1:
        return "the extension wants a table of each hypothesis' places"
    if lengths is not None and not bool((lengths == lengths.view(-1)[0]).all()):
        return "the extension wants one length for all hypotheses with places"
    length = cache.capacity if lengths is None else int(lengths.view(-1)[0])
    if not 0 < length <= cache.capacity or (bias is not None and bias.shape[1] < length):
        return "the extension wants at least one key, and a bias for each"
    return None


def native_decode_attention(
    query: Tensor,
    *,
    cache: KeyValueCache,
    lengths: Tensor | None,
    bias: Tensor | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """`decode_attention` for a call that `unfit` has nothing against."""
    if cache.table is None:
        counts = None if lengths is None else lengths.long().clamp(0, cache.capacity).contiguous()
        return attend_shared(query, key=cache.key, value=cache.value, counts=counts, scale=scale)
    length = cache.capacity if lengths is None else int(lengths.view(-1)[0])
    first = 0 if window is None else max(0, length - window)
    places = cache.table[..., first:length].flatten(0, 1).long().contiguous()
    check_pages(places, count=cache.key.shape[0])
    heads = attend_places(
        query.flatten(0, 1), key=cache.key[:, 0], value=cache.value[:, 0], places=places, length=length - first,
        scale=scale, bias=None if bias is None else bias[:, bias.shape[1] - (length - first) :],
    )  # fmt: skip
    return heads.view(query.shape)
