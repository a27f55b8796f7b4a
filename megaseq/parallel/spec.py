"""What a layer says about a parameter so that others can initialise, shard and store it: plain data, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch

Axis = Literal["vocab", "model", "heads", "hidden", "expert", "layers"] | None
"""A logical axis of a parameter; the rule table of `parallel` maps it to an axis of the mesh. None is never sharded."""

AXES: frozenset[str] = frozenset({"vocab", "model", "heads", "hidden", "expert", "layers"})


class Fill(Protocol):
    """How a parameter gets its first values."""

    def fill(self, tensor: torch.Tensor, *, generator: torch.Generator, axes: Sequence[Axis]) -> None:
        """Overwrites the float32 CPU `tensor` with values that depend on `generator` and on its shape alone."""


@dataclass(frozen=True)
class ParameterSpec:
    """The global description of one parameter, whatever part of it this process holds."""

    shape: tuple[int, ...]
    """Global shape."""
    axes: tuple[Axis, ...]
    """The logical axis of each dimension."""
    init: Fill
    """First values."""
    parts: tuple[int, ...] = ()
    """Sizes along dimension 0 of what is fused in this parameter (query, key and value, say), empty for one. Each part
    is initialised, and is to be sharded, as if it were a parameter of its own."""
    part_inits: tuple[Fill, ...] = ()
    """First values of each part, where they differ; empty: `init` for all."""


@dataclass(frozen=True)
class Box:
    """A block of a global tensor, and where this process keeps it."""

    start: tuple[int, ...]
    """First element in the global tensor, by dimension."""
    local_start: tuple[int, ...]
    """First element in this process's tensor."""
    size: tuple[int, ...]
    """Elements by dimension."""

    def of_global(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the view of the block in the global tensor."""
        return tensor[tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))]

    def of_local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the view of the block in this process's tensor."""
        return tensor[tuple(slice(a, a + n) for a, n in zip(self.local_start, self.size, strict=True))]


@dataclass(frozen=True)
class Shard:
    """Which part of a parameter this process holds; kept as the parameter's `.shard`, absent where it is whole."""

    axes: tuple[str, ...]
    """Mesh axes along which the parameter is divided."""
    boxes: tuple[Box, ...]
    """What this process holds: one block for each fused part."""
    local_shape: tuple[int, ...]
    """Shape of this process's tensor."""


class Exchange(Protocol):
    """What a sharded linear map does with its input and output; None where the map is whole."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the local product reads."""

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """Returns the output, of the local product without bias."""


def shard_of(parameter: torch.Tensor) -> Shard | None:
    """Returns the shard that this process holds of a parameter; None: all of it."""
    shard: Shard | None = getattr(parameter, "shard", None)
    return shard


@dataclass(frozen=True)
class Flow:
    """An activation [B, tokens of a side, width] that units of a model hand on to later ones."""

    name: str
    """What it is: `encoder` and `decoder` are residual streams, `memory` is the encoder's output."""
    side: Literal["source", "target"]
    """Whose tokens it has."""
    width: int
    """Elements a token."""


@dataclass(frozen=True)
class Unit:
    """A piece of a model that a pipeline does not cut; what it says of itself."""

    name: str
    """Its path in the model, `encoder.layers.3`, or what it does, `encoder.start`."""
    tensors: frozenset[str]
    """Names of the parameters and buffers that it reads, from the model on; several units may read the same."""
    source_flops: float
    """Floating-point operations of a forward pass for each token of the source, in products with parameters."""
    target_flops: float
    """The same for each token of the target."""
    leaves: tuple[Flow, ...]
    """What later units read of what was computed so far; it travels to the next stage if the model is cut here."""


@runtime_checkable
class Pipelined(Protocol):
    """A model that is a list of units, which may be run in pieces by several processes."""

    def units(self) -> tuple[Unit, ...]:
        """Returns all units, in order; the last one makes what `output_of` reads."""

    def run_units(
        self, carry: Mapping[str, torch.Tensor], *, batch: Any, units: Sequence[Unit]
    ) -> dict[str, torch.Tensor]:
        """Runs consecutive units; returns what the last of them leaves, by name.

        Args:
            carry: what the unit before them left, by name.
            batch: the micro-batch; ids, masks and positions are read from it by every stage.
            units: consecutive ones.
        """

    def output_of(self, carry: Mapping[str, torch.Tensor], *, batch: Any) -> Any:
        """Returns the loss output of a micro-batch, of what the last unit left."""
