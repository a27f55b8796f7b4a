"""The ops of torch that run the kernels of `quantize`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.quantize.configs import columns_of, configs, dequantize_configs
from megaseq.kernels.quantize.formats import FORMATS, SMALLEST_SCALE
from megaseq.kernels.triton_runtime import config, on_its_device


@on_its_device
def launch_quantize(
    x: Tensor, *, out: Tensor, scales: Tensor | None, form: str, block: int, power_of_two: bool
) -> None:
    """Runs the kernel on rows [R, D] of any strides.

    Args:
        x: the rows.
        out: values [R, D], contiguous; without `scales` the values times their scales.
        scales: fp32 [R, S], contiguous.
        form: name of the format.
        block: elements that share a scale.
        power_of_two: whether scales are powers of two.
    """
    from megaseq.kernels.quantize.triton_kernels import quantize_kernel

    if not x.numel():
        return
    num_rows, width = x.shape
    tile = config("quantize", key=f"{form},{columns_of(block)}", default=configs(block)[0])
    num_blocks = -(-width // block)
    # All in one dimension, as the others end at 65,535.
    quantize_kernel[(-(-num_rows // tile.blocks["ROWS"]) * num_blocks,)](
        x,
        out,
        out if scales is None else scales,
        num_rows,
        width,
        block,
        num_blocks,
        *x.stride(),
        LARGEST=FORMATS[form].largest,
        SMALLEST=SMALLEST_SCALE,
        POWER=power_of_two,
        INTEGER=form == "int8",
        FAKE=scales is None,
        SINGLE=block <= tile.blocks["COLUMNS"],
        **tile.arguments(fused=False),
    )


@on_its_device
def launch_dequantize(values: Tensor, *, scales: Tensor, block: int, out: Tensor) -> None:
    """Runs the kernel on values [R, D] and scales [R, S] of any strides; `out` [R, D] is contiguous."""
    from megaseq.kernels.quantize.triton_kernels import dequantize_kernel

    if not values.numel():
        return
    num_rows, width = values.shape
    tile = config("dequantize", key=f"{columns_of(width)}", default=dequantize_configs()[0])
    num_tiles = -(-width // tile.blocks["COLUMNS"])
    dequantize_kernel[(-(-num_rows // tile.blocks["ROWS"]) * num_tiles,)](
        values,
        scales,
        out,
        num_rows,
        width,
        block,
        num_tiles,
        *values.stride(),
        *scales.stride(),
        **tile.arguments(),
    )


@torch.library.custom_op("megaseq::quantize", mutates_args=())
def triton_quantize(x: Tensor, form: str, block: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values like `x` [..., D] and scales [..., S]."""
    values, scales = empty_outputs(x, form=form, block=block)
    launch_quantize(
        x.reshape(-1, x.shape[-1]),
        out=values,
        scales=scales,
        form=form,
        block=block,
        power_of_two=power_of_two,
    )
    return values, scales


@triton_quantize.register_fake
def _outputs(x: Tensor, form: str, block: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return empty_outputs(x, form=form, block=block)


def empty_outputs(x: Tensor, *, form: str, block: int) -> tuple[Tensor, Tensor]:
    """Memory for values like `x` [..., D] and for scales [..., S]."""
    num_blocks = (x.shape[-1] + block - 1) // block
    values = x.new_empty(x.shape, dtype=FORMATS[form].dtype)
    return values, x.new_empty((*x.shape[:-1], num_blocks), dtype=torch.float32)


@torch.library.custom_op("megaseq::dequantize", mutates_args=())
def triton_dequantize(values: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """`values` [..., D] times the scales [..., S] of their blocks."""
    out = values.new_empty(values.shape, dtype=dtype)
    width, num_blocks = values.shape[-1], scales.shape[-1]
    launch_dequantize(values.reshape(-1, width), scales=scales.reshape(-1, num_blocks), block=block, out=out)
    return out


@triton_dequantize.register_fake
def _dequantized(values: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


@torch.library.custom_op("megaseq::fake_quantize", mutates_args=())
def triton_fake_quantize(x: Tensor, form: str, block: int, power_of_two: bool) -> Tensor:
    """`x` [..., D] rounded to 8 bits and back in one pass."""
    out = x.new_empty(x.shape)
    launch_quantize(x.reshape(-1, x.shape[-1]), out=out, scales=None, form=form, block=block, power_of_two=power_of_two)
    return out


@triton_fake_quantize.register_fake
def _like(x: Tensor, form: str, block: int, power_of_two: bool) -> Tensor:
    return x.new_empty(x.shape)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return gradient, None, None, None


triton_fake_quantize.register_autograd(_straight_through)
