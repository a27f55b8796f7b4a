"""Parameters that have a shape before they have memory."""

from __future__ import annotations

import torch
from torch import nn

from megaseq.layers.base import parameters_without_memory
from megaseq.layers.norm import RMSNorm
from megaseq.parallel.placeholder import is_placeholder, placeholder


def test_a_placeholder_has_a_shape_and_takes_memory_later() -> None:
    parameter = nn.Parameter(placeholder((3, 1000), dtype=torch.bfloat16))
    assert parameter.shape == (3, 1000) and parameter.untyped_storage().nbytes() == 2 and is_placeholder(parameter)
    parameter.data = torch.ones(3, 1000)
    assert parameter.untyped_storage().nbytes() == 12000 and not is_placeholder(parameter)


def test_layers_are_made_without_memory_in_the_context_alone() -> None:
    params = RMSNorm.Params(dim=8)
    with parameters_without_memory():
        empty = params.instantiate()
    assert all(is_placeholder(parameter) for parameter in empty.parameters())
    assert not any(is_placeholder(parameter) for parameter in params.instantiate().parameters())
