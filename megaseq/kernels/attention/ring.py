"""Attention of rows that several processes share: keys and values travel around them.

Liu et al. 2023, "Ring Attention with Blockwise Transformers".

Each process has two chunks of every row, the c-th and the c-th from the end of 2C (C processes), so that causal
attention gives all of them the same work (Zhu 2024, "zigzag ring attention"). Scores exist one tile at a time: the
softmax is put together as tiles come (Milakov and Gimelshein 2018), and the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.attention import fused
from megaseq.kernels.attention.ring_kernels import kernel_ring_attention
from megaseq.kernels.attention.ring_tiles import (
    Ring,
    RingDropout,
    RingSettings,
    Tile,
    chunks_of,
    first_weights,
    tiles,
)
from megaseq.kernels.dispatch import choose, requested
from megaseq.kernels.dropout import dropout
from megaseq.kernels.functions import apply_one

__all__ = ["Ring", "RingDropout", "RingSettings", "chunks_of", "ring_attention"]

TILE = 1024
"""Queries and keys of a tile, at most."""


def ring_attention(query: Tensor, *, key: Tensor, value: Tensor, bias: Tensor | None, settings: RingSettings) -> Tensor:
    """Attends with this process's queries to the keys of all processes; all of them call it at the same time.

    Args:
        query: [B, t, N, H], this process's two chunks.
        key: [B, s, M, H], likewise; N is a multiple of M.
        value: [B, s, M, H].
        bias: [N, L + K - 1], added to the scores by key place minus query place, from 1 - L to K - 1; L and K are the
            lengths of the padded rows. None: none.
        settings: who sees whom, and the rest.

    Returns:
        [B, t, N, H]; zeros for queries that see no key.

    Raises:
        KernelError: if `MEGASEQ_KERNELS` asks for kernels that cannot run this call.
    """
    if _by_kernels(query, settings=settings):
        return kernel_ring_attention(query, key=key, value=value, bias=bias, settings=settings)
    return apply_one(_RingAttention, query, key, value, bias, settings)


def _by_kernels(query: Tensor, *, settings: RingSettings) -> bool:
    """Whether Triton's kernels do the tiles: on a GPU if they can, and where they are asked for."""
    wanted = requested("attention")
    if wanted not in ("auto", "triton") or (wanted == "auto" and not fused.preferred(query.device)):
        return False
    reason = fused.unfit(query, mask=None, bias=None, scale=settings.scale, dropout=None)
    impossible = {} if reason is None else {"triton": reason}
    return choose("attention", automatic="reference" if reason else "triton", impossible=impossible) == "triton"


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, settings: RingSettings
    ) -> Tensor:
        work = _Work(query, bias=bias, settings=settings)
        batch, length, heads, width = query.shape
        total = work.query.new_zeros(batch, heads, length, width)
        highest = work.query.new_full((batch, heads, length, 1), float("-inf"))
        weight = torch.zeros_like(highest)
        held = [key.contiguous(), value.contiguous()]
        for step in range(settings.ring.size):
            waiting = settings.ring.pass_on(held) if step + 1 < settings.ring.size else None
            keys, values = (_by_head(tensor) for tensor in held)
            for tile in work.tiles(step, key_length=key.shape[1]):
                scores, _ = work.scores(tile, keys=keys)
                before, top = highest[:, :, tile.queries], scores.amax(dim=-1, keepdim=True)
                top = torch.maximum(before, top)
                # A query that has seen nothing yet: any finite number does, as all its weights are zero.
                finite = top.masked_fill(top == float("-inf"), 0.0)
                shrink, weights = (before - finite).exp(), (scores - finite).exp()
                highest[:, :, tile.queries] = top
                weight[:, :, tile.queries] = weight[:, :, tile.queries] * shrink + weights.sum(dim=-1, keepdim=True)
                seen = _times(work.drop(weights, tile=tile), _rows(values, tile.keys))
                total[:, :, tile.queries] = total[:, :, tile.queries] * shrink + seen
            if waiting is not None:
                held = waiting()
        empty = weight == 0.0
        output = (total / weight.masked_fill(empty, 1.0)).transpose(1, 2).to(query.dtype)
        log_sum = (highest + weight.log()).masked_fill(empty, 0.0)
        ctx.save_for_backward(query, key, value, bias, output, log_sum)
        ctx.settings = settings
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, output, log_sum = ctx.saved_tensors
        settings: RingSettings = ctx.settings
        work = _Work(query, bias=bias, settings=settings)
        precise = work.query.dtype
        upstream = gradients[0].transpose(1, 2).to(precise)
        of_sum = (upstream * output.transpose(1, 2).to(precise)).sum(dim=-1, keepdim=True)
        of_query = torch.zeros_like(work.query)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=precise)
        held = [key.contiguous(), value.contiguous()]
        travelling = [torch.zeros(tensor.shape, dtype=precise, device=tensor.device) for tensor in held]
        for step in range(settings.ring.size):
            waiting = settings.ring.pass_on(held) if step + 1 < settings.ring.size else None
            keys, values = (_by_head(tensor) for tensor in held)
            of_keys, of_values = (tensor.transpose(1, 2) for tensor in travelling)
            for tile in work.tiles(step, key_length=key.shape[1]):
                scores, slope = work.scores(tile, keys=keys)
                weights = (scores - log_sum[:, :, tile.queries]).exp()
                own = upstream[:, :, tile.queries]
                of_values[:, :, tile.keys] += _across(work.drop(weights, tile=tile), own, heads=keys.shape[1])
                of_weights = work.drop(_times_transposed(own, _rows(values, tile.keys)), tile=tile)
                of_scores = weights * (of_weights - of_sum[:, :, tile.queries])
                if of_bias is not None:
                    _add_by_distance(of_bias, of_scores.sum(dim=0), tile=tile, length=work.query_length)
                if slope is not None:
                    of_scores = of_scores * slope
                of_query[:, :, tile.queries] += _times(of_scores, _rows(keys, tile.keys)) * settings.scale
                # `work.query` has the scale in it already.
                of_keys[:, :, tile.keys] += _across(of_scores, work.query[:, :, tile.queries], heads=keys.shape[1])
            # The gradients go on with their keys, once more than these, and so come home.
            travelled = settings.ring.pass_on(travelling)
            if waiting is not None:
                held = waiting()
            travelling = travelled()
        of_key, of_value = travelling
        return (
            of_query.transpose(1, 2).to(query.dtype),
            of_key.to(key.dtype),
            of_value.to(value.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
        )


class _Work:
    """What both passes compute of a tile; in at least float32."""

    def __init__(self, query: Tensor, *, bias: Tensor | None, settings: RingSettings) -> None:
        precise = torch.promote_types(query.dtype, torch.float32)
        self.query = query.transpose(1, 2).to(precise) * settings.scale
        self._bias = None if bias is None else bias.to(precise)
        self._settings = settings
        self.query_length = settings.query_segment_ids.shape[1]

    def tiles(self, step: int, *, key_length: int) -> Iterator[Tile]:
        """Yields the tiles between this process's queries and the keys that are here after `step` steps."""
        return tiles(self._settings, step=step, lengths=(self.query.shape[2], key_length), size=TILE)

    def scores(self, tile: Tile, *, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the scores [B, N, t, s], minus infinity where hidden, and the soft cap's derivative."""
        settings = self._settings
        scores = _times_transposed(self.query[:, :, tile.queries], _rows(keys, tile.keys))
        slope: Tensor | None = None
        if settings.soft_cap is not None:
            squeezed = torch.tanh(scores / settings.soft_cap)
            scores, slope = settings.soft_cap * squeezed, 1.0 - squeezed.square()
        if self._bias is not None:
            scores = scores + _by_distance(self._bias, tile=tile, length=self.query_length)
        return scores.masked_fill(~self._allowed(tile), float("-inf")), slope

    def _allowed(self, tile: Tile) -> Tensor:
        """Returns bool [B, 1, t, s]."""
        settings = self._settings
        queries, keys = tile.sizes
        query_ids = settings.query_segment_ids[:, tile.query_place : tile.query_place + queries, None]
        key_ids = settings.key_segment_ids[:, None, tile.key_place : tile.key_place + keys]
        allowed = (query_ids == key_ids) & (query_ids != 0)
        if settings.causal or settings.window is not None:
            device = query_ids.device
            places = torch.arange(tile.query_place, tile.query_place + queries, device=device)[:, None]
            distance = places - torch.arange(tile.key_place, tile.key_place + keys, device=device)
            if settings.causal:
                allowed = allowed & (distance >= 0)
            if settings.window is not None:
                allowed = allowed & (distance.abs() < settings.window)
        return allowed[:, None]

    def drop(self, weights: Tensor, *, tile: Tile) -> Tensor:
        """Returns weights [B, N, t, s] with some of them zero, the same in both passes and on any layout."""
        chosen = self._settings.dropout
        if chosen is None:
            return weights
        offset = first_weights(self._settings, tile=tile, heads=weights.shape[1])
        return dropout(weights, rate=chosen.rate, key=chosen.key, offset=offset)


def _by_head(tensor: Tensor) -> Tensor:
    """[B, s, M, H] as [B, M, s, H] in at least float32."""
    return tensor.transpose(1, 2).to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(tensor: Tensor, places: slice) -> Tensor:
    return tensor[:, :, places]


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[B, N, t, W] as [B, M, N / M * t, W]: the query heads of a key head one below the other."""
    return x.reshape(x.shape[0], heads, -1, x.shape[3])


def _times(weights: Tensor, values: Tensor) -> Tensor:
    """[B, N, t, s] times [B, M, s, H]: [B, N, t, H]."""
    product = _grouped(weights, values.shape[1]) @ values
    return product.view(*weights.shape[:3], values.shape[3])


def _times_transposed(query: Tensor, keys: Tensor) -> Tensor:
    """[B, N, t, H] times [B, M, s, H] transposed: [B, N, t, s]."""
    product = _grouped(query, keys.shape[1]) @ keys.transpose(2, 3)
    return product.view(*query.shape[:3], keys.shape[2])


def _across(weights: Tensor, x: Tensor, *, heads: int) -> Tensor:
    """[B, N, t, s] transposed times [B, N, t, H], summed over the query heads of each key head: [B, M, s, H]."""
    return _grouped(weights, heads).transpose(2, 3) @ _grouped(x, heads)


def _distances(tile: Tile, *, length: int) -> slice:
    """Returns where the distances of a tile stand, from that of its last query to its first key on."""
    queries, keys = tile.sizes
    first = tile.key_place - (tile.query_place + queries - 1) + length - 1
    return slice(first, first + queries + keys - 1)


def _by_distance(bias: Tensor, *, tile: Tile, length: int) -> Tensor:
    """Returns the bias [N, t, s] of a tile."""
    return bias[:, _distances(tile, length=length)].unfold(1, tile.sizes[1], 1).flip(1)


def _add_by_distance(total: Tensor, gradient: Tensor, *, tile: Tile, length: int) -> None:
    """Adds the gradient [N, t, s] of a tile's bias to that of all distances [N, L + K - 1]."""
    queries, keys = tile.sizes
    heads = gradient.shape[0]
    # A row that is one longer than the distances puts each query's keys one place further left in the next row: then
    # equal distances stand in one column.
    wide = gradient.new_zeros(heads, queries, queries + keys)
    wide[:, :, :keys] = gradient.flip(1)
    skewed = wide.flatten(1)[:, : queries * (queries + keys - 1)].view(heads, queries, queries + keys - 1)
    total[:, _distances(tile, length=length)] += skewed.sum(dim=1)
