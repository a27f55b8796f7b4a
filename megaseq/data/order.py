"""The order of examples: a keyed bijection on [0, size) with random access.

A Feistel network permutes the smallest power of two that holds `size`; cycle walking (apply it again until the value
is inside) makes that a bijection on [0, size) itself. Nothing is stored and nothing is drawn in sequence, so the
example at any place of any epoch is computed on its own, and a checkpoint needs only a few integers to resume exactly.
Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002: cycle walking, Feistel networks.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from megaseq.base import native

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

# Even, so that halves of unequal width are back in their places at the end. Eight rounds leave no bias that the
# chi-square tests can see, also for domains of only a few values, where each round mixes one or two bits.
NUM_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK64 = (1 << 64) - 1


def order_key(*, seed: int, epoch: int, stream: str) -> int:
    """Returns the 64-bit key of one permutation; any change to any of the three gives an unrelated key."""
    text = f"megaseq.order/{seed}/{epoch}/{stream}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permute(
    *, seed: int, epoch: int, stream: str = "examples", size: int, start: int = 0, stop: int | None = None
) -> Int64Array:
    """Returns places `start` to `stop` of the permutation of [0, size), int64 [stop - start].

    Args:
        seed: The run's seed.
        epoch: Counted from 0.
        stream: Names what is permuted, so that two things of one epoch have unrelated orders.
        size: How many things there are.
        start: First place wanted.
        stop: One past the last place wanted; None means `size`.

    Raises:
        ValueError: `0 <= start <= stop <= size` does not hold.
    """
    stop = size if stop is None else stop
    if not 0 <= start <= stop <= size:
        raise ValueError(f"order.permute: must have 0 <= start <= stop <= size, but is {start}, {stop}, {size}.")
    key = order_key(seed=seed, epoch=epoch, stream=stream)
    if start == stop:
        return np.empty(0, dtype=np.int64)
    extension = native.extension()
    if extension is not None:
        values = np.empty(stop - start, dtype=np.int64)
        extension.permute(values, key, size, start)
        return values
    return _permute_numpy(key=key, size=size, places=np.arange(start, stop, dtype=np.uint64))


def permute_places(*, seed: int, epoch: int, stream: str, size: int, places: Int64Array) -> Int64Array:
    """Returns any `places` of the permutation of [0, size) that `permute` gives ranges of, int64 like `places`."""
    key = order_key(seed=seed, epoch=epoch, stream=stream)
    return _permute_numpy(key=key, size=size, places=places.astype(np.uint64))


def num_windows(*, size: int, window: int) -> int:
    """Returns in how many windows of at most `window` places an epoch of `size` places is split."""
    return -(-size // window)


def window_range(*, size: int, window: int, index: int) -> tuple[int, int]:
    """Returns the (start, stop) places of window `index`; windows differ by at most one place in size."""
    windows = num_windows(size=size, window=window)
    if not 0 <= index < windows:
        raise ValueError(f"order.window_range: must have 0 <= index < {windows}, but is {index}.")
    return size * index // windows, size * (index + 1) // windows


def feistel_widths(size: int) -> tuple[int, int]:
    """Returns the widths in bits of the left and right half; together the smallest domain that holds `size`."""
    bits = max(2, (size - 1).bit_length())
    return bits // 2, bits - bits // 2


def round_keys(key: int) -> list[int]:
    """Returns one 64-bit key for each round: the outputs of SplitMix64 started at `key`."""
    return [_splitmix64((key + (index + 1) * _GOLDEN) & _MASK64) for index in range(NUM_ROUNDS)]


def _splitmix64(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK64
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK64
    return value ^ (value >> 31)


def _permute_numpy(*, key: int, size: int, places: UInt64Array) -> Int64Array:
    keys = round_keys(key)
    widths = feistel_widths(size)
    values = _feistel(places, keys, widths)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = _feistel(values[outside], keys, widths)
        values[outside] = walked
        outside = outside[walked >= size]
    return values.astype(np.int64)


def _feistel(values: UInt64Array, keys: list[int], widths: tuple[int, int]) -> UInt64Array:
    """Permutes [0, 2 ** sum(widths)) once, elementwise."""
    left_width, right_width = widths
    left: Any = values >> np.uint64(right_width)
    right: Any = values & np.uint64((1 << right_width) - 1)
    for key in keys:
        mixed = (right ^ np.uint64(key)) * np.uint64(_FIRST)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(_SECOND)
        mixed >>= np.uint64(64 - left_width)
        left, right = right, left ^ mixed
        left_width, right_width = right_width, left_width
    joined: UInt64Array = (left << np.uint64(right_width)) | right
    return joined
