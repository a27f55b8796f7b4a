"""Which rank writes which piece, and what is no tensor."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.piece import Outline
from megaseq.checkpoint.tiling import Block, check_outlines, deal_out, tiling_problem


def outline(name: str, *shape: int, start: tuple[int, ...] = (), size: tuple[int, ...] = ()) -> Outline:
    return Outline(name, global_shape=shape, start=start or (0,) * len(shape), size=size or shape, dtype=torch.float32)


def test_what_all_hold_is_dealt_out_evenly() -> None:
    whole = [outline(f"t{index}", 10 + index, 3) for index in range(20)]
    dealt = deal_out([whole] * 4)
    assert sorted(itertools.chain(*dealt)) == list(range(20))
    loads = [sum(whole[index].num_bytes for index in own) for own in dealt]
    assert max(loads) - min(loads) <= max(one.num_bytes for one in whole)


def test_what_one_holds_it_writes_and_gets_less_of_the_rest() -> None:
    mine, shared = outline("mine", 100), outline("shared", 50)
    assert deal_out([[mine, shared], [shared]]) == [[0], [0]]
    assert deal_out([[shared], [shared, mine]]) == [[0], [1]]


def test_the_same_piece_twice_on_one_rank_is_written_once() -> None:
    assert deal_out([[outline("tied", 4), outline("tied", 4)]]) == [[0]]


@pytest.mark.parametrize(
    ("outlines", "problem"),
    [
        ([outline("w", 4, start=(0,), size=(2,))], "without 2 of its 4 elements"),
        ([outline("w", 4), outline("w", 4, start=(1,), size=(2,))], r"overlapping: \[4\] at \[0\] and \[2\] at \[1\]"),
        ([outline("w", 4), outline("w", 5)], r"torch.float32 \[4\] on one and torch.float32 \[5\] on another"),
        ([outline("w"), outline("w")], r"overlapping: \[\] at \[\]"),
    ],
)
def test_what_is_no_tensor_is_named(outlines: list[Outline], problem: str) -> None:
    with pytest.raises(CheckpointError, match=f"pieces of w: must make up one tensor exactly.*{problem}"):
        check_outlines(outlines)


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), data=st.data())
@settings(max_examples=300, deadline=None)
def test_tiling_is_what_counting_every_element_says(shape: list[int], data: st.DataObject) -> None:
    blocks: list[Block] = [((0,) * len(shape), tuple(shape))]
    for _ in range(data.draw(st.integers(0, 4))):  # Cuts some block in two, so that tilings are found too.
        start, size = blocks.pop(data.draw(st.integers(0, len(blocks) - 1)))
        dim = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, size[dim]))
        blocks.append((start, tuple(cut if d == dim else n for d, n in enumerate(size))))
        moved = tuple(a + cut if d == dim else a for d, a in enumerate(start))
        blocks.append((moved, tuple(n - cut if d == dim else n for d, n in enumerate(size))))
    if data.draw(st.booleans()):
        blocks.pop(data.draw(st.integers(0, len(blocks) - 1)))
    if data.draw(st.booleans()):
        start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        blocks.append((start, tuple(data.draw(st.integers(0, n - a)) for n, a in zip(shape, start, strict=True))))
    count = torch.zeros(shape, dtype=torch.long)
    for start, size in blocks:
        count[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] += 1
    assert (tiling_problem(blocks, shape=shape) == "") == (bool((count == 1).all()) and bool(blocks))


def test_thousands_of_pieces_take_no_time() -> None:
    rows = 20_000
    blocks: list[Block] = [((row, 0), (1, 8)) for row in range(rows)]
    begin = time.process_time()
    assert tiling_problem(blocks, shape=(rows, 8)) == ""
    assert time.process_time() - begin < 2
    assert math.prod((rows, 8)) == sum(math.prod(size) for _, size in blocks)
