"""The pairs of one window in memory, and batches made from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megaseq.base import NestedMap
from megaseq.data.columns import ranges
from megaseq.data.order import Int64Array
from megaseq.data.plan import PlannedBatch
from megaseq.data.tokenizer import Tokenizer


class Side(NamedTuple):
    """The sources or targets of a window: `ids[starts[i]:starts[i] + lengths[i]]`, without special ids."""

    ids: npt.NDArray[Any]
    starts: Int64Array
    lengths: Int64Array

    def replaced(self, where: npt.NDArray[np.bool_], *, other: Side) -> Side:
        """Returns a side with the examples `where` taken from `other`."""
        starts = np.where(where, len(self.ids) + other.starts, self.starts)
        lengths = np.where(where, other.lengths, self.lengths)
        return Side(np.concatenate([self.ids, other.ids]), starts, lengths)


class Window(NamedTuple):
    """Consecutive examples of an epoch, in its order, with all that batches need."""

    source: Side
    target: Side
    example_ids: Int64Array
    """Numbers of the examples in the input, [examples]."""


class _Placed(NamedTuple):
    """One side of a batch, [rows, length] each."""

    tokens: npt.NDArray[np.int64]
    """Ids with eos at the end of each segment."""
    inputs: npt.NDArray[np.int64]
    """The same one place later, bos first."""
    segment_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]


def make_batch(
    window: Window, *, planned: PlannedBatch, source: Tokenizer, target: Tokenizer, with_example_ids: bool
) -> NestedMap:
    """Makes the tensors of one planned batch.

    Args:
        window: The pairs.
        planned: Which of them stand where.
        source: Gives the special ids of source rows.
        target: Gives the special ids of target rows.
        with_example_ids: Adds `example_ids` [rows], -1 for an empty row; rows must have at most one example.

    Returns:
        `source` {ids, segment_ids, positions} [rows, source length] and `target` {ids, labels, weights, segment_ids,
        positions} [rows, target length]. Segment ids count from 1 and are 0 in padding; each segment ends with eos;
        target ids are the labels one place later with bos in front. Ids and positions int64, segment ids int32, weights
        float32.
    """
    sources = _place(window.source, planned=planned, width=planned.source_length, tokenizer=source)
    targets = _place(window.target, planned=planned, width=planned.target_length, tokenizer=target)
    batch = NestedMap(
        source=NestedMap(
            ids=torch.from_numpy(sources.tokens),
            segment_ids=torch.from_numpy(sources.segment_ids),
            positions=torch.from_numpy(sources.positions),
        ),
        target=NestedMap(
            ids=torch.from_numpy(targets.inputs),
            labels=torch.from_numpy(targets.tokens),
            weights=torch.from_numpy((targets.segment_ids > 0).astype(np.float32)),
            segment_ids=torch.from_numpy(targets.segment_ids),
            positions=torch.from_numpy(targets.positions),
        ),
    )
    if with_example_ids:
        numbers = np.full(planned.num_rows, -1, dtype=np.int64)
        filled = np.flatnonzero(np.diff(planned.row_offsets))
        numbers[filled] = window.example_ids[planned.examples]
        batch["example_ids"] = torch.from_numpy(numbers)
    return batch


def _place(side: Side, *, planned: PlannedBatch, width: int, tokenizer: Tokenizer) -> _Placed:
    """Lays the examples of a batch out in rows, each behind the other."""
    examples, offsets = planned.examples, planned.row_offsets
    lengths = side.lengths[examples]
    sizes = lengths + 1
    stops = np.cumsum(sizes)
    starts = stops - sizes
    per_row = np.diff(offsets)
    row_of = np.repeat(np.arange(len(per_row)), per_row)
    first_of_row = offsets[:-1][row_of]
    places = ranges(row_of * width + starts - starts[first_of_row], lengths=sizes)
    tokens = np.full(int(sizes.sum()), tokenizer.eos_id, dtype=np.int64)
    tokens[ranges(starts, lengths=lengths)] = side.ids[ranges(side.starts[examples], lengths=lengths)]
    inputs = np.empty_like(tokens)
    inputs[1:] = tokens[:-1]
    inputs[starts] = tokenizer.bos_id
    shape = (planned.num_rows, width)
    room = planned.num_rows * width
    padded = [np.full(room, tokenizer.pad_id, dtype=np.int64) for _ in range(2)]
    padded[0][places], padded[1][places] = tokens, inputs
    segment_ids = np.zeros(room, dtype=np.int32)
    segment_ids[places] = np.repeat(np.arange(len(examples)) - first_of_row + 1, sizes)
    positions = np.zeros(room, dtype=np.int64)
    positions[places] = np.arange(len(tokens)) - np.repeat(starts, sizes)
    return _Placed(
        padded[0].reshape(shape), padded[1].reshape(shape), segment_ids.reshape(shape), positions.reshape(shape)
    )
