"""Linear maps of 8-bit tensors, with scales, bias and activation in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.activation.reference import FUNCTIONS
from megaseq.kernels.checks import check_device, check_shape, fail
from megaseq.kernels.dispatch import choose
from megaseq.kernels.quantize import Quantized, check_quantized
from megaseq.kernels.scaled_linear.choice import automatic, impossible
from megaseq.kernels.scaled_linear.reference import reference_scaled_linear
from megaseq.kernels.scaled_linear.torch_products import fp32_linear, int_mm_linear, scaled_mm_linear

__all__ = ["scaled_linear"]

_OP = "scaled_linear"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def scaled_linear(
    x: Quantized,
    *,
    weight: Quantized,
    bias: Tensor | None = None,
    activation: str = "identity",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`activation(x @ weight.T + bias)` of quantised tensors: int8 by int8 in integers, e4m3 by e4m3 in fp32.

    Products are summed without their scales as far as one scale reaches, exactly for int8; scales, bias and
    activation are applied in fp32, and the result is rounded once. Not finite scales (see `quantize`) give NaN.

    Nothing here has a gradient: training that minds the rounding uses `fake_quantize` and an ordinary linear map.

    Args:
        x: [..., K], with a scale a row or for each block.
        weight: [N, K] of the same format, with a scale a row, which is a column of the result, or for each block.
        bias: [N], fp32, bf16 or fp16.
        activation: a name of `layers.activations`.
        dtype: of the result: fp32, bf16 or fp16.

    Returns:
        [..., N].

    Raises:
        KernelError: for tensors or settings that do not fit, or an implementation asked for in `MEGASEQ_KERNELS` that
            cannot run this call.
    """
    _check(x, weight=weight, bias=bias, activation=activation, dtype=dtype)
    shape = (*x.values.shape[:-1], weight.values.shape[0])
    rows = Quantized(_rows(x.values), _rows(x.scales), x.block)
    if not rows.values.shape[0] or not shape[-1]:
        return x.values.new_empty(shape, dtype=dtype)
    reasons = impossible(rows, weight=weight, activation=activation, dtype=dtype)
    preferred = automatic(rows, bias_dtype=None if bias is None else bias.dtype, reasons=reasons)
    chosen = choose(_OP, automatic=preferred, impossible=reasons)
    if chosen == "triton":
        from megaseq.kernels.scaled_linear.op import triton_scaled_linear

        y: Tensor = triton_scaled_linear(*rows, *weight, bias, activation, dtype)
    elif chosen == "scaled_mm":
        y = scaled_mm_linear(rows, weight=weight, bias=bias, dtype=dtype)
    else:
        run = {"int_mm": int_mm_linear, "fp32": fp32_linear, "reference": reference_scaled_linear}[chosen]
        y = run(rows, weight=weight, bias=bias, activation=activation, dtype=dtype)
    return y.view(shape)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _check(x: Quantized, *, weight: Quantized, bias: Tensor | None, activation: str, dtype: torch.dtype) -> None:
    """Checks all arguments.

    Raises:
        KernelError: at the first one that does not fit.
    """
    check_quantized(x, op=_OP, argument="x")
    check_quantized(weight, op=_OP, argument="weight")
    check_shape(weight.values, op=_OP, argument="weight.values", shape=(None, x.values.shape[-1]), legend="[N, K]")
    if weight.values.dtype is not x.values.dtype:
        raise fail(
            "weight.values",
            op=_OP,
            expected=f"have the format of x, {x.values.dtype}",
            came=weight.values.dtype,
            remedy="Quantise both to one format",
        )
    check_device(weight.values, op=_OP, argument="weight.values", other=x.values, other_name="x.values")
    if bias is not None:
        check_shape(bias, op=_OP, argument="bias", shape=(weight.values.shape[0],), legend="[N]")
        check_device(bias, op=_OP, argument="bias", other=x.values, other_name="x.values")
        if bias.dtype not in _FLOATS:
            raise fail("bias", op=_OP, expected="be float32, bfloat16 or float16", came=bias.dtype, remedy="Cast it")
    if dtype not in _FLOATS:
        raise fail(
            "dtype", op=_OP, expected="be float32, bfloat16 or float16", came=dtype, remedy="Cast the result of one"
        )
    if activation not in FUNCTIONS:
        raise fail(
            "activation", op=_OP, expected=f"be one of {', '.join(FUNCTIONS)}", came=activation, remedy="Use identity"
        )
    if torch.is_grad_enabled():
        for name, tensor in (("x.scales", x.scales), ("weight.scales", weight.scales), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise fail(
                    name,
                    op=_OP,
                    expected="want no gradient",
                    came="a tensor that requires one",
                    remedy="Call it under torch.no_grad(); in training use fake_quantize and a linear map",
                )
