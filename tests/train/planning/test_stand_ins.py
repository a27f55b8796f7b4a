"""Experts without values: they allocate what they would, and count for what a token uses of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaseq.layers import MixtureOfExperts
from megaseq.train.planning.stand_ins import install_stand_ins
from megaseq.train.planning.trace import meta_task, units_of
from tests.distributed.parity import task_params


@pytest.mark.parametrize(
    ("router", "choices"),
    [
        ({"method": "top1"}, 1.0),
        ({"method": "top2"}, 2.0),
        ({"method": "top2", "capacity_factor": 0.5}, 1.0),
        ({"method": "expert_choice", "capacity_factor": 2.0}, 2.0),
    ],
    ids=["top1", "top2", "limited", "expert_choice"],
)
def test_experts_without_values(router: dict[str, Any], choices: float) -> None:
    params = task_params()
    dense = {unit.name: unit.source_flops for unit in units_of(meta_task(params))}
    ffn = MixtureOfExperts.Params(num_experts=4, hidden_dim=64)
    for name, value in router.items():
        ffn.router.set(name, value, origin="the test")
    params.set("encoder.layers.1.ffn", ffn, origin="the test")
    task: Any = meta_task(params)
    install_stand_ins(task)
    task.train()
    layer = task.encoder.layers[1].ffn
    x = torch.empty(4, 16, 32, device="meta", requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape and y.is_meta
    y.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is not None for parameter in layer.parameters())
    flops = {unit.name: unit.source_flops for unit in units_of(task)}
    assert flops["encoder.layers.0"] == dense["encoder.layers.0"]
    # The matrices of the block it replaces, as often as a token goes through one, and the router.
    biases = 2 * 4 * (64 + 32)
    extra = (choices - 1.0) * 2 * 2 * 64 * 32 + 2 * 4 * 32 + biases
    assert flops["encoder.layers.1"] == pytest.approx(dense["encoder.layers.1"] + extra)
