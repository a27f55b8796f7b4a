"""Dropout whose mask is a function of (key, element index): the same in any order, on any device, and never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.checks import check_device, check_floating, check_rate, check_shape, fail
from megaseq.kernels.dropout.implementation import apply_mask, chosen_for
from megaseq.kernels.dropout.mask import DropoutKey, DropoutMask, MaskNumbers, Start, mix_key
from megaseq.kernels.dropout.op import as_operator
from megaseq.kernels.functions import apply_one

__all__ = ["DropoutKey", "DropoutMask", "Start", "dropout", "dropout_add", "mix_key"]


def dropout(values: Tensor, *, rate: float, key: DropoutKey, offset: Start = 0) -> Tensor:
    """Sets elements to zero at random and scales the others by 1 / (1 - rate) (Srivastava et al. 2014).

    Args:
        values: any shape.
        rate: chance of an element to become zero, in [0, 1).
        key: what the choice of elements is a function of.
        offset: where `values` stands, if it is a part of a larger tensor.

    Returns:
        A tensor like `values`, or `values` itself if the rate is 0.

    Raises:
        KernelError: for a rate outside [0, 1), numbers that are not floating point, runs that `values` does not consist
            of, or an implementation asked for in `MEGASEQ_KERNELS` that cannot run this call.
    """
    check_rate(rate, op="dropout")
    check_floating(values, op="dropout", argument="values")
    _check_start(offset, op="dropout", values=values)
    if rate == 0.0:
        return values
    return _run(values, residual=None, mask=DropoutMask(rate, key, offset))


def dropout_add(values: Tensor, *, residual: Tensor, rate: float, key: DropoutKey, offset: Start = 0) -> Tensor:
    """`residual + dropout(values)`: the end of every residual branch.

    Args:
        values: any shape.
        residual: the same shape and device; under autocast the branch is bf16 and the stream is not.
        rate: chance of an element of `values` to become zero, in [0, 1).
        key: what the choice of elements is a function of.
        offset: as in `dropout`.

    Returns:
        A tensor of that shape in the wider of both dtypes; `values` are rounded to theirs before the sum.

    Raises:
        KernelError: for tensors that do not fit each other, or as `dropout`.
    """
    check_rate(rate, op="dropout_add")
    check_floating(values, op="dropout_add", argument="values")
    _check_start(offset, op="dropout_add", values=values)
    check_shape(residual, op="dropout_add", argument="residual", shape=tuple(values.shape), legend="of values")
    check_floating(residual, op="dropout_add", argument="residual")
    check_device(residual, op="dropout_add", argument="residual", other=values, other_name="values")
    if rate == 0.0:
        return residual + values
    return _run(values, residual=residual, mask=DropoutMask(rate, key, offset))


def _check_start(offset: Start, *, op: str, values: Tensor) -> None:
    """Checks that a number is not negative, or runs are int64 [R] where `values` are, which consist of R of them.

    Raises:
        KernelError: if not.
    """
    if isinstance(offset, int):
        if offset < 0:
            raise fail(
                "offset", op=op, expected="be at least 0", came=offset, remedy="Count elements from the first one"
            )
        return
    fits = offset.dim() == 1 and offset.dtype is torch.int64 and offset.device == values.device
    count = offset.numel()
    if not fits or (values.numel() % count if count else values.numel()):
        raise fail(
            "offset",
            op=op,
            expected=f"be int64 [R] on {values.device} with R that divides {values.numel()} elements",
            came=f"{offset.dtype} {list(offset.shape)} on {offset.device}",
            remedy="Give one number for each run",
        )


def _run(values: Tensor, *, residual: Tensor | None, mask: DropoutMask) -> Tensor:
    """`dropout`, plus the residual if there is one, by the implementation that is chosen; always new memory."""
    # Neither the extension nor NumPy can be part of a graph: the operator looks for them when it runs.
    if torch.compiler.is_compiling():
        return as_operator(values, residual=residual, mask=mask)
    chosen, extension = chosen_for(values, residual=residual)
    if chosen == "triton":
        return as_operator(values, residual=residual, mask=mask)
    numbers = mask.numbers()
    if residual is not None and residual.dtype is not values.dtype:
        return residual + apply_one(_Dropout, values, None, numbers, extension)
    return apply_one(_Dropout, values, residual, numbers, extension)


class _Dropout(torch.autograd.Function):
    """Applies the mask, and applies it again to the gradient: recomputing costs less than storing and reading it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, residual: Tensor | None, numbers: MaskNumbers, extension: Any) -> Tensor:
        ctx.how = numbers, extension
        dropped = apply_mask(values, numbers=numbers, extension=extension)
        return dropped if residual is None else dropped.add_(residual)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient = gradients[0]
        of_values = apply_one(_GradientDropout, gradient, *ctx.how) if ctx.needs_input_grad[0] else None
        of_residual = gradient if ctx.needs_input_grad[1] else None
        return of_values, of_residual, None, None


class _GradientDropout(torch.autograd.Function):
    """The same linear map on the gradient, itself differentiable."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, numbers: MaskNumbers, extension: Any) -> Tensor:
        ctx.how = numbers, extension
        return apply_mask(values, numbers=numbers, extension=extension)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return apply_one(_GradientDropout, gradients[0], *ctx.how), None, None
