"""The engine: one optimiser step, from a batch to updated weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megaseq.base import NestedMap
from megaseq.checkpoint import Ranks, WarmStart, WarmStartReport
from megaseq.checkpoint.piece import Piece
from megaseq.layers.base import first_values
from megaseq.learner import Learner
from megaseq.parallel.context import shard_batch
from megaseq.parallel.gradients import all_reduce_sum
from megaseq.parallel.layout import Parallel
from megaseq.parallel.mesh import Mesh
from megaseq.tasks.base import BaseTask, LossOutput
from megaseq.train.activation_checkpointing import ActivationCheckpointing, check_rules, checkpoint_activations
from megaseq.train.compiled_layers import compile_layers
from megaseq.train.device import move
from megaseq.train.model import build_task
from megaseq.train.pipelined import PipelinedTask
from megaseq.train.precision import autocast, resolve_precision
from megaseq.train.rows import MicroBatch, micro_batches, split_rows
from megaseq.train.updaters import Updater, make_updater

__all__ = ["Engine", "StepResult", "named_state", "split_rows"]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one optimiser step did over all ranks; plain numbers, read from the device once."""

    loss_sum: float
    weight: float
    metrics: Mapping[str, tuple[float, float]]
    grad_norm: float
    learning_rate: float
    skipped: str
    """Why the step changed nothing, its gradient being non-finite or an outlier; empty where it did."""


