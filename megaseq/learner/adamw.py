"""AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megaseq.base import Problem
from megaseq.kernels.adamw import AdamWSettings, adamw_, choose_adamw
from megaseq.kernels.adamw.apex import apex_adamw_
from megaseq.learner.optimizer import Optimizer, ParameterGroup


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    At update t, with gradient g, rate r and weight decay w:
    p -= r w p;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    p -= r (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon).
    One fused kernel reads gradient, parameter and moments once, and scales the gradient on the way: torch's, or what
    `kernels.adamw.choose_adamw` says.
    """

    class Params(Optimizer.Params):
        beta1: float = 0.9
        """Decay of the first moment."""
        beta2: float = 0.98
        """Decay of the second moment; 0.98 is the Transformer's, 0.999 Adam's own."""
        epsilon: float = 1e-9
        """Added to the root of the second moment."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports decays outside [0, 1) and a negative epsilon."""
            yield from super().validate()
            for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
                if not 0.0 <= value < 1.0:
                    yield f"{name}: must be in [0, 1), but is {value}. Typical values are 0.9 and 0.98."
            if self.epsilon < 0.0:
                yield f"epsilon: must be at least 0, but is {self.epsilon}. Typical is 1e-9."

    params: Params

    def __init__(self, p: Params, *, groups: Sequence[ParameterGroup]) -> None:
        super().__init__(p, groups=groups)
        self._first = self.add_zeros("first_moment")
        self._second = self.add_zeros("second_moment")
        # The kernel wants a step and a divisor as tensors; all parameters share one of each.
        self._step = torch.zeros((), dtype=torch.float32, device=self.device)
        self._divisor = torch.ones((), dtype=torch.float32, device=self.device)
        self._kernels = [choose_adamw(group.tensors[0], flat=_is_flat(group.tensors)) for group in self.groups]

    def step(self, index: int, *, gradients: Sequence[Tensor], learning_rate: float, gradient_scale: float) -> None:
        """Updates a group in one fused call."""
        p, group = self.params, self.groups[index]
        self._step.fill_(self.num_updates)
        self._divisor.fill_(1.0 / gradient_scale)
        if self._kernels[index] != "torch":
            self._step_by_kernel(index, gradients=gradients, learning_rate=learning_rate * group.learning_rate_scale)
            return
        torch._fused_adamw_(
            list(group.tensors),
            list(gradients),
            self._first[index],
            self._second[index],
            [],
            [self._step] * len(group.tensors),
            lr=learning_rate * group.learning_rate_scale,
            beta1=p.beta1,
            beta2=p.beta2,
            weight_decay=group.weight_decay,
            eps=p.epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=None if gradient_scale == 1.0 else self._divisor,
            found_inf=None,
        )

    def _step_by_kernel(self, index: int, *, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Updates a group by another kernel than torch's; step and divisor are filled."""
        p, group = self.params, self.groups[index]
        settings = AdamWSettings(learning_rate, p.beta1, p.beta2, p.epsilon, group.weight_decay)
        parameters = [tensor.detach() for tensor in group.tensors]
        first, second = self._first[index], self._second[index]
        if self._kernels[index] == "apex":
            apex_adamw_(
                parameters,
                gradients=gradients,
                moments=(first, second),
                settings=settings,
                step=self._step,
                divisor=self._divisor,
                skip=None,
            )
            return
        for tensor, gradient, m, v in zip(parameters, gradients, first, second, strict=True):
            adamw_(
                tensor.view(-1),
                gradients=gradient.reshape(-1),
                moments=(m.view(-1), v.view(-1)),
                settings=settings,
                step=self._step,
                divisor=self._divisor,
            )


def _is_flat(tensors: Sequence[Tensor]) -> bool:
    """Whether a group is one run of memory."""
    return len(tensors) == 1 and tensors[0].is_contiguous()
