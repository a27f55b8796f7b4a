"""What a layer says about a parameter so that others can initialise, shard and store it: plain data, no behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    granule: int = 1
    """Elements along the dimension of `heads` that stay together: those of one head."""


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
    shared: tuple[bool, ...] = ()
    """Of each block whether other ranks along `axes` hold it too: key heads, where there are fewer than ranks."""


class Exchange(Protocol):
    """How a divided linear map works with the other ranks; None where the map is whole.

    `divided` is true where tensor ranks share the tokens of what is outside: [B, T / ranks, D] instead of [B, T, D].
    """

    def linear(
        self, x: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor | None, divided: bool
    ) -> torch.Tensor:
        """Maps `x`, by the weight and bias that are here, as `own` returned them."""

    def own(self, parameter: torch.Tensor, *, divided: bool) -> torch.Tensor:
        """Returns the weight or bias as the local product uses it, so that its gradient is right."""


class Ranks(Protocol):
    """The tensor ranks, as a layer that they share sees them; `parallel.apply` hands it to `Layer.divide`."""

    @property
    def size(self) -> int:
        """How many they are."""

    @property
    def index(self) -> int:
        """Which of them this one is."""

    @property
    def sequence(self) -> bool:
        """Whether they share the tokens of the residual stream too, where their number divides these."""

    @property
    def divided(self) -> frozenset[str]:
        """The logical axes of parameters that they share."""

    def column(self, *, entered: bool = False) -> Exchange:
        """Returns the exchange of a map that has a part of its outputs here; `entered`: its input has been copied."""

    def row(self) -> Exchange:
        """Returns the exchange of a map that reads a part of its inputs here."""

    def span(self, length: int) -> tuple[int, int]:
        """Returns (start, stop) of this rank's part of `length` elements."""

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x`, the same on all ranks; its gradient is the sum of theirs."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the ranks' `x`; the gradient of each is that of the sum."""

    def cut_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Returns this rank's tokens [B, T / ranks, D] of `x` [B, T, D]."""

    def join_tokens(self, x: torch.Tensor, *, partial: bool) -> torch.Tensor:
        """Returns all tokens [B, T, D] of the ranks' `x` [B, T / ranks, D].

        Args:
            x: this rank's tokens.
            partial: whether what follows is divided over the ranks, so that gradients are summed, or the same on all.
        """

    def gather(self, x: torch.Tensor, *, length: int, dim: int) -> torch.Tensor:
        """Returns all `length` elements along `dim`, of which each rank has its `span`; without gradient."""

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` over the ranks in place, without gradient; returns it."""

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        """Takes the largest `x` of the ranks, element by element, in place, without gradient; returns it."""


def shard_of(parameter: torch.Tensor) -> Shard | None:
    """Returns the shard that this process holds of a parameter; None: all of it."""
    shard: Shard | None = getattr(parameter, "shard", None)
    return shard


class ContextRanks(Protocol):
    """The ranks that share the tokens of rows, as layers see them; see `megaseq.parallel.context`."""

    @property
    def size(self) -> int:
        """How many they are."""

    @property
    def index(self) -> int:
        """Which of them this one is."""

    @property
    def method(self) -> str:
        """How attention gets at the others' tokens: `ring` or `ulysses`."""

    def places(self, length: int, *, device: torch.device) -> torch.Tensor:
        """Returns the places, int64 [t], of this rank's tokens in a row of `length`, those of padding included."""

    def padded(self, length: int) -> int:
        """Returns the length of a row of `length` tokens with what pads it."""

    def pass_on(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Begins to send tensors to the next rank and to receive the like from the one before; the result waits."""

    def tokens_for_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Exchanges tokens for heads: of [B, t, N, H] to [B, L, N / ranks, H], all tokens in order."""

    def heads_for_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Exchanges heads for tokens, the other way round."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the ranks' `x`, without gradient."""


Added = tuple[torch.Tensor, Mapping[str, tuple[torch.Tensor, torch.Tensor]]]
"""What layers add to the loss of a micro-batch: a scalar that is differentiated, and (sum, weight) pairs by name."""


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

    def flow_shapes(self, batch: Any) -> Mapping[str, tuple[int, int]]:
        """Returns (rows, tokens) of what this process has of each flow of a micro-batch, by name."""

    def begin_losses(self) -> None:
        """Lets layers note from now on what they add to the loss; to be called before the units of a stage are run."""

    def take_losses(self) -> Added | None:
        """Returns what layers have noted since `begin_losses`, and lets them note no more; None where they have none.

        Not to be called before `output_of`, which takes that of the last stage.
        """

    def output_of(self, carry: Mapping[str, torch.Tensor], *, batch: Any) -> Any:
        """Returns the loss output of a micro-batch, of what the last unit left."""
