"""Runs the stages of one rank: training steps by a schedule of torch, and forward passes alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from megaseq.parallel.mesh import Mesh
from megaseq.parallel.pipeline.job import PipelineJob, Shapes
from megaseq.parallel.pipeline.links import Links, in_order
from megaseq.parallel.pipeline.plan import StagePlan
from megaseq.parallel.pipeline.stage import SPLITS_BACKWARD, ScheduledStage, StageModule, make_scheduled_stage
from megaseq.parallel.spec import Added, Pipelined

_logger = logging.getLogger(__name__)

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
        self.links = Links(plan=plan, mesh=mesh, device=device)
        self.modules = [StageModule(model, stage=stage) for stage in plan.of_rank(mesh.index("pipe"))]
        self._key: object = None
        self._schedule: Any = None
        if plan.schedule == "zero_bubble_v" and not SPLITS_BACKWARD and mesh.is_first:
            _logger.warning(
                "parallel.pipeline.schedule: zero_bubble_v must have torch 2.13 or later to fill its gaps, but has %s: "
                "it is right, but waits. Use interleaved or 1f1b.",
                torch.__version__,
            )

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
                    group=self.links.group,
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
    def forward(
        self, batches: Sequence[Any], *, shapes: Sequence[Shapes], dtype: torch.dtype
    ) -> tuple[list[Any], list[Added]]:
        """Runs forward passes alone, of micro-batches that may differ in shape.

        Returns:
            What the last stage made of each, on the rank that has it, elsewhere nothing; and what layers of this rank's
            other stages add to the loss.
        """
        outputs: list[Any] = []
        sums: list[Added] = []
        links = self.links
        for batch, shape in zip(batches, shapes, strict=True):
            received: tuple[Tensor, ...] = ()
            for module in self.modules:
                stage = module.stage
                if stage.index and not links.is_here(stage.index - 1):
                    received = links.receive(stage.enters, shapes=shape, dtype=dtype, stage=stage.index - 1)
                left = module.run(received, batch=batch)
                if stage.is_last:
                    outputs.append(module.output(left, batch=batch))
                    continue
                added = module.added()
                if added is not None:
                    sums.append(added)
                received = in_order(left, flows=stage.leaves, dtype=dtype)
                if not links.is_here(stage.index + 1):
                    links.send(received, stage=stage.index + 1)
        links.wait()
        return outputs, sums


def _loss_itself(output: Tensor, target: Tensor) -> Tensor:
    """The last stage has computed its loss already."""
    return output
