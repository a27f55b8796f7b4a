"""Rows of a step's batch: micro-batches, and rows that only fill up."""

from __future__ import annotations

import torch

from megaseq.train.rows import micro_batches, padded
from tests.train.tiny import random_batch


def test_rows_that_fill_up_are_padding() -> None:
    batch = random_batch(rows=5)
    longer = padded(batch, multiple=4)
    assert longer.source.ids.shape[0] == 8
    assert torch.equal(longer.source.ids[:5], batch.source.ids)
    assert torch.equal(longer.target.weights[:5], batch.target.weights)
    assert not longer.target.weights[5:].any()
    for side in ("source", "target"):
        assert torch.equal(longer[side].segment_ids[:5], batch[side].segment_ids)
        assert not longer[side].segment_ids[5:].any()


def test_rows_without_segments_get_them_where_some_fill_up() -> None:
    batch = random_batch(rows=3)
    for side in (batch.source, batch.target):
        del side["segment_ids"]
    longer = padded(batch, multiple=2)
    for side in (longer.source, longer.target):
        assert side.segment_ids[:3].all() and not side.segment_ids[3:].any()


def test_a_multiple_is_left_alone() -> None:
    batch = random_batch(rows=8)
    assert padded(batch, multiple=4) is batch


def test_micro_batches_know_the_numbers_of_their_rows() -> None:
    parts = micro_batches(random_batch(rows=4), parts=2, data_rank=1, data_ranks=3)
    assert [(part.row_start, part.row_stride, part.batch.source.ids.shape[0]) for part in parts] == [
        (1, 3, 2),
        (7, 3, 2),
    ]
