"""What all ranks decide together: whether a signal has come to one of them, and whether the time is up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megaseq.base import NestedMap
from megaseq.parallel.process import Team, Vote
from megaseq.train.signals import STOPPING, StopSignals


class Agreement:
    """Adds up flags and counts of all ranks, once a step beside the step's own work, and between batches elsewhere.

    Alone, a process sees its signals at once. Of several, each sees the signals of all, at the same step.
    """

    def __init__(self, team: Team, *, signals: StopSignals, time_is_up: Callable[[], bool]) -> None:
        """Decides nothing yet.

        Args:
            team: whose ranks decide.
            signals: that come to this process.
            time_is_up: the clock; of several ranks, the first one's counts.
        """
        self._team = team
        self._time_is_up = time_is_up
        self._signals = signals
        self._vote: Vote | None = None
        self._agreed = ""

    @property
    def signal(self) -> str:
        """Name of the signal that ends the run on all ranks; empty so far."""
        return self._agreed if self._team.world_size > 1 else self._signals.requested

    def begin_step(self, counts: Sequence[int]) -> None:
        """Begins to add up the flags, and `counts` of this rank's batch; the step's own work goes on meanwhile."""
        own = [int(self._signals.requested == number.name) for number in STOPPING]
        self._vote = self._team.vote([*own, int(self._team.is_first and self._time_is_up()), *counts])

    def end_step(self) -> tuple[bool, list[int]]:
        """Returns whether the time is up (of several ranks: was, when the step began), and all ranks' counts."""
        if self._vote is None:
            return False, []
        values, self._vote = self._vote.result(), None
        self._take(values)
        time_is_up = values[len(STOPPING)] > 0 if self._team.world_size > 1 else self._time_is_up()
        return time_is_up, values[len(STOPPING) + 1 :]

    def keep_going(self) -> bool:
        """Whether no rank has had a signal; to be asked by all ranks equally often."""
        self._team.watchdog.beat()
        if self._team.world_size > 1 and not self._agreed:
            self._take(self._team.vote([int(self._signals.requested == number.name) for number in STOPPING]).result())
        return not self.signal

    def _take(self, flags: Sequence[int]) -> None:
        if not self._agreed:
            self._agreed = next((number.name for number, flag in zip(STOPPING, flags, strict=False) if flag), "")


def cells(batch: NestedMap) -> list[int]:
    """Returns the positions of source and target rows, and those of them that are no padding."""
    found = [side.segment_ids for side in (batch.source, batch.target) if side.get("segment_ids") is not None]
    return [sum(ids.numel() for ids in found), sum(int(torch.count_nonzero(ids)) for ids in found)]
