"""Attention over packed rows as many short sequences instead of a few long ones.

A packed row of length L with segments of length l costs L * L under a full mask and L * l without it. Here the segments
of all rows are cut out, gathered into a few groups of similar length, attended to group by group, and put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megaseq.kernels.functions import apply_many, apply_one

GROUP_STEP = 8
"""Segments whose lengths round up to the same multiple of this share a group."""
MIN_GROUP = 16
"""A group of fewer segments joins the next longer one: a call costs more than the padding it saves."""

PROBABILITY_BLOCK = 16
"""Rows of probabilities are padded to a multiple of this; kAttentionBlock in csrc/attention.h."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Segments of similar length, padded to one: n segments of at most `t` queries and `s` keys."""

    queries: Tensor
    """[n * t] place of each query in the flattened rows [B * T]; pads hold B * T."""
    keys: Tensor
    """[n * s] place of each key in [B * S]; pads hold B * S."""
    mask: Tensor
    """Float [n, 1, t, s]: 0 where a query sees a key, minus infinity elsewhere."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(n, t, s)."""
        return self.mask.shape[0], self.mask.shape[2], self.mask.shape[3]


@dataclass(frozen=True)
class SegmentPlan:
    """How the rows of one batch are cut into groups of segments."""

    starts: Integers
    """[n, 2]: first query of each segment in [B * T], first key in [B * S]."""
    lengths: Integers
    """[n, 2]: numbers of queries and keys."""
    sizes: tuple[int, int]
    """(B * T, B * S)."""
    causal: bool
    """Within a segment, a query sees no key after itself."""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The segments, those of similar length together."""
        return tuple(
            _group(self.starts[members], lengths=self.lengths[members], pads=self.sizes, causal=self.causal)
            for members in _cluster(self.lengths)
        )

    @property
    def area(self) -> int:
        """Query-key pairs that the groups compute, padding included."""
        return sum(int(np.prod(group.sizes)) for group in self.groups)

    @cached_property
    def table(self) -> tuple[Integers, int]:
        """The extension's table [n, 5] of starts, lengths and probabilities, and the probabilities of one head."""
        areas = self.lengths[:, 0] * (-(-self.lengths[:, 1] // PROBABILITY_BLOCK) * PROBABILITY_BLOCK)
        (query_starts, key_starts), (queries, keys) = self.starts.T, self.lengths.T
        columns = (query_starts, queries, key_starts, keys, np.cumsum(areas) - areas)
        return np.ascontiguousarray(np.stack(columns, axis=1), dtype=np.int64), int(areas.sum())

    @property
    def longest(self) -> int:
        """Length of the longest side of a segment."""
        return int(self.lengths.max(initial=0))


def plan_segments(query_segment_ids: Tensor, *, key_segment_ids: Tensor, causal: bool) -> SegmentPlan | None:
    """Cuts packed rows into groups of segments.

    Args:
        query_segment_ids: [B, T] in host memory, 0 for padding; equal ids stand together.
        key_segment_ids: [B, S], likewise.
        causal: within a segment, a query sees no key after itself.

    Returns:
        The plan, or None if a segment is not in one piece.
    """
    query_runs = _runs(query_segment_ids.numpy())
    key_runs = query_runs if key_segment_ids is query_segment_ids else _runs(key_segment_ids.numpy())
    if query_runs is None or key_runs is None:
        return None
    _, in_query, in_key = np.intersect1d(query_runs[0], key_runs[0], assume_unique=True, return_indices=True)
    starts = np.stack([query_runs[1][in_query], key_runs[1][in_key]], axis=1)
    lengths = np.stack([query_runs[2][in_query], key_runs[2][in_key]], axis=1)
    sizes = (query_segment_ids.numel(), key_segment_ids.numel())
    return SegmentPlan(starts=starts, lengths=lengths, sizes=sizes, causal=causal)


def segment_attention(query: Tensor, *, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
    """Attends within each segment of packed rows.

    Args:
        query: [B, T, N, H].
        key: [B, S, M, H], N a multiple of M.
        value: [B, S, M, H].
        plan: how the rows are cut.
        scale: factor of the scores.

    Returns:
        [B, T, N, H]; zeros for pads.
    """
    if not plan.groups:
        # Nothing sees anything; the product keeps the graph connected, with zero gradients.
        return query * 0.0
    parts = apply_many(_Cut, query, key, value, plan)
    outputs = []
    for number, group in enumerate(plan.groups):
        part = parts[3 * number : 3 * number + 3]
        grouped = part[0].shape[2] != part[1].shape[2]
        queries, keys, values = (tensor.transpose(1, 2) for tensor in part)
        mask = group.mask.to(query.dtype)
        outputs.append(
            functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped
            ).transpose(1, 2)
        )
    return apply_one(_Join, plan, query.shape, *outputs)


class _Cut(torch.autograd.Function):
    """Rows to groups of segments; its gradient puts the groups' gradients back."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.shapes = (query.shape, key.shape, value.shape)
        parts = []
        for group in plan.groups:
            n, t, s = group.sizes
            parts.append(_gather(query, index=group.queries, sizes=(n, t)))
            parts.append(_gather(key, index=group.keys, sizes=(n, s)))
            parts.append(_gather(value, index=group.keys, sizes=(n, s)))
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        groups = ctx.plan.groups
        queries = [group.queries for group in groups]
        keys = [group.keys for group in groups]
        return (
            _scatter(gradients[0::3], indices=queries, shape=ctx.shapes[0]),
            _scatter(gradients[1::3], indices=keys, shape=ctx.shapes[1]),
            _scatter(gradients[2::3], indices=keys, shape=ctx.shapes[2]),
            None,
        )


class _Join(torch.autograd.Function):
    """Groups of segments back to rows; its gradient cuts the rows' gradient."""

    @staticmethod
    def forward(ctx: Any, plan: SegmentPlan, shape: torch.Size, *outputs: Tensor) -> Tensor:
        ctx.plan = plan
        return _scatter(outputs, indices=[group.queries for group in plan.groups], shape=shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = [_gather(gradients[0], index=group.queries, sizes=group.sizes[:2]) for group in ctx.plan.groups]
        return (None, None, *parts)


def _gather(rows: Tensor, *, index: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Rows [B, T, N, H] at `index` [n * t] as [n, t, N, H]; pads take the last row, which the group's mask hides."""
    width = rows.shape[2] * rows.shape[3]
    flat = rows.reshape(-1, width)
    return flat.index_select(0, index.clamp(max=flat.shape[0] - 1)).view(*sizes, rows.shape[2], rows.shape[3])


def _scatter(parts: tuple[Tensor, ...], *, indices: list[Tensor], shape: torch.Size) -> Tensor:
    """The reverse of `_gather` over all groups: [B, T, N, H] with zeros where no segment is."""
    width = shape[2] * shape[3]
    rows = shape[0] * shape[1]
    # One row more than needed takes what the pads wrote.
    flat = parts[0].new_zeros(rows + 1, width)
    for part, index in zip(parts, indices, strict=True):
        flat.index_copy_(0, index, part.reshape(-1, width))
    return flat[:rows].view(shape)


def _runs(ids: NDArray[Any]) -> tuple[Integers, Integers, Integers] | None:
    """The segments of rows [B, T]: (keys of row and id, starts in [B * T], lengths); None if one is in pieces."""
    rows, length = ids.shape
    if ids.size == 0:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    changes = np.ones((rows, length), dtype=bool)
    changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(changes)
    lengths = np.diff(starts, append=rows * length)
    values = ids.reshape(-1)[starts]
    real = values != 0
    starts, lengths, values = starts[real], lengths[real], values[real]
    keys = (starts // length) * (1 << 32) + values
    if np.unique(keys).size != keys.size:
        return None
    return keys.astype(np.int64), starts.astype(np.int64), lengths.astype(np.int64)


def _cluster(lengths: Integers) -> list[Integers]:
    """Puts segments [n, 2] (queries, keys) of similar length together: a list of index arrays."""
    longest = lengths.max(axis=1, initial=0)
    order = np.argsort(longest, kind="stable")
    steps = -(-longest[order] // GROUP_STEP)
    edges = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(order)]
    clusters: list[Integers] = []
    start = 0
    for stop in edges[1:]:
        if stop - start >= MIN_GROUP or (stop == len(order) and stop > start):
            clusters.append(order[start:stop].astype(np.int64))
            start = stop
    return clusters


def _group(starts: Integers, *, lengths: Integers, pads: tuple[int, int], causal: bool) -> Group:
    """Makes the index tensors and the mask of segments [n, 2]."""
    index, valid = [], []
    for side in (0, 1):
        places = np.arange(lengths[:, side].max())
        real = places[None] < lengths[:, side, None]
        index.append(np.where(real, starts[:, side, None] + places[None], pads[side]))
        valid.append(real)
    allowed = valid[0][:, :, None] & valid[1][:, None, :]
    if causal:
        allowed &= np.tri(allowed.shape[1], allowed.shape[2], dtype=bool)[None]
    mask = np.where(allowed, np.float32(0), np.float32(-np.inf))[:, None]
    return Group(
        queries=torch.from_numpy(index[0].reshape(-1)),
        keys=torch.from_numpy(index[1].reshape(-1)),
        mask=torch.from_numpy(mask),
    )
