"""Builds what one rank of a large run holds, on torch's fake process group and without values, and checks it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from megaseq.base.errors import TrainingError, must
from megaseq.layers.base import bind
from megaseq.parallel.layout import Layout, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.pipeline import StagePlan
from megaseq.parallel.refusals import check_layout
from megaseq.parallel.spec import ParameterSpec, shard_of
from megaseq.tasks.base import BaseTask
from megaseq.train.model import take_part
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.hardware import Hardware
from megaseq.train.planning.memory import RankMemory, gib
from megaseq.train.planning.search import rank_memory, search, stage_plan
from megaseq.train.planning.subject import Subject
from megaseq.train.planning.trace import meta_task


def dry_run(subject: Subject, *, hardware: Hardware, rank: int) -> Iterator[str]:
    """Yields lines about one rank; the layout is that of the run's params, or where these set none the planner's best.

    Raises:
        ParamsError: there is no such rank, or the layout does not work.
        TrainingError: what was built does not fit the plan.
    """
    if not 0 <= rank < hardware.devices:
        raise must("--rank", f"be from 0 to {hardware.devices - 1}", rank, "Choose a rank of the run")
    candidate = _candidate(subject, hardware=hardware)
    layout = candidate.layout
    place = layout.coordinates(rank)
    yield f"layout {layout} on {hardware.devices} devices: {candidate.overrides()}"
    axes = [axis for axis in ("data", "pipe", "context", "tensor", "expert") if layout.size(axis) > 1] or ["data"]
    yield f"rank {rank} is " + ", ".join(f"{axis} {index}" for axis, index in place.items() if axis in axes)
    with fake_processes(layout, rank=rank, timeout_seconds=candidate.parallel.timeout_seconds) as mesh:
        task = meta_task(subject.task)
        plan = take_part(task, mesh=mesh, parallel=candidate.parallel)
        bind(task, seed=0)
        problems = wrong_shapes(task)
        if problems:
            raise TrainingError("\n".join(problems))
        if plan is not None:
            yield from (
                line for line, stage in zip(plan.lines(), plan.stages, strict=True) if stage.rank == place["pipe"]
            )
        held = sum(parameter.numel() for parameter in task.parameters())
        shared = sum(1 for parameter in task.parameters() if shard_of(parameter) is not None)
        count = len(list(task.parameters()))
        whole = subject.num_parameters
        yield f"{held:,} of {whole:,} parameters in {count} tensors, {shared} of them a block; shapes are right"
        memory = _memory(subject, candidate=candidate, plan=plan, pipe_rank=place["pipe"])
        expected = _bytes(task, subject=subject)
        stage = candidate.parallel.zero.stage
        if stage < 3 and abs(memory.parameters - expected) > 0.01 * expected:
            raise TrainingError(
                f"plan: must count the bytes of the weights that the rank holds ({expected}), but counts "
                f"{memory.parameters}. Report this model and layout."
            )
    yield (
        f"memory {gib(memory.total)} of {gib(hardware.usable_bytes)}: weights {gib(memory.parameters)}, gradients "
        f"{gib(memory.gradients)}, state {gib(memory.optimizer)}, activations {gib(memory.activations)}"
    )
    if memory.total > hardware.usable_bytes:
        yield "This does not fit."


def _candidate(subject: Subject, *, hardware: Hardware) -> Candidate:
    """Returns the layout that the params ask for, or the best one if they ask for none."""
    parallel = subject.params.parallel
    asked = parallel.data or any(getattr(parallel, axis) > 1 for axis in ("pipe", "context", "tensor", "expert"))
    if not asked:
        findings = search(subject, hardware=hardware)
        chosen = (findings.fitting or findings.too_large)[:1]
        if not chosen:
            raise must("--devices", "have a layout for this model", hardware.devices, "Use another number")
        return chosen[0].candidate
    layout = resolve_layout(parallel, world_size=hardware.devices)
    check_layout(parallel, layout=layout, facts=subject.facts)
    accumulation = subject.params.train.accumulation
    micro_batches = parallel.pipeline.micro_batches or max(accumulation, layout.pipe)
    mode = subject.params.train.activation_checkpointing.mode
    return Candidate(parallel=parallel, layout=layout, micro_batches=micro_batches, checkpointing=mode)


@contextlib.contextmanager
def fake_processes(layout: Layout, *, rank: int, timeout_seconds: float = 1800.0) -> Iterator[Mesh]:
    """Gives the mesh of one rank among others that do not exist: their collectives return at once.

    Raises:
        TrainingError: this process is part of a real run.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise TrainingError("plan: must run in a process of its own, but is in one of a run. Use another process.")
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield Mesh(layout, rank=rank, timeout_seconds=timeout_seconds)
    finally:
        dist.destroy_process_group()


def wrong_shapes(task: BaseTask) -> list[str]:
    """Returns a line for each parameter whose tensor is not the block that its shard says."""
    found: list[str] = []
    for name, parameter in task.named_parameters():
        spec: ParameterSpec = parameter.spec  # type: ignore[attr-defined]
        shard = shard_of(parameter)
        expected = spec.shape if shard is None else shard.local_shape
        if tuple(parameter.shape) != tuple(expected):
            found.append(
                f"task.{name}: must have shape {expected}, but is {tuple(parameter.shape)}. Report this layout."
            )
    return found


def _bytes(task: BaseTask, *, subject: Subject) -> int:
    return sum(
        parameter.numel() * subject.memory.numbers.computed(subject.weights[name])
        for name, parameter in task.named_parameters()
    )


def _memory(subject: Subject, *, candidate: Candidate, plan: StagePlan | None, pipe_rank: int) -> RankMemory:
    return rank_memory(subject, candidate=candidate, plan=plan or stage_plan(subject, candidate), pipe_rank=pipe_rank)
