"""Tile sizes of dropout's kernel."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import Config


def configs() -> tuple[Config, ...]:
    """All that a tuner may choose."""
    return tuple(
        Config({"BLOCK": block}, num_warps=warps, num_stages=1)
        for block, warps in ((512, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
    )


def default(width: int) -> Config:
    """For runs of `width` elements: short ones are done by fewer warps, as half of a block would idle."""
    return configs()[0] if width <= 512 else configs()[1]
