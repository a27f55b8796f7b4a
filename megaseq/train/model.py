"""Builds the task of a process: all of it, or the part that the layout gives to this rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megaseq.layers.base import StepContext, bind, initialize
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


def build_task(
    params: BaseTask.Params,
    *,
    seed: int,
    device: torch.device,
    mesh: Mesh | None = None,
    parallel: Parallel.Params | None = None,
) -> BuiltTask:
    """Builds the task, takes this rank's part of it, and gives the parameters their first values.

    Memory of parameters is not touched before `initialize`, which fills one at a time, so a rank needs no room for
    what others hold.

    Args:
        params: complete.
        seed: of the run.
        device: where the task computes.
        mesh: None is one process.
        parallel: of the run; None with no mesh.

    Raises:
        ParamsError: the task cannot be divided so.
    """
    task: BaseTask = params.instantiate()
    num_parameters = sum(parameter.numel() for parameter in task.parameters())
    plan: StagePlan | None = None
    if mesh is not None and parallel is not None:
        plan = take_part(task, mesh=mesh, parallel=parallel)
    task.to(device)
    initialize(task, seed=seed, prefix="task")
    context = bind(task, seed=seed, prefix="task")
    return BuiltTask(task=task, context=context, num_parameters=num_parameters, plan=plan)


def take_part(task: BaseTask, *, mesh: Mesh, parallel: Parallel.Params) -> StagePlan | None:
    """Leaves of a whole task what this rank computes; returns the stages, None without a pipeline.

    Raises:
        ParamsError: the task cannot be divided so.
    """
    _divide(task, mesh=mesh, parallel=parallel)
    return _cut_stages(task, mesh=mesh, parallel=parallel)


def _divide(task: BaseTask, *, mesh: Mesh, parallel: Parallel.Params) -> None:
    """Divides parameters over tensor and expert ranks, and installs what layers exchange."""
    apply(task, mesh=mesh, params=parallel)
    install_experts(task, mesh=mesh)
    install_context(task, mesh=mesh, method=parallel.context_method)


def _cut_stages(task: BaseTask, *, mesh: Mesh, parallel: Parallel.Params) -> StagePlan | None:
    """Leaves of the task what this rank's pipeline stages hold; parameters keep the names of the whole model."""
    if mesh.size("pipe") == 1:
        return None
    units = task.units() if isinstance(task, Pipelined) else ()
    plan = make_plan(units, params=parallel.pipeline, ranks=mesh.size("pipe"))
    keep_tensors(task, names=plan.tensors_of(mesh.index("pipe")))
    return plan
