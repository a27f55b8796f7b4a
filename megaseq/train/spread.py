"""How data-parallel ranks share the work on an evaluation input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megaseq.parallel.gradients import all_reduce_sum
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.process import Team

Item = TypeVar("Item")
Sums = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Spread:
    """Which part of the work is this rank's, and how the parts come together again; one process has it all.

    Every data rank decodes texts of its own: none of its forward passes waits for another data rank. Under ZeRO stage 3
    that is so because `Engine.evaluating` gathers all parameters. Ranks that share matrices, stages or tokens have the
    same texts and take the same steps; so do those that share experts, whose tokens travel.
    """

    mesh: Mesh | None = None
    team: Team | None = None
    device: torch.device | str = "cpu"

    @property
    def data_rank(self) -> int:
        """Which of the data ranks this is."""
        return 0 if self.mesh is None else self.mesh.index("data")

    @property
    def data_ranks(self) -> int:
        """Among how many."""
        return 1 if self.mesh is None else self.mesh.size("data")

    @property
    def decoding_ranks(self) -> int:
        """Among how many texts are dealt out: data ranks, of which those that share experts count once."""
        return 1 if self.mesh is None else self.mesh.size("expert_data")

    @property
    def is_first(self) -> bool:
        """Whether this rank has all results in the end."""
        return self.team is None or self.team.is_first

    def deal(self, items: Sequence[Item]) -> list[Item | None]:
        """Returns this rank's items, one of each round, and None in a last round that has none left for it.

        All ranks get equally many, so that what they ask each other in each round never waits for one that is done.
        """
        rank, ranks = (0 if self.mesh is None else self.mesh.index("expert_data")), self.decoding_ranks
        rounds = -(-len(items) // ranks)
        places = range(rank, rounds * ranks, ranks)
        return [items[place] if place < len(items) else None for place in places]

    def collect(self, found: Mapping[int, list[tuple[str, float, float]]]) -> dict[int, list[tuple[str, float, float]]]:
        """Returns what all ranks have found, by the index of the text, on the first rank; elsewhere nothing."""
        if self.team is None or self.team.world_size == 1:
            return dict(found)
        # Of ranks that have decoded the same, one tells.
        shared = ("expert", "pipe", "context", "tensor")
        tells = self.mesh is None or not any(self.mesh.index(axis) for axis in shared)
        rows = self.team.gather_to_first({str(index): best for index, best in found.items()} if tells else {})
        return {
            int(index): [(text, score, logprob) for text, score, logprob in best]
            for row in rows
            for index, best in row.items()
        }

    def share(self, value: Any) -> Any:
        """Returns the JSON value of the first rank on all of them."""
        return value if self.team is None else self.team.share(value)

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
