"""Which units make up each stage, and which rank has which stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megaseq.base.errors import AsText, ParamsError, must
from megaseq.parallel.pipeline.partition import balance
from megaseq.parallel.pipeline_params import Pipeline, stages_per_rank
from megaseq.parallel.spec import Flow, Unit


@dataclass(frozen=True)
class Stage:
    """A run of units that one rank computes."""

    index: int
    """From 0, the one that reads the source."""
    rank: int
    """Place along the mesh's `pipe` axis."""
    units: tuple[Unit, ...]
    enters: tuple[Flow, ...]
    """What it receives from the stage before, in this order."""
    is_last: bool

    @property
    def leaves(self) -> tuple[Flow, ...]:
        """What it sends to the stage after it, in this order."""
        return self.units[-1].leaves

    def cost(self, *, target_share: float = 0.5) -> float:
        """Operations of a forward pass a token, of which `target_share` are of the target."""
        return sum(unit_cost(unit, target_share=target_share) for unit in self.units)


@dataclass(frozen=True)
class StagePlan:
    """All stages of a model, the same on every rank."""

    stages: tuple[Stage, ...]
    ranks: int
    schedule: str

    def of_rank(self, rank: int) -> tuple[Stage, ...]:
        """Returns the stages of a rank, in order."""
        return tuple(stage for stage in self.stages if stage.rank == rank)

    def tensors_of(self, rank: int) -> frozenset[str]:
        """Returns the names of all parameters and buffers that a rank's stages read."""
        return frozenset(name for stage in self.of_rank(rank) for unit in stage.units for name in unit.tensors)

    def lines(self) -> Iterator[str]:
        """Yields a line for each stage, for those who want to see what lies where."""
        total = sum(stage.cost() for stage in self.stages) or 1.0
        for stage in self.stages:
            first, last = stage.units[0].name, stage.units[-1].name
            what = first if len(stage.units) == 1 else f"{first} to {last}"
            yield f"stage {stage.index} on pipe rank {stage.rank}: {what}, {stage.cost() / total:.0%} of the work"


def unit_cost(unit: Unit, *, target_share: float = 0.5) -> float:
    """Returns the operations of a unit's forward pass a token, of which `target_share` are of the target."""
    return unit.source_flops * (1 - target_share) + unit.target_flops * target_share


def make_plan(units: Sequence[Unit], *, params: Pipeline.Params, ranks: int, target_share: float = 0.5) -> StagePlan:
    """Returns the stages of a model.

    Args:
        units: of the whole model.
        params: the schedule, and `split` where a person has chosen.
        ranks: along the `pipe` axis.
        target_share: share of tokens that are of the target.

    Raises:
        ParamsError: more stages than units, or a `split` that does not fit.
    """
    per_rank = stages_per_rank(params)
    count = ranks * per_rank
    if not units:
        raise must("parallel.pipe", "be 1 for a task that is not made of units", ranks, "Set parallel.pipe=1")
    if count > len(units):
        value = AsText(f"{ranks} with {per_rank} stages a rank") if per_rank > 1 else ranks
        remedy = f"Set parallel.pipe={len(units) // per_rank} at most"
        raise must("parallel.pipe", f"make at most the {len(units)} stages that the model has units", value, remedy)
    if params.split:
        sizes = _checked_split(params.split, stages=count, units=len(units))
    else:
        sizes = balance([unit_cost(unit, target_share=target_share) for unit in units], parts=count)
    bounds = [0, *itertools.accumulate(sizes)]
    stages = tuple(
        Stage(
            index=index,
            rank=_rank_of(index, ranks=ranks, v=params.schedule == "zero_bubble_v"),
            units=tuple(units[start:stop]),
            enters=units[start - 1].leaves if start else (),
            is_last=index == count - 1,
        )
        for index, (start, stop) in enumerate(itertools.pairwise(bounds))
    )
    plan = StagePlan(stages=stages, ranks=ranks, schedule=params.schedule)
    _check_ranks(plan)
    return plan


def _check_ranks(plan: StagePlan) -> None:
    """Refuses ranks without a parameter: the learner has nothing to do there, and checkpoints nothing to write."""
    for rank in range(plan.ranks):
        if not plan.tensors_of(rank):
            units = [unit.name for stage in plan.of_rank(rank) for unit in stage.units]
            raise must(
                "parallel.pipe",
                "give every rank a unit with parameters",
                AsText(f"{plan.ranks}, and pipe rank {rank} has only {', '.join(units)}"),
                "Lower parallel.pipe, or set parallel.pipeline.split",
            )


def _rank_of(stage: int, *, ranks: int, v: bool) -> int:
    """Returns the rank of a stage: round and round, or there and back again for the schedules of the form of a V."""
    turn, place = divmod(stage, ranks)
    return ranks - 1 - place if v and turn % 2 else place


def _checked_split(split: tuple[int, ...], *, stages: int, units: int) -> tuple[int, ...]:
    if len(split) != stages or min(split) < 1 or sum(split) != units:
        even = balance([1.0] * units, parts=stages)
        raise must(
            "parallel.pipeline.split",
            f"be {stages} positive numbers that add up to the model's {units} units",
            split,
            f"Try {list(even)}, or leave it empty to split by cost",
            kind=ParamsError,
        )
    return split
