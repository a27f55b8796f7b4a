"""Activations of feed-forward blocks by the names that model families use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ActivationName = Literal[
    "relu", "gelu", "gelu_tanh", "gelu_new", "silu", "swish", "sigmoid", "tanh", "relu2", "identity"
]


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,  # T5's and GPT-2's name of the same function
    "silu": functional.silu,
    "swish": functional.silu,  # Marian's name of the same function
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu2": _relu2,  # So et al. 2021, Primer
    "identity": _identity,
}


def activation(name: ActivationName) -> Callable[[Tensor], Tensor]:
    """Returns the function called `name`, element by element over a tensor of any shape."""
    return _FUNCTIONS[name]
