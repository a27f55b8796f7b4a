"""Dropout whose mask is a function of (key, element index): the same in any order, on any device, and never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaseq.base import native
from megaseq.kernels.checks import check_device, check_floating, check_rate, check_shape, fail
from megaseq.kernels.dispatch import choose, requested
from megaseq.kernels.dropout.host import host_keep_mask, host_keep_mask_of_runs, native_apply
from megaseq.kernels.dropout.reference import keep_mask, keep_mask_of_runs, threshold_of
from megaseq.kernels.dropout.triton_op import dropout_op
from megaseq.kernels.functions import apply_one
from megaseq.kernels.rows import unfit

__all__ = ["DropoutKey", "DropoutMask", "Start", "dropout", "dropout_add", "mix_key"]

DropoutKey = tuple[int, int, int]
"""(seed, step, number of the place): what a mask is a function of, such as `Layer.dropout_key()`."""

Start = int | Tensor
"""Where a tensor stands in a larger one: the number of its first element, the others following row-major; or int64 [R],
the number of the first element of each of R runs of equal length, which one after the other are the tensor."""

_WORD64 = 0xFFFFFFFFFFFFFFFF
_SIGN = 1 << 63


@dataclass(frozen=True, eq=False)
class DropoutMask:
    """Which elements of a tensor become zero."""

    rate: float
    """Chance of an element to become zero, in [0, 1)."""
    key: DropoutKey
    """What the mask is a function of."""
    offset: Start = 0
    """Where the tensor stands, if it is a part of a larger one."""


def mix_key(key: DropoutKey) -> int:
    """The 64-bit key of a mask: SplitMix64 (Steele et al. 2014) absorbs the three numbers one by one."""
    state = 0
    for number in key:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD64
        state ^= state >> 31
    return state


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
    check_shape(residual, op="dropout_add", argument="residual", shape=tuple(values.shape), legend="that of values")
    check_floating(residual, op="dropout_add", argument="residual")
    check_device(residual, op="dropout_add", argument="residual", other=values, other_name="values")
    if rate == 0.0:
        return residual + values
    return _run(values, residual=residual, mask=DropoutMask(rate, key, offset))


def _check_start(offset: Start, *, op: str, values: Tensor) -> None:
    """Checks that runs are int64 [R] on the device of `values`, and that it consists of R of them.

    Raises:
        KernelError: if not.
    """
    if isinstance(offset, int):
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
    # The extension is no part of a compiled graph, and not looked for where it is not wanted.
    wanted = values.device.type == "cpu" and requested("dropout") != "triton"
    extension = native.extension() if wanted else None
    chosen = _choose(values, residual=residual, extended=extension is not None)
    if chosen == "triton":
        runs, start = (None, mask.offset) if isinstance(mask.offset, int) else (mask.offset, 0)
        key = (mix_key(mask.key) ^ _SIGN) - _SIGN
        scale = 1.0 / (1.0 - mask.rate)
        result: Tensor = dropout_op(values, residual, runs, start, key, threshold_of(mask.rate), scale)
        return result
    extension = extension if chosen == "native" else None
    if residual is not None and residual.dtype is not values.dtype:
        return residual + apply_one(_Dropout, values, None, mask, extension)
    return apply_one(_Dropout, values, residual, mask, extension)


def _choose(values: Tensor, *, residual: Tensor | None, extended: bool) -> str:
    """The implementation that runs; `extended` says whether the compiled extension can be called."""
    impossible: dict[str, str] = {}
    fits = values.device.type == "cpu" and values.dtype in (torch.float32, torch.bfloat16)
    if not (extended and fits):
        impossible["native"] = (
            "the compiled extension is not there" if fits else "it takes float32 or bfloat16 in host memory"
        )
    unfit_for_triton = unfit(values, residual)
    if unfit_for_triton is not None:
        impossible["triton"] = unfit_for_triton
    automatic = "reference" if "native" in impossible else "native"
    if values.device.type == "cuda" and unfit_for_triton is None:
        automatic = "triton"
    return choose("dropout", automatic=automatic, impossible=impossible)


class _Dropout(torch.autograd.Function):
    """Applies the mask, and applies it again to the gradient: recomputing costs less than storing and reading it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, residual: Tensor | None, mask: DropoutMask, extension: Any) -> Tensor:
        ctx.how = mask, extension
        dropped = _apply(values, mask=mask, extension=extension)
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
    def forward(ctx: Any, values: Tensor, mask: DropoutMask, extension: Any) -> Tensor:
        ctx.how = mask, extension
        return _apply(values, mask=mask, extension=extension)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return apply_one(_GradientDropout, gradients[0], *ctx.how), None, None


def _apply(values: Tensor, *, mask: DropoutMask, extension: Any) -> Tensor:
    """Values times the mask, by the compiled extension if it is given; always new memory."""
    values = values.contiguous()
    scale = 1.0 / (1.0 - mask.rate)
    key, threshold = mix_key(mask.key), threshold_of(mask.rate)
    if extension is not None:
        return native_apply(
            values.detach(), extension=extension, key=key, start=mask.offset, threshold=threshold, scale=scale
        )
    kept = _kept(values, key=key, start=mask.offset, threshold=threshold)
    # Filled and not multiplied: a dropped infinity becomes 0 and not NaN.
    return (values * scale).masked_fill_(~kept.view(values.shape), 0.0)


def _kept(values: Tensor, *, key: int, start: Start, threshold: int) -> Tensor:
    """Which elements of `values` are kept, without the extension: bool, in the order of its elements."""
    on_cpu, count = values.device.type == "cpu", values.numel()
    if isinstance(start, int):
        if on_cpu:
            return host_keep_mask(count, key=key, offset=start, threshold=threshold)
        return keep_mask(count, key=key, offset=start, threshold=threshold, device=values.device)
    width = count // max(start.numel(), 1)
    if on_cpu:
        return host_keep_mask_of_runs(start, width=width, key=key, threshold=threshold)
    return keep_mask_of_runs(start, width=width, key=key, threshold=threshold)
