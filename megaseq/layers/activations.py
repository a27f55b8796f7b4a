"""Activations of feed-forward blocks by the names that model families use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from megaseq.kernels.activation.reference import FUNCTIONS

ActivationName = Literal[
    "relu", "gelu", "gelu_tanh", "gelu_new", "silu", "swish", "sigmoid", "tanh", "relu2", "identity"
]


def activation(name: ActivationName) -> Callable[[Tensor], Tensor]:
    """Returns the function called `name`, element by element over a tensor of any shape."""
    return FUNCTIONS[name]
