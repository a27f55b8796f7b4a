"""Ragged arrays in files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megaseq.data.columns import Column, ColumnWriter, ranges


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5))))
def test_ranges(pairs: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in pairs], dtype=np.int64)
    lengths = np.array([length for _, length in pairs], dtype=np.int64)
    expected = [i for start, length in pairs for i in range(start, start + length)]
    assert ranges(starts, lengths=lengths).tolist() == expected


def test_round_trip(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [], [65535], [], [4, 5]]
    with ColumnWriter(tmp_path, name="x") as writer:
        for part in (rows[:2], [], rows[2:]):
            values = np.array([value for row in part for value in row], dtype="<u2")
            writer.append(values, lengths=[len(row) for row in part])
    column = Column(tmp_path, name="x", dtype="<u2")
    assert len(column) == len(rows)
    for copy in (column, pickle.loads(pickle.dumps(column))):
        ids, lengths = copy.gather(np.array([4, 2, 1, 4, 0]))
        assert ids.tolist() == [4, 5, 65535, 4, 5, 1, 2, 3] and lengths.tolist() == [2, 1, 0, 2, 3]
        ids, lengths = copy.gather(np.array([], dtype=np.int64))
        assert ids.tolist() == [] and lengths.tolist() == []


def test_text_and_nothing_but_empty_sequences(tmp_path: Path) -> None:
    with ColumnWriter(tmp_path, name="t") as writer:
        writer.append("aü".encode(), lengths=[1, 0, 2])
    column = Column(tmp_path, name="t", dtype=np.uint8)
    assert column.read(np.array([2, 1, 0])) == ["ü".encode(), b"", b"a"]
    with ColumnWriter(tmp_path, name="e") as writer:
        writer.append(b"", lengths=[0, 0])
    assert Column(tmp_path, name="e", dtype=np.uint8).read(np.array([0, 1])) == [b"", b""]
