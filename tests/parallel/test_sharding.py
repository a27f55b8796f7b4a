"""Which block of a parameter a rank holds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megaseq.base import ParamsError
from megaseq.layers.initializers import Constant
from megaseq.parallel.layout import Layout
from megaseq.parallel.sharding import DEFAULT_RULES, head_range, merged_rules, shard_spec, split_range
from megaseq.parallel.spec import ParameterSpec


class Grid:
    """A mesh without processes."""

    def __init__(self, layout: Layout, *, rank: int) -> None:
        self.layout, self.coordinates = layout, layout.coordinates(rank)

    def size(self, axis: str) -> int:
        return self.layout.size(axis)

    def index(self, axis: str) -> int:
        return self.coordinates[axis]


def spec(shape: tuple[int, ...], axes: tuple[str | None, ...], **options: object) -> ParameterSpec:
    return ParameterSpec(shape=shape, axes=axes, init=Constant.Params().instantiate(), **options)  # type: ignore[arg-type]


def local_parts(wanted: ParameterSpec, *, tensor: int) -> list[torch.Tensor]:
    """What each rank holds of a tensor that counts its elements."""
    whole = torch.arange(torch.Size(wanted.shape).numel()).view(wanted.shape)
    parts = []
    for rank in range(tensor):
        grid = Grid(Layout(tensor=tensor), rank=rank)
        shard = shard_spec(wanted, rules=DEFAULT_RULES, mesh=grid)  # type: ignore[arg-type]
        assert shard is not None
        local = torch.full(shard.local_shape, -1)
        for box in shard.boxes:
            box.of_local(local).copy_(box.of_global(whole))
        assert (local >= 0).all()
        parts.append(local)
    return parts


def test_a_vocabulary_may_be_divided_unevenly() -> None:
    parts = local_parts(spec((7, 2), ("vocab", "model")), tensor=3)
    assert [part.shape[0] for part in parts] == [2, 2, 3]
    assert torch.cat(parts).flatten().tolist() == list(range(14))


def test_fused_parts_are_divided_each_on_its_own() -> None:
    parts = local_parts(spec((8, 1), ("heads", "model"), parts=(4, 2, 2), granule=1), tensor=2)
    assert [part.flatten().tolist() for part in parts] == [[0, 1, 4, 6], [2, 3, 5, 7]]


def test_ranks_share_key_heads_where_there_are_fewer() -> None:
    """Four ranks, four query heads of width 2, two key heads."""
    wanted = spec((16, 1), ("heads", "model"), parts=(8, 4, 4), granule=2)
    parts = [part.flatten().tolist() for part in local_parts(wanted, tensor=4)]
    assert parts == [[0, 1, 8, 9, 12, 13], [2, 3, 8, 9, 12, 13], [4, 5, 10, 11, 14, 15], [6, 7, 10, 11, 14, 15]]
    shard = shard_spec(wanted, rules=DEFAULT_RULES, mesh=Grid(Layout(tensor=4), rank=1))  # type: ignore[arg-type]
    assert shard is not None and shard.shared == (False, True, True)


def test_the_second_dimension_is_divided_too() -> None:
    first, second = local_parts(spec((2, 4), ("model", "hidden")), tensor=2)
    assert first.tolist() == [[0, 1], [4, 5]] and second.tolist() == [[2, 3], [6, 7]]


def test_what_no_rule_divides_is_whole() -> None:
    grid = Grid(Layout(data=2, tensor=2), rank=3)
    assert shard_spec(spec((4,), ("model",)), rules=DEFAULT_RULES, mesh=grid) is None  # type: ignore[arg-type]
    rules = merged_rules({"vocab": "none"})
    assert shard_spec(spec((4, 2), ("vocab", "model")), rules=rules, mesh=grid) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "parts"), [(7, 3), (8, 4), (2, 5), (0, 2)])
def test_split_ranges_are_neighbours_of_like_length(length: int, parts: int) -> None:
    ranges = [split_range(length, parts=parts, index=index) for index in range(parts)]
    assert ranges[0][0] == 0 and ranges[-1][1] == length
    assert all(left[1] == right[0] for left, right in pairwise(ranges))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_heads_stay_whole() -> None:
    assert [head_range(12, granule=3, parts=2, index=i) for i in range(2)] == [(0, 6), (6, 12)]
    with pytest.raises(ValueError, match="2 ranks and 3 heads"):
        head_range(9, granule=3, parts=2, index=0)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ParamsError, match=r"parallel\.rules\.model: must be tensor, expert or none"):
        merged_rules({"model": "tensor"})
