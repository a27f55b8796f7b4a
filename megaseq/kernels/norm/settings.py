"""What a norm is told, and what the quantising one returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megaseq.kernels.quantize.formats import Quantized


@dataclass(frozen=True)
class NormKind:
    """Which norm: y = (x - mean) / sqrt(var + eps) * weight + bias, or without mean (and with the mean square)."""

    eps: float
    """Added to the variance or mean square."""
    centred: bool = False
    """Whether the mean is taken away: LayerNorm (Ba et al. 2016); else RMSNorm (Zhang and Sennrich 2019)."""
    add_one: bool = False
    """Multiplies by 1 + weight instead of by the weight (Gemma)."""


class QuantizedNorm(NamedTuple):
    """A normalised tensor in 8 bits."""

    quantized: Quantized
    """Values [..., D] and scales [..., 1]."""
    total: Tensor | None
    """`x + residual` where there was a residual."""
