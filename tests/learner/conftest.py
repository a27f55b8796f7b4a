"""Parameters and gradients of a tiny model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SHAPES = {
    "task.encoder.embedding.weight": (12, 6),
    "task.encoder.layers.0.ffn.up.weight": (6, 8),
    "task.encoder.layers.0.ffn.up.bias": (8,),
    "task.encoder.layers.0.norm.scale": (6,),
    "task.decoder.kernel": (2, 5, 7),
    "task.decoder.temperature": (),
}


def make_parameters(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make_gradients(seed: int) -> dict[str, Tensor]:
    return make_parameters(seed=10_000 + seed)


@pytest.fixture
def parameters() -> dict[str, Tensor]:
    return make_parameters()


@pytest.fixture
def gradients() -> Callable[[int], dict[str, Tensor]]:
    return make_gradients
