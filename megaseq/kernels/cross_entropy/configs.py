"""Tile sizes of the cross entropy's kernels, and how many tokens have logits at one time."""

from __future__ import annotations

import functools

import torch

from megaseq.kernels.triton_runtime import Config

BUDGET = 512 << 20
"""Bytes of one chunk's logits, and the most that they are on any card: a larger chunk would be no faster."""
WIDTHS = 2
"""Tokens of a chunk, at least, in widths D of the hidden state."""
TILE = 128
"""Tokens of a tile of the matrix products; full chunks are whole tiles."""


def configs() -> tuple[Config, ...]:
    """All that a tuner may choose: a program walks over one token's logits in blocks."""
    return tuple(
        Config({"BLOCK": block}, num_warps=warps, num_stages=1)
        for block, warps in ((1024, 4), (2048, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16))
    )


def default(num_classes: int) -> Config:
    """For `num_classes` logits a token."""
    return configs()[2] if num_classes > 2048 else configs()[0]


def tokens_of_chunk(*, count: int, num_classes: int, width: int, item_size: int, budget: int) -> int:
    """Tokens whose logits exist at one time: few enough for memory, enough to be no slower than all at once.

    A chunk costs one more pass over the float32 gradient of the weights, 8 bytes for each of its V x D elements. It
    saves the passes in which plain cross entropy widens the logits, normalises them and differentiates: at least 18
    bytes for each of the chunk's logits. So chunks of D / 2 tokens break even where memory bounds both; four times as
    many leave room for the products, which run at full speed from about a thousand rows.

    Args:
        count: tokens N in all.
        num_classes: classes V of the whole vocabulary.
        width: D.
        item_size: bytes of a logit.
        budget: bytes that the logits of a chunk should stay below.

    Returns:
        `count` if one chunk is enough or more would be slower; else the size of all chunks but the last, which is
        little shorter.
    """
    fits = budget // (num_classes * item_size)
    chunk = max(fits, WIDTHS * width, 8 * TILE)
    if count <= chunk:
        return max(count, 1)
    pieces = -(-count // chunk)
    return -(-count // (pieces * TILE)) * TILE


@functools.cache
def memory_budget(device: torch.device) -> int:
    """`BUDGET`, or a 64th of the memory of a small GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return BUDGET
    return min(BUDGET, max(BUDGET // 4, torch.cuda.get_device_properties(device).total_memory // 64))
