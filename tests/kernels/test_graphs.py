"""Every op in host memory as part of a graph: compiled, for any sizes too, and exported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaseq.kernels import (
    AttentionMask,
    CrossEntropy,
    DropoutMask,
    RelativeBias,
    attention,
    attention_with_log_sum,
    dropout,
    dropout_add,
    linear_cross_entropy,
)
from megaseq.kernels.activation import gated_activation
from megaseq.kernels.cross_entropy.chunked_op import chunked_cross_entropy_op
from megaseq.kernels.dropout.op import dropout_op
from megaseq.kernels.grouped_linear import grouped_linear
from megaseq.kernels.norm import NormKind, add_norm
from megaseq.kernels.rotary import rotate
from tests.kernels.graphs import check_graphs, check_op

Op = Callable[..., Tensor | tuple[Tensor, ...]]
KEY = (1, 20, 300)
LAYER, RMS = NormKind(1e-5, centred=True), NormKind(1e-6)
HEAD = CrossEntropy(label_smoothing=0.1, z_loss=0.01, scale=0.5, soft_cap=9.0)


def _packed(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    places = torch.arange(query.shape[1]).expand(2, -1)
    ids = torch.where(places < 4, 1, 2) * (places < 9)
    mask = AttentionMask(query_segment_ids=ids, key_segment_ids=ids, causal=True)
    return attention(
        query,
        key=key,
        value=value,
        mask=mask,
        bias=RelativeBias(table=table, first=-4),
        dropout=DropoutMask(0.3, KEY),
    )


def _log_sum(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return attention_with_log_sum(query, key=key, value=value, mask=AttentionMask(window=3), soft_cap=4.0)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key=key, value=value, mask=AttentionMask(causal=True))


def _loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    places = torch.arange(hidden.shape[0])
    labels = torch.where(places % 4 == 3, -100, places % 7)
    weights = torch.where(places % 4 == 3, 0.0, 0.5)
    return linear_cross_entropy(hidden, weight=weight, bias=bias, labels=labels, weights=weights, settings=HEAD)


def _rotated(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1] * 3.0).view(1, -1, 1, 3).repeat(1, 1, 1, 2)
    return rotate(x, cosines=angles.cos(), sines=angles.sin())


HEADS = [(2, 11, 4, 8), (2, 11, 2, 8), (2, 11, 2, 8)]
OPS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "packed": (_packed, [*HEADS, (4, 9)]),
    "log_sum": (_log_sum, HEADS),
    "causal": (_causal, HEADS),
    "cross_entropy": (_loss, [(11, 6), (7, 6), (7,)]),
    "dropout": (lambda x: dropout(x, rate=0.4, key=KEY, offset=torch.tensor([3, 99])), [(2, 11)]),
    "dropout_add": (lambda x, y: dropout_add(x, residual=y, rate=0.4, key=KEY, offset=5), [(11, 3), (11, 3)]),
    "layer_norm": (
        lambda x, r, w, b: add_norm(x, residual=r, weight=w, bias=b, kind=LAYER),
        [(11, 6)] * 2 + [(6,)] * 2,
    ),
    "rms_norm": (lambda x, r, w: add_norm(x, residual=r, weight=w, kind=RMS), [(11, 6), (11, 6), (6,)]),
    "activation": (lambda x: gated_activation(x, name="gelu"), [(11, 6)]),
    "rotary": (_rotated, [(2, 11, 3, 8)]),
    "grouped_linear": (lambda x, w: grouped_linear(x, weight=w, counts=[4, x.shape[0] - 4]), [(11, 6), (2, 5, 6)]),
}


def _inputs(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("name", OPS)
def test_is_one_graph(name: str) -> None:
    op, shapes = OPS[name]
    check_graphs(op, *_inputs(shapes))


@pytest.mark.parametrize("name", ["packed", "causal", "dropout_add", "rms_norm"])
def test_the_references_are_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASEQ_KERNELS", "reference")
    test_is_one_graph(name)


def test_the_reference_of_the_loss_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes over padding too, which changes the order of its sums and not their values."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "cross_entropy=reference")
    inputs = _inputs(OPS["cross_entropy"][1])
    torch._dynamo.reset()
    results = []
    for run in (_loss, torch.compile(_loss, fullgraph=True, backend="aot_eager")):
        sums = run(*inputs)
        results.append([*(each.detach() for each in sums), *torch.autograd.grad(sums[0], inputs)])
    torch.testing.assert_close(results[1], results[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in OPS if name != "dropout"])
def test_one_graph_serves_all_lengths(name: str) -> None:
    op, shapes = OPS[name]
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (11, 12, 17):
        inputs = _inputs([tuple(length if size == 11 else size for size in shape) for shape in shapes])
        found, expected = compiled(*inputs), op(*inputs)
        torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_operators_of_host_memory_are_sound() -> None:
    x, runs = torch.randn(4, 6, requires_grad=True), torch.tensor([3, 1 << 40])
    check_op(dropout_op, x, None, None, 2, -77, 1 << 30, 1.5)
    check_op(dropout_op, x, torch.randn(4, 6, dtype=torch.float64, requires_grad=True), runs, 0, 77, 1 << 30, 1.5)
    weight, bias = torch.randn(9, 6, requires_grad=True), torch.randn(9, requires_grad=True)
    labels, weights = torch.tensor([1, 2, -100, 8]), torch.tensor([1.0, 0.5, 0.0, 1.0])
    numbers = [0.1, 0.01, 0.5, 0.0]
    check_op(chunked_cross_entropy_op, x, weight, bias, labels, weights, numbers, 2, [True] * 3)
    check_op(chunked_cross_entropy_op, x.detach(), weight, None, labels, weights, numbers, 0, [False, True, False])


def test_under_autocast_a_graph_has_the_loss_and_gradients_of_no_graph() -> None:
    def loss(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return _loss(*inputs)

    hidden, weight, bias = inputs = _inputs(OPS["cross_entropy"][1])
    torch._dynamo.reset()
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        sums = run(*inputs)
        results.append([*(each.detach() for each in sums), *torch.autograd.grad(sums[0], [hidden, weight, bias])])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch._dynamo.reset()


def test_tensors_without_memory_have_a_loss_of_the_right_kind() -> None:
    hidden, weight, bias = (tensor.to("meta") for tensor in _inputs(OPS["cross_entropy"][1]))
    labels = torch.zeros(11, dtype=torch.int64, device="meta")
    sums = linear_cross_entropy(hidden, weight=weight, bias=bias, labels=labels, weights=labels.float(), settings=HEAD)
    assert all(each.is_meta and each.shape == () and each.dtype is torch.float32 for each in sums)
