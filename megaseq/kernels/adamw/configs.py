"""Tile sizes of the kernel of AdamW."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import Config


def configs() -> list[Config]:
    """All that the tuner tries, the first one for where no table says more."""
    return [
        Config({"BLOCK": block}, num_warps=warps, num_stages=1)
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (512, 4))
    ]
