"""What says which elements dropout sets to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megaseq.kernels.dropout.reference import threshold_of

DropoutKey = tuple[int, int, int]
"""(seed, step, number of the place): what a mask is a function of, such as `Layer.dropout_key()`."""

Start = int | Tensor
"""Where a tensor stands in a larger one: the number of its first element, the others following row-major; or int64 [R],
the number of the first element of each of R runs of equal length, which one after the other are the tensor."""

_WORD64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, eq=False)
class DropoutMask:
    """Which elements of a tensor become zero."""

    rate: float
    """Chance of an element to become zero, in [0, 1)."""
    key: DropoutKey
    """What the mask is a function of."""
    offset: Start = 0
    """Where the tensor stands, if it is a part of a larger one."""

    def numbers(self) -> MaskNumbers:
        """The mask as implementations read it."""
        return MaskNumbers(mix_key(self.key), self.offset, threshold_of(self.rate), 1.0 / (1.0 - self.rate))


class MaskNumbers(NamedTuple):
    """A mask as implementations read it."""

    key: int
    """Of 64 bits, not negative."""
    start: Start
    """The offset."""
    threshold: int
    """Hashes below it are dropped."""
    scale: float
    """Factor of what is kept."""


def mix_key(key: DropoutKey) -> int:
    """The 64-bit key of a mask: SplitMix64 (Steele et al. 2014) absorbs the three numbers one by one."""
    state = 0
    for number in key:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD64
        state ^= state >> 31
    return state
