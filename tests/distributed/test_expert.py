"""Experts on several ranks give what they give in one process: outputs, gradients, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaseq.base import NestedMap
from megaseq.decode import BeamSearch
from megaseq.layers import MixtureOfExperts, RMSNorm, Router, bind, initialize
from megaseq.layers.sight import Sight
from megaseq.parallel.apply import apply
from megaseq.parallel.expert import all_to_all, install_experts, same_tokens
from megaseq.parallel.layout import Parallel, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.spec import shard_of
from megaseq.train.evaluation import evaluate
from megaseq.train.spread import Spread

from .harness import run_ranks
from .parity import Case, local_rows, make_engine, packed_batch

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


EXPERTS: dict[str, Any] = {
    f"{stack}.layers.1.ffn.{name}": value
    for stack in ("encoder", "decoder")
    for name, value in {"cls": "megaseq.layers.moe.MixtureOfExperts", "num_experts": 4, "hidden_dim": 32}.items()
}


def decode(rank: int, layout: dict[str, Any]) -> tuple[list[Any], dict[str, float]]:
    """Evaluates and decodes, sources of unequal lengths, on every rank; one process where the layout is empty."""
    engine = make_engine(Case(parallel=layout, task=EXPERTS), rank=rank)
    source = packed_batch(0).source
    source = NestedMap(ids=source.ids.clamp_min(4), segment_ids=(source.positions >= 0).long())
    for row, length in enumerate([3, 16, 5, 9, 1, 12, 2, 7]):
        source.ids[row, length:] = source.segment_ids[row, length:] = 0
    search = BeamSearch.Params(num_hyps_per_beam=3, target_sos_id=1, target_eos_id=2, target_seq_len=12)
    spread = Spread(mesh=engine.mesh)
    batches = [local_rows(packed_batch(step), mesh=engine.mesh) for step in range(2)]
    with engine.evaluating() as task:
        means = evaluate(task, batches=batches, to_device=engine.to_local, spread=spread)
        own = spread.deal([0, 1, 2, 3])
        with same_tokens(task):
            found = []
            for group in own:
                if group is not None:
                    rows = source.transform(lambda tensor, group=group: tensor[group * 2 : group * 2 + 2])
                    found += [(group, [[(h.ids, h.score) for h in best] for best in task.decode(rows, search=search)])]
    return found, means


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ({"data": 2, "expert": 2}, 2),
        ({"data": 4, "expert": 2}, 4),
        ({"context": 2}, 2),
        ({"context": 2, "context_method": "ulysses", "tensor": 2}, 4),
        ({"data": 2, "expert": 2, "zero.stage": 3, "zero.persistence_elements": 0}, 2),
        ({"pipe": 2}, 2),
        ({"pipe": 2, "data": 2, "expert": 2}, 4),
    ],
    ids=["ep2", "ep2-dp2", "cp2", "cp2-tp2", "ep2-zero3", "pp2", "ep2-pp2"],
)
def test_evaluation_and_decoding_equal_one_process(layout: dict[str, Any], world_size: int) -> None:
    texts, expected = run_ranks(decode, world_size=1, arguments=({},))[0]
    results = run_ranks(decode, world_size=world_size, arguments=(layout,))
    found: dict[int, Any] = {}
    for own, means in results:
        assert means == pytest.approx(expected, rel=1e-5)
        for group, hypotheses in own:
            found.setdefault(group, hypotheses)
            assert found[group] == hypotheses, "ranks that decode the same texts differ"
    assert found.keys() == dict(texts).keys()
    for group, best in texts:
        for got, wanted in zip(found[group], best, strict=True):
            assert [ids for ids, _ in got] == [ids for ids, _ in wanted]
            assert [score for _, score in got] == pytest.approx([score for _, score in wanted], rel=1e-4)
