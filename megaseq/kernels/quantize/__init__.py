"""Symmetric quantisation to 8 bits, with a scale for each row or for each block of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels import triton_runtime
from megaseq.kernels.checks import check_device, check_shape, fail
from megaseq.kernels.dispatch import choose
from megaseq.kernels.functions import apply_one
from megaseq.kernels.quantize.formats import FORMATS, FormatName, Quantized
from megaseq.kernels.quantize.reference import reference_dequantize, reference_quantize
from megaseq.kernels.quantize.straight_through import StraightThrough

__all__ = ["FormatName", "Quantized", "check_quantized", "dequantize", "fake_quantize", "quantize"]

_OP = "quantize"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    x: Tensor, *, form: FormatName = "int8", block: int | None = None, power_of_two: bool = False
) -> Quantized:
    """Rounds each block of each row to 8 bits; the largest magnitude of a block becomes the largest of the format.

    With m the largest magnitude of a block and L that of the format (127 or 448), the scale is m / L, at least 2^-126,
    and a value is x * (1 / scale) in fp32, rounded to nearest (ties to even) and saturated at L. A block of zeros has
    scale 1 and zeros. A block with a NaN or an infinity has scale NaN and zeros, so that what is made of it is NaN:
    nothing that is not finite turns into a number. The largest numbers of fp32 may come back infinite.

    No gradient flows through the result; `fake_quantize` has one.

    Args:
        x: [..., D], fp32, bf16 or fp16, of any strides.
        form: the format of the values.
        block: elements of a row that share a scale, the last block may be shorter; None: the whole row.
        power_of_two: rounds scales up to powers of two, so that scaling is exact.

    Returns:
        Values [..., D] and fp32 scales [..., ceil(D / block)], contiguous.

    Raises:
        KernelError: for tensors or settings that do not fit, or an implementation asked for in `MEGASEQ_KERNELS` that
            cannot run this call.
    """
    block = _check(x, form=form, block=block)
    x = x.detach()
    if _choose(x, form=form) == "triton":
        from megaseq.kernels.quantize.op import triton_quantize

        values, scales = triton_quantize(x, form, block, power_of_two)
    else:
        values, scales = reference_quantize(x, form=form, block=block, power_of_two=power_of_two)
    return Quantized(values, scales, block)


def dequantize(quantized: Quantized, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns values times the scales of their blocks: [..., D] in `dtype`, rounded once from fp32; without gradient.

    Args:
        quantized: from `quantize`.
        dtype: fp32, bf16 or fp16.

    Raises:
        KernelError: for tensors or settings that do not fit, or an implementation asked for in `MEGASEQ_KERNELS` that
            cannot run this call.
    """
    values, scales, block = quantized
    form = check_quantized(quantized, op="dequantize")
    scales = scales.detach()
    if dtype not in _FLOATS:
        raise fail(
            "dtype",
            op="dequantize",
            expected="be float32, bfloat16 or float16",
            came=dtype,
            remedy="Cast the result of one of these",
        )
    if _choose(values, form=form) == "triton":
        from megaseq.kernels.quantize.op import triton_dequantize

        result: Tensor = triton_dequantize(values, scales, block, dtype)
        return result
    return reference_dequantize(values, scales=scales, block=block, dtype=dtype)


def fake_quantize(
    x: Tensor, *, form: FormatName = "int8", block: int | None = None, power_of_two: bool = False
) -> Tensor:
    """What is left of `x` after `quantize` and `dequantize`, in its dtype, for training that minds the rounding.

    The gradient passes straight through (Bengio et al. 2013), undiminished: scales follow the data, so nothing is
    clipped.

    Args:
        x: [..., D], fp32, bf16 or fp16, of any strides.
        form: as in `quantize`.
        block: as in `quantize`.
        power_of_two: as in `quantize`.

    Returns:
        A tensor like `x`.

    Raises:
        KernelError: as `quantize`.
    """
    block = _check(x, form=form, block=block)
    if _choose(x, form=form) == "triton":
        from megaseq.kernels.quantize.op import triton_fake_quantize

        result: Tensor = triton_fake_quantize(x, form, block, power_of_two)
        return result
    return apply_one(StraightThrough, x, form, block, power_of_two)


def _choose(x: Tensor, *, form: str) -> str:
    reason = triton_runtime.unable(x)
    if reason is None and form == "e4m3" and lacks_e4m3(x.device):
        reason = "this GPU has no 8-bit floats (they need sm_89 or later)"
    automatic = "triton" if x.is_cuda and reason is None else "reference"
    return choose(_OP, automatic=automatic, impossible={} if reason is None else {"triton": reason})


def lacks_e4m3(device: torch.device) -> bool:
    """Whether `device` is a GPU whose kernels cannot handle 8-bit floats; the reference then does, in fp32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


def _check(x: Tensor, *, form: str, block: int | None) -> int:
    """Checks the arguments of `quantize`; returns the number of elements that share a scale.

    Raises:
        KernelError: at the first one that does not fit.
    """
    if x.dtype not in _FLOATS:
        raise fail(
            "x",
            op=_OP,
            expected="be float32, bfloat16 or float16",
            came=x.dtype,
            remedy="Cast it before the call",
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise fail(
            "x",
            op=_OP,
            expected="have shape [..., D] with D at least 1",
            came=list(x.shape),
            remedy="Leave out rows without elements",
        )
    if form not in FORMATS:
        raise fail("form", op=_OP, expected=f"be one of {', '.join(FORMATS)}", came=form, remedy="Use int8")
    if block is not None and block < 1:
        raise fail("block", op=_OP, expected="be at least 1", came=block, remedy="Use None for one scale a row")
    return x.shape[-1] if block is None else min(block, x.shape[-1])


def check_quantized(quantized: Quantized, *, op: str, argument: str = "") -> str:
    """Checks that values and scales belong together; returns the name of the format.

    Args:
        quantized: what came.
        op: the op's name.
        argument: the argument's name; "" where it is the op's only one.

    Raises:
        KernelError: at the first that does not fit.
    """
    values, scales, block = quantized
    prefix = argument and f"{argument}."
    names = [name for name, form in FORMATS.items() if form.dtype is values.dtype]
    if not names or values.dim() == 0:
        raise fail(
            f"{prefix}values",
            op=op,
            expected="be int8 or float8_e4m3fn [..., D]",
            came=f"{values.dtype} {list(values.shape)}",
            remedy="Use quantize",
        )
    if block < 1:
        raise fail(f"{prefix}block", op=op, expected="be at least 1", came=block, remedy="Use quantize")
    shape = (*values.shape[:-1], -(-values.shape[-1] // block))
    check_shape(scales, op=op, argument=f"{prefix}scales", shape=shape, legend="[..., ceil(D / block)]")
    check_device(scales, op=op, argument=f"{prefix}scales", other=values, other_name=f"{prefix}values")
    if scales.dtype is not torch.float32:
        raise fail(f"{prefix}scales", op=op, expected="be float32", came=scales.dtype, remedy="Use quantize")
    return names[0]
