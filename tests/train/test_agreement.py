"""What ranks decide together: signals of any one of them, the first one's clock, counts of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaseq.base import NestedMap
from megaseq.parallel.place import Place
from megaseq.parallel.process import Team, current_team
from megaseq.train.agreement import Agreement, cells
from megaseq.train.signals import StopSignals
from tests.distributed.harness import run_ranks


def _steps(rank: int) -> list[Any]:
    signals = StopSignals()
    agreement = Agreement(current_team(), signals=signals, time_is_up=lambda: rank != 0)
    seen: list[Any] = []
    for step in range(3):
        agreement.begin_step([10 * rank, step])
        if step == 1 and rank == 1:
            signals.requested = "SIGUSR1"  # Comes during the step: all hear of it with the next one.
        seen.append((agreement.end_step(), agreement.signal))
    seen.append(agreement.keep_going())
    return seen


def test_all_ranks_see_a_signal_at_the_same_step() -> None:
    for seen in run_ranks(_steps, world_size=3):
        # The clocks of other ranks than the first do not count.
        assert seen == [
            ((False, [30, 0]), ""),
            ((False, [30, 3]), ""),
            ((False, [30, 6]), "SIGUSR1"),
            False,
        ]


def _between_batches(rank: int) -> list[bool]:
    signals = StopSignals()
    agreement = Agreement(current_team(), signals=signals, time_is_up=lambda: False)
    going = [agreement.keep_going()]
    if rank == 2:
        signals.requested = "SIGTERM"
    return [*going, agreement.keep_going(), agreement.keep_going()]


def test_between_batches_all_ranks_stop_together() -> None:
    assert run_ranks(_between_batches, world_size=3) == [[True, False, False]] * 3


@pytest.mark.parametrize("up", [False, True])
def test_one_process_sees_its_signals_and_its_clock_at_once(up: bool) -> None:
    signals = StopSignals()
    agreement = Agreement(Team(Place()), signals=signals, time_is_up=lambda: up)
    agreement.begin_step([4, 2])
    signals.requested = "SIGINT"
    assert agreement.end_step() == (up, [4, 2])
    assert agreement.signal == "SIGINT"
    assert not agreement.keep_going()


def test_cells_are_positions_and_those_that_are_no_padding() -> None:
    source = NestedMap(segment_ids=torch.tensor([[1, 1, 0], [1, 2, 2]]))
    target = NestedMap(segment_ids=torch.tensor([[1, 0], [0, 0]]))
    assert cells(NestedMap(source=source, target=target)) == [10, 6]
    assert cells(NestedMap(source=NestedMap(features=torch.zeros(2, 3)), target=target)) == [4, 1]
