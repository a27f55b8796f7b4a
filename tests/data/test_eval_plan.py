"""Batches sorted by length."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megaseq.data import Bucketing, Packing
from megaseq.data.eval_plan import row_budget, sorted_plan


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=60),
    st.integers(1, 200),
    st.none() | st.integers(1, 5),
)
def test_every_example_once_within_the_budget(
    lengths: list[tuple[int, int]], budget: int, max_rows: int | None
) -> None:
    source = np.array([pair[0] for pair in lengths], dtype=np.int64)
    target = np.array([pair[1] for pair in lengths], dtype=np.int64)
    plan = sorted_plan(source_lengths=source, target_lengths=target, max_tokens=budget, max_rows=max_rows)
    assert sorted(plan.examples.tolist()) == list(range(len(lengths)))
    keys = np.maximum(source, target)[plan.examples].tolist()
    assert keys == sorted(keys, reverse=True)
    for batch in plan.batches():
        assert batch.num_rows == len(batch.examples) > 0
        assert batch.source_length == source[batch.examples].max()
        assert batch.target_length == target[batch.examples].max()
        longest = max(batch.source_length, batch.target_length)
        assert batch.num_rows == 1 or longest * batch.num_rows <= budget
        assert max_rows is None or batch.num_rows <= max_rows


def test_budget_of_training_batches() -> None:
    assert row_budget(Packing.Params(rows=4, source_length=10, target_length=20).instantiate()) == 80
    p = Bucketing.Params(bucket_upper_bound=(10, 20), bucket_batch_limit=(8, 2))
    assert row_budget(p.instantiate()) == 80
