"""Tile sizes of attention's kernels: what the launcher takes where no table has tuned ones, and what a tuner tries."""

from __future__ import annotations

import torch

from megaseq.kernels.triton_runtime import Config

FORWARD, OF_QUERY, OF_KEY = "attention_forward", "attention_backward_query", "attention_backward_key"
MAX_HEAD = 256
"""Widest head: a tile of queries and two of keys fill the shared memory."""


def key_of(*, dtype: torch.dtype, head: int, bias: bool, dropout: bool) -> str:
    """What the best tile sizes depend on, as the tables of `triton_runtime.config` name it; `head` as padded."""
    words = [str(dtype).removeprefix("torch."), f"head={head}", *["bias"] * bias, *["dropout"] * dropout]
    return ",".join(words)


def default(kernel: str, *, dtype: torch.dtype, head: int, bias: bool, dropout: bool, arch: int) -> Config:
    """The tile sizes of a kernel.

    Args:
        kernel: `FORWARD`, `OF_QUERY` or `OF_KEY`.
        dtype: of queries, keys and values.
        head: width of a head, rounded up to a power of two.
        bias: whether a table of biases is added.
        dropout: whether weights become zero.
        arch: as of `triton_runtime.architecture`; 0 is the interpreter.
    """
    return candidates(kernel, dtype=dtype, head=head, bias=bias, dropout=dropout, arch=arch)[0]


def candidates(
    kernel: str, *, dtype: torch.dtype, head: int, bias: bool, dropout: bool, arch: int
) -> tuple[Config, ...]:
    """What a tuner tries, the default first; arguments as of `default`."""
    if arch == 0:
        return (_config(64, 64, 4, 1),)
    return (_config(64, 64, 4, 2),)


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=num_warps, num_stages=num_stages)
