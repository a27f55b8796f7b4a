"""Runs the stages of one rank: training steps by a schedule of torch, and forward passes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from megaseq.parallel.mesh import Mesh
from megaseq.parallel.pipeline.job import PipelineJob, Shapes
from megaseq.parallel.pipeline.plan import Stage, StagePlan
from megaseq.parallel.pipeline.stage import ScheduledStage, StageModule, make_scheduled_stage
from megaseq.parallel.spec import Pipelined

_SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_SEVERAL = {"interleaved": ScheduleInterleaved1F1B, "zero_bubble_v": ScheduleZBVZeroBubble}


class PipelineRunner:
    """The stages that this rank has, and the links to those before and after them."""

    def __init__(self, model: Pipelined, *, plan: StagePlan, mesh: Mesh, device: torch.device) -> None:
        """Takes hold of the model's parameters as they are now; their data may be replaced later, they may not.

        Args:
            model: with at least the tensors of this rank's stages.
            plan: of the whole model.
            mesh: with a `pipe` axis of several ranks.
            device: where the stages compute.
        """
        self.plan = plan
        self._device = device
        self._rank = mesh.index("pipe")
        self._group = mesh.group("pipe")
        self._global_ranks = mesh.ranks("pipe")
        self.modules = [StageModule(model, stage=stage) for stage in plan.of_rank(self._rank)]
        self._key: object = None
        self._schedule: Any = None

    @property
    def last_rank(self) -> int:
        """Global rank of the process that has the last stage."""
        return self._global_ranks[self.plan.stages[-1].rank]

    @property
    def has_last(self) -> bool:
        """Whether this rank has the last stage, and with it losses and logits."""
        return any(module.stage.is_last for module in self.modules)

    def step(self, job: PipelineJob) -> None:
        """Runs forward and backward passes of all micro-batches; gradients are added to those of the parameters.

        Args:
            job: the same on all ranks of the pipeline. On the rank of the last stage its `outputs` are filled.
        """
        schedule = self._scheduled(len(job.batches), shapes=job.shapes, dtype=job.dtype)
        for module in self.modules:
            module.job = job
        try:
            # The schedule wants a target for each micro-batch; the loss is part of the last stage.
            schedule.step(target=torch.zeros(len(job.batches)), return_outputs=False)
        finally:
            for module in self.modules:
                module.job = None

    def _scheduled(self, count: int, *, shapes: Shapes, dtype: torch.dtype) -> Any:
        """Returns the schedule for `count` micro-batches of one shape; a new shape makes a new one."""
        key = (count, tuple(sorted(shapes.items())), dtype)
        if key != self._key:
            self._schedule = None  # Its buffers go before others are made.
            stages: list[ScheduledStage] = [
                make_scheduled_stage(
                    module,
                    num_stages=len(self.plan.stages),
                    shapes=shapes,
                    dtype=dtype,
                    device=self._device,
                    group=self._group,
                )
                for module in self.modules
            ]
            options: dict[str, Any] = {"n_microbatches": count, "loss_fn": _loss_itself, "scale_grads": False}
            if self.plan.schedule in _SINGLE:
                self._schedule = _SINGLE[self.plan.schedule](stages[0], **options)
            else:
                several: list[Any] = list(stages)
                self._schedule = _SEVERAL[self.plan.schedule](several, **options)
            self._key = key
        return self._schedule

    @torch.no_grad()
    def forward(self, batches: Sequence[Any], *, shapes: Sequence[Shapes], dtype: torch.dtype) -> list[Any]:
        """Runs forward passes alone, of micro-batches that may differ in shape.

        Returns:
            What the last stage made of each, on the rank that has it; elsewhere nothing.
        """
        outputs: list[Any] = []
        sent: list[tuple[dist.Work | None, Tensor]] = []
        for batch, shape in zip(batches, shapes, strict=True):
            local: tuple[Tensor, ...] = ()
            for module in self.modules:
                stage = module.stage
                received = local
                if stage.index and not self._is_here(stage.index - 1):
                    received = self._receive(stage, shapes=shape, dtype=dtype)
                left = module.run(received, batch=batch)
                if stage.is_last:
                    outputs.append(module.output(left, batch=batch))
                    continue
                local = tuple(left[flow.name].to(dtype).contiguous() for flow in stage.leaves)
                if not self._is_here(stage.index + 1):
                    peer = self._peer(stage.index + 1)
                    sent += [(dist.isend(tensor, dst=peer, group=self._group), tensor) for tensor in local]
        for work, _ in sent:
            if work is not None:
                work.wait()
        return outputs

    def _receive(self, stage: Stage, *, shapes: Shapes, dtype: torch.dtype) -> tuple[Tensor, ...]:
        buffers = [
            torch.empty((*shapes[flow.name], flow.width), dtype=dtype, device=self._device) for flow in stage.enters
        ]
        for buffer in buffers:
            dist.recv(buffer, src=self._peer(stage.index - 1), group=self._group)
        return tuple(buffers)

    def _peer(self, stage: int) -> int:
        return self._global_ranks[self.plan.stages[stage].rank]

    def _is_here(self, stage: int) -> bool:
        return self.plan.stages[stage].rank == self._rank


def _loss_itself(output: Tensor, target: Tensor) -> Tensor:
    """The last stage has computed its loss already."""
    return output
