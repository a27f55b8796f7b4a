"""Tile sizes of attention's kernels: what the launcher takes where no table has tuned ones, and what a tuner tries."""

from __future__ import annotations

import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.triton_runtime import Config, generation, version

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


SMALL_SHARED_MEMORY = 99 << 10
"""Bytes that a block may have on sm_86, sm_89 and sm_120: what `_SMALL` is made for."""
_LARGE_SHARED_MEMORY = 163 << 10
"""The same of sm_80, which the other lists are made for."""
_SMALL: dict[tuple[str, int], tuple[Sizes, ...]] = {
    (FORWARD, 64): ((128, 64, 8, 2), (64, 64, 4, 3)),
    (OF_QUERY, 64): ((64, 64, 4, 2),),
    (OF_KEY, 256): ((32, 32, 4, 1),),
}
"""By kernel and width: what takes the place of tiles of `_HALF` that do not fit there."""
_OF_GENERATION: dict[tuple[int, str, int], tuple[Sizes, ...]] = {
    (80, OF_QUERY, 64): ((128, 64, 8, 2), (64, 64, 8, 2)),
    # 64 queries and a soft cap would spill thousands of bytes where products take their operands from registers.
    (80, OF_KEY, 64): ((32, 128, 8, 2), (32, 64, 8, 2)),
    (90, FORWARD, 256): ((128, 32, 8, 2), (64, 32, 4, 2)),
    (90, OF_QUERY, 256): ((64, 32, 8, 2),),
    (90, OF_KEY, 256): ((32, 64, 8, 2), (16, 64, 8, 2)),
    (100, FORWARD, 64): ((128, 64, 8, 3), (64, 64, 4, 3)),
}
"""By generation of tensor cores, kernel and width: what spills less there than the tiles of `_HALF`."""


def padded(head: int) -> int:
    """The width of a tile for heads of width `head`: a power of two that the matrix units take."""
    return max(16, 1 << (head - 1).bit_length())


def key_of(*, dtype: torch.dtype, head: int, bias: bool, dropout: bool) -> str:
    """What the best tile sizes depend on, as the tables of `triton_runtime.config` name it; `head` as padded."""
    words = [triton_runtime.kind_of(dtype), f"head={head}", *["bias"] * bias, *["dropout"] * dropout]
    return ",".join(words)


def widest_head(dtype: torch.dtype, *, shared: int) -> int:
    """The widest head that fits: tiles of float32 do not become smaller.

    Args:
        dtype: of queries, keys and values.
        shared: as of `triton_runtime.shared_memory`.
    """
    if shared < SMALL_SHARED_MEMORY:
        return 0
    return 128 if dtype is torch.float32 and shared < _LARGE_SHARED_MEMORY else MAX_HEAD


def default(kernel: str, *, dtype: torch.dtype, head: int, bias: bool, arch: int, shared: int) -> Config:
    """The tile sizes of a kernel where no table knows better ones.

    Args:
        kernel: `FORWARD`, `OF_QUERY` or `OF_KEY`.
        dtype: of queries, keys and values.
        head: width of a head, rounded up to a power of two.
        bias: whether a table of biases is added, whose tiles want shared memory.
        arch: as of `triton_runtime.architecture`; 0 is the interpreter.
        shared: as of `triton_runtime.shared_memory`.
    """
    return candidates(kernel, dtype=dtype, head=head, bias=bias, arch=arch, shared=shared)[0]


def candidates(kernel: str, *, dtype: torch.dtype, head: int, bias: bool, arch: int, shared: int) -> tuple[Config, ...]:
    """What a tuner tries, the default first; arguments as of `default`."""
    if arch == 0:
        return (INTERPRETED,)
    widest = next(width for width in (64, 128, 256) if head <= width)
    single, made_for = dtype is torch.float32, generation(arch)
    if made_for == 100 and kernel == OF_KEY and head > 128:
        # Two sums of 256 columns leave nothing of the tensor memory for a product: in registers they are kept.
        return (_config((64, 32, 8, 1)),)
    if made_for == 100 and kernel == OF_QUERY and single:
        return (_config((32, 32, 8, 1)),)
    if single:
        return tuple(map(_config, _SINGLE[kernel][widest]))
    if shared < _LARGE_SHARED_MEMORY and (kernel, widest) in _SMALL:
        return tuple(map(_config, _SMALL[kernel, widest]))
    if made_for == 90 and kernel == OF_KEY and widest == 256 and bias:
        return (_config((16, 64, 8, 2)),)
    if made_for == 100 and kernel == OF_KEY and widest == 64 and version() < (3, 9):
        # With Triton 3.6 the pipeline spills 1,500 bytes for grouped heads and a causal mask, with 3.9 320; larger
        # tiles without one spill 2,000 for a soft cap and slopes.
        return (_config((64, 64, 8, 1)), _config((32, 128, 8, 1)))
    return tuple(map(_config, _OF_GENERATION.get((made_for, kernel, widest), _HALF[kernel][widest])))


def _config(sizes: Sizes) -> Config:
    block_m, block_n, warps, stages = sizes
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)
