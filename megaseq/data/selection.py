"""Which pairs of a source take part, and a report on those that do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megaseq.data.columns import Column, release
from megaseq.data.order import Int64Array

_STEP = 1 << 20
NUM_SHOWN = 5
Mask = npt.NDArray[np.bool_]


class Limits(NamedTuple):
    """Longest source and target in tokens, with eos, and what happens to pairs beyond them and to empty texts."""

    max_source_length: int
    max_target_length: int
    truncate: bool
    keep_empty: bool


class Lengths(NamedTuple):
    """Tokens with eos of some pairs, each int32 [pairs], cut to the limits where those say so."""

    source: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]


class Selection:
    """The pairs of one source that take part, by rank; keeps only the list of those that do not."""

    def __init__(self, total: int, *, dropped: Int64Array) -> None:
        self._total = total
        self.dropped = dropped
        """Indices of the pairs left out, ascending."""
        # How many kept pairs stand before each dropped one.
        self._kept_before = dropped - np.arange(len(dropped), dtype=np.int64)

    def __len__(self) -> int:
        return self._total - len(self.dropped)

    def indices(self, ranks: Int64Array) -> Int64Array:
        """Returns the indices in the source of the kept pairs number `ranks`."""
        return ranks + np.searchsorted(self._kept_before, ranks, side="right").astype(np.int64)


class Found(NamedTuple):
    """The pairs of one source that break a rule: indices, ascending."""

    empty: Int64Array
    too_long: Int64Array

    @property
    def dropped(self) -> Int64Array:
        """All of them, ascending."""
        return np.union1d(self.empty, self.too_long)


def screen(source: Column, *, target: Column, limits: Limits, num_tags: int = 0) -> Found:
    """Looks at the lengths of all pairs, a piece at a time; a source of only its `num_tags` tags is empty."""
    empty, too_long = [], []
    for start, sources, targets in _raw_lengths(source, target=target):
        blank = (sources <= num_tags) | (targets == 0)
        if not limits.keep_empty:
            empty.append(start + np.flatnonzero(blank))
        if not limits.truncate:
            # One token less: eos follows.
            beyond = (sources >= limits.max_source_length) | (targets >= limits.max_target_length)
            too_long.append(start + np.flatnonzero(beyond & (limits.keep_empty | ~blank)))
    return Found(_join(empty), _join(too_long))


def misfits(
    source: Column, *, target: Column, limits: Limits, dropped: Int64Array, fits: Callable[[Lengths], Mask]
) -> Int64Array:
    """Returns the pairs outside of `dropped` that `fits` refuses, ascending."""
    refused = []
    for start, sources, targets in _raw_lengths(source, target=target):
        refused.append(start + np.flatnonzero(~fits(with_eos(sources, target=targets, limits=limits))))
    return np.setdiff1d(_join(refused), dropped, assume_unique=True)


def lengths_of(source: Column, *, target: Column, indices: Int64Array, limits: Limits) -> Lengths:
    """Returns the lengths of the pairs `indices`."""
    lengths = [column.offsets[indices + 1] - column.offsets[indices] for column in (source, target)]
    for column in (source, target):
        release(column.offsets)
    return with_eos(lengths[0], target=lengths[1], limits=limits)


def with_eos(source: npt.NDArray[Any], *, target: npt.NDArray[Any], limits: Limits) -> Lengths:
    """Returns lengths with eos, cut to the limits, from token counts without it."""
    return Lengths(
        np.minimum(source + 1, limits.max_source_length).astype(np.int32),
        np.minimum(target + 1, limits.max_target_length).astype(np.int32),
    )


def _raw_lengths(source: Column, *, target: Column) -> Iterator[tuple[int, Int64Array, Int64Array]]:
    for start in range(0, len(source), _STEP):
        stop = min(start + _STEP, len(source))
        yield start, np.diff(source.offsets[start : stop + 1]), np.diff(target.offsets[start : stop + 1])
    release(source.offsets)
    release(target.offsets)


def _join(parts: list[Int64Array]) -> Int64Array:
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)
