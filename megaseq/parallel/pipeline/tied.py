"""Tensors that several stages hold, such as an embedding that is also the softmax's matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch.distributed as dist
from torch import Tensor

from megaseq.parallel.gradients import sum_over
from megaseq.parallel.mesh import Mesh


class TiedTensors:
    """Which tensors several pipeline ranks hold, and the sum of what they have of them."""

    def __init__(self, names: Collection[str], *, mesh: Mesh | None) -> None:
        """Makes the groups; to be called by all ranks of the run at the same time.

        Args:
            names: of what this rank holds; ranks that differ in another axis than `pipe` hold the same.
            mesh: None is one process.
        """
        self._groups: list[tuple[dist.ProcessGroup | None, tuple[str, ...]]] = []
        self.first_here: frozenset[str] = frozenset(names)
        """Those that no earlier stage holds."""
        pipe = mesh.group("pipe") if mesh is not None else None
        if mesh is None or pipe is None:
            return
        gathered: list[set[str] | None] = [None] * mesh.size("pipe")
        dist.all_gather_object(gathered, set(names), group=pipe)
        held = [names_of or set() for names_of in gathered]
        holders: dict[tuple[int, ...], list[str]] = {}
        for name in sorted(set().union(*held)):
            holders.setdefault(tuple(i for i, have in enumerate(held) if name in have), []).append(name)
        here = mesh.index("pipe")
        self.first_here = frozenset(name for name in names if not any(name in have for have in held[:here]))
        for places in sorted(holders):
            if len(places) > 1:
                group = _group_of(places, mesh=mesh)
                if here in places:
                    self._groups.append((group, tuple(holders[places])))

    @property
    def names(self) -> frozenset[str]:
        """The tensors that another rank holds too."""
        return frozenset(name for _, names in self._groups for name in names)

    def sum(self, tensors: Mapping[str, Tensor], *, bucket_elements: int = 50_000_000) -> None:
        """Sums what the ranks have of each tied tensor, in place; all ranks that hold it take part.

        Args:
            tensors: by name; what is not tied is left alone.
            bucket_elements: sent together, at most.
        """
        for group, names in self._groups:
            present = [tensors[name] for name in names if name in tensors]
            sum_over(present, group=group, bucket_elements=bucket_elements)


def _group_of(places: tuple[int, ...], *, mesh: Mesh) -> dist.ProcessGroup | None:
    """Returns the group of these pipe ranks that this process is in; every pipeline of the mesh gets one."""
    if len(places) == mesh.size("pipe"):
        return mesh.group("pipe")
    own: dist.ProcessGroup | None = None
    columns: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.layout.world_size):
        at = mesh.layout.coordinates(rank)
        column = tuple(at[axis] for axis in ("data", "context", "tensor"))
        columns.setdefault(column, []).append(rank)
    for ranks in columns.values():
        by_place = sorted(ranks, key=lambda rank: mesh.layout.coordinates(rank)["pipe"])
        members = [by_place[place] for place in places]
        made = dist.new_group(members)
        if mesh.rank in members:
            own = made
    return own
