"""Linear maps of quantised tensors by the matrix products that torch has for 8 bits, or in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels.activation.reference import FUNCTIONS
from megaseq.kernels.functions import without_autocast
from megaseq.kernels.quantize.e4m3 import decode_e4m3
from megaseq.kernels.quantize.formats import Quantized


def int_mm_linear(
    x: Quantized, *, weight: Quantized, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """int8 [M, K] times int8 [N, K], in exact integers within a block; one of the two may have one scale a row.

    The fastest in host memory, at every M: 3 to 5 times fp32 where the processor multiplies 8-bit integers.
    """
    width = x.values.shape[1]
    if x.scales.shape[1] == weight.scales.shape[1] == 1:
        y = _integers(x.values, weight.values).float().mul_(x.scales)
        return _finish(y, columns=weight.scales[:, 0], bias=bias, activation=activation, dtype=dtype)
    y = torch.zeros(x.values.shape[0], weight.values.shape[0], device=x.values.device)
    block = min(x.block, weight.block)
    for start in range(0, width, block):
        part = slice(start, min(start + block, width))
        rows, columns = x.scales[:, start // x.block, None], weight.scales[:, start // weight.block]
        product = _integers(x.values[:, part], weight.values[:, part])
        y.addcmul_(product.float().mul_(rows), columns)
    return _finish(y, columns=None, bias=bias, activation=activation, dtype=dtype)


def _integers(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [M, K] times int8 [N, K]: int32 [M, N]."""
    if x.shape[1] == 1:
        # A column [N, 1] is a row, too, by its strides; torch takes it for the wrong one of them.
        return torch._int_mm(x.contiguous(), weight.reshape(1, -1).contiguous())
    return torch._int_mm(x, weight.t())


def fp32_linear(x: Quantized, *, weight: Quantized, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """A product in fp32, where there is none in the format: of e4m3 in host memory, and on GPUs before sm_89."""
    rows, columns = _decoded(x), _decoded(weight)
    with without_autocast(rows.device):
        y = functional.linear(rows, columns)
    if x.scales.shape[1] == 1:
        y.mul_(x.scales)
    of_columns = weight.scales[:, 0] if weight.scales.shape[1] == 1 else None
    return _finish(y, columns=of_columns, bias=bias, activation=activation, dtype=dtype)


def scaled_mm_linear(x: Quantized, *, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """torch's own product of e4m3 with a scale for each row and column, accumulated in full fp32."""
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales,
        scale_b=weight.scales.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=False,
    )


def _finish(y: Tensor, *, columns: Tensor | None, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """Scales the columns of y [M, N] (fp32, overwritten), adds the bias, applies the activation."""
    if columns is not None:
        y = y.mul_(columns) if bias is None else torch.addcmul(bias.float(), y, columns)
    elif bias is not None:
        y = y.add_(bias)
    return FUNCTIONS[activation](y).to(dtype)


def _decoded(quantized: Quantized) -> Tensor:
    """Rows [R, K] in fp32; times their scales only where a row has several."""
    values, scales, block = quantized
    numbers = decode_e4m3(values) if values.dtype is torch.float8_e4m3fn else values.float()
    if scales.shape[1] == 1:
        return numbers
    for index, start in enumerate(range(0, values.shape[1], block)):
        numbers[:, start : start + block].mul_(scales[:, index, None])
    return numbers
