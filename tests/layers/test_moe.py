"""The mixture of experts against a loop over tokens; capacity, losses, padding, decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megaseq.base import NestedMap, ParamsError
from megaseq.layers import FeedForward, LayerNorm, MixtureOfExperts, Router, bind, initialize
from megaseq.layers.sight import Sight
from megaseq.tasks.translation import Translation
from tests.distributed.parity import packed_batch, task_params

D, F, E = 6, 5, 4


def make(*, gated: bool = False, dropout: float = 0.0, **router: Any) -> MixtureOfExperts:
    params = MixtureOfExperts.Params(
        model_dim=D,
        hidden_dim=F,
        num_experts=E,
        norm=LayerNorm.Params(),
        residual="pre",
        dropout=dropout,
        activation_dropout=dropout,
        bias=True,
        activation="gelu",
        gated=gated,
        router=Router.Params(**router),
    )
    layer: MixtureOfExperts = params.instantiate()
    initialize(layer, seed=3, prefix="moe")
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    layer.router.weight.data.mul_(3.0)
    bind(layer, seed=3, prefix="moe")
    return layer.double()


def sight_of(segment_ids: Tensor) -> Sight:
    return Sight(segment_ids=segment_ids, positions=torch.zeros_like(segment_ids), causal=False)


def segments(*, rows: int = 3, length: int = 7) -> Tensor:
    ids = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        ids[row, length - row :] = 0
    return ids


def stream(*, rows: int = 3, length: int = 7) -> Tensor:
    return torch.randn(rows, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loop(layer: MixtureOfExperts, x: Tensor, *, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Token by token, expert by expert, as the papers say."""
    router, p = layer.router, layer.router.params
    out = x.clone()
    balance = z_loss = 0.0
    dropped = wanted = 0
    for row in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if ids[row, t]]
        entered = {t: layer.norm(x[row, t]) for t in real}
        logits = {t: router.weight @ entered[t] for t in real}
        probabilities = {t: logits[t].softmax(0) for t in real}
        pairs: list[tuple[int, int, Tensor]] = []
        if p.method == "expert_choice":
            assert p.capacity_factor is not None
            room = math.ceil(p.capacity_factor * len(real) / E)
            for e in range(E):
                ranked = sorted(real, key=lambda t: -float(probabilities[t][e]))
                pairs += [(t, e, probabilities[t][e]) for t in ranked[:room]]
            wanted += len(pairs)
        else:
            number = 2 if p.method == "top2" else 1
            room = 10**9
            if p.capacity_factor is not None and layer.training:
                room = math.ceil(p.capacity_factor * number * len(real) / E)
            taken = [0] * E
            for choice in range(number):
                for t in real:
                    best = probabilities[t].argsort(descending=True)[:number]
                    e = int(best[choice])
                    gate = probabilities[t][e]
                    if number == 2:
                        gate = gate / probabilities[t][best].sum()
                    wanted += 1
                    taken[e] += 1
                    if taken[e] <= room:
                        pairs.append((t, e, gate))
                    else:
                        dropped += 1
        for t, e, gate in pairs:
            hidden = functional.gelu(layer.up.weight[e] @ entered[t] + layer.up.bias[e])  # type: ignore[index]
            if layer.gate is not None:
                hidden = functional.gelu(layer.gate.weight[e] @ entered[t] + layer.gate.bias[e]) * (  # type: ignore[index]
                    layer.up.weight[e] @ entered[t] + layer.up.bias[e]  # type: ignore[index]
                )
            out[row, t] = out[row, t] + gate * (layer.down.weight[e] @ hidden + layer.down.bias[e])  # type: ignore[index]
        for e in range(E):
            share = sum(int(probabilities[t].argmax()) == e for t in real) / len(real)
            mean = sum(float(probabilities[t][e].detach()) for t in real) / len(real)
            balance += len(real) * E * share * mean
        z_loss += sum(float(logits[t].logsumexp(0).detach()) ** 2 for t in real)
    return out, {"balance_loss": balance, "router_z_loss": z_loss, "dropped": dropped, "wanted": wanted}


