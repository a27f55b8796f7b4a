"""What ops share about torch: a typed door to autograd functions, a short way to an op, products without autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def apply_one(function: type[torch.autograd.Function], /, *arguments: Any) -> Tensor:
    """Applies a function that returns one tensor."""
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def apply_many(function: type[torch.autograd.Function], /, *arguments: Any) -> tuple[Tensor, ...]:
    """Applies a function that returns a tuple of tensors."""
    result: tuple[Tensor, ...] = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for `device`, of any type."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where products have the dtype of what is multiplied."""
    return torch.autocast(device.type, enabled=False) if autocast_on(device) else nullcontext()


def watched(tensor: Tensor) -> bool:
    """Whether something wants to see the operators that run on `tensor`: a trace, a mode, a transform, or a tensor that
    stands for others."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def direct(
    op: Callable[..., Any],
    *,
    run: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Returns a function that does what an operator does, past torch's dispatcher where nobody watches.

    The way through the dispatcher takes the host longer than a launch, and a GPU longer than a small kernel.

    Args:
        op: an operator of `torch.library.custom_op`, whose first argument is a tensor.
        run: the function that it was made of.
        keep: its `setup_context`, if it has a gradient.
        differentiate: its backward function; what it returns has no gradient itself.
    """
    function: Any = None
    if keep is not None and differentiate is not None:
        remember = keep

        # Not by a setup_context, for which torch looks at the signature at every call.
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            remember(ctx, arguments, output)
            return output

        once: Any = torch.autograd.function.once_differentiable
        methods = {"forward": staticmethod(forward), "backward": staticmethod(once(differentiate))}
        function = type(run.__name__, (torch.autograd.Function,), methods)

    def call(*arguments: Any) -> Any:
        if watched(arguments[0]):
            return op(*arguments)
        if function is None or not torch.is_grad_enabled():
            return run(*arguments)
        return function.apply(*arguments)

    return call
