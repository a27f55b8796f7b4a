"""The loss of a task on an evaluation input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from megaseq.base import NestedMap
from megaseq.tasks.base import BaseTask
from megaseq.train.spread import ALONE, Spread


def evaluate(
    task: BaseTask,
    *,
    batches: Iterable[NestedMap],
    to_device: Callable[[NestedMap], NestedMap] = lambda batch: batch,
    keep_going: Callable[[], bool] = lambda: True,
    spread: Spread = ALONE,
) -> dict[str, float]:
    """Returns the mean over all tokens of `batches` of the loss and of the task's metrics.

    Args:
        task: in evaluation mode.
        batches: as the input pipeline makes them, each example once.
        to_device: moves a batch to the task's device.
        keep_going: asked between batches; on False the result is empty.
        spread: whose rows the batches have; the means are those over all ranks.

    Returns:
        `loss`, each metric of the task, `perplexity` where there is a metric `nll`, and `tokens`, the summed weight.
    """
    sums: dict[str, tuple[float, float]] = {}
    for batch in batches:
        if not keep_going():
            return {}
        output = task.compute_loss(to_device(batch))
        pairs = {"loss": (output.loss_sum, output.weight), **output.metrics}
        values = torch.stack([value.double() for pair in pairs.values() for value in pair]).tolist()
        for index, name in enumerate(pairs):
            total, weight = sums.get(name, (0.0, 0.0))
            sums[name] = (total + values[2 * index], weight + values[2 * index + 1])
    sums = spread.add_up(sums)
    means = {name: total / weight for name, (total, weight) in sums.items() if weight > 0}
    if "nll" in means:
        # Beyond this, exp() overflows; such a model is no better than noise anyway.
        means["perplexity"] = math.exp(min(means["nll"], 700.0))
    if "loss" in sums:
        means["tokens"] = sums["loss"][1]
    return means