CASES: list[dict[str, Any]] = [
    {"method": "top1"},
    {"method": "top2"},
    {"method": "top2", "gated": True},
    {"method": "top1", "capacity_factor": 1.0},
    {"method": "top2", "capacity_factor": 0.75},
    {"method": "expert_choice", "capacity_factor": 2.0},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
@pytest.mark.parametrize("training", [True, False])
def test_equals_loop(case: dict[str, Any], training: bool) -> None:
    layer = make(**case).train(training)
    x, ids = stream().requires_grad_(), segments()
    layer.context.auxiliary = []
    y = layer(x, sight=sight_of(ids))
    expected, sums = loop(layer, x, ids=ids)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    parameters = [x, *layer.parameters()]
    got = torch.autograd.grad(y, parameters, upstream, allow_unused=True)
    want = torch.autograd.grad(expected, parameters, upstream, allow_unused=True)
    for name, one, other in zip(["x", *dict(layer.named_parameters())], got, want, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=name)
    (auxiliary,) = layer.context.auxiliary
    metrics = auxiliary.metrics
    torch.testing.assert_close(float(metrics["router_z_loss"][0]), sums["router_z_loss"])
    assert [float(v) for v in metrics["experts_dropped"]] == [sums["dropped"], sums["wanted"]]
    loss = 0.001 * sums["router_z_loss"]
    if case["method"] != "expert_choice":
        torch.testing.assert_close(float(metrics["balance_loss"][0]), sums["balance_loss"])
        loss += 0.01 * sums["balance_loss"]
    torch.testing.assert_close(float(auxiliary.loss_sum.detach()), loss)
    assert int(metrics["router_z_loss"][1]) == int((ids > 0).sum())
    if case.get("capacity_factor") == 0.75 and training:
        assert sums["dropped"] > 0


@pytest.mark.parametrize("case", CASES[:3], ids=["top1", "top2", "gated"])
def test_gradcheck(case: dict[str, Any]) -> None:
    layer = make(**case, balance_loss=0.1, z_loss=0.1)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        layer.context.auxiliary = []
        y = layer(x, sight=sight_of(segments(rows=2, length=3)))
        return y, layer.context.auxiliary[0].loss_sum

    assert torch.autograd.gradcheck(call, (stream(rows=2, length=3).requires_grad_(),))


def test_even_load_has_balance_loss_one() -> None:
    layer = make(method="top1")
    logits = (torch.eye(E, dtype=torch.float64) * 50).repeat(1, 2, 1)
    real = torch.ones(1, 2 * E, dtype=torch.bool)
    load = layer.router._load(logits.argmax(-1), real=real, dtype=logits.dtype)
    _, metrics = layer.router._losses(logits, probabilities=logits.softmax(-1), real=real, load=load)
    assert float(metrics["balance_loss"][0] / metrics["balance_loss"][1]) == pytest.approx(1.0)
    assert float(metrics["experts_load"][0] / metrics["experts_load"][1]) == pytest.approx(1.0)


def test_padding_changes_nothing() -> None:
    for case in CASES:
        layer = make(**case)
        x = stream()
        short = layer(x[:, :5], sight=sight_of(torch.ones(3, 5, dtype=torch.long)))
        ids = torch.ones(3, 7, dtype=torch.long)
        ids[:, 5:] = 0
        padded = layer(x, sight=sight_of(ids))
        torch.testing.assert_close(padded[:, :5], short, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(padded[:, 5:], x[:, 5:], rtol=0, atol=0)


def test_rows_alone_give_what_they_give_together() -> None:
    """Capacity, balance loss, jitter and both dropouts do not depend on what else is in the batch."""
    for case in (*CASES, {"method": "top1", "jitter": 0.3, "dropout": 0.4}):
        layer = make(**case)
        x, ids = stream(), segments()
        layer.context.auxiliary = []
        layer.context.row_start = 0
        together = layer(x, sight=sight_of(ids))
        pieces = []
        for row in range(3):
            layer.context.row_start = row
            pieces.append(layer(x[row : row + 1], sight=sight_of(ids[row : row + 1])))
        torch.testing.assert_close(torch.cat(pieces), together, rtol=1e-12, atol=1e-12)
        whole, *parts = (loss.loss_sum for loss in layer.context.auxiliary)
        torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_jitter_moves_the_router_in_training_alone() -> None:
    layer, calm = make(method="top1", jitter=0.5), make(method="top1")
    x = stream()
    assert not torch.equal(layer(x), calm(x))
    torch.testing.assert_close(layer.eval()(x), calm.eval()(x))


def mixed() -> Translation.Params:
    params = task_params()
    expert = MixtureOfExperts.Params(num_experts=E, hidden_dim=24)
    params.set("encoder.layers.1.ffn", expert, origin="test")
    params.set("decoder.layers.1.ffn", expert.replace(gated=True), origin="test")
    return params


def test_every_second_layer_of_a_model() -> None:
    task = mixed().instantiate()
    initialize(task, seed=0)
    bind(task, seed=0)
    assert isinstance(task.encoder.layers[0].ffn, FeedForward)
    assert isinstance(task.encoder.layers[1].ffn, MixtureOfExperts)
    batch = packed_batch(0)
    output = task.compute_loss(batch)
    output.loss_sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
    nll = float(output.metrics["nll"][0])
    factors = {"balance_loss": 0.01, "router_z_loss": 0.001}
    auxiliary = sum(factor * float(output.metrics[name][0]) for name, factor in factors.items())
    assert auxiliary > 0
    # Without smoothing and auxiliary losses it is the negative log likelihood.
    assert task.context.auxiliary is None
    plain = mixed()
    plain.set("label_smoothing", 0.0, origin="test")
    twin = plain.instantiate()
    initialize(twin, seed=0)
    bind(twin, seed=0)
    assert float(twin.compute_loss(batch).loss_sum) == pytest.approx(nll + auxiliary, rel=1e-5)


def test_decoding_token_by_token_equals_the_whole() -> None:
    task = mixed().instantiate()
    initialize(task, seed=0)
    bind(task, seed=0)
    task.eval()
    ids = torch.randint(4, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        memory = task.encode(NestedMap(ids=ids))
        whole = task.logits(task.decode_hidden(NestedMap(ids=ids), memory=memory))
        state = task.prefill(NestedMap(ids=ids))
        for place in range(ids.shape[1]):
            logits, state = task.step(state, tokens=ids[:, place])
            torch.testing.assert_close(logits, whole[:, place], rtol=1e-4, atol=1e-4)


def test_experts_are_initialised_one_by_one() -> None:
    layer = make(method="top1").float()
    initialize(layer, seed=3, prefix="moe")
    first, second = layer.up.weight[0], layer.up.weight[1]
    assert not torch.equal(first, second)
    edge = math.sqrt(6 / (D + F))
    assert float(layer.up.weight.abs().max()) <= edge
    assert float(layer.up.weight.abs().max()) > 0.8 * edge


def test_refusals() -> None:
    params = task_params()
    ffn = MixtureOfExperts.Params(
        num_experts=E, hidden_dim=24, router=Router.Params(method="expert_choice", capacity_factor=2.0)
    )
    params.set("decoder.layers.1.ffn", ffn, origin="test")
    with pytest.raises(ParamsError, match=r"ffn.router.method: must be top1 or top2 in a decoder"):
        params.instantiate()
    problems = "\n".join(
        str(problem) for problem in Router.Params(method="expert_choice", model_dim=1, num_experts=4).check()
    )
    assert "capacity_factor: must be a number with expert_choice" in problems
