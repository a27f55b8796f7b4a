"""Which runs of keys the queries of packed rows can see: computed once per mask, read by every kernel.

Rows are cut into granules of `GRANULE` tokens. For each granule of one side a range says where the other side has
tokens of its segments; outside of it nothing is computed. Within a second, smaller range all pairs belong to one
segment, so that ids need not be compared. Ids of segments rise along a row in packed batches; if they do not, the first
range is wider and the second one narrower than need be, and the results are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

GRANULE = 32
"""Tokens of a granule; divides the sides of every tile."""
_NEVER = 1 << 30
"""Above every id and every place."""


@dataclass(frozen=True, eq=False)
class SegmentRanges:
    """Segments of both sides in the form that kernels read."""

    query_ids: Tensor
    """int32 [B, T], 0 is padding."""
    key_ids: Tensor
    """int32 [B, S], likewise."""
    key_ranges: Tensor
    """int32 [B, granules of T, 4]: (start, stop) of the keys that a granule of queries sees any of, and (start, stop)
    of keys that all of them see as far as segments go; empty if start is not below stop."""
    query_ranges: Tensor
    """int32 [B, granules of S, 4]: the same of the queries for a granule of keys."""


def segment_ranges(query_ids: Tensor, *, key_ids: Tensor) -> SegmentRanges:
    """Computes the ranges of rows with segment ids [B, T] and [B, S], 0 for padding; nothing waits for the device."""
    own = query_ids.to(torch.int32).contiguous()
    queries = _Granules(own)
    if query_ids is key_ids:
        ranges = _ranges(queries, others=queries)
        return SegmentRanges(own, own, ranges, ranges)
    others = key_ids.to(torch.int32).contiguous()
    keys = _Granules(others)
    return SegmentRanges(own, others, _ranges(queries, others=keys), _ranges(keys, others=queries))


class _Granules:
    """The least and greatest ids of the granules of rows."""

    def __init__(self, ids: Tensor) -> None:
        batch, length = ids.shape
        count = -(-length // GRANULE)
        grains = functional.pad(ids, (0, count * GRANULE - length)).view(batch, count, GRANULE)
        self.count = count
        self.length = length
        self.greatest = grains.amax(dim=2)
        """0 for nothing but padding."""
        self.least = torch.where(grains == 0, _NEVER, grains).amin(dim=2)
        """Of those that are not padding."""
        # The tail of the last granule is no padding: nothing is there.
        inside = torch.arange(count * GRANULE, device=ids.device).view(count, GRANULE) < length
        some_pads = ((grains == 0) & inside).any(dim=2)
        self.only = torch.where(some_pads | (self.least != self.greatest), 0, self.greatest)
        """The id that all of a granule have; 0 if there is no such."""


def _ranges(own: _Granules, *, others: _Granules) -> Tensor:
    if own.count == 0 or others.count == 0:
        return own.greatest.new_zeros(own.greatest.shape[0], own.count, 4)
    # The first granule with an id as great as our least; ids before it are smaller, whatever their order.
    rising = others.greatest.cummax(dim=1).values
    start = torch.searchsorted(rising, own.least, out_int32=True)
    # The last granule with an id as small as our greatest, found from the end.
    falling = others.least.flip(1).cummin(dim=1).values.neg()
    stop = others.count - torch.searchsorted(falling, own.greatest.neg(), out_int32=True)
    stop = torch.where(own.greatest == 0, 0, stop)
    # A granule that holds our one id alone is the first that we see, or the one after it, which shares no other.
    ends = _ends_of_runs(others.only)
    whole_start, whole_stop = torch.zeros_like(start), torch.zeros_like(start)
    for candidate in (start + 1, start):
        place = candidate.clamp(max=others.count - 1).long()
        same = (others.only.gather(1, place) == own.only) & (own.only != 0) & (candidate < others.count)
        whole_start = torch.where(same, candidate, whole_start)
        whole_stop = torch.where(same, ends.gather(1, place), whole_stop)
    return torch.stack([start, stop, whole_start, whole_stop], dim=2).to(torch.int32) * GRANULE


def _ends_of_runs(values: Tensor) -> Tensor:
    """Where the run of equal `values` [B, n] ends that each is in: int32 [B, n], the place after its last."""
    count = values.shape[1]
    places = torch.arange(1, count + 1, dtype=torch.int32, device=values.device).expand_as(values)
    last = torch.ones_like(values, dtype=torch.bool)
    last[:, :-1] = values[:, 1:] != values[:, :-1]
    return torch.where(last, places, _NEVER).flip(1).cummin(dim=1).values.flip(1).to(torch.int32)
