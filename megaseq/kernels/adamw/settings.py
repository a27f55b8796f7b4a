"""What the AdamW op is told."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of neighbouring elements with a weight decay each."""

    ends: Tensor
    """int64 [G], ascending: the first element behind each run; the last is the number of elements."""
    weight_decay: Tensor
    """fp32 [G]."""


@dataclass(frozen=True, eq=False)
class AdamWSettings:
    """The numbers of one update (Loshchilov and Hutter, 2019)."""

    learning_rate: float
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    beta2: float = 0.98
    """Decay of the second moment, in [0, 1)."""
    epsilon: float = 1e-9
    """Added to the root of the second moment."""
    weight_decay: float | Segments = 0.0
    """Decoupled: `learning_rate * weight_decay` of a parameter is taken from it."""
