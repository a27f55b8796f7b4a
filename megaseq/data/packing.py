"""Packing: several pairs in one row, so that every batch has one fixed shape and little padding.

The packer fills one row at a time from a pool of candidates. A row begins with the oldest candidate, so that none waits
for ever, and then takes, of those that fit, the one after which the least room is left, in the same proportion, on the
source and on the target side. When none fits the row is closed.

A window is cut in lanes of about `LANE` examples that are packed independently. Rows are as full as without (what is in
a lane's pool at its end is packed in a further round), and NumPy can pack all lanes side by side, one example of each
at a time. The C++ packer gives the same rows (csrc/packing.cc).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megaseq.base import Problem, native
from megaseq.data.order import Int64Array, permute
from megaseq.data.plan import Batching, Lengths, Plan, sample_evenly

LANE = 4096
"""Examples that are packed one after another; fixed, because the rows depend on it."""
MAX_ROW_LENGTH = 65536
"""Tokens; keeps every score below 2^31, so that the C++ packer computes with 32 bits."""
_WEIGHT = 4096
_EMPTY = MAX_ROW_LENGTH + 1  # The length of an empty place in the pool: fits no row.
_NEVER = np.iinfo(np.int64).max


class Rows(NamedTuple):
    """Examples `examples[offsets[r]:offsets[r + 1]]` share row r."""

    offsets: Int64Array
    examples: Int64Array


class Layout(NamedTuple):
    """Where the tokens of packed rows stand, each [rows, length]; all are 0 in padding."""

    segment_ids: Int64Array
    """1 for the row's first example, 2 for its second, ..."""
    positions: Int64Array
    """Place of the token in its example, from 0."""
    examples: Int64Array
    """The example that the token belongs to."""


def pack_rows(
    *, source_lengths: Lengths, target_lengths: Lengths, source_row: int, target_row: int, lookahead: int = 64
) -> Rows:
    """Packs pairs in rows; every pair is in exactly one row and no row holds more tokens than it has room for.

    Args:
        source_lengths: Tokens of each source, at most `source_row`, [examples].
        target_lengths: Tokens of each target, at most `target_row`, [examples].
        source_row: Tokens that a source row has room for.
        target_row: Tokens that a target row has room for.
        lookahead: Candidates to choose the next pair from; more fill rows better and take longer.

    Raises:
        ValueError: A pair is longer than the row, or a row longer than `MAX_ROW_LENGTH`.
    """
    source = np.ascontiguousarray(source_lengths, dtype=np.int32)
    target = np.ascontiguousarray(target_lengths, dtype=np.int32)
    if max(source_row, target_row) > MAX_ROW_LENGTH or min(source_row, target_row) < 1:
        raise ValueError(f"pack_rows: must have rows of 1 to {MAX_ROW_LENGTH}, but is {source_row}, {target_row}.")
    if len(source) and (source.max() > source_row or target.max() > target_row or min(source.min(), target.min()) < 0):
        raise ValueError(f"pack_rows: must have pairs that fit rows of {source_row} and {target_row}.")
    extension = native.extension()
    if extension is not None:
        offsets = np.empty(len(source) + 1, dtype=np.int64)
        examples = np.empty(len(source), dtype=np.int64)
        rows = extension.pack(source, target, source_row, target_row, lookahead, offsets, examples)
        return Rows(offsets[: rows + 1].copy(), examples)
    return _pack_numpy(source, target, source_row, target_row, lookahead)


