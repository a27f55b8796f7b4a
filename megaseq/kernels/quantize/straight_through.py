"""Rounding to 8 bits and back in plain torch, with the gradient of the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaseq.kernels.quantize.reference import reference_dequantize, reference_quantize


class StraightThrough(torch.autograd.Function):
    """The quantised numbers forwards, the gradient as it comes backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: str, block: int, power_of_two: bool) -> Tensor:
        values, scales = reference_quantize(x, form=form, block=block, power_of_two=power_of_two)
        return reference_dequantize(values, scales=scales, block=block, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None
