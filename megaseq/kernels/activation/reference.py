"""Activations in plain torch: the truth, and what runs in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
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
"""By the names that model families use."""

SAME: Mapping[str, str] = {"gelu_new": "gelu_tanh", "swish": "silu"}
"""Other names of one function, to the one that kernels know."""


def reference_activation(hidden: Tensor, *, name: str, gated: bool) -> Tensor:
    """`gated_activation` step by step; shapes as there."""
    if gated:
        gate, up = hidden.chunk(2, dim=-1)
        return FUNCTIONS[name](gate) * up
    return FUNCTIONS[name](hidden)
