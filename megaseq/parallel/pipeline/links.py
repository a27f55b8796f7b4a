"""How activations get from one stage to the next outside of a schedule, and results to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megaseq.parallel.mesh import Mesh
from megaseq.parallel.pipeline.job import Shapes
from megaseq.parallel.pipeline.plan import StagePlan
from megaseq.parallel.spec import Flow


class Links:
    """The ranks of one pipeline, by the stages that they have."""

    def __init__(self, *, plan: StagePlan, mesh: Mesh, device: torch.device) -> None:
        self.plan = plan
        self.group = mesh.group("pipe")
        self.device = device
        self._rank = mesh.index("pipe")
        self._global_ranks = mesh.ranks("pipe")
        self._sent: list[tuple[dist.Work | None, Tensor]] = []

    def is_here(self, stage: int) -> bool:
        """Whether this rank has the stage of this index."""
        return 0 <= stage < len(self.plan.stages) and self.plan.stages[stage].rank == self._rank

    def send(self, tensors: Sequence[Tensor], *, stage: int) -> None:
        """Begins to send what `stage`, of another rank, is to receive; `wait` ends it."""
        peer = self._peer(stage)
        self._sent += [(dist.isend(tensor, dst=peer, group=self.group), tensor) for tensor in tensors]

    def receive(self, flows: Sequence[Flow], *, shapes: Shapes, dtype: torch.dtype, stage: int) -> tuple[Tensor, ...]:
        """Returns what `stage`, of another rank, has sent."""
        return tuple(self.receive_tensor((*shapes[flow.name], flow.width), dtype=dtype, stage=stage) for flow in flows)

    def receive_tensor(self, shape: Sequence[int], *, dtype: torch.dtype, stage: int) -> Tensor:
        """Returns one tensor that `stage`, of another rank, has sent."""
        buffer = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        dist.recv(buffer, src=self._peer(stage), group=self.group)
        return buffer

    def wait(self) -> None:
        """Returns when everything has been sent."""
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()

    def from_stage(self, tensor: Tensor | None, *, shape: Sequence[int], dtype: torch.dtype, stage: int) -> Tensor:
        """Returns on all ranks of the pipeline the tensor that the rank of `stage` has.

        Args:
            tensor: there; elsewhere None.
            shape: of it, known to all.
            dtype: of what is returned.
            stage: whose rank sends.
        """
        if tensor is None:
            shared = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        else:
            shared = tensor.to(dtype).contiguous()
        dist.broadcast(shared, src=self._peer(stage), group=self.group)
        return shared

    def _peer(self, stage: int) -> int:
        return self._global_ranks[self.plan.stages[stage].rank]


def in_order(carry: Mapping[str, Tensor], *, flows: Sequence[Flow], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns the flows' tensors as they are sent: dense, in order."""
    return tuple(carry[flow.name].to(dtype).contiguous() for flow in flows)
