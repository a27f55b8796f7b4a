"""Rows that ranks share give what whole rows give: losses and gradients of a model, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaseq.base import NestedMap, ParamsError
from megaseq.layers import Alibi, BucketedBias, LearnedPositions, MixtureOfExperts, Router, bind, initialize
from megaseq.layers.rotary import Rotary
from megaseq.parallel.apply import apply
from megaseq.parallel.context import install_context, padded_length, shard_batch
from megaseq.parallel.layout import Parallel, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.spec import shard_of
from megaseq.tasks.translation import Translation

from .harness import run_ranks
from .parity import packed_batch, task_params


def model(kind: str) -> Translation.Params:
    """A model in which everything that attention can have is somewhere."""
    params = task_params()
    sides = [params.encoder, params.decoder]
    if kind == "t5":
        params.encoder.position_bias = BucketedBias.Params(num_buckets=8, max_distance=12)
        params.decoder.layer.self_attention.position_bias = BucketedBias.Params(num_buckets=8, max_distance=12)
    elif kind == "alibi":
        for side in sides:
            side.position_bias = Alibi.Params()
            side.positions = LearnedPositions.Params(max_positions=16)
    elif kind == "rotary":
        for side in sides:
            side.positions = None
            side.layer.self_attention.rotary = Rotary.Params()
            side.layer.self_attention.num_key_value_heads = 2
            side.layer.self_attention.window = 5
            side.layer.self_attention.soft_cap = 3.0
    elif kind == "experts":
        for side in sides:
            side.set("layers.1.ffn", MixtureOfExperts.Params(num_experts=4, hidden_dim=24), origin="test")
    return params


def batch_of(kind: str) -> NestedMap:
    batch = packed_batch(0, rows=4)
    if kind == "odd":
        # One segment a row and lengths that do not divide: everything is derived.
        for name, length in (("source", 13), ("target", 7)):
            side = batch[name].transform(lambda tensor, length=length: tensor[:, :length])
            del side.segment_ids, side.positions
            batch[name] = side
        batch.target.weights = torch.ones(4, 7)
    return batch


def compare(rank: int, layout_params: dict[str, Any], kind: str) -> None:
    parallel = Parallel.Params(**layout_params)
    mesh = Mesh(resolve_layout(parallel, world_size=dist.get_world_size()), rank=rank)
    whole, part = (model(kind).instantiate() for _ in range(2))
    apply(part, mesh=mesh, params=parallel)
    install_context(part, mesh=mesh, method=parallel.context_method)
    for task in (whole, part):
        initialize(task, seed=2)
        bind(task, seed=2).row_start = 3
        task.double()
    batch = batch_of(kind)
    expected = whole.compute_loss(batch)
    expected.loss_sum.backward()
    shared = shard_batch(batch, mesh=mesh)
    assert shared.target.ids.shape[1] * mesh.size("context") == padded_length(
        batch.target.ids.shape[1], ranks=mesh.size("context")
    )
    got = part.compute_loss(shared)
    got.loss_sum.backward()
    group = mesh.group("context")
    for name in expected.metrics:
        pair = torch.stack([value.double() for value in got.metrics[name]])
        dist.all_reduce(pair, group=group)
        torch.testing.assert_close(pair, torch.stack([v.double() for v in expected.metrics[name]]), msg=name)
    loss = got.loss_sum.detach()
    dist.all_reduce(loss, group=group)
    torch.testing.assert_close(loss, expected.loss_sum.detach())
    for (name, one), other in zip(part.named_parameters(), whole.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        dist.all_reduce(one.grad, group=group)
        shard = shard_of(one)
        wanted = other.grad if shard is None else torch.cat([box.of_global(other.grad) for box in shard.boxes])
        torch.testing.assert_close(one.grad, wanted, rtol=1e-8, atol=1e-9, msg=name)
    # A batch that is not shared is computed whole, by each rank for itself.
    torch.testing.assert_close(part.compute_loss(batch).loss_sum.detach(), expected.loss_sum.detach())


RING, ULYSSES = {"context": 2}, {"context": 2, "context_method": "ulysses"}
ROWS: list[tuple[dict[str, Any], int, str]] = [
    (RING, 2, "plain"),
    (ULYSSES, 2, "plain"),
    (RING, 2, "t5"),
    (ULYSSES, 2, "t5"),
    (RING, 2, "alibi"),
    (RING, 2, "rotary"),
    (ULYSSES, 2, "rotary"),
    (RING, 2, "odd"),
    (ULYSSES, 2, "odd"),
    ({"context": 3}, 3, "plain"),
    ({"context": 4, "context_method": "ulysses"}, 4, "plain"),
    ({"context": 2, "tensor": 2}, 4, "t5"),
    ({"context": 2, "tensor": 2, "sequence": True, "context_method": "ulysses"}, 4, "plain"),
    (RING, 2, "experts"),
]


@pytest.mark.parametrize(
    ("layout", "world_size", "kind"),
    ROWS,
    ids=["-".join([f"{key}={value}" for key, value in row[0].items()] + [row[2]]) for row in ROWS],
)
def test_shared_rows_equal_whole_rows(layout: dict[str, Any], world_size: int, kind: str) -> None:
    run_ranks(compare, world_size=world_size, arguments=(layout, kind))


def refuse(rank: int) -> None:
    parallel = Parallel.Params(context=2)
    mesh = Mesh(resolve_layout(parallel, world_size=2), rank=rank)
    params = task_params()
    router = Router.Params(capacity_factor=1.25)
    params.set("decoder.layers.1.ffn", MixtureOfExperts.Params(num_experts=4, hidden_dim=8, router=router), origin="t")
    with pytest.raises(ParamsError, match=r"router.capacity_factor: must be null .* where context ranks share rows"):
        install_context(params.instantiate(), mesh=mesh, method="ring")
    params = task_params()
    params.encoder.layer.self_attention.num_key_value_heads = 1
    with pytest.raises(ParamsError, match=r"parallel.context: must divide the 1 heads .*context_method=ring"):
        install_context(params.instantiate(), mesh=mesh, method="ulysses")


def test_what_cannot_share_rows_is_refused() -> None:
    run_ranks(refuse, world_size=2)
    task = task_params().instantiate()
    batch = packed_batch(0)
    batch.source.row_segment_ids = batch.source.segment_ids
    with pytest.raises(ParamsError, match="must be absent where no ranks share rows"):
        task.compute_loss(batch)
