"""The rows of a step's batch: which this process has, and how they become micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megaseq.base import NestedMap


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a step's batch, and their numbers in the global batch."""

    batch: NestedMap
    index: int
    """Among the micro-batches of this process."""
    row_start: int
    """Number of the first row in the step's global batch."""
    row_stride: int
    """From one row to the next, in these numbers."""


def split_rows(batch: NestedMap, *, parts: int) -> list[NestedMap]:
    """Splits the rows of every tensor of `batch` into `parts` runs of equal length, the last ones one longer.

    A batch of fewer rows than parts gives one part a row.
    """
    if parts == 1:
        return [batch]
    tensors = batch.flatten()
    return [batch.pack([tensor[start:stop] for tensor in tensors]) for start, stop in _bounds(batch, parts=parts)]


def micro_batches(batch: NestedMap, *, parts: int, data_rank: int = 0, data_ranks: int = 1) -> list[MicroBatch]:
    """Splits what a data rank has of a global batch, whose rows are dealt out one by one (`PlannedBatch.shard`).

    Args:
        batch: this rank's rows.
        parts: micro-batches; fewer where there are fewer rows.
        data_rank: which rows these are.
        data_ranks: among how many the rows were dealt out.
    """
    return [
        MicroBatch(batch=part, index=index, row_start=data_rank + first * data_ranks, row_stride=data_ranks)
        for index, (part, (first, _)) in enumerate(
            zip(split_rows(batch, parts=parts), _bounds(batch, parts=parts), strict=True)
        )
    ]


def padded(batch: NestedMap, *, multiple: int) -> NestedMap:
    """Returns `batch` with rows of nothing but padding behind the last until their number is a multiple."""
    rows = batch.flatten()[0].shape[0]
    missing = -rows % multiple
    if not missing:
        return batch
    longer = batch.transform(lambda tensor: torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]))
    for side in (longer.source, longer.target):
        side.setdefault("segment_ids", torch.ones_like(side.ids))
        for name in ("segment_ids", "row_segment_ids", "weights"):
            if name in side:
                side[name] = torch.cat([side[name][:rows], torch.zeros_like(side[name][rows:])])
    return longer


def _bounds(batch: NestedMap, *, parts: int) -> Iterator[tuple[int, int]]:
    rows = batch.flatten()[0].shape[0]
    parts = max(1, min(parts, rows))
    return itertools.pairwise(rows * index // parts for index in range(parts + 1))