def layout(*, rows: Rows, lengths: Lengths, row_length: int, num_rows: int | None = None) -> Layout:
    """Returns segment ids, positions and examples of every token, [num_rows, row_length], for one of the two sides.

    Args:
        rows: Which examples stand in which row.
        lengths: Tokens of each example that `rows` mentions, on this side.
        row_length: Tokens in a padded row.
        num_rows: Rows of the result; None means as many as `rows` has. More are left empty.
    """
    count = len(rows.offsets) - 1
    num_rows = count if num_rows is None else num_rows
    segment_ids, positions, examples = (np.zeros(num_rows * row_length, dtype=np.int64) for _ in range(3))
    sizes = lengths[rows.examples].astype(np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    per_row = np.diff(rows.offsets)
    row_of = np.repeat(np.arange(count), per_row)
    row_start = np.append(starts, 0)[np.minimum(rows.offsets[:-1], len(starts))]
    place = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
    column = np.repeat(starts - row_start[row_of], sizes) + place
    flat = np.repeat(row_of * row_length, sizes) + column
    segment_ids[flat] = np.repeat(np.arange(len(sizes)) - rows.offsets[:-1][row_of] + 1, sizes)
    positions[flat] = place
    examples[flat] = np.repeat(rows.examples, sizes)
    shape = (num_rows, row_length)
    return Layout(segment_ids.reshape(shape), positions.reshape(shape), examples.reshape(shape))


class Packing(Batching):
    """Several pairs per row; every batch has the shape [rows, source_length] and [rows, target_length]."""

    class Params(Batching.Params):
        """Shapes of the batch and effort of the packer."""

        rows: int = 32
        """Rows of a global batch, over all data-parallel ranks, for one micro-batch."""
        source_length: int = 256
        """Tokens in a source row."""
        target_length: int | None = None
        """Tokens in a target row; None takes the corpus' ratio of target to source tokens, so that both sides fill."""
        multiple_of: int = 8
        """A target length that comes from the corpus is rounded up to a multiple of this."""
        lookahead: int = 64
        """Candidates to choose the next pair from."""

        def validate(self) -> Iterator[Problem | str]:
            """Yields what is out of range."""
            yield from super().validate()
            for name in ("window", "rows", "multiple_of", "lookahead"):
                if getattr(self, name) < 1:
                    yield Problem(
                        path=name, rule="be at least 1", value=getattr(self, name), remedy="Set a positive number."
                    )
            for name in ("source_length", "target_length"):
                value = getattr(self, name)
                if value is not None and not 1 <= value <= MAX_ROW_LENGTH:
                    yield Problem(
                        path=name,
                        rule=f"be from 1 to {MAX_ROW_LENGTH}",
                        value=value,
                        remedy="Set a length in this range.",
                    )

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.source_length: int = p.source_length
        self.target_length: int = p.source_length if p.target_length is None else p.target_length

    def fit(self, *, source_lengths: Lengths, target_lengths: Lengths) -> None:
        """Sets the target length from the corpus' lengths where the params leave it open."""
        p = self.params
        if p.target_length is not None or not len(source_lengths):
            return
        source = int(sample_evenly(source_lengths).sum(dtype=np.int64))
        target = int(sample_evenly(target_lengths).sum(dtype=np.int64))
        wanted = -(-p.source_length * target // max(1, source))
        limit = MAX_ROW_LENGTH - MAX_ROW_LENGTH % p.multiple_of
        self.target_length = min(limit, max(1, -(-wanted // p.multiple_of)) * p.multiple_of)

    def fits(self, *, source_lengths: Lengths, target_lengths: Lengths) -> npt.NDArray[np.bool_]:
        """Returns which examples are no longer than a row."""
        fits: npt.NDArray[np.bool_] = (source_lengths <= self.source_length) & (target_lengths <= self.target_length)
        return fits

    def plan(self, *, seed: int, epoch: int, window: int, source_lengths: Lengths, target_lengths: Lengths) -> Plan:
        """Packs the window's examples; rows come in a random order, and the last batch may lack some."""
        p = self.params
        fits = self.fits(source_lengths=source_lengths, target_lengths=target_lengths)
        kept = np.flatnonzero(fits)
        packed = pack_rows(
            source_lengths=source_lengths[kept],
            target_lengths=target_lengths[kept],
            source_row=self.source_length,
            target_row=self.target_length,
            lookahead=p.lookahead,
        )
        count = len(packed.offsets) - 1
        # The rows that a window's last pools gave are unlike the others; shuffled, they come at no particular time.
        order = permute(seed=seed, epoch=epoch, stream=f"rows/{window}", size=count)
        offsets, examples = _reorder(packed, order)
        batches = -(-count // p.rows)
        ones = np.ones(batches, dtype=np.int64)
        return Plan(
            batch_offsets=np.minimum(np.arange(batches + 1, dtype=np.int64) * p.rows, count),
            row_offsets=offsets,
            examples=kept[examples].astype(np.int64),
            num_rows=ones * p.rows,
            source_lengths=ones * self.source_length,
            target_lengths=ones * self.target_length,
            dropped=np.flatnonzero(~fits).astype(np.int64),
        )


def _reorder(rows: Rows, order: Int64Array) -> Rows:
    """Returns row order[0], row order[1], ..."""
    starts, sizes = rows.offsets[:-1][order], np.diff(rows.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    places = np.repeat(starts - offsets[:-1], sizes) + np.arange(offsets[-1])
    return Rows(offsets, rows.examples[places])


def _pack_numpy(
    source: npt.NDArray[np.int32], target: npt.NDArray[np.int32], source_row: int, target_row: int, lookahead: int
) -> Rows:
    """Packs round after round: the lanes' last pools are the examples of the next round; one lane is the last one."""
    offsets, examples = [np.zeros(1, dtype=np.int64)], []
    waiting = np.arange(len(source), dtype=np.int64)
    placed = 0
    while waiting.size:
        # A round must shrink what waits, so pools are kept well below the lanes' size.
        lanes = waiting.size // max(LANE, 4 * lookahead)
        last = lanes < 2
        packer = _Lanes(source, target, waiting, 1 if last else lanes, source_row, target_row, lookahead)
        packer.run(drain=last)
        chosen, begins = packer.rows()
        examples.append(chosen)
        # A row ends where the next one begins, and the round's last row at the round's end.
        offsets.append(placed + np.append(np.flatnonzero(begins)[1:], len(chosen)).astype(np.int64))
        placed += len(chosen)
        waiting = packer.leftover()
    return Rows(np.concatenate(offsets), np.concatenate(examples) if examples else waiting)


class _Lanes:
    """The state of all lanes of one round; lane i packs examples bounds[i] to bounds[i + 1] of `waiting`."""

    def __init__(
        self,
        source: npt.NDArray[np.int32],
        target: npt.NDArray[np.int32],
        waiting: Int64Array,
        lanes: int,
        source_row: int,
        target_row: int,
        lookahead: int,
    ) -> None:
        bounds = waiting.size * np.arange(lanes + 1, dtype=np.int64) // lanes
        self.waiting = waiting
        # One entry more, for the lanes that have nothing left to take.
        self.source = np.append(source[waiting], np.int32(_EMPTY))
        self.target = np.append(target[waiting], np.int32(_EMPTY))
        self.next, self.stop = bounds[:-1].copy(), bounds[1:]
        self.row = (np.int32(source_row), np.int32(target_row))
        longest = max(source_row, target_row)
        self.weights = (np.int32(target_row * _WEIGHT // longest or 1), np.int32(source_row * _WEIGHT // longest or 1))
        self.pool = np.full((lanes, lookahead), _NEVER, dtype=np.int64)
        self.pool_source = np.full((lanes, lookahead), _EMPTY, dtype=np.int32)
        self.pool_target = np.full((lanes, lookahead), _EMPTY, dtype=np.int32)
        for slot in range(lookahead):
            self._refill(np.arange(lanes), np.full(lanes, slot))
        steps = int((self.stop - bounds[:-1]).max())
        self.chosen = np.full((lanes, steps), -1, dtype=np.int64)
        self.begins = np.zeros((lanes, steps), dtype=bool)

    def _refill(self, lanes: Int64Array, slots: Int64Array) -> None:
        index = self.next[lanes]
        there = index < self.stop[lanes]
        index = np.where(there, index, len(self.waiting))
        self.pool[lanes, slots] = np.where(there, index, _NEVER)
        self.pool_source[lanes, slots] = self.source[index]
        self.pool_target[lanes, slots] = self.target[index]
        self.next[lanes] += there

    def run(self, *, drain: bool) -> None:
        """Places one example of each lane at a time; without `drain` a lane stops at the first row after its input."""
        lanes = np.arange(len(self.pool))
        room_source = np.full(len(lanes), -1, dtype=np.int32)
        room_target = np.full(len(lanes), -1, dtype=np.int32)
        for step in range(self.chosen.shape[1]):
            left_source = room_source[lanes, None] - self.pool_source[lanes]
            left_target = room_target[lanes, None] - self.pool_target[lanes]
            fits: npt.NDArray[np.bool_] = np.logical_and(left_source >= 0, left_target >= 0)
            left_source *= self.weights[0]
            left_target *= self.weights[1]
            score = 2 * np.abs(left_source - left_target) + left_source + left_target
            score[~fits] = np.iinfo(np.int32).max
            slots = score.argmin(axis=1)
            begins: npt.NDArray[np.bool_] = np.logical_not(np.any(fits, axis=1))
            slots[begins] = self.pool[lanes[begins]].argmin(axis=1)
            going = self.pool[lanes, slots] != _NEVER
            if not drain:
                going &= ~begins | (self.next[lanes] < self.stop[lanes])
            if not going.all():
                lanes, slots, begins = lanes[going], slots[going], begins[going]
                if not lanes.size:
                    return
            room_source[lanes[begins]], room_target[lanes[begins]] = self.row
            room_source[lanes] -= self.pool_source[lanes, slots]
            room_target[lanes] -= self.pool_target[lanes, slots]
            self.chosen[lanes, step] = self.pool[lanes, slots]
            self.begins[lanes, step] = begins
            self._refill(lanes, slots)

    def rows(self) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
        """Returns the examples placed, lane after lane, and which of them begin a row."""
        placed = self.chosen >= 0
        return self.waiting[self.chosen[placed]], self.begins[placed]

    def leftover(self) -> Int64Array:
        """Returns the examples that wait for the next round, oldest first within a lane, lane after lane."""
        left: Int64Array = np.sort(self.pool[self.pool != _NEVER])
        return np.take(self.waiting, left)
