"""Which pairs take part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaseq.data.columns import Column, ColumnWriter
from megaseq.data.selection import Limits, Selection, lengths_of, misfits, screen


@given(st.integers(1, 40), st.data())
def test_ranks_of_what_is_kept(total: int, data: st.DataObject) -> None:
    dropped = sorted(data.draw(st.sets(st.integers(0, total - 1))))
    kept = [i for i in range(total) if i not in dropped]
    selection = Selection(total, dropped=np.array(dropped, dtype=np.int64))
    assert len(selection) == len(kept)
    assert selection.indices(np.arange(len(kept), dtype=np.int64)).tolist() == kept


@pytest.fixture
def columns(tmp_path: Path) -> dict[str, Column]:
    made = {}
    for name, lengths in (("source", [0, 3, 4, 5, 1, 9]), ("target", [1, 3, 0, 2, 6, 9])):
        with ColumnWriter(tmp_path, name=name) as writer:
            writer.append(np.zeros(sum(lengths), dtype="<u2"), lengths=lengths)
        made[name] = Column(tmp_path, name=name, dtype="<u2")
    return made


def test_screening(columns: dict[str, Column]) -> None:
    # Limits count eos, so a source of 5 tokens has no room in 5.
    found = screen(**columns, limits=Limits(5, 6, truncate=False, keep_empty=False))
    assert (found.empty.tolist(), found.too_long.tolist()) == ([0, 2], [3, 4, 5])
    assert found.dropped.tolist() == [0, 2, 3, 4, 5]
    tagged = screen(**columns, limits=Limits(5, 6, truncate=False, keep_empty=False), num_tags=1)
    assert (tagged.empty.tolist(), tagged.too_long.tolist()) == ([0, 2, 4], [3, 5])
    kept = screen(**columns, limits=Limits(5, 6, truncate=True, keep_empty=True))
    assert kept.dropped.tolist() == []
    empty_kept = screen(**columns, limits=Limits(5, 6, truncate=False, keep_empty=True))
    assert (empty_kept.empty.tolist(), empty_kept.too_long.tolist()) == ([], [3, 4, 5])


def test_lengths_are_cut_and_misfits_found(columns: dict[str, Column]) -> None:
    limits = Limits(5, 6, truncate=True, keep_empty=True)
    lengths = lengths_of(**columns, indices=np.array([5, 0, 3]), limits=limits)
    assert (lengths.source.tolist(), lengths.target.tolist()) == ([5, 1, 5], [6, 2, 3])
    dropped = np.array([5], dtype=np.int64)
    assert misfits(**columns, limits=limits, dropped=dropped, fits=lambda lengths: lengths.target < 6).tolist() == [4]
