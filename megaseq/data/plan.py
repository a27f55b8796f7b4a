"""What a batching decides for one window: which examples share a row, and which rows share a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megaseq.base import Configurable
from megaseq.data.order import Int64Array

Lengths = npt.NDArray[Any]
"""Token counts of examples, any integer type, [examples]."""


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """One global batch: examples `examples[row_offsets[r]:row_offsets[r + 1]]` stand in row r, in this order."""

    row_offsets: Int64Array
    """Starts of the rows in `examples`, from 0, [rows + 1]."""
    examples: Int64Array
    """Places in the window's arrays of lengths."""
    num_rows: int
    """Rows of the batch's tensors; those after `len(row_offsets) - 1` are empty."""
    source_length: int
    """Tokens in a padded source row."""
    target_length: int
    """Tokens in a padded target row."""

    def shard(self, *, rank: int, ranks: int) -> PlannedBatch:
        """Returns rows rank, rank + ranks, ...: disjoint over ranks, all of them together, of equal `num_rows`.

        Neighbouring rows are alike in length in some batchings, so dealing them out balances the ranks. Where `ranks`
        does not divide `num_rows`, the last ranks get an empty row more.
        """
        starts, stops = self.row_offsets[:-1][rank::ranks], self.row_offsets[1:][rank::ranks]
        offsets = np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64)
        places = np.repeat(starts - offsets[:-1], stops - starts) + np.arange(offsets[-1])
        return PlannedBatch(
            row_offsets=offsets,
            examples=self.examples[places],
            num_rows=-(-self.num_rows // ranks),
            source_length=self.source_length,
            target_length=self.target_length,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The batches of one window, as two nested lists in compressed form."""

    batch_offsets: Int64Array
    """Starts of the batches in the list of rows, from 0, [batches + 1]."""
    row_offsets: Int64Array
    """Starts of the rows in `examples`, from 0, [rows + 1]."""
    examples: Int64Array
    """Places in the window's arrays of lengths; each appears here once, or once in `dropped`."""
    num_rows: Int64Array
    """Rows of each batch's tensors, empty ones included, [batches]."""
    source_lengths: Int64Array
    """Tokens in a padded source row of each batch, [batches]."""
    target_lengths: Int64Array
    """Tokens in a padded target row of each batch, [batches]."""
    dropped: Int64Array
    """Places of the examples that fit nowhere, ascending."""

    @property
    def num_batches(self) -> int:
        """How many batches the window gives."""
        return len(self.batch_offsets) - 1

    def batch(self, index: int) -> PlannedBatch:
        """Returns batch `index` of the window."""
        first, last = self.batch_offsets[index], self.batch_offsets[index + 1]
        offsets = self.row_offsets[first : last + 1]
        return PlannedBatch(
            row_offsets=offsets - offsets[0],
            examples=self.examples[offsets[0] : offsets[-1]],
            num_rows=int(self.num_rows[index]),
            source_length=int(self.source_lengths[index]),
            target_length=int(self.target_lengths[index]),
        )

    def batches(self) -> Iterator[PlannedBatch]:
        """Yields every batch in order."""
        return (self.batch(index) for index in range(self.num_batches))

    def fill(self, *, source_lengths: Lengths, target_lengths: Lengths) -> tuple[float, float]:
        """Returns the fractions of the batches' source and target tokens that are not padding."""
        source = int(source_lengths[self.examples].sum(dtype=np.int64))
        target = int(target_lengths[self.examples].sum(dtype=np.int64))
        source_room = int(np.dot(self.num_rows, self.source_lengths))
        target_room = int(np.dot(self.num_rows, self.target_lengths))
        return source / max(1, source_room), target / max(1, target_room)


class Batching(Configurable):
    """Decides which examples go together. Subclasses: `Packing`, `Bucketing`.

    Use: `fit` once with the lengths of the whole corpus, then `plan` for any window of any epoch, in any order.
    """

    class Params(Configurable.Params):
        """What all batchings have in common."""

        window: int = 1 << 20
        """Examples planned together: an epoch of more is split, so that the first batch of a huge corpus comes soon."""

    def fit(self, *, source_lengths: Lengths, target_lengths: Lengths) -> None:
        """Takes from the corpus' lengths [examples] what the params left open; the same lengths give the same."""

    def fits(self, *, source_lengths: Lengths, target_lengths: Lengths) -> npt.NDArray[np.bool_]:
        """Returns which examples `plan` has room for, after `fit`: those that it would not drop, [examples]."""
        del target_lengths
        return np.ones(len(source_lengths), dtype=np.bool_)

    def plan(self, *, seed: int, epoch: int, window: int, source_lengths: Lengths, target_lengths: Lengths) -> Plan:
        """Plans window `window` of epoch `epoch`: a pure function of the arguments, the params and what `fit` saw.

        Args:
            seed: The run's seed.
            epoch: Counted from 0.
            window: Counted from 0 in the epoch.
            source_lengths: Tokens of the window's examples, in the epoch's order, [examples].
            target_lengths: Likewise for the target.
        """
        raise NotImplementedError


def sample_evenly(lengths: Lengths, *, limit: int = 1 << 22) -> Lengths:
    """Returns at most `limit` entries of `lengths`, evenly spaced, so that fitting a huge corpus stays quick."""
    if len(lengths) <= limit:
        return lengths
    return lengths[np.arange(limit, dtype=np.int64) * len(lengths) // limit]
