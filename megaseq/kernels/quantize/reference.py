"""Symmetric quantisation in plain torch: what every other implementation must compute, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megaseq.kernels.quantize.e4m3 import decode_e4m3
from megaseq.kernels.quantize.formats import FORMATS, SMALLEST_SCALE

_MANTISSA, _EXPONENT = 0x007FFFFF, 0x7F800000


def reference_quantize(x: Tensor, *, form: str, block: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Returns values like `x` [..., D] and fp32 scales [..., S] as `quantize` defines them; `block` divides rows."""
    wanted = FORMATS[form]
    blocks = _blocks(x.float(), block=block)
    top = blocks.abs().amax(dim=-1)
    finite = torch.isfinite(top)
    # A tensor on the same device: torch's CUDA kernels multiply by the reciprocal of a number, or of a tensor in host
    # memory, which rounds twice.
    scales = (top / torch.full((), wanted.largest, dtype=top.dtype, device=top.device)).clamp(min=SMALLEST_SCALE)
    if power_of_two:
        # Upwards, so that nothing saturates: a mantissa that is not zero carries into the exponent.
        scales = ((scales.view(torch.int32) + _MANTISSA) & _EXPONENT).view(torch.float32)
    scales = torch.where(top == 0, 1.0, scales)
    # One division a block; a division for each element costs more and is no closer to the true quotient's rounding.
    scaled = (blocks * (1.0 / scales)[..., None]).clamp(-wanted.largest, wanted.largest)
    scaled = torch.where(finite[..., None], scaled, 0.0)
    values = (scaled.round() if wanted.dtype is torch.int8 else scaled).to(wanted.dtype)
    scales = torch.where(finite, scales, torch.nan)
    return values.flatten(-2)[..., : x.shape[-1]].contiguous(), scales


def reference_dequantize(values: Tensor, *, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Returns `values` [..., D] times the scales [..., S] of their blocks, in `dtype`."""
    numbers = decode_e4m3(values) if values.dtype is torch.float8_e4m3fn else values.float()
    blocks = _blocks(numbers, block=block) * scales[..., None]
    return blocks.flatten(-2)[..., : values.shape[-1]].to(dtype)


def _blocks(x: Tensor, *, block: int) -> Tensor:
    """Cuts rows [..., D] into [..., S, block], the last one filled with zeros."""
    missing = -x.shape[-1] % block
    if missing:
        x = functional.pad(x, (0, missing))
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
