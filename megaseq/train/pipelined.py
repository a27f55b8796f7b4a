"""A task of which this rank has some pipeline stages: its optimiser steps, its losses, and its decoding."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaseq.base import NestedMap
from megaseq.layers.decoding_part import DecodingPart
from megaseq.layers.encoder_decoder import EncoderDecoder
from megaseq.parallel.gradients import all_reduce_sum
from megaseq.parallel.layout import Parallel
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.pipeline import PipelinedDecoder, PipelineJob, StagePlan
from megaseq.parallel.pipeline_params import micro_batches_of
from megaseq.parallel.spec import Added, Pipelined
from megaseq.tasks.base import BaseTask, LossOutput
from megaseq.train.precision import Precision, autocast
from megaseq.train.rows import MicroBatch, micro_batches, padded
from megaseq.train.updaters import Updater


class PipelinedTask:
    """Takes a batch through all stages; every rank of the pipeline calls it with the same one at the same time."""

    def __init__(
        self,
        task: BaseTask,
        *,
        plan: StagePlan,
        mesh: Mesh,
        parallel: Parallel.Params,
        precision: Precision,
        accumulation: int,
        device: torch.device,
    ) -> None:
        """Makes the stages, and gives `task` the losses and the decoding of the whole model.

        Args:
            task: cut to what `plan` gives this rank, its parameters on their device.
            plan: all stages.
            mesh: with several ranks along `pipe`.
            parallel: of the run.
            precision: of forward passes.
            accumulation: micro-batches of a step, where the pipeline's params do not say.
            device: of this process.
        """
        assert isinstance(task, Pipelined)
        self.plan = plan
        self._task: BaseTask = task
        self._model: Pipelined = task
        self._mesh = mesh
        self._precision: Precision = precision
        self._device = device
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._parts = micro_batches_of(parallel.pipeline, accumulation=accumulation, ranks=mesh.size("pipe"))
        # Imported where it is used: torch's schedules take as long as torch itself.
        from megaseq.parallel.pipeline.runner import PipelineRunner

        self._runner = PipelineRunner(task, plan=plan, mesh=mesh, device=device)
        self._names: dict[bool, list[str]] = {}
        self._added_names: dict[bool, list[str]] = {}
        self._install()

    def _install(self) -> None:
        """Lets evaluation and decoding go through the pipeline; the task's own would miss what is on other ranks."""
        object.__setattr__(self._task, "compute_loss", self.compute_loss)
        task: object = self._task
        if isinstance(task, EncoderDecoder):
            decoder = self._decoder(task)
            for name in ("prefill", "step", "step_best", "select", "reorder", "vocab_size"):
                object.__setattr__(self._task, name, getattr(decoder, name))

    def _decoder(self, task: EncoderDecoder) -> PipelinedDecoder:
        parts = {
            stage.index: DecodingPart(task, units=stage.units)
            for stage in self.plan.of_rank(self._mesh.index("pipe"))
            if any(unit.name.startswith("decoder.") for unit in stage.units)
        }
        return PipelinedDecoder(
            self._model,
            parts=parts,
            links=self._runner.links,
            width=task.decoder.params.model_dim,
            vocab_size=task.params.target_vocab_size,
            dtype=self._dtype,
        )

    # ---- training ------------------------------------------------------------------------------------------------

    def accumulate(
        self, batch: NestedMap, *, scale: Tensor, place: Callable[[MicroBatch], None], updater: Updater
    ) -> LossOutput:
        """Runs forward and backward passes of all micro-batches of a step.

        Args:
            batch: this data rank's rows.
            scale: factor of the summed loss before it is differentiated.
            place: tells all layers which rows the next forward pass has.
            updater: told before and after each backward pass of a stage.

        Returns:
            The sums of the whole batch, on every rank of the pipeline.
        """
        data_rank, data_ranks = self._mesh.index("data"), self._mesh.size("data")
        # A schedule's micro-batches are of one shape.
        batch = padded(batch, multiple=self._parts)
        parts = micro_batches(batch, parts=self._parts, data_rank=data_rank, data_ranks=data_ranks)
        job = PipelineJob(
            batches=[part.batch for part in parts],
            shapes=self._model.flow_shapes(parts[0].batch),
            dtype=self._dtype,
            scale=scale,
            before_forward=lambda index: place(parts[index]),
            forward_context=lambda: autocast(self._precision, device=self._device),
            before_backward=updater.before_stage_backward,
            after_backward=updater.after_stage_backward,
        )
        self._runner.step(job)
        return self._shared([job.outputs[index] for index in sorted(job.outputs)], added=job.added, training=True)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def compute_loss(self, batch: NestedMap) -> LossOutput:
        """Returns the loss of `batch`, without gradient, on every rank of the pipeline."""
        rows = batch.flatten()[0].shape[0]
        # Smaller ones let the ranks work at the same time.
        parts = [part.batch for part in micro_batches(batch, parts=min(rows, self._mesh.size("pipe")))]
        shapes = [self._model.flow_shapes(part) for part in parts]
        outputs, added = self._runner.forward(parts, shapes=shapes, dtype=self._dtype)
        return self._shared(outputs, added=added, training=False)

    # ---- what stages know ----------------------------------------------------------------------------------------

    def _shared(self, outputs: Sequence[LossOutput], *, added: Sequence[Added], training: bool) -> LossOutput:
        """Returns on all ranks the sums of what the rank of the last stage has, and of what other stages add to it."""
        links, last = self._runner.links, len(self.plan.stages) - 1
        sums = _sums(outputs) if outputs else {}
        if training not in self._names:
            self._names[training] = self._shared_names(list(sums))
        names = self._names[training]
        values = torch.stack([value for name in names for value in sums[name]]) if outputs else None
        shared = links.from_stage(values, shape=(2 * len(names),), dtype=torch.float64, stage=last)
        pairs = {name: (shared[2 * index], shared[2 * index + 1]) for index, name in enumerate(names)}
        for name, (total, count) in self._summed(added, training=training).items():
            before = pairs.get(name)
            pairs[name] = (total, count) if before is None else (before[0] + total, before[1] + count)
        loss_sum, weight = pairs.pop("loss")
        return LossOutput(loss_sum=loss_sum, weight=weight, metrics=pairs)

    def _summed(self, added: Sequence[Added], *, training: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns on all ranks the sums over all stages of what their layers add to the loss."""
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for loss, metrics in added:
            for name, pair in {"loss": (loss, torch.zeros_like(loss)), **metrics}.items():
                total, weight = (value.detach().double() for value in pair)
                before = sums.get(name)
                sums[name] = (total, weight) if before is None else (before[0] + total, before[1] + weight)
        group = self._runner.links.group
        if training not in self._added_names:
            gathered: list[list[str] | None] = [None] * self._mesh.size("pipe")
            dist.all_gather_object(gathered, list(sums), group=group)
            self._added_names[training] = list(dict.fromkeys(name for held in gathered for name in held or ()))
        names = self._added_names[training]
        if not names:
            return {}
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        values = all_reduce_sum(torch.stack([v for name in names for v in sums.get(name, (zero, zero))]), group=group)
        return {name: (values[2 * index], values[2 * index + 1]) for index, name in enumerate(names)}

    def _shared_names(self, names: Sequence[str]) -> list[str]:
        """Returns the names of the sums, which the rank of the last stage knows; the same in every step."""
        links, last = self._runner.links, len(self.plan.stages) - 1
        text = json.dumps(list(names)).encode()
        here = links.is_here(last)
        length = torch.tensor([len(text)], device=self._device) if here else None
        size = int(links.from_stage(length, shape=(1,), dtype=torch.int64, stage=last))
        data = torch.tensor(list(text), device=self._device) if here else None
        shared = links.from_stage(data, shape=(size,), dtype=torch.int64, stage=last)
        found: list[str] = json.loads(bytes(shared.tolist()).decode())
        return found


def _sums(outputs: Sequence[LossOutput]) -> dict[str, tuple[Tensor, Tensor]]:
    """Adds up the micro-batches' pairs, in float64."""
    rows: list[Mapping[str, tuple[Tensor, Tensor]]] = [
        {"loss": (output.loss_sum, output.weight), **output.metrics} for output in outputs
    ]
    return {name: (_total([row[name][0] for row in rows]), _total([row[name][1] for row in rows])) for name in rows[0]}


def _total(values: Sequence[Any]) -> Tensor:
    return torch.stack([value.detach().double() for value in values]).sum()
