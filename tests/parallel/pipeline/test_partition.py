"""Splitting units by cost: as good as trying every split."""

from __future__ import annotations

import itertools
import random

import pytest

from megaseq.parallel.pipeline import balance


def _all_splits(count: int, *, parts: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, count), parts - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, count))) for cut in cuts]


def _loads(costs: list[float], *, sizes: tuple[int, ...]) -> list[float]:
    bounds = [0, *itertools.accumulate(sizes)]
    return [sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)]


@pytest.mark.parametrize("seed", range(60))
def test_no_split_is_better(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 9)
    parts = draw.randint(1, count)
    costs = [float(draw.choice((0, 1, 2, 3, 5, 8))) for _ in range(count)]
    sizes = balance(costs, parts=parts)
    assert sum(sizes) == count
    assert len(sizes) == parts
    assert min(sizes) >= 1
    every = [_loads(costs, sizes=other) for other in _all_splits(count, parts=parts)]
    loads = _loads(costs, sizes=sizes)
    dearest = min(max(other) for other in every)
    assert max(loads) == dearest
    assert sum(x * x for x in loads) == min(sum(x * x for x in other) for other in every if max(other) == dearest)


def test_more_parts_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one unit for each of 3 parts, but gets 2"):
        balance([1.0, 1.0], parts=3)


def test_costs_that_are_no_round_numbers() -> None:
    costs = [0.1] * 30
    assert balance(costs, parts=3) == (10, 10, 10)
