"""Tile sizes of the norms' kernels."""

from __future__ import annotations

import functools

from megaseq.kernels.triton_runtime import Config

WIDEST = 8192
"""A program holds whole rows in registers; the backward pass of a wider one would spill them."""


def columns_of(width: int) -> int:
    """Columns of a tile: the power of two that holds a row of `width` elements."""
    return max(16, 1 << (width - 1).bit_length())


def configs(width: int) -> tuple[Config, ...]:
    """All that a tuner may choose for rows of `width` elements."""
    columns = columns_of(width)
    found = []
    for elements in (1024, 2048, 4096) if columns < 8192 else (8192,):
        rows = elements // columns
        if 1 <= rows <= 64:
            found += [Config({"ROWS": rows}, num_warps=warps, num_stages=1) for warps in (elements // 512, 8)]
    return tuple({(entry.blocks["ROWS"], entry.num_warps): entry for entry in found}.values())


@functools.cache
def default(width: int) -> Config:
    """For rows of `width` elements: 2048 elements by 4 warps, or one row by as many warps as keep it in registers."""
    columns = columns_of(width)
    rows = max(1, 2048 // columns)
    return Config({"ROWS": min(rows, 64)}, num_warps=max(4, min(16, columns // 512)), num_stages=1)
