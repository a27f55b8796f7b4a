"""What layers add to the loss of a batch besides the task's own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AuxiliaryLoss:
    """What one layer adds to the loss, and what it reports: sums over this process's tokens."""

    loss_sum: Tensor
    """Scalar that is differentiated."""
    metrics: Mapping[str, tuple[Tensor, Tensor]]
    """(sum, weight) pairs without gradient, by name."""


def add_up(losses: Sequence[AuxiliaryLoss], *, loss_sum: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Adds the losses of layers to the task's.

    They are sums over tokens as the task's loss is, and are divided by the same weight, that of the target: so their
    scale does not depend on how the batch is cut into micro-batches and dealt out to ranks.

    Args:
        losses: one a layer.
        loss_sum: of the task.

    Returns:
        The total, and the layers' metrics together.
    """
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    for loss in losses:
        loss_sum = loss_sum + loss.loss_sum.to(loss_sum.dtype)
        for name, (total, weight) in loss.metrics.items():
            before = metrics.get(name)
            metrics[name] = (total, weight) if before is None else (before[0] + total, before[1] + weight)
    return loss_sum, metrics
