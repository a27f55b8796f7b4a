"""Bucketing: Lingvo's rules for bounds and limits, token limits, bounds chosen from the corpus."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.data.bucketing import Bucketing, choose_bounds
from megaseq.data.plan import Plan

IntArray = npt.NDArray[Any]


def plan_of(params: Bucketing.Params, source: IntArray, target: IntArray, **key: int) -> tuple[Bucketing, Plan]:
    """Fits and plans with defaults for the parts of the key that are not given."""
    batching = params.instantiate()
    batching.fit(source_lengths=source, target_lengths=target)
    plan = batching.plan(**{"seed": 1, "epoch": 0, "window": 0, **key}, source_lengths=source, target_lengths=target)
    return batching, plan


def test_a_key_equal_to_the_bound_goes_in_that_bucket_and_longer_ones_are_dropped() -> None:
    source = np.array([10, 11, 20, 21, 1, 5])
    target = np.array([1, 1, 1, 1, 20, 10])
    params = Bucketing.Params(bucket_upper_bound=(10, 20), bucket_batch_limit=(8, 8))
    _, plan = plan_of(params, source, target)
    assert sorted(sorted(batch.examples.tolist()) for batch in plan.batches()) == [[0, 5], [1, 2, 4]]
    assert plan.dropped.tolist() == [3]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=200),
    bounds=st.sets(st.integers(1, 60), min_size=1, max_size=6),
    limit=st.integers(1, 9),
    key=st.sampled_from(["max", "source", "target"]),
)
@settings(deadline=None, max_examples=100)
def test_batches_equal_those_of_a_loop(lengths: list[tuple[int, int]], bounds: set[int], limit: int, key: str) -> None:
    pairs = np.array(lengths, dtype=np.uint16).reshape(-1, 2)
    upper = tuple(sorted(bounds))
    limits = tuple(limit + index for index in range(len(upper)))
    params = Bucketing.Params(bucket_upper_bound=upper, bucket_batch_limit=limits)
    params.bucket_key = key  # type: ignore[assignment]
    _, plan = plan_of(params, pairs[:, 0], pairs[:, 1])
    # Lingvo's way: one example after the other, a batch whenever a bucket is full, the rest at the end.
    open_buckets: dict[int, list[int]] = {index: [] for index in range(len(upper))}
    expected, dropped = [], []
    for example, (source, target) in enumerate(lengths):
        value = {"max": max(source, target), "source": source, "target": target}[key]
        bucket = next((index for index, bound in enumerate(upper) if value <= bound), None)
        if bucket is None:
            dropped.append(example)
            continue
        open_buckets[bucket].append(example)
        if len(open_buckets[bucket]) == limits[bucket]:
            expected.append(open_buckets[bucket])
            open_buckets[bucket] = []
    expected += [rest for rest in open_buckets.values() if rest]
    assert sorted(batch.examples.tolist() for batch in plan.batches()) == sorted(expected)
    assert plan.dropped.tolist() == dropped
    for batch in plan.batches():
        assert batch.source_length == pairs[batch.examples, 0].max()
        assert batch.target_length == pairs[batch.examples, 1].max()
        assert batch.num_rows == len(batch.examples) == len(batch.row_offsets) - 1


@given(seed=st.integers(0, 2**32), max_tokens=st.integers(60, 4000), multiple=st.sampled_from([1, 4]))
@settings(deadline=None, max_examples=30)
def test_no_batch_has_more_than_max_tokens(seed: int, max_tokens: int, multiple: int) -> None:
    source, target = np.random.default_rng(seed).integers(1, 50, (2, 500))
    params = Bucketing.Params(max_tokens=max_tokens, num_buckets=5, max_length=50, multiple_of=multiple)
    batching, plan = plan_of(params, source, target)
    assert not len(plan.dropped)
    for batch in plan.batches():
        tokens = batch.num_rows * max(batch.source_length, batch.target_length)
        assert tokens <= max(max_tokens, multiple * 50)
    assert all(limit % multiple == 0 for limit in batching.batch_limits)


def test_pad_to_bound_gives_one_shape_per_bucket() -> None:
    source, target = np.random.default_rng(0).integers(1, 50, (2, 500))
    params = Bucketing.Params(bucket_upper_bound=(20, 50), bucket_batch_limit=(16,), pad_to_bound=True)
    _, plan = plan_of(params, source, target)
    assert {(batch.source_length, batch.target_length) for batch in plan.batches()} == {(20, 20), (50, 50)}


def padded_tokens(keys: IntArray, bounds: tuple[int, ...]) -> int:
    """Tokens of all keys, each padded to the first bound that holds it."""
    return int(np.asarray(bounds)[np.searchsorted(bounds, keys)].sum())


@given(keys=st.lists(st.integers(1, 12), min_size=1, max_size=40), num_buckets=st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_chosen_bounds_are_the_best_of_all(keys: list[int], num_buckets: int) -> None:
    array = np.array(keys)
    bounds = choose_bounds(keys=array, num_buckets=num_buckets, longest=12)
    assert bounds[-1] == 12
    assert list(bounds) == sorted(set(bounds))
    assert len(bounds) <= num_buckets
    best = min(
        padded_tokens(array, (*chosen, 12))
        for count in range(num_buckets)
        for chosen in itertools.combinations(range(1, 12), count)
    )
    assert padded_tokens(array, bounds) == best


def test_chosen_bounds_pad_less_than_even_ones() -> None:
    keys = np.clip(np.random.default_rng(0).lognormal(3, 0.8, 20_000).astype(int) + 1, 1, 2000)
    bounds = choose_bounds(keys=keys, num_buckets=8, longest=2000)
    even = tuple(range(250, 2001, 250))
    assert len(bounds) == 8
    assert padded_tokens(keys, bounds) < 0.4 * padded_tokens(keys, even)


def test_bounds_of_an_empty_corpus() -> None:
    assert choose_bounds(keys=np.empty(0, dtype=np.int64), num_buckets=4, longest=99) == (99,)


def test_batches_are_shuffled_by_the_key() -> None:
    source, target = np.random.default_rng(0).integers(1, 50, (2, 2000))
    params = Bucketing.Params(bucket_upper_bound=(10, 20, 30, 40, 50), bucket_batch_limit=(16,))
    _, plan = plan_of(params, source, target)
    _, again = plan_of(params, source, target)
    assert np.array_equal(plan.examples, again.examples)
    for change in ({"seed": 2}, {"epoch": 1}, {"window": 1}):
        _, other = plan_of(params, source, target, **change)
        assert not np.array_equal(plan.examples, other.examples)
        assert sorted(batch.examples.tolist() for batch in plan.batches()) == sorted(
            batch.examples.tolist() for batch in other.batches()
        )
    lengths = [batch.source_length for batch in plan.batches()]
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("pad_to_bound", [False, True])
@pytest.mark.parametrize("lengths", [[], [99, 98]])
def test_a_window_without_a_fitting_example_has_no_batches(lengths: list[int], pad_to_bound: bool) -> None:
    array = np.array(lengths, dtype=np.int32)
    params = Bucketing.Params(bucket_upper_bound=(10,), bucket_batch_limit=(4,), pad_to_bound=pad_to_bound)
    _, plan = plan_of(params, array, array)
    assert plan.num_batches == 0
    assert len(plan.dropped) == len(lengths)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "bucket_batch_limit: must be set where max_tokens"),
        ({"bucket_batch_limit": (4,), "max_tokens": 100}, "bucket_batch_limit: must be set where max_tokens"),
        ({"bucket_upper_bound": (20, 10), "bucket_batch_limit": (4,)}, "bucket_upper_bound: must ascend"),
        ({"bucket_upper_bound": (10, 20), "bucket_batch_limit": (4, 4, 4)}, "must have one number, or one"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"max_tokens": 100, "bucket_key": "source"}, "bucket_key: must be max with"),
        ({"bucket_batch_limit": (0,)}, "bucket_batch_limit: must be at least 1"),
        ({"max_tokens": 100, "num_buckets": 0}, "num_buckets: must be at least 1"),
    ],
)
def test_contradictory_params_are_named(fields: dict[str, Any], message: str) -> None:
    problems = Bucketing.Params(**fields).check()
    assert message in "\n".join(str(problem) for problem in problems)
