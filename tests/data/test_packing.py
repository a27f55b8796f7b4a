"""Packing: every pair once, no row too full, the same rows in C++ and NumPy, and little padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base import native
from megaseq.data.packing import LANE, Packing, Rows, layout, pack_rows
from megaseq.data.plan import Plan

IntArray = npt.NDArray[Any]


def translation_lengths(count: int, *, seed: int = 0) -> tuple[IntArray, IntArray]:
    """Lengths like those of captions in two languages: log-normal, the target in proportion, with noise."""
    generator = np.random.default_rng(seed)
    source = np.clip(np.rint(generator.lognormal(2.7, 0.35, count)), 4, 60).astype(np.int32)
    target = np.clip(np.rint(0.96 * source + generator.normal(0, 2.5, count)), 3, 60).astype(np.int32)
    return source, target


def check_rows(rows: Rows, source: IntArray, target: IntArray, source_row: int, target_row: int) -> None:
    """Every example is in exactly one row, no row is empty, and none holds more than it has room for."""
    assert np.array_equal(np.sort(rows.examples), np.arange(len(source)))
    assert rows.offsets[0] == 0
    assert rows.offsets[-1] == len(source)
    if len(source):
        assert (np.diff(rows.offsets) > 0).all()
        assert np.add.reduceat(source[rows.examples].astype(np.int64), rows.offsets[:-1]).max() <= source_row
        assert np.add.reduceat(target[rows.examples].astype(np.int64), rows.offsets[:-1]).max() <= target_row


def pack_both(source: IntArray, target: IntArray, source_row: int, target_row: int, lookahead: int) -> Rows:
    """Packs with NumPy and, where it was built, with C++, which must give the same rows element by element."""
    arguments: Any = {
        "source_lengths": source,
        "target_lengths": target,
        "source_row": source_row,
        "target_row": target_row,
        "lookahead": lookahead,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGASEQ_NATIVE", "0")
        plain = pack_rows(**arguments)
    if native.available():
        compiled = pack_rows(**arguments)
        assert np.array_equal(plain.offsets, compiled.offsets)
        assert np.array_equal(plain.examples, compiled.examples)
    return plain


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 25)), max_size=300),
    rows=st.tuples(st.integers(40, 100), st.integers(25, 300)),
    lookahead=st.integers(1, 70),
)
@settings(deadline=None, max_examples=150)
def test_every_pair_once_and_native_equals_numpy(
    lengths: list[tuple[int, int]], rows: tuple[int, int], lookahead: int
) -> None:
    pairs = np.array(lengths, dtype=np.int32).reshape(-1, 2)
    packed = pack_both(pairs[:, 0], pairs[:, 1], *rows, lookahead)
    check_rows(packed, pairs[:, 0], pairs[:, 1], *rows)


@given(
    count=st.integers(2 * LANE - 2, 5 * LANE),
    seed=st.integers(0, 2**32),
    lookahead=st.sampled_from([1, 16, 64, 1100]),
    rows=st.tuples(st.integers(60, 700), st.integers(60, 700)),
)
@settings(deadline=None, max_examples=8)
def test_several_lanes(count: int, seed: int, lookahead: int, rows: tuple[int, int]) -> None:
    source, target = translation_lengths(count, seed=seed)
    packed = pack_both(source, target, *rows, lookahead)
    check_rows(packed, source, target, *rows)


@pytest.mark.parametrize("rows", [(65_536, 65_536), (65_536, 1), (1, 65_536), (65_535, 3)])
def test_the_longest_rows_do_not_overflow(rows: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    source = generator.integers(0, rows[0] + 1, 3000).astype(np.int32)
    target = generator.integers(0, rows[1] + 1, 3000).astype(np.int32)
    check_rows(pack_both(source, target, *rows, 64), source, target, *rows)


@pytest.mark.parametrize("length", [128, 256, 512])
def test_rows_are_full_on_both_sides(length: int) -> None:
    source, target = translation_lengths(29_000)
    batching = Packing.Params(source_length=length, rows=8192 // length).instantiate()
    batching.fit(source_lengths=source, target_lengths=target)
    plan = batching.plan(seed=1, epoch=0, window=0, source_lengths=source, target_lengths=target)
    fill = plan.fill(source_lengths=source, target_lengths=target)
    assert min(fill) > 0.93


def test_lingvos_example() -> None:
    source, target = np.array([3, 2, 1]), np.array([4, 1, 5])
    rows = pack_both(source, target, 5, 5, 64)
    of_source = layout(rows=rows, lengths=source, row_length=5)
    of_target = layout(rows=rows, lengths=target, row_length=5)
    assert of_source.segment_ids.tolist() == [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]]
    assert of_source.positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert of_source.examples.tolist() == [[0, 0, 0, 1, 1], [2, 0, 0, 0, 0]]
    assert of_target.segment_ids.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 1, 1]]
    assert of_target.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]


@given(lengths=st.lists(st.integers(0, 6), max_size=40), spare=st.integers(0, 3))
@settings(deadline=None)
def test_layout_equals_a_loop(lengths: list[int], spare: int) -> None:
    sizes = np.array(lengths, dtype=np.int32)
    rows = pack_both(sizes, sizes, 9, 9, 4)
    count = len(rows.offsets) - 1 + spare
    expected = np.zeros((3, count, 9), dtype=np.int64)
    for row in range(len(rows.offsets) - 1):
        column = 0
        for segment, example in enumerate(rows.examples[rows.offsets[row] : rows.offsets[row + 1]], start=1):
            for position in range(lengths[example]):
                expected[:, row, column] = segment, position, example
                column += 1
    found = layout(rows=rows, lengths=sizes, row_length=9, num_rows=count)
    assert np.array_equal(np.stack(found), expected)


def plan_of(batching: Packing, source: IntArray, target: IntArray, **key: int) -> Plan:
    """Plans with defaults for the parts of the key that are not given."""
    return batching.plan(**{"seed": 1, "epoch": 0, "window": 0, **key}, source_lengths=source, target_lengths=target)


def test_every_example_is_in_the_plan_or_dropped() -> None:
    source, target = translation_lengths(5000)
    source[17], target[4000] = 61, 99
    batching = Packing.Params(source_length=60, target_length=64, rows=7).instantiate()
    plan = plan_of(batching, source, target)
    assert plan.dropped.tolist() == [17, 4000]
    assert np.array_equal(np.sort(np.concatenate([plan.examples, plan.dropped])), np.arange(5000))
    assert set(plan.num_rows.tolist()) == {7}
    assert set(plan.source_lengths.tolist()) == {60}
    assert set(plan.target_lengths.tolist()) == {64}
    rows = [len(batch.row_offsets) - 1 for batch in plan.batches()]
    assert set(rows[:-1]) == {7}
    assert 1 <= rows[-1] <= 7
    for batch in plan.batches():
        sums = np.add.reduceat(source[batch.examples], batch.row_offsets[:-1])
        assert sums.max() <= 60


@given(ranks=st.integers(1, 9), count=st.integers(1, 400), num_rows=st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_ranks_share_each_batch(ranks: int, count: int, num_rows: int) -> None:
    source, target = translation_lengths(count)
    batching = Packing.Params(source_length=64, target_length=64, rows=num_rows).instantiate()
    plan = plan_of(batching, source, target)
    for batch in plan.batches():
        rows = sorted(tuple(row) for row in np.split(batch.examples, batch.row_offsets[1:-1]))
        shards = [batch.shard(rank=rank, ranks=ranks) for rank in range(ranks)]
        dealt = [tuple(row) for s in shards if len(s.examples) for row in np.split(s.examples, s.row_offsets[1:-1])]
        assert sorted(dealt) == rows
        assert {shard.num_rows for shard in shards} == {-(-num_rows // ranks)}
        assert all(len(shard.row_offsets) - 1 <= shard.num_rows for shard in shards)


def test_the_plan_depends_on_the_key_and_on_nothing_else() -> None:
    source, target = translation_lengths(3000)
    first, again = (Packing.Params(target_length=256).instantiate() for _ in range(2))
    plan = plan_of(first, source, target)
    plan_of(again, target, source, epoch=5)
    same = plan_of(again, source, target)
    assert np.array_equal(plan.examples, same.examples)
    for change in ({"seed": 2}, {"epoch": 1}, {"window": 1}):
        assert not np.array_equal(plan.examples, plan_of(first, source, target, **change).examples)


def test_an_empty_window_has_no_batches() -> None:
    empty = np.empty(0, dtype=np.int32)
    plan = plan_of(Packing.Params().instantiate(), empty, empty)
    assert plan.num_batches == 0
    assert list(plan.batches()) == []


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 256), (0.93, 240), (1.5, 384), (0.001, 8)])
def test_the_target_length_comes_from_the_corpus(ratio: float, expected: int) -> None:
    source = np.full(1000, 1000, dtype=np.uint16)
    target = np.full(1000, round(1000 * ratio), dtype=np.uint16)
    batching = Packing.Params(source_length=256).instantiate()
    batching.fit(source_lengths=source, target_lengths=target)
    assert batching.target_length == expected


def test_pairs_longer_than_the_row_are_refused() -> None:
    with pytest.raises(ValueError, match="must have pairs that fit rows of 5 and 5"):
        pack_rows(source_lengths=np.array([6]), target_lengths=np.array([1]), source_row=5, target_row=5)
    with pytest.raises(ValueError, match="must have rows of 1 to 65536, but is 0, 5"):
        pack_rows(source_lengths=np.array([0]), target_lengths=np.array([1]), source_row=0, target_row=5)


def test_params_out_of_range_are_named() -> None:
    problems = Packing.Params(rows=0, source_length=70_000, window=0, lookahead=-1).check()
    text = "\n".join(str(problem) for problem in problems)
    for name in ("rows", "source_length", "window", "lookahead"):
        assert f"{name}: must be" in text
