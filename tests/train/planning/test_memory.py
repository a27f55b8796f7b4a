"""Predicted peak memory is what a step has alive at most, counted tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaseq.base import NestedMap
from megaseq.data import Packing
from megaseq.layers.embedding import Embedding
from megaseq.layers.families import stacks
from megaseq.layers.positions import SinusoidalPositions
from megaseq.learner import MovingAverage
from megaseq.parallel.layout import Layout, Parallel
from megaseq.train.engine import Engine
from megaseq.train.experiment import Run
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.live_memory import LiveMemory
from megaseq.train.planning.subject import Subject
from megaseq.train.planning.trace import Shape

from ..tiny import run_params


def make_run(
    directory: Path,
    *,
    dim: int,
    vocab: int,
    rows: int,
    length: int,
    mode: str = "none",
    shares_matrices: bool = True,
    **stack: Any,
) -> Run.Params:
    p = run_params(directory)
    sides = stacks(num_layers=2, num_heads=4, hidden_dim=4 * dim, dropout=0.1, **stack)
    for side in sides.values():
        side.positions = SinusoidalPositions.Params()
    p.task = p.task.replace(model_dim=dim, source_vocab_size=vocab, target_vocab_size=vocab, **sides)
    if not shares_matrices:
        p.task.target_embedding, p.task.head = Embedding.Params(), Embedding.Params()
    p.train_input.batching = Packing.Params(rows=rows, source_length=length)
    p.train.activation_checkpointing.mode = mode
    return p


def full_batch(*, rows: int, length: int, vocab: int, seed: int = 0) -> NestedMap:
    """A batch without padding: attention is one fused op, as on a GPU."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, vocab, (rows, length), generator=draw) for _ in range(3)]
    target = NestedMap(ids=ids[1], labels=ids[2], weights=torch.ones(rows, length))
    return NestedMap(source=NestedMap(ids=ids[0]), target=target)


def measured_peak(engine: Engine, batch: NestedMap, *, steps: int = 2) -> int:
    """Peak of live bytes in a few steps, without those of the batch."""
    with LiveMemory() as memory:
        memory.track([*engine.task.parameters(), *engine.task.buffers()])
        memory.track(piece.tensor for piece in engine.pieces())
        for step in range(steps):
            engine.train_step(batch, step=step)
    return memory.peak


CASES: list[dict[str, Any]] = [
    {"dim": 64, "vocab": 200, "rows": 16, "length": 64},
    {"dim": 64, "vocab": 200, "rows": 16, "length": 64, "accumulation": 2},
    {"dim": 64, "vocab": 200, "rows": 16, "length": 64, "mode": "full"},
    {"dim": 64, "vocab": 200, "rows": 16, "length": 64, "mode": "full", "accumulation": 4},
    {"dim": 64, "vocab": 200, "rows": 8, "length": 64, "mode": "selective", "attention_dropout": 0.1},
    {"dim": 128, "vocab": 2000, "rows": 4, "length": 32, "accumulation": 2},
    {"dim": 128, "vocab": 2000, "rows": 4, "length": 32, "residual": "post", "ema": True},
    {"dim": 64, "vocab": 4000, "rows": 4, "length": 32, "shares_matrices": False},
    {"dim": 128, "vocab": 2000, "rows": 8, "length": 32, "precision": "bf16"},
    {"dim": 128, "vocab": 2000, "rows": 8, "length": 32, "precision": "bf16", "accumulation": 2},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{value}" for value in case.values()))
def test_one_process(case: dict[str, Any], tmp_path: Path) -> None:
    case = dict(case)
    accumulation, precision = case.pop("accumulation", 1), case.pop("precision", "fp32")
    ema = case.pop("ema", False)
    p = make_run(tmp_path, **case)
    p.learner.ema = MovingAverage.Params() if ema else None
    mode = case.get("mode", "none")
    subject = Subject(p, precision=precision)
    shape = Shape(rows=case["rows"] // accumulation, source_length=case["length"], target_length=case["length"])
    candidate = Candidate(parallel=Parallel.Params(), layout=Layout(), micro_batches=accumulation, checkpointing=mode)
    predicted = subject.memory.rank(
        [subject.units],
        candidate=candidate,
        traces=subject.traces(tensor=1, mode=mode, shape=shape),
        shape=shape,
    )
    engine = Engine(
        p.task,
        learner_params=p.learner,
        seed=1,
        precision=precision,
        accumulation=accumulation,
        activation_checkpointing=p.train.activation_checkpointing,
    )
    batch = full_batch(rows=case["rows"], length=case["length"], vocab=case["vocab"])
    assert predicted.total == pytest.approx(measured_peak(engine, batch), rel=0.1)
