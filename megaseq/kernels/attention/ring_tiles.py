"""How the tokens of rows lie with the processes of a ring, and which tiles of queries and keys meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megaseq.kernels.attention.ranges import SegmentRanges
from megaseq.kernels.dropout import DropoutKey


class Ring(Protocol):
    """The processes that share rows, in a circle."""

    @property
    def size(self) -> int:
        """How many they are."""

    @property
    def index(self) -> int:
        """Which of them this one is."""

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begins to send tensors to the next process and to receive the like from the one before; the result waits."""


@dataclass(frozen=True, eq=False)
class RingDropout:
    """Which weights among all of the batch's, [rows, N, T, S] row-major, become zero."""

    rate: float
    key: DropoutKey
    rows: Tensor
    """int64 [B], numbers of the rows."""
    heads: tuple[int, int]
    """(number of the first head here, heads N of the model)."""
    lengths: tuple[int, int]
    """(T, S), without what pads rows for the processes."""


@dataclass(frozen=True, eq=False)
class RingSettings:
    """All of a call that is not differentiated."""

    ring: Ring
    query_segment_ids: Tensor
    """int64 [B, L], of the whole rows, padded; 0 is padding."""
    key_segment_ids: Tensor
    """int64 [B, K], likewise."""
    causal: bool
    window: int | None
    scale: float
    soft_cap: float | None
    dropout: RingDropout | None
    ranges: dict[tuple[int, int], SegmentRanges] = field(default_factory=dict)
    """What kernels have found out of the segments of a pair of chunks, by their places; kept for all layers."""


@dataclass(frozen=True)
class Tile:
    """A run of queries and a run of keys: where they are in this process's tensors, and in the row."""

    queries: slice
    keys: slice
    query_place: int
    key_place: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start


def chunks_of(index: int, *, size: int) -> tuple[int, int]:
    """Returns which two of 2 * `size` chunks of a row process `index` has."""
    return index, 2 * size - 1 - index


def tiles(settings: RingSettings, *, step: int, lengths: tuple[int, int], size: int | None) -> Iterator[Tile]:
    """Yields the tiles between this process's queries and the keys that are here after `step` steps.

    Args:
        settings: of the call.
        step: how often the keys were passed on.
        lengths: (t, s), queries and keys of a process.
        size: queries and keys of a tile, at most; None: a whole chunk.
    """
    ring = settings.ring
    owner = (ring.index - step) % ring.size
    for queries, query_place in _runs(lengths[0], index=ring.index, count=ring.size, size=size):
        for keys, key_place in _runs(lengths[1], index=owner, count=ring.size, size=size):
            tile = Tile(queries, keys, query_place, key_place)
            if not _is_hidden(tile, settings=settings):
                yield tile


def _is_hidden(tile: Tile, *, settings: RingSettings) -> bool:
    """Whether all keys of a tile come after its queries, or are too far away."""
    queries, keys = tile.sizes
    nearest_after = tile.key_place - (tile.query_place + queries - 1)
    nearest_before = tile.query_place - (tile.key_place + keys - 1)
    if settings.causal and nearest_after > 0:
        return True
    return settings.window is not None and max(nearest_after, nearest_before) >= settings.window


def _runs(length: int, *, index: int, count: int, size: int | None) -> Iterator[tuple[slice, int]]:
    """Yields runs of at most `size` of a process's `length` tokens, each with the place of its first token."""
    chunk = length // 2
    for half, number in enumerate(chunks_of(index, size=count)):
        for start in range(0, chunk, size or max(chunk, 1)):
            stop = min(start + (size or chunk), chunk)
            yield slice(half * chunk + start, half * chunk + stop), number * chunk + start


def first_weights(settings: RingSettings, *, tile: Tile, heads: int) -> Tensor:
    """Returns int64 [B * N * t], the number among all of the batch's weights of each query's first one in the tile."""
    chosen = settings.dropout
    assert chosen is not None
    first, total = chosen.heads
    queries, keys = chosen.lengths
    device = chosen.rows.device
    numbers = torch.arange(first, first + heads, device=device)
    places = torch.arange(tile.query_place, tile.query_place + tile.sizes[0], device=device)
    runs = (chosen.rows[:, None, None] * total + numbers[:, None]) * queries + places
    return (runs * keys + tile.key_place).flatten()
