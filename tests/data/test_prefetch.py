"""An iterator in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from megaseq.data.prefetch import Prefetcher


def test_order_and_end() -> None:
    for depth in (1, 5):
        prefetcher = Prefetcher(iter(range(20)), depth=depth)
        assert list(prefetcher) == list(range(20))
        assert list(prefetcher) == []


def test_errors_reach_the_reader_in_their_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    prefetcher = Prefetcher(items(), depth=4)
    assert next(prefetcher) == 1
    with pytest.raises(ValueError, match="broken"):
        next(prefetcher)
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_close_ends_the_thread_and_no_more_than_depth_are_made() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(10**9):
            made.append(i)
            yield i

    prefetcher = Prefetcher(items(), depth=2)
    assert next(prefetcher) == 0
    time.sleep(0.05)
    assert len(made) <= 5
    prefetcher.close()
    assert not any(thread.name == "megaseq-prefetch" and thread.is_alive() for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(prefetcher)
