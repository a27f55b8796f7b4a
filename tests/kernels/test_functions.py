"""The short way to an operator: the same results, and the long way for whoever watches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaseq.kernels.functions import direct

calls: list[str] = []


def _run(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    calls.append("run")
    return x * factor, x.sum(dim=0)


_double = torch.library.custom_op("megaseq_test::scaled_and_summed", _run, mutates_args=())


@_double.register_fake
def _(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.factor = inputs[1]


def _differentiate(ctx: Any, of_scaled: Tensor, of_sum: Tensor | None) -> tuple[Tensor, None]:
    assert of_sum is None
    return of_scaled * ctx.factor, None


_double.register_autograd(_differentiate, setup_context=_keep)
scaled = direct(_double, run=_run, keep=_keep, differentiate=_differentiate)


class Seen(TorchDispatchMode):
    """Writes down which operators pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, requires_grad=True)


@pytest.mark.parametrize("function", [_double, scaled])
def test_both_ways_give_the_same(function: Any, x: Tensor) -> None:
    output, total = function(x, 3.0)
    assert torch.equal(output, x * 3) and torch.equal(total, x.sum(dim=0)) and not total.requires_grad
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.full_like(x, 3.0))
    with torch.no_grad():
        assert not function(x, 3.0)[0].requires_grad


def test_a_mode_sees_the_operator(x: Tensor) -> None:
    with Seen() as seen:
        scaled(x, 3.0)
    assert any("scaled_and_summed" in name for name in seen.names)


def test_a_graph_holds_the_operator(x: Tensor) -> None:
    exported = torch.export.export(_Module(), (x.detach(),))
    assert "scaled_and_summed" in str(exported.graph)
    compiled = torch.compile(_Module(), fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], torch.full_like(x, 2.0))


def test_a_gradient_of_the_gradient_is_an_error(x: Tensor) -> None:
    (gradient,) = torch.autograd.grad(scaled(x, 3.0)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class _Module(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = scaled(x, 2.0)[0]
        return output
