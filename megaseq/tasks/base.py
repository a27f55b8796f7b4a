"""BaseTask: a model that knows its loss and how to decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from megaseq.base import Configurable, NestedMap
from megaseq.decode.hypothesis import Hypothesis
from megaseq.layers.base import Layer


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """What the forward pass of one micro-batch gives.

    Sums and weights stay apart, so that the mean over micro-batches and ranks is exact however uneven they are.
    """

    loss_sum: Tensor
    """Scalar that is differentiated: the sum over target tokens of all terms of the loss."""
    weight: Tensor
    """Scalar without gradient: the weight that `loss_sum` is divided by, usually the number of target tokens."""
    metrics: Mapping[str, tuple[Tensor, Tensor]]
    """Further (sum, weight) pairs without gradient, by name."""


class BaseTask(Layer):
    """Base of all tasks: a module with a loss, built, stepped and stored by the jobs of megaseq.train."""

    class Params(Layer.Params):
        pass

    params: Params

    def compute_loss(self, batch: NestedMap) -> LossOutput:
        """Runs the forward pass of `batch`, as the input pipeline made it."""
        raise NotImplementedError

    def loss_weight(self, batch: NestedMap) -> Tensor:
        """Returns the weight, a scalar, that the loss of `batch` will have; known before the forward pass.

        The engine divides by the weight of the whole batch in every micro-batch's backward pass.
        """
        weights: Tensor = batch.target.weights
        return weights.sum(dtype=torch.float32)

    def decode(
        self, source: NestedMap, *, search: Configurable.Params, keys: Tensor | None = None
    ) -> list[list[Hypothesis]]:
        """Decodes `source` (ids [B, S], one example a row); returns the n best hypotheses of each, best first.

        Args:
            source: one example a row.
            search: params of the search; what they leave to the task is as in `default_search`.
            keys: [B] identity of each example, its index in the corpus, say, so that samples do not depend on the
                batch; the row's index by default.
        """
        raise NotImplementedError

    def default_search(self) -> Configurable.Params:
        """Returns the params of the search that evaluation uses unless told otherwise."""
        raise NotImplementedError
