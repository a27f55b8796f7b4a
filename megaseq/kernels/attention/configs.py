"""Tile sizes of attention's kernels: what the launcher takes where no table has tuned ones, and what a tuner tries."""

from __future__ import annotations

import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.triton_runtime import Config

FORWARD, OF_QUERY, OF_KEY = "attention_forward", "attention_backward_query", "attention_backward_key"
MAX_HEAD = 256
"""Widest head: a tile of queries and two of keys fill the shared memory."""
INTERPRETED = Config({"BLOCK_M": 64, "BLOCK_N": 64})
"""For the interpreter, which takes as long for a large tile as for a small one."""

Sizes = tuple[int, int, int, int]
"""(BLOCK_M, BLOCK_N, warps, stages)."""

_HALF: dict[str, dict[int, tuple[Sizes, ...]]] = {
    FORWARD: {
        64: ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (64, 64, 4, 2)),
        256: ((64, 32, 4, 2),),
    },
    OF_QUERY: {
        64: ((128, 64, 8, 2), (64, 64, 4, 2)),
        128: ((64, 64, 8, 2),),
        256: ((64, 32, 8, 1),),
    },
    OF_KEY: {
        64: ((64, 128, 8, 2), (64, 64, 4, 2)),
        128: ((64, 64, 8, 2),),
        256: ((32, 64, 8, 1),),
    },
}
"""By kernel and the widest head that they are for: in bfloat16 and float16, the default first."""
_SINGLE: dict[str, dict[int, tuple[Sizes, ...]]] = {
    kernel: {64: ((32, 32, 4, 1),), 128: ((32, 32, 8, 1),), 256: ((32, 32, 8, 1),)}
    for kernel in (FORWARD, OF_QUERY, OF_KEY)
}
"""The same in float32, whose products no tensor core computes."""


def padded(head: int) -> int:
    """The width of a tile for heads of width `head`: a power of two that the matrix units take."""
    return max(16, 1 << (head - 1).bit_length())


def key_of(*, dtype: torch.dtype, head: int, bias: bool, dropout: bool) -> str:
    """What the best tile sizes depend on, as the tables of `triton_runtime.config` name it; `head` as padded."""
    words = [triton_runtime.kind_of(dtype), f"head={head}", *["bias"] * bias, *["dropout"] * dropout]
    return ",".join(words)


def default(kernel: str, *, dtype: torch.dtype, head: int, bias: bool, arch: int) -> Config:
    """The tile sizes of a kernel where no table knows better ones.

    Args:
        kernel: `FORWARD`, `OF_QUERY` or `OF_KEY`.
        dtype: of queries, keys and values.
        head: width of a head, rounded up to a power of two.
        bias: whether a table of biases is added, whose tiles want shared memory.
        arch: as of `triton_runtime.architecture`; 0 is the interpreter.
    """
    return candidates(kernel, dtype=dtype, head=head, bias=bias, arch=arch)[0]


def candidates(kernel: str, *, dtype: torch.dtype, head: int, bias: bool, arch: int) -> tuple[Config, ...]:
    """What a tuner tries, the default first; arguments as of `default`."""
    if arch == 0:
        return (INTERPRETED,)
    if arch >= 100 and kernel == OF_KEY and head > 128:
        # Two sums of 256 columns leave nothing of the tensor memory for a product: in registers they are kept.
        return (Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=1),)
    if arch < 90 and kernel == OF_KEY and head <= 64 and dtype is not torch.float32:
        # 64 queries and a soft cap would spill thousands of bytes where products take their operands from registers.
        return tuple(Config({"BLOCK_M": 32, "BLOCK_N": block}, num_warps=8, num_stages=2) for block in (128, 64))
    if arch >= 100 and kernel == OF_QUERY and dtype is torch.float32:
        return (Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1),)
    of_dtype = _SINGLE if dtype is torch.float32 else _HALF
    widest = next(width for width in (64, 128, 256) if head <= width)
    return tuple(
        Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)
        for block_m, block_n, warps, stages in of_dtype[kernel][widest]
    )
