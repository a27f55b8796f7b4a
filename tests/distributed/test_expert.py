"""Experts on several ranks give what they give in one process: outputs, gradients, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaseq.layers import MixtureOfExperts, RMSNorm, Router, bind, initialize
from megaseq.layers.sight import Sight
from megaseq.parallel.apply import apply
from megaseq.parallel.expert import all_to_all, install_experts
from megaseq.parallel.layout import Parallel, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.spec import shard_of

from .harness import run_ranks

D, E, ROWS, LENGTH = 8, 4, 4, 6


def params(**router: Any) -> MixtureOfExperts.Params:
    return MixtureOfExperts.Params(
        model_dim=D,
        hidden_dim=12,
        num_experts=E,
        norm=RMSNorm.Params(),
        residual="pre",
        dropout=0.1,
        activation_dropout=0.2,
        bias=True,
        gated=True,
        router=Router.Params(**router),
    )


def segments() -> torch.Tensor:
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    ids[1, 4:] = 0
    # A row of pads: its rank may have nothing to send.
    ids[3] = 0
    return ids


def run(layer: MixtureOfExperts, *, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    layer.context.auxiliary = []
    y = layer(x, sight=Sight(segment_ids=ids, positions=torch.zeros_like(ids), causal=False))
    weights = torch.randn(ROWS, LENGTH, D, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    rows = slice(layer.context.row_start, None, layer.context.row_stride)
    loss = (y * weights[rows]).sum() + layer.context.auxiliary[0].loss_sum
    loss.backward()
    return y.detach(), loss.detach()


def compare(rank: int, layout_params: dict[str, Any], router: dict[str, Any]) -> None:
    parallel = Parallel.Params(**layout_params)
    mesh = Mesh(resolve_layout(parallel, world_size=dist.get_world_size()), rank=rank)
    x = torch.randn(ROWS, LENGTH, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, part = params(**router).instantiate(), params(**router).instantiate()
    apply(part, mesh=mesh, params=parallel, prefix="moe")
    install_experts(part, mesh=mesh)
    for layer in (whole, part):
        initialize(layer, seed=1, prefix="moe")
        bind(layer, seed=1, prefix="moe")
        layer.double()
    x_whole, x_part = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, loss = run(whole, x=x_whole, ids=segments())
    index, size = mesh.index("data"), mesh.size("data")
    part.context.row_start, part.context.row_stride = index, size
    got, part_loss = run(part, x=x_part[index::size], ids=segments()[index::size])
    torch.testing.assert_close(got, expected[index::size], rtol=1e-10, atol=1e-10)
    dist.all_reduce(part_loss, group=mesh.group("data"))
    torch.testing.assert_close(part_loss, loss)
    assert x_part.grad is not None and x_whole.grad is not None
    torch.testing.assert_close(x_part.grad[index::size], x_whole.grad[index::size], rtol=1e-9, atol=1e-10)
    for (name, one), other in zip(part.named_parameters(), whole.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        shard = shard_of(one)
        expert = shard is not None and "expert" in shard.axes
        assert expert == (name.split(".")[0] in ("gate", "up", "down") and mesh.size("expert") > 1)
        axis = "expert_data" if expert else "data"
        if mesh.group(axis) is not None:
            dist.all_reduce(one.grad, group=mesh.group(axis))
        wanted = other.grad if shard is None else torch.cat([box.of_global(other.grad) for box in shard.boxes])
        torch.testing.assert_close(one.grad, wanted, rtol=1e-9, atol=1e-10, msg=name)


METHODS: list[dict[str, Any]] = [
    {"method": "top2", "jitter": 0.1},
    {"method": "top1", "capacity_factor": 1.0},
    {"method": "expert_choice", "capacity_factor": 2.0},
]


@pytest.mark.parametrize("router", METHODS, ids=[str(router["method"]) for router in METHODS])
@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ({"data": 2, "expert": 2}, 2),
        ({"data": 4, "expert": 2}, 4),
        ({"data": 2, "tensor": 2}, 4),
        ({"data": 2, "expert": 2, "tensor": 2}, 4),
        ({"data": 4, "expert": 4}, 4),
    ],
    ids=["ep2", "ep2-dp2", "dp2-tp2", "ep2-tp2", "ep4"],
)
def test_experts_on_ranks_equal_one_process(layout: dict[str, int], world_size: int, router: dict[str, Any]) -> None:
    run_ranks(compare, world_size=world_size, arguments=(layout, router))


def exchange(rank: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    sizes = [[0, 2, 1], [3, 0, 0], [0, 0, 0]]
    send, receive = sizes[rank], [row[rank] for row in sizes]
    x = torch.full((sum(send), 2), float(rank + 1), requires_grad=True)
    got = all_to_all(x, send=send, receive=receive, group=group)
    assert got[:, 0].tolist() == [source + 1.0 for source in range(3) for _ in range(receive[source])]
    (gradient,) = torch.autograd.grad((got * (rank + 10)).sum(), x)
    assert gradient[:, 0].tolist() == [target + 10.0 for target in range(3) for _ in range(send[target])]


def test_uneven_and_empty_exchanges() -> None:
    run_ranks(exchange, world_size=3)
