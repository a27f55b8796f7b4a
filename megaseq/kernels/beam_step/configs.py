"""Tile sizes that the kernels may be launched with."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import Config

MAX_HYPS = 32
"""Widest beam, and half of the most extensions of a hypothesis."""
MERGE_ELEMENTS = 4096
"""Candidates that the merging program holds at once."""

DEFAULT = Config({"BLOCK": 1024}, num_warps=4, num_stages=2)
"""Logits that a program looks at at once."""

WARPS_FOR_HYPS = 4
"""The widest beam that four warps merge without spilling registers."""


def crowd(rows: int) -> str:
    """How keys of the tables call a number of hypotheses: few have to share out their vocabularies to fill a GPU."""
    return "few" if rows <= 16 else "some" if rows <= 256 else "many"


def configs() -> list[Config]:
    """What a tuner tries for the pass over the logits, the default first."""
    return [
        DEFAULT,
        Config({"BLOCK": 2048}, num_warps=4, num_stages=2),
        Config({"BLOCK": 2048}, num_warps=8, num_stages=2),
        Config({"BLOCK": 4096}, num_warps=8, num_stages=2),
    ]


def merging(hyps: int) -> Config:
    """How the program of a source is launched that merges `hyps` hypotheses, a power of 2."""
    return Config({}, num_warps=4 if hyps <= WARPS_FOR_HYPS else 8, num_stages=1)
