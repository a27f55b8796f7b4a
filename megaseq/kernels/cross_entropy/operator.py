"""What the operators of the cross entropy share: arguments that torch can pass on, and gradients made as they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.cross_entropy.settings import CrossEntropy, LossSums

Wanted = tuple[bool, bool, bool]
"""Whether there is to be a gradient of hidden states, weight and bias."""


def wanted_of(hidden: Tensor, *, weight: Tensor, bias: Tensor | None) -> Wanted:
    """Which gradients a call wants."""
    graded = torch.is_grad_enabled()
    return (
        graded and hidden.requires_grad,
        graded and weight.requires_grad,
        graded and bias is not None and bias.requires_grad,
    )


def call(
    operator: Callable[..., Any],
    hidden: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    settings: CrossEntropy,
) -> LossSums:
    """Calls an operator, whose first output is the sums [5]; shapes as of `linear_cross_entropy`."""
    numbers = [settings.label_smoothing, settings.z_loss, settings.scale, settings.soft_cap or 0.0]
    wanted = list(wanted_of(hidden, weight=weight, bias=bias))
    return loss_sums(operator(hidden, weight, bias, labels, weights, numbers, settings.chunk or 0, wanted)[0])


def loss_sums(sums: Tensor) -> LossSums:
    """The sums [5], of which only the loss has a gradient."""
    loss, *others = sums.unbind()
    return LossSums(loss, *(other.detach() for other in others))


def settings_of(numbers: list[float], chunk: int) -> CrossEntropy:
    """The settings that `call` made numbers of."""
    smoothing, z_loss, scale, soft_cap = numbers
    return CrossEntropy(
        label_smoothing=smoothing, z_loss=z_loss, scale=scale, soft_cap=soft_cap or None, chunk=chunk or None
    )


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps the gradients, which are the outputs after the first, for the backward pass."""
    gradients_made = output[1:]
    ctx.mark_non_differentiable(*gradients_made)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients_made)
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in inputs[:3])


def gradients(ctx: Any, of_sums: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's eight arguments: those made, times that of the loss."""
    found: list[Tensor | None] = [None, None, None]
    if of_sums is not None:
        for index, gradient in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[index]:
                found[index] = (gradient * of_sums[0]).to(ctx.dtypes[index])
    return (*found, None, None, None, None, None)
