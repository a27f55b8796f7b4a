"""Dropout as an operator of torch, with a gradient of its own: on a GPU, and as part of a graph anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.dropout.implementation import apply_mask, chosen_for
from megaseq.kernels.dropout.mask import DropoutMask, MaskNumbers

_SIGN, _WORD64 = 1 << 63, 0xFFFFFFFFFFFFFFFF


def as_operator(values: Tensor, *, residual: Tensor | None, mask: DropoutMask) -> Tensor:
    """`residual + dropout(values)` as one operator, by the implementation that is chosen when it runs."""
    key, start, threshold, scale = mask.numbers()
    runs, first = (None, start) if isinstance(start, int) else (start, 0)
    # Operators take signed numbers of 64 bits.
    key = (key ^ _SIGN) - _SIGN
    result: Tensor = dropout_op(values, residual, runs, first, key, threshold, scale)
    return result


@torch.library.custom_op("megaseq::dropout", mutates_args=())
def dropout_op(
    values: Tensor,
    residual: Tensor | None,
    runs: Tensor | None,
    start: int,
    key: int,
    threshold: int,
    scale: float,
) -> Tensor:
    """`residual + dropout(values)`, contiguous; see `triton_kernels.launch`."""
    chosen, extension = chosen_for(values, residual=residual)
    if chosen != "triton":
        numbers = MaskNumbers(key & _WORD64, start if runs is None else runs, threshold, scale)
        dropped = apply_mask(values, numbers=numbers, extension=extension)
        return dropped if residual is None else residual.contiguous() + dropped
    from megaseq.kernels.dropout import triton_kernels

    values = values.contiguous()
    out: Tensor = _output(values, residual, runs, start, key, threshold, scale)
    triton_kernels.launch(
        values,
        residual=None if residual is None else residual.contiguous(),
        out=out,
        runs=None if runs is None else runs.contiguous(),
        start=start,
        key=key,
        threshold=threshold,
        scale=scale,
    )
    return out


@dropout_op.register_fake
def _output(
    values: Tensor,
    residual: Tensor | None,
    runs: Tensor | None,
    start: int,
    key: int,
    threshold: int,
    scale: float,
) -> Tensor:
    dtype = values.dtype if residual is None else torch.promote_types(values.dtype, residual.dtype)
    return values.new_empty(values.shape, dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, residual, runs, *mask = inputs
    ctx.save_for_backward(runs)
    ctx.mask = mask
    ctx.dtypes = values.dtype, None if residual is None else residual.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (runs,) = ctx.saved_tensors
    of_dropped, of_sum = ctx.dtypes
    of_values = dropout_op(gradient.to(of_dropped), None, runs, *ctx.mask) if ctx.needs_input_grad[0] else None
    of_residual = gradient.to(of_sum) if ctx.needs_input_grad[1] else None
    return of_values, of_residual, None, None, None, None, None


dropout_op.register_autograd(_gradients, setup_context=_remember)
