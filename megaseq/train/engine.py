"""The engine: one optimiser step, from a batch to updated weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megaseq.base import NestedMap
from megaseq.checkpoint import WarmStart, WarmStartReport
from megaseq.layers.base import bind, initialize
from megaseq.learner import Learner
from megaseq.tasks.base import BaseTask, LossOutput
from megaseq.train.device import move
from megaseq.train.precision import MasterWeights, autocast, resolve_precision


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one optimiser step did; plain numbers, read from the device once."""

    loss_sum: float
    weight: float
    metrics: Mapping[str, tuple[float, float]]
    grad_norm: float
    learning_rate: float
    skipped: str
    """Why the step changed nothing, its gradient being non-finite or an outlier; empty where it did."""


def split_rows(batch: NestedMap, *, parts: int) -> list[NestedMap]:
    """Splits the rows of every tensor of `batch` into `parts` runs of equal length, the last ones one shorter.

    A batch of fewer rows than parts gives one part a row.
    """
    if parts == 1:
        return [batch]
    tensors = batch.flatten()
    rows = tensors[0].shape[0]
    parts = min(parts, rows)
    bounds = [rows * index // parts for index in range(parts + 1)]
    return [batch.pack([tensor[start:stop] for tensor in tensors]) for start, stop in itertools.pairwise(bounds)]


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
    ) -> None:
        self.device = torch.device(device)
        self.precision = resolve_precision(precision, device=self.device)
        self.task: BaseTask = task_params.instantiate()
        self.task.to(self.device)
        initialize(self.task, seed=seed, prefix="task")
        self._context = bind(self.task, seed=seed, prefix="task")
        self._weights = MasterWeights(self.task, precision=self.precision)
        self.learner: Learner = learner_params.instantiate(
            named_parameters={f"task.{name}": master for name, master in self._weights.masters.items()}
        )
        self._accumulation = accumulation

    def train_step(self, batch: NestedMap, *, step: int) -> StepResult:
        """Does optimiser step `step` (0 is the first) on `batch`.

        Rows are split into micro-batches; gradients are those of the loss summed over all of them and divided by
        their total weight, so the split changes no more than rounding.
        """
        self.task.train()
        batch = self.to_device(batch)
        weight = self.task.loss_weight(batch)
        scale = 1.0 / weight.clamp_min(1e-8)
        outputs: list[LossOutput] = []
        for index, micro_batch in enumerate(split_rows(batch, parts=self._accumulation)):
            outputs.append(self._accumulate(micro_batch, step=step, index=index, scale=scale))
        update = self.learner.update(step=step)
        self._weights.publish()
        self._weights.clear_gradients()
        sums = _read(outputs)
        loss_sum, loss_weight = sums.pop("loss")
        return StepResult(
            loss_sum=loss_sum,
            weight=loss_weight,
            metrics=sums,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            skipped=update.skipped,
        )

    def _accumulate(self, batch: NestedMap, *, step: int, index: int, scale: Tensor) -> LossOutput:
        self._context.step, self._context.micro_batch = step, index
        with autocast(self.precision, device=self.device):
            output = self.task.compute_loss(batch)
        (output.loss_sum * scale).backward()  # type: ignore[no-untyped-call]
        self._weights.collect_gradients(first=index == 0)
        return dataclasses.replace(output, loss_sum=output.loss_sum.detach())

    @contextlib.contextmanager
    def evaluating(self, *, averaged: bool = True) -> Iterator[BaseTask]:
        """Gives the task in evaluation mode, with the moving average as its weights where the learner keeps one."""
        weights = self.learner.averages(on_change=self._weights.publish) if averaged else contextlib.nullcontext()
        self.task.eval()
        try:
            with weights, torch.inference_mode(), autocast(self.precision, device=self.device):
                yield self.task
        finally:
            self.task.train()

    def to_device(self, batch: NestedMap) -> NestedMap:
        """Returns `batch` with its tensors on the engine's device."""
        return move(batch, device=self.device)

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns all tensors that a checkpoint keeps, by logical name: fp32 weights and the learner's state."""
        return self._weights_by_name() | self.learner.state_tensors()

    def _weights_by_name(self) -> dict[str, Tensor]:
        masters = {f"task.{name}": master.detach() for name, master in self._weights.masters.items()}
        return named_state(self.task) | masters

    def warm_start(self, source: WarmStart) -> WarmStartReport:
        """Begins with the parameters of another run; moving averages begin with the loaded values.

        Raises:
            CheckpointError: the other checkpoint does not hold what is asked for.
        """
        report = source.load(self._weights_by_name())
        if self.learner.ema is not None:
            self.learner.ema.restart()
        self._weights.publish()
        return report

    def load_state(self, tensors: Mapping[str, Tensor], *, learner_state: Mapping[str, Any]) -> None:
        """Takes back what `state_tensors` and the learner's `state` gave."""
        with torch.no_grad():
            for name, tensor in self.state_tensors().items():
                if tensor is not tensors[name]:
                    tensor.copy_(tensors[name])
        self.learner.load(tensors=tensors, state=learner_state)
        self._weights.publish()


def named_state(task: BaseTask) -> dict[str, Tensor]:
    """Returns the parameters and persistent buffers of `task`, detached, under the names that checkpoints give them."""
    return {f"task.{name}": tensor.detach() for name, tensor in task.state_dict(keep_vars=True).items()}


def _read(outputs: list[LossOutput]) -> dict[str, tuple[float, float]]:
    """Returns the (sum, weight) pairs of all micro-batches together; one transfer from the device."""
    names = ["loss", *outputs[0].metrics]
    rows = [
        torch.stack([value.detach().float() for pair in pairs for value in pair])
        for pairs in ([(output.loss_sum, output.weight), *output.metrics.values()] for output in outputs)
    ]
    flat: list[float] = torch.stack(rows).double().sum(dim=0).tolist()
    return {name: (flat[2 * index], flat[2 * index + 1]) for index, name in enumerate(names)}
