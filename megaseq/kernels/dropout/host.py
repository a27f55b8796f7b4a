"""Dropout in host memory: the compiled extension where there is one, NumPy in cache-sized pieces elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaseq.kernels.dropout.reference import FIRST_MULTIPLIER, HIGH_STRIDE, SECOND_MULTIPLIER, STRIDE, WORD

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
        h, s = word[:size], shifted[:size]
        np.add(places[:size], np.uint32(((index & WORD) * STRIDE + (key & WORD)) & WORD), out=h)
        np.right_shift(h, 16, out=s)
        np.bitwise_xor(h, s, out=h)
        np.multiply(h, np.uint32(FIRST_MULTIPLIER), out=h)
        np.bitwise_xor(h, np.uint32(_high_word(key, index)), out=h)
        np.right_shift(h, 13, out=s)
        np.bitwise_xor(h, s, out=h)
        np.multiply(h, np.uint32(SECOND_MULTIPLIER), out=h)
        np.right_shift(h, 16, out=s)
        np.bitwise_xor(h, s, out=h)
        np.multiply(h, np.uint32(HIGH_STRIDE), out=h)
        np.right_shift(h, 15, out=s)
        np.bitwise_xor(h, s, out=h)
        np.greater_equal(h, np.uint32(threshold), out=kept[first : first + size])
        first += size
    return torch.from_numpy(kept)


def _high_word(key: int, index: int) -> int:
    """What the high words of the key and of the index add to every hash of a piece."""
    word = ((key >> 32) + (index >> 32) * HIGH_STRIDE) & WORD
    word = ((word ^ (word >> 16)) * FIRST_MULTIPLIER) & WORD
    word = ((word ^ (word >> 13)) * SECOND_MULTIPLIER) & WORD
    return word ^ (word >> 16)


def native_apply(values: Tensor, *, extension: Any, key: int, offset: int, threshold: int, scale: float) -> Tensor:
    """`values * scale` where kept and 0 elsewhere, by the compiled extension.

    Args:
        values: float32 or bfloat16, contiguous, in host memory.
        extension: the module `megaseq._csrc`.
        key: of the mask.
        offset: number of the first element.
        threshold: hashes below it are dropped.
        scale: factor of what is kept.

    Returns:
        A tensor like `values`.
    """
    output = torch.empty_like(values)
    if values.dtype is torch.bfloat16:
        # NumPy has no bfloat16; the extension takes its bits.
        source, target = (tensor.view(torch.int16).numpy().view(np.uint16) for tensor in (values, output))
        extension.dropout_apply_bfloat16(source.reshape(-1), target.reshape(-1), key, offset, threshold, scale)
    else:
        extension.dropout_apply(values.numpy().reshape(-1), output.numpy().reshape(-1), key, offset, threshold, scale)
    return output
