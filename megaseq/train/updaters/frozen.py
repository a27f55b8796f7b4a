"""Parameters that do not train, under ZeRO: no share holds them, but checkpoints do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaseq.checkpoint.piece import Piece, fragment_pieces
from megaseq.train.updaters.first_shares import ExactRun
from megaseq.train.updaters.shares import Described


@dataclass(frozen=True)
class Frozen:
    """What this process holds of a parameter that does not train."""

    parameter: Described
    first: int
    """First element in the parameter."""
    computing: Tensor
    """[N] elements that the module computes with, or, in stage 3, gathers."""
    exact: Tensor
    """[N] the same in fp32; the same tensor where the module computes in fp32."""

    def pieces(self) -> list[Piece]:
        """Returns them as pieces of the logical tensor."""
        about = self.parameter
        return fragment_pieces(
            about.name, self.exact, first=self.first, shard=about.shard, global_shape=about.global_shape
        )

    @torch.no_grad()
    def publish(self) -> None:
        """Lets the module compute with what was written into the pieces."""
        if self.computing is not self.exact:
            self.computing.copy_(self.exact)


def frozen_of(parameter: Any, *, about: Described, exact: Mapping[str, ExactRun]) -> Frozen:
    """Returns what this process holds of a frozen parameter.

    Args:
        parameter: after DeepSpeed took it over.
        about: what it is.
        exact: fp32 values of the parameters that were rounded, by name; at least those here.
    """
    if hasattr(parameter, "ds_id"):
        size, count = int(parameter.partition_numel()), int(parameter.ds_numel)
        first = min(dist.get_rank(parameter.ds_process_group) * size, count)
        computing = parameter.ds_tensor.data.view(-1)[: min(size, count - first)]
    else:
        first, computing = 0, parameter.data.view(-1)
    values = exact.get(about.name)
    if values is None:
        return Frozen(about, first, computing, computing)
    return Frozen(about, first, computing, values.run(first, computing.numel()).clone())
