"""Predicted peak memory of a rank is what its step has alive at most, on layouts of several processes."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megaseq.layers.families import add_experts
from megaseq.layers.routing import Router
from megaseq.parallel.layout import Parallel, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.train.engine import Engine
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.live_memory import LiveMemory
from megaseq.train.planning.search import rank_memory, stage_plan
from megaseq.train.planning.subject import Subject
from tests.distributed.harness import run_ranks
from tests.train.planning.test_memory import full_batch, make_run

SIZES: dict[str, int] = {"dim": 64, "vocab": 400, "rows": 16, "length": 64}
LAYOUTS: list[dict[str, Any]] = [
    {"data": 2},
    {"data": 2, "zero.stage": 1, "zero.bucket_elements": 20_000},
    {"data": 2, "zero.stage": 2, "zero.bucket_elements": 20_000},
    {"data": 2, "zero.stage": 3, "zero.bucket_elements": 20_000, "zero.prefetch_elements": 20_000},
    {"context": 2},
    {"data": 2, "expert": 2},
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipe": 2, "pipeline.micro_batches": 4},
    {"pipe": 2, "pipeline.schedule": "gpipe", "pipeline.micro_batches": 4},
]
ZERO: dict[str, Any] = {"zero.bucket_elements": 20_000, "zero.prefetch_elements": 20_000}
V: dict[str, Any] = {"pipe": 2, "pipeline.schedule": "zero_bubble_v"}
MORE: list[dict[str, Any]] = [
    {"data": 2, "zero.overlap": False},
    {"data": 2, "zero.stage": 3, **ZERO, "experts": True},
    {"data": 2, "experts": True},
    {"context": 2, "context_method": "ulysses"},
    {**V, "pipeline.micro_batches": 4},
    {**V, "pipeline.micro_batches": 8},
    {**V, "pipeline.micro_batches": 4, "dim": 128},
    {"pipe": 2, "pipeline.schedule": "interleaved", "pipeline.micro_batches": 4},
    {"data": 2, "zero.stage": 2, **ZERO, "precision": "bf16"},
    {"data": 2, "zero.stage": 3, **ZERO, "precision": "bf16"},
    {"data": 2, "zero.stage": 3, **ZERO, "precision": "bf16", "dim": 128},
    {"data": 2, "zero.stage": 3, **ZERO, "zero.persistence_elements": 1000},
    {"data": 2, "accumulation": 4},
    {"data": 2, "accumulation": 4, "dim": 128},
    {"data": 2, "tensor": 2, "sequence": True, "zero.stage": 2, **ZERO},
    {"data": 2, "tensor": 2, "sequence": True, "zero.stage": 2, **ZERO, "dim": 128},
    {"tensor": 2, "pipe": 2, "pipeline.micro_batches": 4},
    {"tensor": 2, "pipe": 2, "sequence": True, "pipeline.micro_batches": 4},
]
OF_THE_RUN = ("experts", "dim", "precision", "accumulation")
"""Keys of the rows above that are no params of `parallel`."""


def world_size_of(row: dict[str, Any]) -> int:
    """Processes of a row's layout."""
    return math.prod(row.get(axis, 1) for axis in ("data", "tensor", "pipe", "context"))


def measure(rank: int, row: dict[str, Any], directory: str) -> tuple[int, int]:
    """(predicted, measured) bytes of this rank; `experts` in `row` gives the model some."""
    params, sizes = Parallel.Params(), SIZES | {"dim": row.get("dim", SIZES["dim"])}
    precision, accumulation = row.get("precision", "fp32"), row.get("accumulation", 1)
    p = make_run(Path(directory), **sizes)
    if row.get("expert") or row.get("experts"):
        for stack in (p.task.get("encoder"), p.task.get("decoder")):
            add_experts(stack, num_experts=4, router=Router.Params())
    for path, value in row.items():
        if path not in OF_THE_RUN:
            params.set(path, value)
    p.parallel = params
    layout = resolve_layout(params, world_size=world_size_of(row))
    candidate = Candidate(parallel=params, layout=layout, micro_batches=params.pipeline.micro_batches or accumulation)
    subject = Subject(p, precision=precision)
    plan = stage_plan(subject, candidate)
    predicted = rank_memory(subject, candidate=candidate, plan=plan, pipe_rank=layout.coordinates(rank)["pipe"])
    mesh = Mesh(layout, rank=rank)
    engine = Engine(
        p.task,
        learner_params=p.learner,
        seed=1,
        precision=precision,
        accumulation=accumulation,
        mesh=mesh,
        parallel=params,
    )
    whole = full_batch(rows=sizes["rows"], length=sizes["length"], vocab=sizes["vocab"])
    batch = whole.transform(lambda value: value[mesh.index("data") :: mesh.size("data")])
    with LiveMemory() as memory:
        memory.track([*engine.task.parameters(), *engine.task.buffers()])
        memory.track(piece.tensor for piece in engine.pieces())
        for step in range(3):
            engine.train_step(batch, step=step)
    return predicted.total + predicted.host, memory.peak


@pytest.mark.parametrize("row", [*LAYOUTS, *(pytest.param(row, marks=pytest.mark.slow) for row in MORE)], ids=str)
def test_prediction_is_within_a_tenth(row: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for predicted, measured in run_ranks(measure, world_size=world_size_of(row), arguments=(row, directory)):
            assert predicted == pytest.approx(measured, rel=0.1)
