"""Tile sizes of the kernels of `quantize`."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import Config

WIDEST = 8192
"""Columns of the widest tile; a longer block is read twice, tile by tile."""


def columns_of(block: int) -> int:
    """Columns of the tile for blocks of this many elements: a power of two, at least 16."""
    return min(WIDEST, max(16, 1 << (block - 1).bit_length()))


def configs(block: int) -> list[Config]:
    """All that the tuner tries for blocks of this many elements, the first one for where no table says more."""
    columns = columns_of(block)
    if columns > 4096:
        return [Config({"ROWS": 1, "COLUMNS": columns}, num_warps=warps, num_stages=2) for warps in (8, 16)]
    return [
        Config({"ROWS": elements // columns, "COLUMNS": columns}, num_warps=warps, num_stages=2)
        for elements in (4096, 2048, 8192)
        if elements >= columns
        for warps in (4, 8)
    ]


def dequantize_configs() -> list[Config]:
    """All that the tuner tries for `dequantize`, whatever the blocks."""
    return [
        Config({"ROWS": rows, "COLUMNS": columns}, num_warps=4, num_stages=2)
        for rows, columns in ((1, 1024), (2, 1024), (1, 2048), (4, 512))
    ]
