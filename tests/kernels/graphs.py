"""Checks that an op can be part of a graph: compiled, exported, checked by torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Outputs = Tensor | tuple[Tensor, ...]


class _Module(nn.Module):
    def __init__(self, function: Callable[..., Outputs]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Outputs:
        return self.function(*inputs)


def _with_gradients(function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> list[Tensor]:
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    graded = [output for output in outputs if output.requires_grad]
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    total = torch.stack([output.float().square().sum() for output in graded]).sum()
    return [output.detach() for output in outputs] + list(torch.autograd.grad(total, leaves))


def check_graphs(function: Callable[..., Outputs], *inputs: Tensor) -> None:
    """Asserts that `function` gives the same outputs and gradients compiled as one graph, and outputs exported."""
    torch._dynamo.reset()
    expected = _with_gradients(function, inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = _with_gradients(compiled, inputs)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)
    exported = torch.export.export(_Module(function), tuple(inputs)).module()(*inputs)
    outputs = (exported,) if isinstance(exported, Tensor) else exported
    for have, want in zip(outputs, expected, strict=False):
        torch.testing.assert_close(have.detach(), want, rtol=0, atol=0, equal_nan=True)
    torch._dynamo.reset()


def check_op(op: Any, *arguments: object) -> None:
    """Asserts that torch finds the op's schema, fake and gradient right."""
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference in units of the length of `expected`; infinite if a number is not finite."""
    difference = found.double().cpu() - expected.double().cpu()
    error = float(difference.norm()) / max(float(expected.double().norm()), 1e-30)
    return error if difference.isfinite().all() else float("inf")
