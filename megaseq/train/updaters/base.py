"""What the engine asks of the part that owns master weights, gradients and the learner."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from megaseq.base import NestedMap
from megaseq.checkpoint.piece import Piece
from megaseq.learner import Learner
from megaseq.learner.learner import UpdateStats
from megaseq.tasks.base import LossOutput
from megaseq.train.updaters.disk_memory import DiskMemory


class Updater(Protocol):
    """Between the last backward pass of a step and the first forward pass of the next one."""

    learner: Learner
    """Its params, schedule, counts and skip statistics; what its tensors are is the updater's affair."""
    disk: DiskMemory | None
    """Where masters and moments lie, if not in memory."""

    def compute_loss(self, batch: NestedMap) -> LossOutput:
        """Runs the task's forward pass; `backward` of its sum, scaled, is to follow."""

    def backward(self, loss: Tensor, *, first: bool, last: bool) -> None:
        """Adds the gradient of `loss` to those of the step.

        Args:
            loss: scalar; normalised by the weight of the global batch, so that gradients are to be summed over ranks.
            first: whether this is the step's first micro-batch.
            last: whether it is the last one.
        """

    def before_stage_backward(self) -> None:
        """To be called, instead of `backward`, before a pipeline's schedule runs a backward pass of a stage."""

    def after_stage_backward(self) -> None:
        """To be called when such a pass has left gradients in the parameters."""

    def update(self, *, step: int) -> UpdateStats:
        """Sums gradients over ranks and makes step `step`, or none of it; afterwards there are no gradients."""

    def evaluating(self, *, averaged: bool) -> AbstractContextManager[None]:
        """Within the context the module has all its weights, the moving averages if `averaged` and there are any."""

    def pieces(self) -> list[Piece]:
        """Returns what this process holds of fp32 weights and of the learner's state, by logical name, not copies."""

    def parameter_pieces(self) -> list[Piece]:
        """Returns what this process holds of the fp32 weights alone."""

    def publish(self) -> None:
        """Makes the weights that the module computes with follow the pieces after these were written to."""
