"""The epoch permutation: a bijection, random access, unbiased, and the same in C++ and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base import native
from megaseq.data.order import num_windows, permute, window_range

keys = {
    "seed": st.integers(0, 2**63),
    "epoch": st.integers(0, 10_000),
    "stream": st.sampled_from(["examples", "rows/3"]),
}

FROZEN_TEN = [7, 8, 9, 4, 5, 0, 3, 2, 6, 1]
FROZEN_HUGE = [105031593313, 978294278332, 893098668499]


@pytest.fixture(params=["numpy", "native"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each implementation; the compiled one only where it was built."""
    if request.param == "numpy":
        monkeypatch.setenv("MEGASEQ_NATIVE", "0")
    elif not native.available():
        pytest.skip("the C++ extension is not built")
    return str(request.param)


@given(size=st.integers(1, 3000), **keys)
@settings(deadline=None, max_examples=60)
def test_is_a_bijection(size: int, seed: int, epoch: int, stream: str) -> None:
    order = permute(seed=seed, epoch=epoch, stream=stream, size=size)
    assert np.array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 65_535, 65_537, 300_007])
def test_is_a_bijection_at_the_edges_of_domains(size: int, implementation: str) -> None:
    order = permute(seed=1, epoch=2, size=size)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@given(size=st.integers(1, 2**62), place=st.floats(0, 1, exclude_max=True), **keys)
@settings(deadline=None, max_examples=60)
def test_any_part_is_the_same_part_of_the_whole(size: int, place: float, seed: int, epoch: int, stream: str) -> None:
    start = min(int(size * place), size - 1)
    stop = min(size, start + 50)
    part = permute(seed=seed, epoch=epoch, stream=stream, size=size, start=start, stop=stop)
    assert part.min() >= 0
    assert part.max() < size
    assert len(set(part.tolist())) == stop - start
    middle = (start + stop) // 2
    rest = permute(seed=seed, epoch=epoch, stream=stream, size=size, start=middle, stop=stop)
    assert np.array_equal(rest, part[middle - start :])


@pytest.mark.skipif(not native.available(), reason="the C++ extension is not built")
@given(size=st.integers(1, 2**62), place=st.floats(0, 1, exclude_max=True), **keys)
@settings(deadline=None, max_examples=100)
def test_native_equals_numpy(size: int, place: float, seed: int, epoch: int, stream: str) -> None:
    start = min(int(size * place), size - 1)
    stop = min(size, start + 100)
    compiled = permute(seed=seed, epoch=epoch, stream=stream, size=size, start=start, stop=stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGASEQ_NATIVE", "0")
        plain = permute(seed=seed, epoch=epoch, stream=stream, size=size, start=start, stop=stop)
    assert np.array_equal(compiled, plain)


def test_frozen_values(implementation: str) -> None:
    # A change here breaks the resuming of every run that an earlier version began.
    assert permute(seed=1, epoch=0, size=10).tolist() == FROZEN_TEN
    assert permute(seed=7, epoch=3, stream="rows/0", size=1 << 40, start=12345, stop=12348).tolist() == FROZEN_HUGE


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 1}, {"stream": "rows/0"}])
def test_each_part_of_the_key_changes_the_order(change: dict[str, object]) -> None:
    base = permute(seed=1, epoch=0, size=10_000)
    other = permute(**{"seed": 1, "epoch": 0, "size": 10_000, **change})  # type: ignore[arg-type]
    # Of two unrelated orders about one place in all is the same.
    assert (base == other).sum() < 10


@pytest.mark.parametrize("size", [2, 3, 5, 6, 13, 64, 100])
def test_every_value_comes_equally_often_at_every_place(size: int) -> None:
    trials = 3000
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), permute(seed=seed, epoch=0, size=size)] += 1
    expected = trials / size
    # A doubly stochastic table has (size - 1)^2 degrees of freedom; 5 sigma of that chi-square.
    freedom = (size - 1) ** 2
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 10


def test_neighbours_are_uncorrelated() -> None:
    order = permute(seed=3, epoch=1, size=100_003).astype(float)
    for lag in (1, 2, 3, 17, 256):
        correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(len(order))


def test_small_orders_reach_all_permutations() -> None:
    seen = {tuple(permute(seed=seed, epoch=0, size=4).tolist()) for seed in range(1000)}
    assert len(seen) == 24


def test_a_range_outside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have 0 <= start <= stop <= size, but is 3, 11, 10"):
        permute(seed=1, epoch=0, size=10, start=3, stop=11)


def test_an_empty_range_is_empty() -> None:
    assert permute(seed=1, epoch=0, size=0).shape == (0,)
    assert permute(seed=1, epoch=0, size=10, start=4, stop=4).shape == (0,)


@given(size=st.integers(1, 10**12), window=st.integers(1, 10**6))
@settings(deadline=None)
def test_windows_tile_the_epoch(size: int, window: int) -> None:
    windows = num_windows(size=size, window=window)
    for index in {0, windows // 3, windows // 2, max(0, windows - 2), windows - 1}:
        start, stop = window_range(size=size, window=window, index=index)
        assert 0 < stop - start <= window
        if index + 1 < windows:
            assert window_range(size=size, window=window, index=index + 1)[0] == stop
    assert window_range(size=size, window=window, index=0)[0] == 0
    assert window_range(size=size, window=window, index=windows - 1)[1] == size


def test_a_window_outside_the_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="must have 0 <= index < 2, but is 2"):
        window_range(size=10, window=5, index=2)
