"""A linear map of quantised tensors in float64: what every other implementation must compute."""

from __future__ import annotations

import torch
from torch import Tensor

from megaseq.kernels.activation.reference import FUNCTIONS
from megaseq.kernels.quantize.formats import Quantized


def reference_scaled_linear(
    x: Quantized, *, weight: Quantized, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """`scaled_linear` step by step; shapes as there, with rows x [M, K]."""
    y = _numbers(x) @ _numbers(weight).T
    if bias is not None:
        y = y + bias.double()
    return FUNCTIONS[activation](y).to(dtype)


def _numbers(quantized: Quantized) -> Tensor:
    """What rows [R, K] stand for, in float64; the products of values and scales are exact there."""
    scales = quantized.scales.double().repeat_interleave(quantized.block, dim=-1)
    return quantized.values.float().double() * scales[:, : quantized.values.shape[-1]]
