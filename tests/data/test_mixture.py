"""Mixtures: exact parts, and the order of their examples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base.errors import ParamsError
from megaseq.data import Mixture, ParallelText
from megaseq.data.example_order import ExampleOrder
from megaseq.data.mixture import apportion, components
from megaseq.data.order import permute

TEXT = ParallelText.Params(source_files="a", target_files="b")


@given(st.integers(0, 10_000), st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6))
def test_parts_are_whole_and_within_one_of_exact(total: int, weights: list[float]) -> None:
    parts = apportion(total, weights=weights)
    assert sum(parts) == total
    assert all(abs(part - total * w / sum(weights)) < 1 for part, w in zip(parts, weights, strict=True))


def test_draws_by_weight_and_temperature() -> None:
    mixture = Mixture.Params(sources={"a": TEXT, "b": TEXT})
    assert mixture.instantiate().draws([900, 100]) == [900, 100]
    assert mixture.replace(temperature=2.0).instantiate().draws([900, 100]) == [750, 250]
    assert mixture.replace(weights={"a": 1, "b": 4}).instantiate().draws([900, 100]) == [200, 800]
    assert [component.name for component in components(mixture)] == ["a", "b"]
    assert [component.name for component in components(TEXT)] == [""]


@pytest.mark.parametrize(
    "change", [{"sources": {}}, {"weights": {"a": 1.0}}, {"weights": {"a": 0.0, "b": 0.0}}, {"temperature": 0.0}]
)
def test_what_contradicts_itself(change: dict[str, object]) -> None:
    with pytest.raises(ParamsError):
        Mixture.Params(sources={"a": TEXT, "b": TEXT}).replace(**change).instantiate()


@settings(max_examples=30)
@given(st.data())
def test_each_example_once_in_each_epoch_of_its_source(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=4))
    draws = apportion(
        sum(sizes), weights=data.draw(st.lists(st.floats(0.05, 5.0), min_size=len(sizes), max_size=len(sizes)))
    )
    order = ExampleOrder(seed=3, names=[f"s{k}" for k in range(len(sizes))], sizes=sizes, draws=draws)
    assert order.size == sum(sizes)
    drawn: list[list[int]] = [[] for _ in sizes]
    for epoch in range(4):
        cut = data.draw(st.integers(0, order.size))
        parts = [
            order.examples(epoch=epoch, start=0, stop=cut),
            order.examples(epoch=epoch, start=cut, stop=order.size),
        ]
        whole = order.examples(epoch=epoch, start=0, stop=order.size)
        for k in (0, 1):
            assert np.concatenate([part[k] for part in parts]).tolist() == whole[k].tolist()
        assert [int((whole[0] == k).sum()) for k in range(len(sizes))] == draws
        # What is at a place is the draw that the mixture's permutation deals there; put them in the order of draws.
        dealt = permute(seed=3, epoch=epoch, stream="mixture", size=order.size)
        for k in range(len(sizes)):
            for place in np.argsort(dealt):
                if whole[0][place] == k:
                    drawn[k].append(int(whole[1][place]))
    for size, sequence in zip(sizes, drawn, strict=True):
        for start in range(0, len(sequence) - size + 1, size):
            assert sorted(sequence[start : start + size]) == list(range(size))
        counts = Counter(sequence).values()
        assert not counts or max(counts) <= -(-len(sequence) // size)


def test_one_source_is_its_permutation() -> None:
    order = ExampleOrder(seed=9, names=[""], sizes=[50], draws=[50])
    for epoch in (0, 3):
        sources, ranks = order.examples(epoch=epoch, start=10, stop=40)
        assert not sources.any()
        assert ranks.tolist() == permute(seed=9, epoch=epoch, size=50)[10:40].tolist()


def test_sources_with_no_draws() -> None:
    order = ExampleOrder(seed=1, names=["a", "b", "c"], sizes=[3, 0, 4], draws=[7, 0, 0])
    sources, ranks = order.examples(epoch=0, start=0, stop=7)
    assert not sources.any() and sorted(Counter(ranks.tolist()).values()) == [2, 2, 3]
