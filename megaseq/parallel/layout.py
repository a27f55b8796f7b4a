"""How the processes of a run are laid out: so many along each axis of the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from megaseq.base import Configurable, Problem
from megaseq.base.errors import AsText, must
from megaseq.parallel.pipeline_params import Pipeline
from megaseq.parallel.zero_params import Zero

MeshAxis = Literal["data", "pipe", "context", "tensor", "expert"]
"""An axis of the mesh. `expert` is not one beside the others: it divides `data`."""

AXIS_ORDER: tuple[MeshAxis, ...] = ("pipe", "data", "context", "tensor")
"""From the outermost, whose neighbours are far apart, to the innermost, whose neighbours share a machine."""


class Parallel(Configurable):
    """What is computed where; only its params are used."""

    class Params(Configurable.Params):
        data: int = 0
        """Data-parallel groups of ranks, each with its rows of a batch; 0: as many as the other axes leave."""
        pipe: int = 1
        """Stages that the layers are split into."""
        context: int = 1
        """Ranks that share the tokens of a row."""
        tensor: int = 1
        """Ranks that share each matrix."""
        expert: int = 1
        """Data-parallel ranks that share the experts of a layer; divides `data`."""
        sequence: bool = False
        """Whether tensor ranks also share the tokens between the matrix products (Korthikanti et al. 2022)."""
        context_method: Literal["ring", "ulysses"] = "ring"
        """ring: keys and values travel around (Liu et al. 2023); ulysses: heads are dealt out (Jacobs et al. 2023)."""
        zero: Zero.Params = Zero.Params()
        """What data-parallel ranks share of the model's and the optimizer's state."""
        pipeline: Pipeline.Params = Pipeline.Params()
        """How the stages are made and in which order they work; read where `pipe` is above 1."""
        rules: dict[str, str] = {}
        """Mesh axis of a logical axis (`vocab`, `heads`, `hidden`, `expert`), instead of the usual one; `none` keeps
        parameters with this axis whole."""
        timeout_seconds: float = 1800.0
        """A collective that hangs for longer ends the run with the place where each rank stands."""
        processes: int = 0
        """Processes that `megaseq train` starts itself where no launcher has; 0: as many as the axes make, with
        `data` at 0 one for each GPU of the machine."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports sizes below one, experts that do not divide data ranks, and `sequence` without tensor ranks."""
            yield from super().validate()
            for name in ("pipe", "context", "tensor", "expert"):
                if getattr(self, name) < 1:
                    size = getattr(self, name)
                    yield f"{name}: must be at least 1, but is {size}. Set parallel.{name}=1, which turns it off."
            if self.data < 0:
                yield f"data: must not be negative, but is {self.data}. Use 0 for what the other axes leave."
            elif self.data and self.expert >= 1 and self.data % self.expert:
                fitting = [size for size in range(1, self.data + 1) if self.data % size == 0]
                nearest = max(1, round(self.data / self.expert)) * self.expert
                yield (
                    f"expert: must divide data ({self.data}), but is {self.expert}. Experts live on data ranks: choose "
                    f"one of {fitting}, or set parallel.data={nearest}."
                )
            if self.sequence and self.tensor == 1:
                yield (
                    "sequence: must be false where tensor is 1, but is true. It shares the work of tensor ranks: set "
                    "parallel.sequence=false, or parallel.tensor=2."
                )
            if self.timeout_seconds <= 0:
                yield f"timeout_seconds: must be positive, but is {self.timeout_seconds}. 1800 is usual."

    params: Params


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of all axes, none of them open."""

    data: int = 1
    pipe: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.data * self.pipe * self.context * self.tensor

    def size(self, axis: str) -> int:
        """Returns the length of an axis; `expert_data` is what `expert` leaves of `data`."""
        if axis == "expert_data":
            return self.data // self.expert
        length: int = getattr(self, axis)
        return length

    def coordinates(self, rank: int) -> dict[str, int]:
        """Returns the index of `rank` along every axis, `expert` and `expert_data` included."""
        indices: dict[str, int] = {}
        for axis in reversed(AXIS_ORDER):
            rank, indices[axis] = divmod(rank, self.size(axis))
        indices["expert_data"], indices["expert"] = divmod(indices["data"], self.expert)
        return indices

    def __str__(self) -> str:
        """`data=2 x tensor=2`, without the axes of length 1."""
        named = [f"{axis}={self.size(axis)}" for axis in ("data", *AXIS_ORDER[:1], "context", "tensor")]
        shown = [text for text in named if not text.endswith("=1")]
        if self.expert > 1:
            shown.append(f"expert={self.expert}")
        return " x ".join(shown) or "one process"


def resolve_layout(params: Parallel.Params, *, world_size: int) -> Layout:
    """Returns the layout of `world_size` processes.

    Raises:
        ParamsError: the axes do not divide the processes.
    """
    model = params.pipe * params.context * params.tensor
    if world_size % model or (params.data and params.data * model != world_size):
        asked = f"pipe={params.pipe} x context={params.context} x tensor={params.tensor}"
        if params.data:
            asked = f"data={params.data} x {asked}"
            allowed = f"start {params.data * model} processes, or set parallel.data=0"
        else:
            lower = world_size // model * model
            nearest = f"{lower} or {lower + model}" if lower else f"{model}"
            allowed = f"start {nearest} processes"
        raise must(
            "parallel",
            "have axes whose product is the number of processes",
            AsText(f"{asked} for {world_size} processes"),
            f"Change the axes, or {allowed}",
        )
    data = world_size // model
    if data % params.expert:
        raise must(
            "parallel.expert",
            f"divide the {data} data-parallel ranks",
            params.expert,
            f"Choose one of {[n for n in range(1, data + 1) if data % n == 0]}",
        )
    return Layout(data=data, pipe=params.pipe, context=params.context, tensor=params.tensor, expert=params.expert)
