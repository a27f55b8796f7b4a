"""What two halves of a backward pass leave between them, and how many micro-batches a V has at the same time."""

from __future__ import annotations

import torch
from torch import nn

from megaseq.train.planning.halves import first_half, moments
from megaseq.train.planning.live_memory import LiveMemory


def test_first_half_leaves_the_gradients_of_what_is_made_with_parameters() -> None:
    one, two = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
    with LiveMemory() as memory:
        x = torch.randn(4, 8, requires_grad=True)
        y = two(torch.tanh(one(x)))
        left, peak = first_half([y], inputs=[x], memory=memory)
    # Of the output of `one`; that of `two` is what the pass was given.
    assert left == 4 * 32 * 4
    assert peak >= left + 4 * 8 * 4
    assert one.weight.grad is None


def test_nothing_is_left_without_parameters() -> None:
    with LiveMemory() as memory:
        x = torch.randn(4, 8, requires_grad=True)
        assert first_half([torch.tanh(x)], inputs=[x], memory=memory) == (0, 0)


def _moments_of(actions: list[tuple[str, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(alive, between) during each first half of a rank's actions: a name, and which of its stages."""
    alive, between, found = [0, 0], [0, 0], []
    for name, stage in actions:
        if name == "FORWARD":
            alive[stage] += 1
        elif name == "BACKWARD_INPUT":
            found.append(((alive[0], alive[1]), (between[0], between[1])))
            between[stage] += 1
        else:
            alive[stage] -= 1
            between[stage] -= 1
    return found


def test_a_v_has_as_much_alive_as_its_schedule() -> None:
    from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

    for ranks, micro_batches in ((2, 4), (2, 8), (4, 8), (4, 12)):
        schedule = ScheduleZBVZeroBubble.__new__(ScheduleZBVZeroBubble)
        schedule.pp_group_size, schedule.num_stages = ranks, 2 * ranks
        schedule._n_microbatches = micro_batches
        for rank in range(ranks):
            made = [action for action in schedule._calculate_single_rank_operations(rank) if action is not None]
            actions = [(action.computation_type.name, 0 if action.stage_index < ranks else 1) for action in made]
            during = _moments_of(actions)
            for moment in moments(rank, ranks=ranks, micro_batches=micro_batches):
                assert (moment.alive, moment.between) in during
            # Nowhere are there more stages' activations, halves between included or not.
            most = max(sum(alive) for alive, _ in during)
            assert max(sum(m.alive) for m in moments(rank, ranks=ranks, micro_batches=micro_batches)) == most
