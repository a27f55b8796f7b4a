"""The truth about dropout's masks in plain torch; the formula is explained in megaseq/csrc/dropout.h."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
STRIDE, HIGH_STRIDE = 0x9E3779B1, 0x27D4EB2F
FIRST_MULTIPLIER, SECOND_MULTIPLIER = 0x7FEB352D, 0x846CA68B
FIRST_HIGH_MULTIPLIER, SECOND_HIGH_MULTIPLIER = 0x85EBCA6B, 0xC2B2AE35


def threshold_of(rate: float) -> int:
    """Hashes below this are dropped: `rate` in units of 2^-32, in [0, 2^32)."""
    return min(round(rate * 2**32), WORD)


def keep_mask(count: int, *, key: int, offset: int, threshold: int, device: torch.device) -> Tensor:
    """Which of the elements `offset` to `offset + count` are kept: bool [count]."""
    index = torch.arange(offset, offset + count, dtype=torch.int64, device=device)
    return kept_elements(index, key=key, threshold=threshold)


def keep_mask_of_runs(runs: Tensor, *, width: int, key: int, threshold: int) -> Tensor:
    """Which elements of runs that begin at elements `runs` [R] are kept: bool [R, width]."""
    places = torch.arange(width, dtype=torch.int64, device=runs.device)
    return kept_elements(runs[:, None] + places, key=key, threshold=threshold)


def kept_elements(index: Tensor, *, key: int, threshold: int) -> Tensor:
    """Which of the elements `index` (int64, any shape) are kept: bool of that shape."""
    return hashes(index, key=key) >= threshold


def uniform(like: Tensor, *, key: int, start: int | Tensor) -> Tensor:
    """Returns numbers in [0, 1), one for each element of `like` and a function of (key, number of the element) alone.

    Args:
        like: gives shape, dtype and device.
        key: of the mask, of which the same hashes are made.
        start: number of the first element; int64 [R]: of the first of each of R equal runs.
    """
    count = like.numel()
    if isinstance(start, int):
        index = torch.arange(start, start + count, dtype=torch.int64, device=like.device)
    else:
        places = torch.arange(count // max(start.numel(), 1), dtype=torch.int64, device=like.device)
        index = start[:, None] + places
    return (hashes(index, key=key).double() / 2.0**32).to(like.dtype).view(like.shape)


def hashes(index: Tensor, *, key: int) -> Tensor:
    """Returns the 32-bit hash, as int64, of each of the elements `index` (int64, any shape).

    All words are held in int64, where a product of two of them may wrap and its low 32 bits are still right.
    """
    low, high = index & WORD, (index >> 32) & WORD
    mixed = ((key >> 32) + high * HIGH_STRIDE) & WORD
    mixed = ((mixed ^ (mixed >> 16)) * FIRST_HIGH_MULTIPLIER) & WORD
    mixed = ((mixed ^ (mixed >> 13)) * SECOND_HIGH_MULTIPLIER) & WORD
    word = (low * STRIDE + (key & WORD)) & WORD
    word = ((word ^ (word >> 16) ^ mixed ^ (mixed >> 16)) * FIRST_MULTIPLIER) & WORD
    return ((word ^ (word >> 15)) * SECOND_MULTIPLIER) & WORD
