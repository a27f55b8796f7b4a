"""Whether pieces make up their tensors exactly, and which process writes which of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megaseq.base.errors import AsText, CheckpointError, must
from megaseq.checkpoint.piece import Outline

Block = tuple[Sequence[int], Sequence[int]]
"""Start and size, by dimension."""


def deal_out(outlines: Sequence[Sequence[Outline]]) -> list[list[int]]:
    """Says which pieces each process writes, so that every element is written once and the bytes are even.

    A piece that several processes hold goes to the one with the least to write so far, the largest first (the
    longest-processing-time rule, Graham 1969).

    Args:
        outlines: Of the pieces of each process.

    Returns:
        Indices into the pieces of each process, in order.

    Raises:
        CheckpointError: The pieces of a name overlap in part, leave a gap, or differ in type or global shape.
    """
    holders: dict[Outline, list[tuple[int, int]]] = {}
    for rank, own in enumerate(outlines):
        for index, outline in enumerate(own):
            holders.setdefault(outline, []).append((rank, index))
    check_outlines(list(holders))
    loads = [0] * len(outlines)
    dealt: list[list[int]] = [[] for _ in outlines]
    shared: list[Outline] = []
    for outline, places in holders.items():
        if len({rank for rank, _ in places}) > 1:
            shared.append(outline)
        else:
            rank, index = places[0]
            loads[rank] += outline.num_bytes
            dealt[rank].append(index)
    for outline in sorted(shared, key=lambda one: (-one.num_bytes, one.name, one.start)):
        rank, index = min(holders[outline], key=lambda place: (loads[place[0]], place))
        loads[rank] += outline.num_bytes
        dealt[rank].append(index)
    return [sorted(indices) for indices in dealt]


def check_outlines(outlines: Sequence[Outline]) -> None:
    """Raises CheckpointError where the pieces of a name are not one tensor, each element given once."""
    by_name: dict[str, list[Outline]] = {}
    for outline in outlines:
        by_name.setdefault(outline.name, []).append(outline)
    for name, group in by_name.items():
        first = group[0]
        other = next((one for one in group if (one.dtype, one.global_shape) != (first.dtype, first.global_shape)), None)
        if other is not None:
            problem = (
                f"{first.dtype} {list(first.global_shape)} on one and {other.dtype} {list(other.global_shape)} "
                "on another"
            )
        else:
            problem = tiling_problem([(one.start, one.size) for one in group], shape=first.global_shape)
        if problem:
            raise must(
                f"pieces of {name}",
                "make up one tensor exactly over all ranks",
                AsText(problem),
                "Mend the layout that cut them",
                kind=CheckpointError,
            )


def tiling_problem(blocks: Sequence[Block], *, shape: Sequence[int]) -> str:
    """Returns what keeps the blocks from making up a tensor of `shape`, each element once; empty if nothing does."""
    for start, size in blocks:
        ends = [a + n for a, n in zip(start, size, strict=True)]
        if len(ends) != len(shape) or any(a < 0 for a in start) or any(a > b for a, b in zip(ends, shape, strict=True)):
            return f"a block of {list(size)} at {list(start)} outside {list(shape)}"
    overlap = _overlap([block for block in blocks if 0 not in block[1]], num_dims=len(shape))
    if overlap is not None:
        one, other = ([list(part) for part in block] for block in overlap)
        return f"overlapping: {one[1]} at {one[0]} and {other[1]} at {other[0]}"
    missing = math.prod(shape) - sum(math.prod(size) for _, size in blocks)
    if missing or not blocks:
        return f"without {missing} of its {math.prod(shape)} elements"
    return ""


def _overlap(blocks: Sequence[Block], *, num_dims: int) -> tuple[Block, Block] | None:
    """Returns two blocks with an element in common, or None."""
    if num_dims == 0:
        return (blocks[0], blocks[1]) if len(blocks) > 1 else None
    # A sweep along the dimension that divides them most: few are open at a time, so that thousands take no time.
    sweep = max(range(num_dims), key=lambda dim: len({block[0][dim] for block in blocks}))
    opened: list[Block] = []
    for block in sorted(blocks, key=lambda one: one[0][sweep]):
        begin = block[0][sweep]
        opened = [one for one in opened if one[0][sweep] + one[1][sweep] > begin]
        for other in opened:
            if all(a < b + m and b < a + n for a, n, b, m in zip(*block, *other, strict=True)):
                return other, block
        opened.append(block)
    return None
