"""Tile sizes that the kernels may be launched with."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import Config

MATRIX_ROWS = 16
"""The fewest rows of a tile whose scores are a matrix product: those of a tensor core's instruction."""
MAX_ROWS = 64
"""Rows of a tile; more queries of one head make several tiles, which read its keys again."""
MAX_WIDTH = 256
"""Widest head."""
ADDING = Config({"BLOCK_S": 16}, num_warps=4, num_stages=3)
"""How many shares are added at once."""


def padded(width: int) -> int:
    """The width of a tile for heads of `width`, a power of 2."""
    return max(16, 1 << (width - 1).bit_length())


def crowd(programs: int) -> str:
    """How keys of the tables call a number of programs (before the keys are split): what fills a GPU, and how often."""
    return "few" if programs <= 128 else "some" if programs <= 2048 else "many"


def default(*, rows: int, width: int, itemsize: int) -> Config:
    """The tile for a call that no table knows.

    Args:
        rows: queries that read the same keys.
        width: of a head.
        itemsize: bytes of a query's element.
    """
    # Keys and values of a tile, twice for the pipeline, stay near 64 KiB, so that two programs share a processor.
    block = max(16, min(128, 16384 // (padded(width) * itemsize)))
    matrix = int(rows > 1)
    # Products of float32 take registers: no tensor core computes them.
    warps = 8 if matrix and itemsize == 4 else 4
    return Config({"BLOCK_N": block, "MATRIX": matrix}, num_warps=warps, num_stages=2)


def configs(*, rows: int, width: int, itemsize: int) -> list[Config]:
    """What a tuner tries, the default first; sizes as in `default`."""
    first = default(rows=rows, width=width, itemsize=itemsize)
    block = first.blocks["BLOCK_N"]
    half = max(16, block // 2)
    matrix = first.blocks["MATRIX"]
    return [
        first,
        Config({"BLOCK_N": half, "MATRIX": matrix}, num_warps=4, num_stages=2),
        Config({"BLOCK_N": half, "MATRIX": matrix}, num_warps=2, num_stages=3),
        Config({"BLOCK_N": block, "MATRIX": 1}, num_warps=4, num_stages=3),
    ]
