"""Activations at known points, and the names that mean the same."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from megaseq.layers.activations import ActivationName, activation

X = torch.linspace(-4, 4, 33)

FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "relu2": lambda x: max(x, 0.0) ** 2,
    "identity": lambda x: x,
}
FORMULAS["gelu_new"], FORMULAS["swish"] = FORMULAS["gelu_tanh"], FORMULAS["silu"]


@pytest.mark.parametrize("name", get_args(ActivationName))
def test_activation_is_its_formula(name: ActivationName) -> None:
    expected = torch.tensor([FORMULAS[name](float(x)) for x in X])
    torch.testing.assert_close(activation(name)(X), expected, rtol=1e-5, atol=1e-6)
