"""Builds the task of a process: all of it, or the part that the layout gives to this rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megaseq.layers.base import StepContext, bind, initialize, parameters_without_memory
from megaseq.parallel.apply import apply
from megaseq.parallel.context import install_context
from megaseq.parallel.expert import install_experts
from megaseq.parallel.layout import Parallel
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.pipeline import StagePlan, keep_tensors, make_plan
from megaseq.parallel.spec import Pipelined
from megaseq.tasks.base import BaseTask


@dataclass(frozen=True)
class BuiltTask:
    """An initialised task on its device."""

    task: BaseTask
    context: StepContext
    """Of all its layers; the engine moves it on."""
    num_parameters: int
    """Elements of all parameters of the whole model, whatever of it is here."""
    plan: StagePlan | None = None
    """Of a pipeline's stages; None: the model is in one piece."""
    is_empty: bool = False
    """Whether parameters have a shape but no memory yet, and `first_values` gives them values one at a time."""


def build_task(
    params: BaseTask.Params,
    *,
    seed: int,
    device: torch.device,
    mesh: Mesh | None = None,
    parallel: Parallel.Params | None = None,
) -> BuiltTask:
    """Builds the task, takes this rank's part of it, and gives the parameters their first values.

    Parameters have no memory before it is known what of them lies here, so a rank needs no room for what others hold.
    Under ZeRO stage 3, which divides them further, they stay without it: the updater fills one at a time.

    Args:
        params: complete.
        seed: of the run.
        device: where the task computes.
        mesh: None is one process.
        parallel: of the run; None with no mesh.

    Raises:
        ParamsError: the task cannot be divided so.
    """
    with parameters_without_memory():
        task: BaseTask = params.instantiate()
    num_parameters = sum(parameter.numel() for parameter in task.parameters())
    plan: StagePlan | None = None
    if mesh is not None and parallel is not None:
        plan = take_part(task, mesh=mesh, parallel=parallel)
    is_empty = parallel is not None and parallel.zero.stage == 3
    for module in task.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if not is_empty:
        for parameter in task.parameters():
            parameter.data = torch.empty(parameter.shape, device=device)
        initialize(task, seed=seed, prefix="task")
    context = bind(task, seed=seed, prefix="task")
    return BuiltTask(task=task, context=context, num_parameters=num_parameters, plan=plan, is_empty=is_empty)


def take_part(task: BaseTask, *, mesh: Mesh, parallel: Parallel.Params) -> StagePlan | None:
    """Leaves of a whole task what this rank computes; returns the stages, None without a pipeline.

    Raises:
        ParamsError: the task cannot be divided so.
    """
    apply(task, mesh=mesh, params=parallel)
    install_experts(task, mesh=mesh)
    install_context(task, mesh=mesh, method=parallel.context_method)
    return _cut_stages(task, mesh=mesh, parallel=parallel)


def _cut_stages(task: BaseTask, *, mesh: Mesh, parallel: Parallel.Params) -> StagePlan | None:
    """Leaves of the task what this rank's pipeline stages hold; parameters keep the names of the whole model."""
    if mesh.size("pipe") == 1:
        return None
    units = task.units() if isinstance(task, Pipelined) else ()
    plan = make_plan(units, params=parallel.pipeline, ranks=mesh.size("pipe"))
    keep_tensors(task, names=plan.tensors_of(mesh.index("pipe")))
    return plan
