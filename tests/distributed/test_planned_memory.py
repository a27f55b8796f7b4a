"""Predicted peak memory of a rank is what its step has alive at most, on layouts of several processes."""

from __future__ import annotations

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
MORE: list[dict[str, Any]] = [
    {"data": 2, "zero.overlap": False},
    {"data": 2, "zero.stage": 3, "zero.bucket_elements": 20_000, "zero.prefetch_elements": 20_000, "experts": True},
    {"data": 2, "experts": True},
    {"context": 2, "context_method": "ulysses"},
]


def measure(rank: int, parallel: dict[str, Any], directory: str) -> tuple[int, int]:
    """(predicted, measured) bytes of this rank; `experts` in `parallel` gives the model some."""
    params = Parallel.Params()
    p = make_run(Path(directory), **SIZES)
    if parallel.get("expert") or parallel.get("experts"):
        for stack in (p.task.get("encoder"), p.task.get("decoder")):
            add_experts(stack, num_experts=4, router=Router.Params())
    for path, value in parallel.items():
        if path != "experts":
            params.set(path, value)
    p.parallel = params
    layout = resolve_layout(params, world_size=2)
    micro_batches = params.pipeline.micro_batches or 1
    candidate = Candidate(parallel=params, layout=layout, micro_batches=micro_batches)
    subject = Subject(p, precision="fp32")
    plan = stage_plan(subject, candidate)
    predicted = rank_memory(subject, candidate=candidate, plan=plan, pipe_rank=layout.coordinates(rank)["pipe"])
    mesh = Mesh(layout, rank=rank)
    engine = Engine(p.task, learner_params=p.learner, seed=1, precision="fp32", mesh=mesh, parallel=params)
    whole = full_batch(rows=SIZES["rows"], length=SIZES["length"], vocab=SIZES["vocab"])
    batch = whole.transform(lambda value: value[mesh.index("data") :: mesh.size("data")])
    with LiveMemory() as memory:
        memory.track([*engine.task.parameters(), *engine.task.buffers()])
        memory.track(piece.tensor for piece in engine.pieces())
        for step in range(3):
            engine.train_step(batch, step=step)
    return predicted.total + predicted.host, memory.peak


@pytest.mark.parametrize(
    "parallel", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in MORE)], ids=str
)
def test_prediction_is_within_a_tenth(parallel: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for predicted, measured in run_ranks(measure, world_size=2, arguments=(parallel, directory)):
            assert predicted == pytest.approx(measured, rel=0.1)
