"""Batches for evaluation: sorted by length, one example a row."""

from __future__ import annotations

import numpy as np

from megaseq.data.bucketing import Bucketing
from megaseq.data.order import Int64Array
from megaseq.data.packing import Packing
from megaseq.data.plan import Batching, Lengths, Plan

_DEFAULT_TOKENS = 8192


def row_budget(batching: Batching) -> int:
    """Returns the padded tokens of the larger side of a training batch."""
    if isinstance(batching, Packing):
        return batching.params.rows * max(batching.source_length, batching.target_length)
    if isinstance(batching, Bucketing):
        return max(bound * limit for bound, limit in zip(batching.bounds, batching.batch_limits, strict=True))
    return _DEFAULT_TOKENS


def sorted_plan(*, source_lengths: Lengths, target_lengths: Lengths, max_tokens: int, max_rows: int | None) -> Plan:
    """Plans batches of examples of like length, the longest first, so that what does not fit memory shows at once.

    Args:
        source_lengths: Tokens of each source, [examples].
        target_lengths: Tokens of each target, [examples].
        max_tokens: Padded tokens of the larger side of a batch, at most, unless a single example has more.
        max_rows: Rows of a batch, at most.
    """
    keys = np.maximum(source_lengths, target_lengths).astype(np.int64)
    # Equal keys by source length, then in order: beside less padding, it makes the plan independent of the sort.
    examples = np.lexsort((np.arange(len(keys)), -source_lengths.astype(np.int64), -keys)).astype(np.int64)
    bounds = [0]
    while bounds[-1] < len(examples):
        rows = max(1, max_tokens // int(keys[examples[bounds[-1]]]))
        bounds.append(min(len(examples), bounds[-1] + (min(rows, max_rows) if max_rows else rows)))
    offsets = np.array(bounds, dtype=np.int64)
    return Plan(
        batch_offsets=offsets,
        row_offsets=np.arange(len(examples) + 1, dtype=np.int64),
        examples=examples,
        num_rows=np.diff(offsets),
        source_lengths=_longest(source_lengths[examples], offsets=offsets),
        target_lengths=_longest(target_lengths[examples], offsets=offsets),
        dropped=np.empty(0, dtype=np.int64),
    )


def _longest(lengths: Lengths, *, offsets: Int64Array) -> Int64Array:
    if not len(lengths):
        return np.empty(0, dtype=np.int64)
    longest: Int64Array = np.maximum.reduceat(lengths.astype(np.int64), offsets[:-1])
    return longest
