"""What a layer says about a parameter so that others can initialise, shard and store it: plain data, no behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
