"""How data-parallel ranks share the work on an evaluation input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from megaseq.parallel.gradients import all_reduce_sum
from megaseq.parallel.layout import Parallel
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.process import Team

Item = TypeVar("Item")
Sums = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Spread:
    """Which part of the work is this rank's, and how the parts come together again; one process has it all."""

    mesh: Mesh | None = None
    team: Team | None = None
    decodes_apart: bool = True
    """Whether data ranks decode different texts. Not under ZeRO stage 3, where a forward pass of one needs all; ranks
    that share experts decode the same texts as each other in any case."""
    device: torch.device | str = "cpu"

    @property
    def data_rank(self) -> int:
        """Which of the data ranks this is."""
        return 0 if self.mesh is None else self.mesh.index("data")

    @property
    def data_ranks(self) -> int:
        """Among how many."""
        return 1 if self.mesh is None else self.mesh.size("data")

    def deal(self, items: Sequence[Item]) -> list[Item | None]:
        """Returns this rank's items, one of each round, and None in a last round that has none left for it.

        All ranks get equally many, so that what they ask each other in each round never waits for one that is done.
        """
        if not self.decodes_apart:
            return list(items)
        # Ranks that share experts take the same steps, so that none waits for one that is done.
        rank, ranks = (0, 1) if self.mesh is None else (self.mesh.index("expert_data"), self.mesh.size("expert_data"))
        rounds = -(-len(items) // ranks)
        places = range(rank, rounds * ranks, ranks)
        return [items[place] if place < len(items) else None for place in places]

    def collect(self, found: Mapping[int, list[tuple[str, float, float]]]) -> dict[int, list[tuple[str, float, float]]]:
        """Returns what all ranks have found, by the index of the text; of ranks with the same, it is the first's."""
        if self.team is None or not self.decodes_apart or self.data_ranks == 1:
            return dict(found)
        merged: dict[int, list[tuple[str, float, float]]] = {}
        for row in self.team.gather({str(index): hypotheses for index, hypotheses in found.items()}):
            for index, hypotheses in row.items():
                merged.setdefault(int(index), [(text, score, logprob) for text, score, logprob in hypotheses])
        return merged

    def add_up(self, sums: Sums) -> dict[str, tuple[float, float]]:
        """Returns the (sum, weight) pairs of all data and context ranks together."""
        group = None if self.mesh is None else self.mesh.group("data", "context")
        if group is None or not sums:
            return dict(sums)
        flat = torch.tensor([value for pair in sums.values() for value in pair], dtype=torch.float64)
        total = all_reduce_sum(flat.to(self.device), group=group).tolist()
        return {name: (total[2 * index], total[2 * index + 1]) for index, name in enumerate(sums)}


ALONE = Spread()
"""Of one process."""


def spread_over(mesh: Mesh, *, params: Parallel.Params, team: Team, device: torch.device) -> Spread:
    """Returns how the ranks of a run share the work on its evaluation inputs."""
    return Spread(mesh=mesh, team=team, decodes_apart=params.zero.stage < 3, device=device)
