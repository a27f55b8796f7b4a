"""The outer optimizer: parameters that all workers begin their inner steps with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaseq.train.local_sgd.compression import decode, encode
from megaseq.train.local_sgd.params import LocalSGD


def bounds(count: int, *, fragments: int) -> list[tuple[int, int]]:
    """Returns the first and last element of each fragment of `count` parameters."""
    return [(count * index // fragments, count * (index + 1) // fragments) for index in range(fragments)]


class OuterState:
    """Parameters as one vector, and their momentum.

    `published` is what the workers have. Where changes are compressed it is not quite `values`, the exact sum; what it
    lacks goes with the next change.
    """

    def __init__(self, values: Tensor, *, params: LocalSGD.Params) -> None:
        """Begins without momentum at `values` [P], float32."""
        self.values = values.clone()
        self.published = values.clone()
        self.version = 0
        """Changes that were applied."""
        self.bounds = bounds(len(values), fragments=params.fragments)
        self._params = params
        self._momentum = torch.zeros_like(values)
        self._gradients = torch.zeros_like(values)
        self._received = [0] * params.fragments

    def size(self, fragments: Sequence[int]) -> int:
        """Returns the parameters of `fragments` together."""
        return sum(self.bounds[index][1] - self.bounds[index][0] for index in fragments)

    def read(self, fragments: Sequence[int]) -> Tensor:
        """Returns the published values of `fragments`, one after the other."""
        return torch.cat([self.published[slice(*self.bounds[index])] for index in fragments])

    def step(self, gradients: dict[int, Tensor]) -> tuple[list[int], bytes]:
        """Makes an outer step with the mean changes (before minus after) of some fragments.

        Returns:
            The fragments, and their change (after minus before) as `encode` writes it.
        """
        fragments = sorted(gradients)
        changes = []
        for index in fragments:
            part = slice(*self.bounds[index])
            self._descend(part, gradient=gradients[index])
            self._end_of_round(part, total=gradients[index])
            changes.append(self.values[part] - self.published[part])
        data = encode(torch.cat(changes), compression=self._params.compression)
        self._publish(fragments, data=data)
        self.version += 1
        return fragments, data

    def add(self, gradients: dict[int, Tensor], *, workers: int) -> None:
        """Takes one worker's change, its share of an outer step, as soon as it comes.

        Momentum moves on once in as many changes as there are workers (delayed Nesterov, Liu et al. 2024,
        arxiv.org/abs/2401.09135): changes of all workers that began with the same values make the step that `step`
        makes of their mean.
        """
        for index, gradient in gradients.items():
            part = slice(*self.bounds[index])
            share = gradient / workers
            self._descend(part, gradient=share)
            self._gradients[part] += share
            self._received[index] += 1
            if self._received[index] >= workers:
                self._end_of_round(part, total=self._gradients[part])
                self._gradients[part] = 0.0
                self._received[index] = 0
            self.published[part] = self.values[part]
        self.version += 1

    def _descend(self, part: slice, *, gradient: Tensor) -> None:
        self.values[part] -= self._params.outer_learning_rate * gradient

    def _end_of_round(self, part: slice, *, total: Tensor) -> None:
        momentum, rate = self._params.outer_momentum, self._params.outer_learning_rate
        self._momentum[part] = momentum * self._momentum[part] + total
        self.values[part] -= rate * momentum * self._momentum[part]

    def _publish(self, fragments: Sequence[int], *, data: bytes) -> None:
        change = decode(data, count=self.size(fragments), compression=self._params.compression)
        start = 0
        for index in fragments:
            first, last = self.bounds[index]
            self.published[first:last] += change[start : start + last - first]
            start += last - first
