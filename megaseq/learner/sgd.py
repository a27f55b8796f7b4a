"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megaseq.base import Problem
from megaseq.learner.optimizer import Optimizer, ParameterGroup


class SGD(Optimizer):
    """Gradient descent with momentum.

    With gradient g, rate r and weight decay w: g += w p;  b = momentum b + g;  p -= r b, or, with `nesterov`,
    p -= r (g + momentum b) (Sutskever et al., 2013). Weight decay is an L2 penalty here: it passes through the
    momentum.
    """

    class Params(Optimizer.Params):
        momentum: float = 0.0
        """Decay of the velocity; 0 keeps none."""
        nesterov: bool = False
        """Whether to look ahead along the velocity."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports a momentum outside [0, 1), and Nesterov without one."""
            yield from super().validate()
            if not 0.0 <= self.momentum < 1.0:
                yield f"momentum: must be in [0, 1), but is {self.momentum}. Typical is 0.9."
            if self.nesterov and self.momentum == 0.0:
                yield "nesterov: must be off without momentum, but is on. Set momentum, for example 0.9."

    params: Params

    def __init__(self, p: Params, *, groups: Sequence[ParameterGroup]) -> None:
        super().__init__(p, groups=groups)
        self._velocity = self.add_zeros("velocity") if p.momentum > 0.0 else [[] for _ in groups]
        self._divisor = torch.ones((), dtype=torch.float32, device=self.device)

    def step(self, index: int, *, gradients: Sequence[Tensor], learning_rate: float, gradient_scale: float) -> None:
        """Updates a group in one fused call."""
        p, group = self.params, self.groups[index]
        self._divisor.fill_(1.0 / gradient_scale)
        torch._fused_sgd_(
            list(group.tensors),
            list(gradients),
            self._velocity[index],
            weight_decay=group.weight_decay,
            momentum=p.momentum,
            lr=learning_rate * group.learning_rate_scale,
            dampening=0.0,
            nesterov=p.nesterov,
            maximize=False,
            # The first velocity is the gradient: what decaying zeros gives too.
            is_first_step=False,
            grad_scale=None if gradient_scale == 1.0 else self._divisor,
            found_inf=None,
        )
