"""The mesh: where this process stands along every axis, and the process groups along them."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import torch.distributed as dist

from megaseq.parallel.layout import AXIS_ORDER, Layout

GROUPS: tuple[tuple[str, ...], ...] = (
    ("data",),
    ("pipe",),
    ("context",),
    ("tensor",),
    ("expert",),
    ("expert_data",),
    ("data", "context"),
    ("expert_data", "context"),
    ("context", "tensor"),
    ("pipe", "tensor"),
    ("pipe", "context", "tensor"),
    ("expert", "pipe", "tensor"),
    ("data", "pipe", "context", "tensor"),
)
"""Sets of axes along which something is reduced, gathered or sent."""


class Mesh:
    """The processes of a run as a grid.

    Ranks that agree in all coordinates but those of some axes are a group of these axes; it is None where it has one
    rank, so that code without processes needs no special case: every function that takes a group takes None.
    """

    def __init__(self, layout: Layout, *, rank: int = 0, timeout_seconds: float = 1800.0) -> None:
        """Makes all groups; to be called by all ranks of an initialised torch.distributed at the same time.

        Args:
            layout: its `world_size` is that of torch.distributed; one process needs none.
            rank: of this process.
            timeout_seconds: of every collective.
        """
        self.layout = layout
        self.rank = rank
        self.coordinates = layout.coordinates(rank)
        self._groups: dict[frozenset[str], dist.ProcessGroup | None] = {}
        made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        timeout = datetime.timedelta(seconds=timeout_seconds)
        for axes in GROUPS:
            own: dist.ProcessGroup | None = None
            for ranks in self._partition(axes):
                if ranks not in made:
                    made[ranks] = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
                if rank in ranks:
                    own = made[ranks]
            self._groups[frozenset(axes)] = own

    def _partition(self, axes: Iterable[str]) -> list[tuple[int, ...]]:
        """Returns the groups of `axes`, each the ranks that differ in no other coordinate, in order."""
        others = _others(axes)
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.layout.world_size):
            place = self.layout.coordinates(rank)
            groups.setdefault(tuple(place[axis] for axis in others), []).append(rank)
        return [tuple(ranks) for ranks in groups.values()]

    def size(self, *axes: str) -> int:
        """Returns the number of ranks along the axes together."""
        product = 1
        for axis in axes:
            product *= self.layout.size(axis)
        return product

    def index(self, axis: str) -> int:
        """Returns where this process stands along an axis, from 0."""
        return self.coordinates[axis]

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Returns the group of this process along the axes, None where it is alone; raises KeyError if not made."""
        return self._groups[frozenset(axes)]

    def ranks(self, *axes: str) -> tuple[int, ...]:
        """Returns the global ranks of this process's group along the axes, itself included, in order."""
        for ranks in self._partition(axes):
            if self.rank in ranks:
                return ranks
        raise ValueError(f"mesh: rank {self.rank} is not among {self.layout.world_size} processes")

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports."""
        return self.rank == 0


def _others(axes: Iterable[str]) -> tuple[str, ...]:
    """Returns the coordinates that ranks of one group of `axes` have in common."""
    chosen = set(axes)
    kept: list[str] = []
    for axis in AXIS_ORDER:
        if axis in chosen:
            continue
        if axis == "data" and chosen & {"expert", "expert_data"}:
            kept += [part for part in ("expert", "expert_data") if part not in chosen]
        else:
            kept.append(axis)
    return tuple(kept)
