"""Tile sizes of the kernels of `quantize`."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import Config

WIDEST = 8192
"""Columns of the widest tile; a longer block is read twice, tile by tile."""
_ELEMENTS = 8192


def columns_of(block: int) -> int:
    """Columns of the tile for blocks of this many elements: a power of two, at least 16."""
    return min(WIDEST, max(16, 1 << (block - 1).bit_length()))


def default(block: int) -> Config:
    """The tile that an architecture without a table uses: as many rows as fill registers well."""
    columns = columns_of(block)
    rows = max(1, min(32, _ELEMENTS // 2 // columns))
    return Config({"ROWS": rows, "COLUMNS": columns}, num_warps=8 if rows * columns > 4096 else 4, num_stages=2)


def configs(block: int) -> list[Config]:
    """All that the tuner tries for blocks of this many elements."""
    columns = columns_of(block)
    return [
        Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=2)
        for rows in (1, 2, 4, 8, 16, 32)
        if 512 <= rows * columns <= _ELEMENTS or (rows == 1 and columns <= _ELEMENTS)
        for warps in (4, 8)
    ]
