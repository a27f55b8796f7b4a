"""Dropout on a GPU as an operator of torch, with a gradient of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
