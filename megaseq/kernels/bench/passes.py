"""Forward and backward pass of an op as one call to be timed, and beside those of its reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megaseq.kernels.bench_case import Comparison

Outputs = Tensor | Sequence[Tensor]
Op = Callable[[Sequence[Tensor]], Outputs]
"""From its input tensors to its outputs; those that are differentiable are differentiated."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""What rounding alone may cost, in units of the largest magnitude."""


def both_passes(op: Op, *, inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Calls `op`, then differentiates what it gave by all inputs that want it; returns outputs and gradients."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def run() -> list[Tensor]:
        outputs = _listed(op(inputs))
        # Any numbers do for the gradient that comes in; these are there.
        differentiable = [output for output in outputs if output.requires_grad]
        if not differentiable:
            return outputs
        incoming = [output.detach() for output in differentiable]
        return [*outputs, *torch.autograd.grad(differentiable, wanted, incoming)]

    return run


def compare_passes(
    op: Op, *, reference: Op, inputs: Sequence[Tensor], tolerance: float | None = None
) -> dict[str, Comparison]:
    """Outputs and gradients of `op` beside those of `reference`, which gets the same numbers in float64.

    The gradients that come in are numbers from -1 to 1, the same for both.

    Args:
        op: what is to be proven.
        reference: what it must compute.
        inputs: tensors of any kind; gradients are compared for those that want them.
        tolerance: None: that of the type of the first one.
    """
    exact = [
        tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for tensor in inputs
    ]
    allowed = TOLERANCE[inputs[0].dtype] if tolerance is None else tolerance
    found, expected = _listed(op(inputs)), _listed(reference(exact))
    if len(found) != len(expected):
        raise ValueError(f"the op gave {len(found)} outputs, the reference {len(expected)}")
    incoming = [
        torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float64).view(output.shape)
        for output in found
    ]
    pairs = {f"output {index}": pair for index, pair in enumerate(zip(found, expected, strict=True))}
    graded = [index for index, output in enumerate(found) if output.requires_grad]
    if graded:
        gradients = []
        for outputs, leaves in ((found, inputs), (expected, exact)):
            wanted = [tensor for tensor in leaves if tensor.requires_grad]
            # Rounded as the op gets them, for the reference too.
            coming = [incoming[index].to(found[index].dtype).to(outputs[index].dtype) for index in graded]
            gradients.append(torch.autograd.grad([outputs[index] for index in graded], wanted, coming))
        pairs |= {f"gradient {index}": pair for index, pair in enumerate(zip(*gradients, strict=True))}
    return {name: Comparison(ours, theirs, allowed) for name, (ours, theirs) in pairs.items()}


def normal(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0, trained: bool = True) -> Tensor:
    """Normal numbers, the same at every call."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(trained)


def _listed(outputs: Outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


class Named(Protocol):
    """A case with a name; several may share it."""

    @property
    def name(self) -> str:
        """Which it is."""


Case = TypeVar("Case", bound=Named)


def in_types(
    cases: Iterable[Case], *, others_of: Collection[str], first: torch.dtype = torch.bfloat16
) -> list[tuple[Case, torch.dtype]]:
    """Every case with the type `first`, and those whose names are in `others_of` with the two others too."""
    types = (first, *(dtype for dtype in TOLERANCE if dtype is not first))
    return [(case, dtype) for case in cases for dtype in types if dtype is first or case.name in others_of]


def short(dtype: torch.dtype) -> str:
    """What names of cases call a type."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
