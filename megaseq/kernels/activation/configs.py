"""Tile sizes of the activations' kernels."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import Config


def configs() -> tuple[Config, ...]:
    """All that a tuner may choose: a program has some columns of one row."""
    return tuple(
        Config({"BLOCK": block}, num_warps=warps, num_stages=1)
        for block, warps in ((256, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8))
    )


def default(width: int) -> Config:
    """For rows of `width` elements."""
    return configs()[0] if width <= 256 else configs()[2]
