"""Dropout in host memory: the compiled extension where there is one, NumPy in cache-sized pieces elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaseq.kernels.dropout.reference import (
    FIRST_HIGH_MULTIPLIER,
    FIRST_MULTIPLIER,
    HIGH_STRIDE,
    SECOND_HIGH_MULTIPLIER,
    SECOND_MULTIPLIER,
    STRIDE,
    WORD,
)

PIECE = 1 << 15
"""Elements a piece: two buffers of 32-bit words stay in the second-level cache."""


def host_keep_mask(count: int, *, key: int, offset: int, threshold: int) -> Tensor:
    """`reference.keep_mask` in host memory: bool [count]."""
    kept: NDArray[np.bool_] = np.empty(count, dtype=np.bool_)
    places = np.arange(min(PIECE, count), dtype=np.uint32) * np.uint32(STRIDE)
    word, shifted = np.empty_like(places), np.empty_like(places)
    first = 0
    while first < count:
        index = offset + first
        # A piece ends where the low word of the index wraps, so that its high word is one number.
        size = min(places.size, count - first, (WORD + 1) - (index & WORD))
        h = word[:size]
        np.add(places[:size], np.uint32(((index & WORD) * STRIDE + (key & WORD)) & WORD), out=h)
        high = np.uint32(_high_word(key, index))
        _hash(h, shifted=shifted[:size], high=high)
        np.greater_equal(h, np.uint32(threshold), out=kept[first : first + size])
        first += size
    return torch.from_numpy(kept)


def host_keep_mask_of_runs(runs: Tensor, *, width: int, key: int, threshold: int) -> Tensor:
    """`reference.keep_mask_of_runs` in host memory: bool [R, width]."""
    first: NDArray[np.int64] = runs.numpy()
    kept: NDArray[np.bool_] = np.empty((first.size, width), dtype=np.bool_)
    places = np.arange(width, dtype=np.uint32) * np.uint32(STRIDE)
    rows = max(1, PIECE // max(width, 1))
    for start in range(0, first.size, rows):
        index = first[start : start + rows]
        low = ((index & WORD).astype(np.uint32) * np.uint32(STRIDE)) + np.uint32(key & WORD)
        high = np.asarray([_high_word(key, int(number)) for number in np.unique(index >> 32) << 32], dtype=np.uint32)
        words = high[np.unique(index >> 32, return_inverse=True)[1].reshape(-1)]
        hashes = low[:, None] + places[None]
        _hash(hashes, shifted=np.empty_like(hashes), high=words[:, None])
        np.greater_equal(hashes, np.uint32(threshold), out=kept[start : start + rows])
    # The rare run in which the low word of the index wraps has two high words.
    for row in np.flatnonzero((first & WORD) + width > WORD + 1):
        kept[row] = host_keep_mask(width, key=key, offset=int(first[row]), threshold=threshold).numpy()
    return torch.from_numpy(kept)


def _hash(h: NDArray[np.uint32], *, shifted: NDArray[np.uint32], high: np.uint32 | NDArray[np.uint32]) -> None:
    """Turns low words into hashes, in place; `shifted` is scratch, `high` what the high words add."""
    np.right_shift(h, 16, out=shifted)
    np.bitwise_xor(h, shifted, out=h)
    np.bitwise_xor(h, high, out=h)
    np.multiply(h, np.uint32(FIRST_MULTIPLIER), out=h)
    np.right_shift(h, 15, out=shifted)
    np.bitwise_xor(h, shifted, out=h)
    np.multiply(h, np.uint32(SECOND_MULTIPLIER), out=h)


def _high_word(key: int, index: int) -> int:
    """What the high words of the key and of the index add to every hash of a piece."""
    word = ((key >> 32) + (index >> 32) * HIGH_STRIDE) & WORD
    word = ((word ^ (word >> 16)) * FIRST_HIGH_MULTIPLIER) & WORD
    word = ((word ^ (word >> 13)) * SECOND_HIGH_MULTIPLIER) & WORD
    return word ^ (word >> 16)


def native_apply(
    values: Tensor, *, extension: Any, key: int, start: int | Tensor, threshold: int, scale: float
) -> Tensor:
    """`values * scale` where kept and 0 elsewhere, by the compiled extension.

    Args:
        values: float32 or bfloat16, contiguous, in host memory.
        extension: the module `megaseq._csrc`.
        key: of the mask.
        start: number of the first element, or int64 [R]: of the first one of each of R equal runs.
        threshold: hashes below it are dropped.
        scale: factor of what is kept.

    Returns:
        A tensor like `values`.
    """
    output = torch.empty_like(values)
    name = "dropout_apply" if isinstance(start, int) else "dropout_apply_runs"
    place = start if isinstance(start, int) else start.contiguous().numpy()
    if values.dtype is torch.bfloat16:
        # NumPy has no bfloat16; the extension takes its bits.
        name += "_bfloat16"
        source, target = (tensor.view(torch.int16).numpy().view(np.uint16) for tensor in (values, output))
    else:
        source, target = values.numpy(), output.numpy()
    getattr(extension, name)(source.reshape(-1), target.reshape(-1), key, place, threshold, scale)
    return output
