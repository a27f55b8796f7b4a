"""Pieces: what this process holds of tensors that many may share, under names and shapes that know no layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megaseq.base.errors import AsText, CheckpointError, must
from megaseq.parallel.spec import Box, Shard


@dataclass(frozen=True)
class Piece:
    """A block of the logical tensor `name`, and the view of this process's memory where it lies.

    Several processes may give the same piece (a replicated parameter); pieces of one name that overlap in part are an
    error, but for copies. All pieces of a name together make up the global tensor.
    """

    name: str
    global_shape: tuple[int, ...]
    """Shape of the logical tensor."""
    start: tuple[int, ...]
    """First element of the block in the logical tensor, by dimension."""
    tensor: Tensor
    """The block; as many dimensions as the logical tensor. A checkpoint is read into it in place."""
    is_copy: bool = False
    """Whether pieces of other processes have all of it, perhaps cut in other places; it is read and never written."""

    def __post_init__(self) -> None:
        """Raises CheckpointError where the block does not lie inside the logical tensor."""
        size = tuple(self.tensor.shape)
        if not len(self.global_shape) == len(self.start) == len(size) or not all(
            start >= 0 and start + length <= whole
            for start, length, whole in zip(self.start, size, self.global_shape, strict=True)
        ):
            raise must(
                f"piece of {self.name}",
                f"lie inside {list(self.global_shape)}",
                AsText(f"a block of {list(size)} at {list(self.start)}"),
                "Mend what cut it",
                kind=CheckpointError,
            )

    @property
    def size(self) -> tuple[int, ...]:
        """Elements by dimension."""
        return tuple(self.tensor.shape)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the logical tensor."""
        return self.size == self.global_shape


class Outline(NamedTuple):
    """A piece without its values: what processes tell each other of it."""

    name: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, piece: Piece) -> Outline:
        """Returns the outline of a piece."""
        return cls(piece.name, piece.global_shape, piece.start, piece.size, piece.tensor.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """What one process writes of one tensor; its values are asked for when it is their turn."""

    outline: Outline
    values: Callable[[], Tensor]

    @classmethod
    def of(cls, piece: Piece) -> Part:
        """Returns the part that is a piece."""
        return cls(outline=Outline.of(piece), values=lambda: piece.tensor)


def whole_piece(name: str, tensor: Tensor) -> Piece:
    """Returns the piece that is all of the tensor `name`."""
    return Piece(name=name, global_shape=tuple(tensor.shape), start=(0,) * tensor.dim(), tensor=tensor)


def as_pieces(tensors: Mapping[str, Tensor] | Sequence[Piece]) -> list[Piece]:
    """Returns pieces as they are, and whole tensors by name as pieces."""
    if isinstance(tensors, Mapping):
        return [whole_piece(name, tensor) for name, tensor in tensors.items()]
    return list(tensors)


def shard_pieces(name: str, tensor: Tensor, *, shard: Shard | None, global_shape: Sequence[int]) -> list[Piece]:
    """Returns the pieces that a process's shard of a tensor consists of: one for each of its boxes.

    Args:
        name: Logical.
        tensor: What this process holds, of `shard.local_shape`; something of a parameter's shape, a moment say.
        shard: Which part of the logical tensor that is; None is all.
        global_shape: Of the logical tensor.
    """
    if shard is None:
        return [Piece(name=name, global_shape=tuple(global_shape), start=(0,) * tensor.dim(), tensor=tensor)]
    return [
        Piece(name=name, global_shape=tuple(global_shape), start=box.start, tensor=box.of_local(tensor))
        for box in shard.boxes
    ]


def fragment_pieces(
    name: str, fragment: Tensor, *, first: int, shard: Shard | None, global_shape: Sequence[int]
) -> list[Piece]:
    """Returns the pieces in a run of consecutive elements of a flattened tensor, as ZeRO deals them out.

    A run of an n-dimensional block is at most 2n - 1 blocks, each contiguous in the fragment.

    Args:
        name: Logical.
        fragment: [N] elements of this process's tensor in row-major order.
        first: Where in that tensor the fragment begins.
        shard: Which part of the logical tensor this process's tensor is; None is all.
        global_shape: Of the logical tensor.

    Raises:
        CheckpointError: The fragment goes beyond the end of the tensor: padding, say.
    """
    shape = tuple(global_shape) if shard is None else shard.local_shape
    stop = first + fragment.numel()
    if fragment.dim() != 1 or first < 0 or stop > math.prod(shape):
        raise must(
            f"fragment of {name}",
            f"be a run of the {math.prod(shape)} elements of {list(shape)}",
            AsText(f"elements {first} to {stop}, of shape {list(fragment.shape)}"),
            "Leave padding out",
            kind=CheckpointError,
        )
    zero = (0,) * len(shape)
    boxes = (Box(start=zero, local_start=zero, size=shape),) if shard is None else shard.boxes
    pieces: list[Piece] = []
    for start, size, offset in _blocks(first, stop, shape=shape):
        block = fragment[offset : offset + math.prod(size)].view(size)
        for box in boxes:
            low = [max(a, b) for a, b in zip(start, box.local_start, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, size, box.local_start, box.size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                inside = block[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))]
                place = tuple(g + a - o for g, a, o in zip(box.start, low, box.local_start, strict=True))
                pieces.append(Piece(name=name, global_shape=tuple(global_shape), start=place, tensor=inside))
    return pieces


def _blocks(first: int, stop: int, *, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Gives (start, size, offset in the run) of blocks of `shape` that make up its elements [first, stop), in order."""
    if first >= stop:
        return
    if not shape:
        yield (), (), 0
        return
    if len(shape) == 1:
        yield (first,), (stop - first,), 0
        return
    row = math.prod(shape[1:])
    index = first // row
    head = min(stop, (index + 1) * row)
    if first > index * row or head < (index + 1) * row:
        for start, size, offset in _blocks(first - index * row, head - index * row, shape=shape[1:]):
            yield (index, *start), (1, *size), offset
        index += 1
    last = stop // row
    if last > index:
        yield (index, *(0 for _ in shape[1:])), (last - index, *shape[1:]), index * row - first
        index = last
    if stop > max(index * row, head):
        for start, size, offset in _blocks(0, stop - index * row, shape=shape[1:]):
            yield (index, *start), (1, *size), index * row - first + offset
