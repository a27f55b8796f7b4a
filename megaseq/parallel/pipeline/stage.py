"""A stage as torch.distributed.pipelining sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megaseq.parallel.pipeline.job import PipelineJob, Shapes
from megaseq.parallel.pipeline.plan import Stage
from megaseq.parallel.spec import Added, Flow, Pipelined

SPLITS_BACKWARD = torch.__version__ >= "2.13"
"""Whether torch can make the gradients of parameters apart from those of what a stage received. Torch 2.11 fails there
at autograd functions written in Python, and adds up the gradients of all outputs of an operation that has several."""


class StageModule(nn.Module):
    """Runs the units of a stage on the micro-batch that it is told; its parameters are those of the units."""

    def __init__(self, model: Pipelined, *, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.job: PipelineJob | None = None
        self.micro_batch = 0
        names = [name for unit in stage.units for name in unit.tensors]
        # Such a stage does its backward pass at once: what leads from one use of a parameter to the other would be
        # gone when the gradients of the parameters between them are computed.
        self.reads_twice = len(set(names)) < len(names)
        # In a list: the model must not become a child, of which other stages of this rank would then be parts.
        self._model = [model]
        # No buffers: a schedule asks for parameters alone.
        self.weights = nn.ParameterList(_parameters_of(model, stage=stage))

    def forward(self, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Maps what the stage before has sent to what the next one gets; the last stage gives the scaled loss."""
        job = self.job
        if job is None:
            raise RuntimeError("pipeline: must be told its micro-batches, but a stage has none.")
        job.before_forward(self.micro_batch)
        with job.forward_context():
            left = self.run(received, batch=job.batches[self.micro_batch])
            if not self.stage.is_last:
                *others, last = (left[flow.name] for flow in self.stage.leaves)
                added = self.added()
                if added is not None:
                    job.added.append(_detached(added))
                    last = _with_loss(last, loss=added[0] if job.scale is None else added[0] * job.scale)
                return tuple(_sendable(tensor, dtype=job.dtype) for tensor in (*others, last))
            output = self.output(left, batch=job.batches[self.micro_batch])
        loss: Tensor = output.loss_sum
        # Kept without the graph, which the schedule frees micro-batch by micro-batch.
        job.outputs[self.micro_batch] = dataclasses.replace(output, loss_sum=loss.detach().clone())
        return loss * job.scale if job.scale is not None else loss.clone()

    def run(self, received: tuple[Tensor, ...], *, batch: Any) -> Mapping[str, Tensor]:
        """Runs the units; returns what the last of them leaves."""
        carry = {flow.name: tensor for flow, tensor in zip(self.stage.enters, received, strict=True)}
        self._model[0].begin_losses()
        return self._model[0].run_units(carry, batch=batch, units=self.stage.units)

    def added(self) -> Added | None:
        """Returns what layers of a stage that is not the last one, which has just run, add to the loss."""
        return self._model[0].take_losses()

    def output(self, left: Mapping[str, Tensor], *, batch: Any) -> Any:
        """Returns the loss output of what the last unit left."""
        return self._model[0].output_of(left, batch=batch)


class ScheduledStage(PipelineStage):
    """Tells its module which micro-batch comes, and the job which backward passes are done."""

    submod: StageModule

    @property
    def at_once(self) -> bool:
        """Whether the first half of a backward pass that a schedule asks for in two is all of it."""
        return self.submod.reads_twice or not SPLITS_BACKWARD

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """See `PipelineStage`. Torch 2.11 greets a neighbour also on this very rank, to which gloo cannot send."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        """See `PipelineStage`."""
        self.submod.micro_batch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *arguments, **options)

    def backward_one_chunk(self, bwd_chunk_id: int, **options: Any) -> None:  # type: ignore[override]
        """See `PipelineStage`; schedules name all options."""
        job = self.submod.job
        # The other half of a backward pass that comes in two is `backward_weight_one_chunk`.
        whole = options.get("full_backward", True) or self.at_once
        options["full_backward"] = whole
        if job is not None and whole:
            job.before_backward()
        super().backward_one_chunk(bwd_chunk_id, **options)
        if job is not None and whole:
            job.after_backward()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """See `PipelineStage`."""
        if self.at_once:
            return
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if self.submod.job is not None:
            self.submod.job.after_backward()


def make_scheduled_stage(
    module: StageModule, *, num_stages: int, shapes: Shapes, dtype: torch.dtype, device: torch.device, group: Any
) -> ScheduledStage:
    """Returns the stage for micro-batches of one shape; it takes no more than the buffers that it receives into.

    Args:
        module: what it runs.
        num_stages: of the whole pipeline.
        shapes: of the activations.
        dtype: of the activations.
        device: of this rank.
        group: the ranks of the pipeline.
    """
    stage = module.stage
    outputs = tuple(_meta(flow, shapes=shapes, dtype=dtype) for flow in stage.leaves)
    if stage.is_last:
        outputs = (torch.empty((), device="meta", dtype=torch.float32, requires_grad=True),)
    process_group: dist.ProcessGroup = group
    return ScheduledStage(
        module,
        stage.index,
        num_stages,
        device,
        # Static: to infer them, the schedule would run the stages, dropout, hooks of an optimizer and all.
        input_args=tuple(_meta(flow, shapes=shapes, dtype=dtype) for flow in stage.enters),
        output_args=outputs,
        group=process_group,
    )


class _WithLoss(torch.autograd.Function):
    """Hands on `x`; where that has a gradient, a loss has the gradient 1.

    So a stage that does not end with the task's loss differentiates the sum of that and of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        """Returns `x`."""
        ctx.loss = (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `x` and of the loss."""
        dtype, device = ctx.loss
        return gradient, torch.ones((), dtype=dtype, device=device)


def _with_loss(x: Tensor, *, loss: Tensor) -> Tensor:
    joined: Tensor = _WithLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return joined


def _detached(added: Added) -> Added:
    loss, metrics = added
    return loss.detach().clone(), metrics


def _sendable(tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Returns an activation as it goes to the next stage: dense, and no view, which could not be detached in place."""
    tensor = tensor.to(dtype).contiguous()
    if torch.is_grad_enabled() and not tensor.requires_grad:
        # All before it is frozen; the schedule sends a gradient back nevertheless, which ends here.
        return tensor.detach().requires_grad_()
    return tensor.clone() if tensor._is_view() else tensor


def _meta(flow: Flow, *, shapes: Shapes, dtype: torch.dtype) -> Tensor:
    return torch.empty((*shapes[flow.name], flow.width), device="meta", dtype=dtype, requires_grad=True)


def _parameters_of(model: Any, *, stage: Stage) -> list[nn.Parameter]:
    names = {name for unit in stage.units for name in unit.tensors}
    return [parameter for name, parameter in model.named_parameters() if name in names]
