"""Layers that exchange something with other ranks, computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaseq.layers.base import bind, initialize
from megaseq.parallel.apply import apply
from megaseq.parallel.context import install_context, shard_batch
from megaseq.parallel.expert import install_experts
from megaseq.parallel.layout import Parallel, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.train.activation_checkpointing import ActivationCheckpointing, Mode, checkpoint_activations

from .harness import run_ranks
from .parity import local_rows, packed_batch, task_params
from .test_expert import EXPERTS


def compare(rank: int, layout: dict[str, Any], mode: Mode) -> None:
    parallel = Parallel.Params(**layout)
    mesh = Mesh(resolve_layout(parallel, world_size=dist.get_world_size()), rank=rank)
    params = task_params()
    for path, value in EXPERTS.items():
        params.set(path, value, origin="the test")
    batch = shard_batch(local_rows(packed_batch(0), mesh=mesh), mesh=mesh)
    gradients = []
    for settings in (ActivationCheckpointing.Params(), ActivationCheckpointing.Params(mode=mode)):
        task = params.instantiate()
        apply(task, mesh=mesh, params=parallel)
        install_experts(task, mesh=mesh)
        install_context(task, mesh=mesh, method=parallel.context_method)
        initialize(task, seed=2)
        bind(task, seed=2)
        checkpoint_activations(task, params=settings)
        output = task.compute_loss(batch)
        output.loss_sum.backward()
        gradients.append({name: parameter.grad for name, parameter in task.named_parameters()})
        gradients[-1]["loss"] = output.loss_sum.detach()
        assert task.context.auxiliary is None
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize(
    "layout",
    [{"data": 2, "expert": 2}, {"context": 2}, {"context": 2, "context_method": "ulysses"}],
    ids=["ep2", "cp2-ring", "cp2-ulysses"],
)
def test_computed_again_it_is_the_same(layout: dict[str, Any], mode: Mode) -> None:
    run_ranks(compare, world_size=2, arguments=(layout, mode))
