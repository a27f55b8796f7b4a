"""Tile sizes of the rotation's kernel."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import Config


def configs() -> tuple[Config, ...]:
    """All that a tuner may choose: a program turns HEADS heads of one token."""
    return tuple(
        Config({"HEADS": heads}, num_warps=warps, num_stages=1)
        for heads, warps in ((4, 1), (8, 2), (8, 4), (16, 4), (32, 4))
    )


def default() -> Config:
    """For what no table knows."""
    return configs()[1]
