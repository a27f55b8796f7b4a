"""Sums of gradients in buckets, and what of them counts in the norm."""

from __future__ import annotations

import torch

from megaseq.parallel.gradients import (
    buckets_of,
    counted_boxes,
    counted_views,
    names_of_all_stages,
    squared_norm_reduction,
    sum_over,
)
from megaseq.parallel.layout import Layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.spec import Box, Shard
from tests.distributed.harness import run_ranks


def test_buckets_hold_as_many_elements_of_one_type() -> None:
    sizes = [3, 3, 9, 1, 1]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(1, dtype=torch.bfloat16)]
    buckets = list(buckets_of(tensors, bucket_elements=6))
    assert [[tensor.numel() for tensor in bucket] for bucket in buckets] == [[3, 3], [9], [1, 1], [1]]
    assert [tensor for bucket in buckets for tensor in bucket] == tensors


def test_one_process_counts_everything() -> None:
    parameters = {"a": torch.zeros(2, 3)}
    assert counted_boxes(parameters, mesh=None) == {"a": None}
    gradient = torch.ones(2, 3)
    assert counted_views({"a": None})("a", gradient)[0] is gradient
    assert squared_norm_reduction(None) is None
    assert names_of_all_stages(["a"], mesh=None) == ["a"]


def _sum_rank(rank: int) -> list[torch.Tensor]:
    mesh = Mesh(Layout(data=2), rank=rank)
    whole = torch.full((2, 3), 1.0 + rank)
    strided = torch.full((3, 2), 10.0 * (1 + rank)).t()
    sum_over([whole, strided, whole.new_full((4,), 5.0)], group=mesh.group("data"), bucket_elements=7)
    assert torch.equal(whole, torch.full((2, 3), 3.0)) and torch.equal(strided, torch.full((2, 3), 30.0))
    return []


def test_tensors_are_summed_in_place() -> None:
    run_ranks(_sum_rank, world_size=2)


def _counted_rank(rank: int) -> dict[str, float]:
    mesh = Mesh(Layout(tensor=2), rank=rank)
    whole, divided, partly = torch.ones(4), torch.ones(2, 3), torch.ones(4)
    box = Box(start=(2 * rank, 0), local_start=(0, 0), size=(2, 3))
    divided.shard = Shard(axes=("tensor",), boxes=(box,), local_shape=(2, 3))  # type: ignore[attr-defined]
    # As a query and a key of which the ranks share the key.
    boxes = (
        Box(start=(2 * rank,), local_start=(0,), size=(2,)),
        Box(start=(4,), local_start=(2,), size=(2,)),
    )
    partly.shard = Shard(axes=("tensor",), boxes=boxes, local_shape=(4,))  # type: ignore[attr-defined]
    parameters = {"whole": whole, "divided": divided, "partly": partly}
    views = counted_views(counted_boxes(parameters, mesh=mesh))
    reduce = squared_norm_reduction(mesh)
    assert reduce is not None
    totals = {}
    for name, parameter in parameters.items():
        own = sum((view.square().sum() for view in views(name, parameter)), torch.zeros(()))
        totals[name] = float(reduce(own))
    return totals


def test_what_several_ranks_hold_counts_once() -> None:
    for totals in run_ranks(_counted_rank, world_size=2):
        assert totals == {"whole": 4.0, "divided": 12.0, "partly": 6.0}