class Engine:
    """Owns a task, its learner and the number format; `train_step` is the only thing that changes weights."""

    def __init__(
        self,
        task_params: BaseTask.Params,
        *,
        learner_params: Learner.Params,
        seed: int,
        precision: str = "auto",
        accumulation: int = 1,
        device: torch.device | str = "cpu",
        mesh: Mesh | None = None,
        parallel: Parallel.Params | None = None,
        activation_checkpointing: ActivationCheckpointing.Params | None = None,
        compiled: bool = False,
    ) -> None:
        """Builds what this rank has of the model and its state; all ranks do so at the same time.

        Args:
            task_params: complete.
            learner_params: of the run.
            seed: of initial weights and dropout.
            precision: auto, fp32, bf16 or bf16_autocast.
            accumulation: micro-batches of a step.
            device: of this process.
            mesh: where this process stands; None is one process.
            parallel: how the ranks share the work; None with no mesh.
            activation_checkpointing: what layers compute again; None: nothing.
            compiled: whether Transformer layers are compiled.

        Raises:
            ParamsError: the model or the learner does not go with `parallel`.
        """
        self.device = torch.device(device)
        self.precision = resolve_precision(precision, device=self.device)
        self.mesh = mesh
        self.parallel = Parallel.Params() if parallel is None else parallel
        built = build_task(task_params, seed=seed, device=self.device, mesh=mesh, parallel=self.parallel)
        self.task: BaseTask = built.task
        self.context = built.context
        self.num_parameters = built.num_parameters
        """Elements of all parameters of the whole model."""
        if compiled:
            compile_layers(self.task)
        if activation_checkpointing is not None:
            check_rules(activation_checkpointing, task=task_params)
            checkpoint_activations(self.task, params=activation_checkpointing, compiled=compiled)
        self.updater: Updater = make_updater(
            self.task,
            learner_params=learner_params,
            precision=self.precision,
            mesh=mesh,
            parallel=self.parallel,
            device=self.device,
            values=functools.partial(_first_values, seed=seed) if built.is_empty else None,
        )
        self._accumulation = accumulation
        self.pipeline: PipelinedTask | None = None
        """Where the model is cut into stages of several ranks."""
        if built.plan is not None and mesh is not None:
            self.pipeline = PipelinedTask(
                self.task,
                plan=built.plan,
                mesh=mesh,
                parallel=self.parallel,
                precision=self.precision,
                accumulation=accumulation,
                device=self.device,
            )
        self._data_group = mesh.group("data") if mesh is not None else None
        self._loss_group = mesh.group("data", "context") if mesh is not None else None

    @property
    def learner(self) -> Learner:
        """Optimizer, schedule, counts and skip statistics."""
        return self.updater.learner

    def train_step(self, batch: NestedMap, *, step: int) -> StepResult:
        """Does optimiser step `step` (0 is the first) on `batch`, this data rank's rows of the global batch.

        Rows are split into micro-batches; gradients are those of the loss summed over all of them, and over all
        ranks, and divided by their total weight, so the split changes no more than rounding.
        """
        self.task.train()
        batch = self.to_device(batch)
        weight = all_reduce_sum(self.task.loss_weight(batch), group=self._data_group)
        scale = 1.0 / weight.clamp_min(1e-8)
        outputs = self._differentiate(shard_batch(batch, mesh=self.mesh), step=step, scale=scale)
        update = self.updater.update(step=step)
        sums = self._read(outputs)
        loss_sum, loss_weight = sums.pop("loss")
        return StepResult(
            loss_sum=loss_sum,
            weight=loss_weight,
            metrics=sums,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            skipped=update.skipped,
        )

    def _differentiate(self, batch: NestedMap, *, step: int, scale: Tensor) -> list[LossOutput]:
        """Leaves the gradients of `batch` with the updater; returns the loss of each micro-batch, or of all."""
        if self.pipeline is not None:
            sums = self.pipeline.accumulate(
                batch, scale=scale, place=lambda part: self.place(part, step=step), updater=self.updater
            )
            return [sums]
        parts = self.micro_batches(batch)
        return [self._accumulate(part, step=step, scale=scale, last=part is parts[-1]) for part in parts]

    def micro_batches(self, batch: NestedMap, *, parts: int = 0) -> list[MicroBatch]:
        """Splits this data rank's rows into `parts` micro-batches (0: `accumulation`), with their global numbers."""
        data_rank, data_ranks = (self.mesh.index("data"), self.mesh.size("data")) if self.mesh is not None else (0, 1)
        return micro_batches(batch, parts=parts or self._accumulation, data_rank=data_rank, data_ranks=data_ranks)

    def place(self, part: MicroBatch, *, step: int) -> None:
        """Tells all layers which rows of which step the next forward pass has: dropout is a function of these."""
        self.context.step = step
        self.context.row_start, self.context.row_stride = part.row_start, part.row_stride

    def _accumulate(self, part: MicroBatch, *, step: int, scale: Tensor, last: bool) -> LossOutput:
        self.place(part, step=step)
        with autocast(self.precision, device=self.device):
            output = self.updater.compute_loss(part.batch)
        self.updater.backward(output.loss_sum * scale, first=part.index == 0, last=last)
        return dataclasses.replace(output, loss_sum=output.loss_sum.detach())

    def _read(self, outputs: list[LossOutput]) -> dict[str, tuple[float, float]]:
        """Returns the (sum, weight) pairs of all micro-batches and ranks together; one transfer from the device."""
        names = ["loss", *outputs[0].metrics]
        rows = [
            torch.stack([value.detach().float() for pair in pairs for value in pair])
            for pairs in ([(output.loss_sum, output.weight), *output.metrics.values()] for output in outputs)
        ]
        total = all_reduce_sum(torch.stack(rows).double().sum(dim=0), group=self._loss_group)
        flat: list[float] = total.tolist()
        return {name: (flat[2 * index], flat[2 * index + 1]) for index, name in enumerate(names)}

    @contextlib.contextmanager
    def evaluating(self, *, averaged: bool = True) -> Iterator[BaseTask]:
        """Gives the task in evaluation mode, with the moving average as its weights where the learner keeps one.

        All ranks enter and leave it together.
        """
        self.task.eval()
        try:
            with (
                self.updater.evaluating(averaged=averaged),
                torch.inference_mode(),
                autocast(self.precision, device=self.device),
            ):
                yield self.task
        finally:
            self.task.train()

    def to_local(self, batch: NestedMap) -> NestedMap:
        """Returns what this process computes of `batch`, on its device: all of it, or its tokens of every row."""
        return shard_batch(self.to_device(batch), mesh=self.mesh)

    def to_device(self, batch: NestedMap) -> NestedMap:
        """Returns `batch` with its tensors on the engine's device."""
        return move(batch, device=self.device)

    def pieces(self) -> list[Piece]:
        """Returns what this process holds of all that a checkpoint keeps: fp32 weights and the learner's state."""
        return self.updater.pieces()

    def loaded(self, *, learner_state: Mapping[str, Any]) -> None:
        """To be called after the tensors of `pieces` were written to in place; `learner_state` is `learner.state()`."""
        self.learner.load_counts(learner_state)
        self.updater.publish()

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns all tensors that a checkpoint keeps, by logical name; only where this process holds them whole."""
        return {piece.name: piece.tensor for piece in self.updater.pieces()}

    def warm_start(self, source: WarmStart) -> WarmStartReport:
        """Begins with the parameters of another run; moving averages begin with the loaded values.

        Raises:
            CheckpointError: the other checkpoint does not hold what is asked for.
        """
        report = source.load(self.updater.parameter_pieces(), ranks=Ranks(alone=self.mesh is None))
        if self.learner.ema is not None:
            self.learner.ema.restart()
        self.updater.publish()
        return report


def _first_values(name: str, parameter: Tensor, *, seed: int) -> Tensor:
    return first_values(parameter, path=name, seed=seed)


def named_state(task: BaseTask) -> dict[str, Tensor]:
    """Returns the parameters and persistent buffers of `task`, detached, under the names that checkpoints give them."""
    return {f"task.{name}": tensor.detach() for name, tensor in task.state_dict(keep_vars=True).items()}
