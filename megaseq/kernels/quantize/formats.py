"""The number formats of quantised tensors, and what `quantize` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

FormatName = Literal["int8", "e4m3"]
"""8-bit integers, and 8-bit floats with 4 bits of exponent and 3 of mantissa (Micikevicius et al. 2022)."""


@dataclass(frozen=True)
class Format:
    """A format that numbers are rounded to."""

    dtype: torch.dtype
    largest: float
    """What the largest magnitude of a block becomes; -128 is not used, so that the range is symmetric."""


FORMATS: Mapping[str, Format] = {
    "int8": Format(torch.int8, 127.0),
    "e4m3": Format(torch.float8_e4m3fn, 448.0),
}

SMALLEST_SCALE = 2.0**-126
"""Of blocks that are not all zero: the smallest normal number, so that a scale's inverse is finite."""


class Quantized(NamedTuple):
    """A tensor in 8 bits: element i of a row is about `values[..., i] * scales[..., i // block]`."""

    values: Tensor
    """[..., D], int8 or float8_e4m3fn."""
    scales: Tensor
    """fp32 [..., S], one for each of the S = ceil(D / block) blocks of a row."""
    block: int
    """Elements that share a scale; D where a row has one."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.values.device
