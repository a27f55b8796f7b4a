"""Which example stands at which place of an epoch, for one source or a mixture of several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megaseq.data.order import Int64Array, permute, permute_places


class ExampleOrder:
    """The order of a training stream: a pure function of (seed, epoch, place), computed in O(1) for each place.

    One source: every epoch is a permutation of it. Several: the places of an epoch are dealt to the sources by a
    permutation, source k gets exactly `draws[k]` of them, and its j-th draw since the beginning of training is place
    j mod size of the permutation of its own epoch j // size. So each source is drawn once whole before any of its
    examples comes again, with no state but the epoch and the place.
    """

    def __init__(self, *, seed: int, names: Sequence[str], sizes: Sequence[int], draws: Sequence[int]) -> None:
        self._seed, self._names, self._sizes, self._draws = seed, tuple(names), tuple(sizes), tuple(draws)
        self._starts = np.concatenate([[0], np.cumsum(draws)]).astype(np.int64)

    @property
    def size(self) -> int:
        """Places in an epoch."""
        return int(self._starts[-1])

    def fingerprint(self) -> tuple[object, ...]:
        """All that decides the order, as plain values."""
        return self._seed, self._names, self._sizes, self._draws

    def examples(self, *, epoch: int, start: int, stop: int) -> tuple[Int64Array, Int64Array]:
        """Returns the source and the rank in that source of each of the places `start` to `stop` of `epoch`."""
        if len(self._sizes) == 1:
            ranks = permute(seed=self._seed, epoch=epoch, size=self.size, start=start, stop=stop)
            return np.zeros(stop - start, dtype=np.int64), ranks
        dealt = permute(seed=self._seed, epoch=epoch, stream="mixture", size=self.size, start=start, stop=stop)
        source_of = np.searchsorted(self._starts, dealt, side="right") - 1
        ranks = np.empty(stop - start, dtype=np.int64)
        for k in range(len(self._sizes)):
            mine = np.flatnonzero(source_of == k)
            ranks[mine] = self._ranks(k, draws=epoch * self._draws[k] + dealt[mine] - self._starts[k])
        return source_of.astype(np.int64), ranks

    def _ranks(self, k: int, *, draws: Int64Array) -> Int64Array:
        """Returns the ranks of source k's draws, counted since the beginning of training."""
        epochs, places = np.divmod(draws, max(1, self._sizes[k]))
        ranks = np.empty(len(draws), dtype=np.int64)
        by_epoch = np.argsort(epochs, kind="stable")
        firsts = np.flatnonzero(np.diff(epochs[by_epoch])) + 1
        for at in np.split(by_epoch, firsts) if len(draws) else ():
            ranks[at] = permute_places(
                seed=self._seed,
                epoch=int(epochs[at[0]]),
                stream=f"source/{self._names[k]}",
                size=self._sizes[k],
                places=places[at],
            )
        return ranks
