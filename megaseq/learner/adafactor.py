"""Adafactor, as T5 was trained with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaseq.base import Problem
from megaseq.learner.optimizer import Optimizer, ParameterGroup


@dataclass
class _Slots:
    """The state of one parameter: `row` [..., R] and `column` [..., C] of a factored one, else `second`."""

    second: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None
    first: Tensor | None = None


class Adafactor(Optimizer):
    """Second moments kept as a row and a column of each matrix (Shazeer and Stern, 2018).

    At update t, with gradient g and d = 1 - t^decay_exponent: V is the average, with decay d, of g^2 +
    epsilon_gradient, kept as its row means and column means where the parameter is factored; u = g / sqrt(V), divided
    by max(1, RMS(u) / update_clip). The rate r is the learner's, times max(epsilon_parameter, RMS(p)) with
    `scale_by_parameter`, times min(0.01, 1 / sqrt(t)) with `relative_step` (0.01 becomes 1e-6 t with
    `relative_step_warmup`). With a `beta1` the update r u goes through a first moment. p -= r w p, then p -= update.
    """

    class Params(Optimizer.Params):
        decay_exponent: float = -0.8
        """Exponent of the decay of the second moment; towards 0 forgets faster."""
        beta1: float | None = None
        """Decay of a first moment of the update; None keeps none."""
        update_clip: float | None = 1.0
        """Limit of the root mean square of an update before the rate; None is no limit."""
        scale_by_parameter: bool = True
        """Whether the rate is relative to the parameter's root mean square."""
        relative_step: bool = False
        """Whether the rate falls by itself; learning rate and schedule multiply it (use 1.0 and Constant)."""
        relative_step_warmup: bool = False
        """Whether the relative step starts near 0."""
        min_dim_to_factor: int = 128
        """Only matrices with both dimensions at least this are factored."""
        epsilon_gradient: float = 1e-30
        """Added to the squared gradient."""
        epsilon_parameter: float = 1e-3
        """Floor of the parameter's root mean square."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports values that make no update."""
            yield from super().validate()
            if self.decay_exponent > 0.0:
                yield f"decay_exponent: must be at most 0, but is {self.decay_exponent}. The usual value is -0.8."
            if self.beta1 is not None and not 0.0 <= self.beta1 < 1.0:
                yield f"beta1: must be in [0, 1), but is {self.beta1}. Leave it out for none."
            if self.update_clip is not None and self.update_clip <= 0.0:
                yield f"update_clip: must be positive, but is {self.update_clip}. Leave it out for no limit."

    params: Params

    def __init__(self, p: Params, *, groups: Sequence[ParameterGroup]) -> None:
        super().__init__(p, groups=groups)
        self._items = [
            [self._allocate(name, tensor) for name, tensor in zip(group.names, group.tensors, strict=True)]
            for group in groups
        ]
        sizes = [tensor.numel() for group in groups for tensor in group.tensors]
        self._scratch = groups[0].tensors[0].new_empty(max(sizes)) if sizes else torch.empty(0)

    def _allocate(self, name: str, tensor: Tensor) -> _Slots:
        slots = _Slots()
        if tensor.dim() >= 2 and min(tensor.shape[-2:]) >= self.params.min_dim_to_factor:
            row, column = tensor.shape[:-1], tensor.shape[:-2] + tensor.shape[-1:]
            slots.row = self.add_slot("second_moment_row", name, tensor.new_zeros(row))
            slots.column = self.add_slot("second_moment_column", name, tensor.new_zeros(column))
        else:
            slots.second = self.add_slot("second_moment", name, torch.zeros_like(tensor, requires_grad=False))
        if self.params.beta1 is not None:
            slots.first = self.add_slot("first_moment", name, torch.zeros_like(tensor, requires_grad=False))
        return slots

    def step(self, index: int, *, gradients: Sequence[Tensor], learning_rate: float, gradient_scale: float) -> None:
        """Updates parameter by parameter, each while it is in the cache, without a host synchronisation."""
        p, group = self.params, self.groups[index]
        if p.relative_step:
            bound = 1e-6 * self.num_updates if p.relative_step_warmup else 1e-2
            learning_rate *= min(bound, 1.0 / math.sqrt(self.num_updates))
        rate = learning_rate * group.learning_rate_scale
        for parameter, gradient, slots in zip(group.tensors, gradients, self._items[index], strict=True):
            if gradient_scale != 1.0:
                gradient.mul_(gradient_scale)
            self._update_one(parameter, gradient=gradient, slots=slots, rate=rate, weight_decay=group.weight_decay)

    def _update_one(
        self, parameter: Tensor, *, gradient: Tensor, slots: _Slots, rate: float, weight_decay: float
    ) -> None:
        """Updates one parameter; every norm stays a tensor, so that a GPU is not waited for."""
        p = self.params
        root_size = math.sqrt(max(parameter.numel(), 1))
        update = self._scratch[: parameter.numel()].view(parameter.shape)
        self._precondition(gradient, slots=slots, out=update)
        scale = torch.full((), rate, dtype=parameter.dtype, device=parameter.device)
        if p.scale_by_parameter:
            scale *= (parameter.norm() / root_size).clamp_(min=p.epsilon_parameter)
        decay = scale * weight_decay
        if p.update_clip is not None:
            scale = scale / (update.norm() / (root_size * p.update_clip)).clamp_(min=1.0)
        if weight_decay != 0.0:
            parameter.mul_(1.0 - decay)
        if slots.first is not None and p.beta1 is not None:
            slots.first.lerp_(update.mul_(scale), 1.0 - p.beta1)
            parameter.sub_(slots.first)
        else:
            parameter.addcmul_(update, scale, value=-1.0)

    def _precondition(self, gradient: Tensor, *, slots: _Slots, out: Tensor) -> None:
        """Takes the squared gradient into the second moment and writes gradient / sqrt(second moment) to `out`."""
        weight = float(self.num_updates) ** self.params.decay_exponent
        torch.mul(gradient, gradient, out=out).add_(self.params.epsilon_gradient)
        if slots.second is not None:
            slots.second.lerp_(out, weight)
            torch.rsqrt(slots.second, out=out)
        elif slots.row is not None and slots.column is not None:
            slots.row.lerp_(out.mean(dim=-1), weight)
            slots.column.lerp_(out.mean(dim=-2), weight)
            rows = (slots.row / slots.row.mean(dim=-1, keepdim=True)).rsqrt_()
            torch.mul(rows.unsqueeze(-1), slots.column.rsqrt().unsqueeze(-2), out=out)
        out.mul_(gradient)
