"""Batches against a plain loop over rows, segments and tokens."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megaseq.data.plan import PlannedBatch
from megaseq.data.tokenizer import Bytes, build
from megaseq.data.window import Side, Window, make_batch

TOKENIZER = build(Bytes.Params())
PAD, BOS, EOS = 0, 2, 3


def make_side(draw: random.Random, count: int) -> tuple[Side, list[list[int]]]:
    """A side whose examples lie in the flat array in another order than their own, with gaps."""
    rows = [[draw.randrange(4, 260) for _ in range(draw.randrange(5))] for _ in range(count)]
    flat, starts = [9], [0] * count
    for i in draw.sample(range(count), count):
        starts[i] = len(flat)
        flat += [*rows[i], 9]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Side(np.array(flat, dtype=np.uint16), np.array(starts, dtype=np.int64), lengths), rows


def lay_out(rows: list[list[list[int]]], num_rows: int, width: int) -> dict[str, list[list[int]]]:
    result: dict[str, list[list[int]]] = {name: [] for name in ("tokens", "inputs", "segment_ids", "positions")}
    for r in range(num_rows):
        segments = rows[r] if r < len(rows) else []
        tokens, inputs, ids, positions = [], [], [], []
        for number, segment in enumerate(segments, 1):
            tokens += [*segment, EOS]
            inputs += [BOS, *segment]
            ids += [number] * (len(segment) + 1)
            positions += range(len(segment) + 1)
        for name, values in (("tokens", tokens), ("inputs", inputs), ("segment_ids", ids), ("positions", positions)):
            result[name].append(values + [0] * (width - len(values)))
    return result


@given(st.randoms(use_true_random=False), st.integers(0, 5), st.integers(0, 2), st.integers(0, 3))
def test_against_a_plain_loop(draw: random.Random, count: int, empty_rows: int, room: int) -> None:
    per_row = [draw.randrange(4) for _ in range(count)]
    total = sum(per_row)
    source, source_rows = make_side(draw, total + 2)
    target, target_rows = make_side(draw, total + 2)
    examples = draw.sample(range(total + 2), total)
    offsets = np.concatenate([[0], np.cumsum(per_row)]).astype(np.int64)
    rows = [examples[offsets[r] : offsets[r + 1]] for r in range(count)]
    widths = [
        max([sum(len(texts[i]) + 1 for i in row) for row in rows], default=0) + room
        for texts in (source_rows, target_rows)
    ]
    planned = PlannedBatch(
        row_offsets=offsets,
        examples=np.array(examples, dtype=np.int64),
        num_rows=count + empty_rows,
        source_length=widths[0],
        target_length=widths[1],
    )
    numbers = np.arange(100, 100 + total + 2)
    batch = make_batch(
        Window(source, target, numbers), planned=planned, source=TOKENIZER, target=TOKENIZER, with_example_ids=False
    )
    wanted = [
        lay_out([[texts[i] for i in row] for row in rows], count + empty_rows, width)
        for texts, width in ((source_rows, widths[0]), (target_rows, widths[1]))
    ]
    assert set(batch) == {"source", "target"}
    assert batch.source.ids.tolist() == wanted[0]["tokens"]
    assert batch.target.labels.tolist() == wanted[1]["tokens"]
    assert batch.target.ids.tolist() == wanted[1]["inputs"]
    assert batch.target.weights.tolist() == [[float(i > 0) for i in row] for row in wanted[1]["segment_ids"]]
    for side, values in ((batch.source, wanted[0]), (batch.target, wanted[1])):
        assert side.segment_ids.tolist() == values["segment_ids"]
        assert side.positions.tolist() == values["positions"]
        assert (str(side.ids.dtype), str(side.segment_ids.dtype)) == ("torch.int64", "torch.int32")
    if all(size <= 1 for size in per_row):
        batch = make_batch(
            Window(source, target, numbers), planned=planned, source=TOKENIZER, target=TOKENIZER, with_example_ids=True
        )
        ids = [100 + row[0] if row else -1 for row in rows] + [-1] * empty_rows
        assert batch.example_ids.tolist() == ids
