"""Tile sizes of the kernel of `scaled_linear`."""

from __future__ import annotations

import dataclasses

from megaseq.kernels.triton_runtime import Config, architecture

NARROWEST = 32
"""The least BLOCK_K: what tensor cores take at once in 8 bits. Blocks with scales of their own are multiples of it."""

LOADED = 16
"""Bytes that a thread loads at once, of rows that start and end at multiples of them."""


def rows_key(rows: int) -> int:
    """The size of M that a table knows tiles for: 16 is decoding, where reading the weight takes the time."""
    return next((size for size in (16, 32, 64, 128) if rows <= size), 256)


def default(rows: int, *, block: int | None = None) -> Config:
    """The tile for what no table knows; arguments as of `configs`."""
    return _tiles(rows, block=block)[0]


def configs(rows: int, *, integer: bool, block: int | None = None) -> list[Config]:
    """All that the tuner tries for M = `rows` on this architecture.

    Args:
        rows: M.
        integer: whether products are of int8, which are summed in place; those of e4m3 take registers of their own.
        block: elements of K that share a scale, where a row has several; BLOCK_K divides it.
    """
    # On sm_80 and sm_100 sums of int8 of this size leave the registers.
    wide = _WIDE if integer and block is None and rows_key(rows) == 256 and architecture() == 90 else ()
    return [*_tiles(rows, block=block), *wide]


def narrowed(tile: Config, *, aligned: bool) -> Config:
    """The tile for rows that are, or are not, `aligned`: all of them start and end at multiples of `LOADED`.

    Elements of others are loaded one by one, through registers and without a pipeline: steps of 128 would spill
    thousands of bytes with Triton 3.6, and tens with 3.9.
    """
    step = tile.blocks["BLOCK_K"]
    return tile if aligned or step <= 64 else dataclasses.replace(tile, blocks={**tile.blocks, "BLOCK_K": 64})


def _tiles(rows: int, *, block: int | None) -> list[Config]:
    size = rows_key(rows)
    if block is None:
        return list(_LISTS[size])
    # A scaled sum is held twice: that of the block, and in fp32 that of all blocks.
    tallest = 64
    tiles = [
        config
        for config in _LISTS[size]
        if block % config.blocks["BLOCK_K"] == 0 and config.blocks["BLOCK_M"] <= tallest
    ]
    step = next((step for step in (64, NARROWEST) if block % step == 0), NARROWEST)
    return tiles or [_tile(max(16, min(size, 64)), columns=64, step=step, warps=4, stages=4)]


def _tile(rows: int, *, columns: int, step: int, warps: int, stages: int) -> Config:
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": step, "GROUP": 8}
    return Config(blocks, num_warps=warps, num_stages=stages)


_LISTS = {
    # Many small programs, each with as much of the weight on its way as fits.
    16: (
        _tile(16, columns=32, step=128, warps=2, stages=5),
        _tile(16, columns=32, step=256, warps=4, stages=4),
        _tile(16, columns=64, step=128, warps=4, stages=5),
        _tile(16, columns=16, step=256, warps=2, stages=5),
        _tile(16, columns=128, step=128, warps=4, stages=4),
    ),
    32: (
        _tile(32, columns=32, step=128, warps=4, stages=5),
        _tile(32, columns=64, step=128, warps=4, stages=5),
        _tile(32, columns=64, step=256, warps=4, stages=3),
    ),
    64: (
        _tile(64, columns=64, step=128, warps=4, stages=4),
        _tile(64, columns=128, step=128, warps=4, stages=4),
        _tile(64, columns=32, step=128, warps=4, stages=5),
    ),
    128: (
        _tile(128, columns=64, step=128, warps=4, stages=4),
        _tile(128, columns=128, step=128, warps=8, stages=3),
        _tile(64, columns=128, step=128, warps=4, stages=4),
        _tile(64, columns=64, step=128, warps=4, stages=4),
    ),
    256: (
        _tile(128, columns=128, step=128, warps=8, stages=3),
        _tile(128, columns=128, step=128, warps=8, stages=4),
        _tile(64, columns=128, step=128, warps=4, stages=4),
    ),
}
_WIDE = (_tile(128, columns=256, step=128, warps=8, stages=3), _tile(128, columns=256, step=64, warps=8, stages=4))
