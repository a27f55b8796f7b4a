"""Pieces make up the tensors that they were cut from, and are views of this process's memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.piece import Piece, fragment_pieces, shard_pieces, whole_piece
from megaseq.parallel.spec import Box, Shard

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def numbered(shape: Sequence[int]) -> Tensor:
    """A tensor in which every element is another number."""
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(tuple(shape))


def assemble(pieces: Sequence[Piece], *, shape: tuple[int, ...]) -> Tensor:
    """The global tensor of the pieces; -1 where there is none. An element that two give is an error."""
    result = torch.full(shape, -1.0)
    for piece in pieces:
        where = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))
        assert bool((result[where] == -1).all()), "two pieces overlap"
        result[where] = piece.tensor
    return result


def fused_shard(parts: Sequence[int], *, width: int, rank: int, ranks: int) -> Shard:
    """Rank's rows of each of several fused parts of a [sum(parts), width] tensor."""
    boxes, begin, local = [], 0, 0
    for part in parts:
        low, high = part * rank // ranks, part * (rank + 1) // ranks
        boxes.append(Box(start=(begin + low, 0), local_start=(local, 0), size=(high - low, width)))
        begin, local = begin + part, local + high - low
    return Shard(axes=("tensor",), boxes=tuple(boxes), local_shape=(local, width))


@given(shape=SHAPES, data=st.data())
@settings(max_examples=300, deadline=None)
def test_fragments_of_a_tensor_are_few_blocks_that_make_it_up(shape: tuple[int, ...], data: st.DataObject) -> None:
    values = numbered(shape)
    total = values.numel()
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    flat, pieces = values.reshape(-1), []
    for first, stop in itertools.pairwise(cuts):
        found = fragment_pieces("x", flat[first:stop], first=first, shard=None, global_shape=shape)
        assert len(found) <= max(1, 2 * len(shape) - 1)
        assert all(piece.tensor.is_contiguous() for piece in found)
        pieces += found
    assert torch.equal(assemble(pieces, shape=shape), values)


@given(
    parts=st.lists(st.integers(2, 6), min_size=1, max_size=3),
    width=st.integers(1, 4),
    ranks=st.integers(1, 2),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_fragments_of_fused_shards_make_up_the_tensor(
    parts: list[int], width: int, ranks: int, data: st.DataObject
) -> None:
    values = numbered((sum(parts), width))
    pieces, whole = [], []
    for rank in range(ranks):
        shard = fused_shard(parts, width=width, rank=rank, ranks=ranks)
        local = torch.cat([box.of_global(values) for box in shard.boxes])
        whole += shard_pieces("x", local, shard=shard, global_shape=values.shape)
        cut = data.draw(st.integers(0, local.numel()))
        for first, part in ((0, local.reshape(-1)[:cut]), (cut, local.reshape(-1)[cut:])):
            pieces += fragment_pieces("x", part, first=first, shard=shard, global_shape=values.shape)
    assert torch.equal(assemble(whole, shape=(sum(parts), width)), values)
    assert torch.equal(assemble(pieces, shape=(sum(parts), width)), values)


def test_what_is_written_to_a_piece_is_in_the_fragment() -> None:
    flat = torch.zeros(9)
    for piece in fragment_pieces("x", flat, first=2, shard=None, global_shape=(3, 4)):
        piece.tensor.copy_(
            numbered((3, 4))[tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))]
        )
    assert flat.tolist() == list(range(2, 11))


def test_a_scalar_is_a_piece() -> None:
    assert whole_piece("x", torch.tensor(3.0)).is_whole
    (piece,) = fragment_pieces("x", torch.tensor([3.0]), first=0, shard=None, global_shape=())
    assert piece.tensor.item() == 3.0 and piece.size == ()


def test_a_piece_outside_its_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"piece of x: must lie inside \[4\], but is a block of \[3\] at \[2\]"):
        Piece(name="x", global_shape=(4,), start=(2,), tensor=torch.zeros(3))
    with pytest.raises(CheckpointError, match="Leave padding out"):
        fragment_pieces("x", torch.zeros(3), first=3, shard=None, global_shape=(5,))
