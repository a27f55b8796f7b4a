"""A typed door to `torch.autograd.Function.apply`, which torch leaves without annotations."""

from __future__ import annotations

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
