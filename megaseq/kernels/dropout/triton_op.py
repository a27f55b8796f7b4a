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
    out = torch.empty_like(values)
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
def _(
    values: Tensor,
    residual: Tensor | None,
    runs: Tensor | None,
    start: int,
    key: int,
    threshold: int,
    scale: float,
) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, runs, *mask = inputs
    ctx.save_for_backward(runs)
    ctx.mask = mask


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (runs,) = ctx.saved_tensors
    of_values = dropout_op(gradient, None, runs, *ctx.mask) if ctx.needs_input_grad[0] else None
    of_residual = gradient if ctx.needs_input_grad[1] else None
    return of_values, of_residual, None, None, None, None, None


dropout_op.register_autograd(_gradients, setup_context=_remember)
