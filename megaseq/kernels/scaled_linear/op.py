"""The op of torch that runs the kernel of `scaled_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.activation.reference import SAME
from megaseq.kernels.quantize.formats import Quantized
from megaseq.kernels.scaled_linear.configs import LOADED, default, narrowed, rows_key
from megaseq.kernels.triton_runtime import config, on_its_device


@on_its_device
def launch(x: Quantized, *, weight: Quantized, bias: Tensor | None, activation: str, out: Tensor) -> None:
    """Runs the kernel.

    Args:
        x: rows [M, K] of any strides, with scales [M, S].
        weight: [N, K] of any strides, with scales [N, S].
        bias: [N], contiguous.
        activation: its name.
        out: [M, N], contiguous.
    """
    from megaseq.kernels.scaled_linear.triton_kernels import scaled_linear_kernel

    if not out.numel():
        return
    (num_rows, width), num_columns = x.values.shape, weight.values.shape[0]
    blocked = [operand.block for operand in (x, weight) if operand.scales.shape[1] > 1]
    integer = x.values.dtype is torch.int8
    key = f"{'int8' if integer else 'e4m3'},rows={rows_key(num_rows)}{',blocked' if blocked else ''}"
    # BLOCK_K must divide all blocks: it divides their greatest common power of two.
    block = min((number & -number for number in blocked), default=None)
    untuned = default(num_rows, block=block)
    tile = config("scaled_linear", key=key, default=untuned)
    if block is not None and block % tile.blocks["BLOCK_K"]:
        tile = untuned
    starts = [number for values in (x.values, weight.values) for number in (values.data_ptr(), values.stride(0))]
    tile = narrowed(tile, aligned=not any(number % LOADED for number in (width, *starts)))
    sizes = tile.blocks
    grid = (-(-num_rows // sizes["BLOCK_M"]) * -(-num_columns // sizes["BLOCK_N"]),)
    scaled_linear_kernel[grid](
        x.values,
        weight.values,
        x.scales,
        weight.scales,
        out if bias is None else bias,
        out,
        num_rows,
        num_columns,
        width,
        *x.values.stride(),
        *weight.values.stride(),
        *x.scales.stride(),
        *weight.scales.stride(),
        x.block,
        weight.block,
        ACTIVATION=SAME.get(activation, activation),
        HAS_BIAS=bias is not None,
        X_BLOCKED=x.scales.shape[1] > 1,
        W_BLOCKED=weight.scales.shape[1] > 1,
        INTEGER=integer,
        EVEN=width % sizes["BLOCK_K"] == 0,
        **tile.arguments(),
    )


@torch.library.custom_op("megaseq::scaled_linear", mutates_args=())
def triton_scaled_linear(
    x: Tensor,
    x_scales: Tensor,
    x_block: int,
    weight: Tensor,
    weight_scales: Tensor,
    weight_block: int,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N] in `dtype` of x [M, K] and weight [N, K]."""
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    launch(
        Quantized(x, x_scales, x_block),
        weight=Quantized(weight, weight_scales, weight_block),
        bias=None if bias is None else bias.contiguous(),
        activation=activation,
        out=out,
    )
    return out


@triton_scaled_linear.register_fake
def _output(
    x: Tensor,
    x_scales: Tensor,
    x_block: int,
    weight: Tensor,
    weight_scales: Tensor,
    weight_block: int,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
