"""What a rank has alive while it is built: its shares and one parameter whole, never the model."""

from __future__ import annotations

from typing import Any

import pytest

from megaseq.learner import SGD
from megaseq.train.engine import Engine
from megaseq.train.planning.live_memory import LiveMemory

from .harness import run_ranks
from .parity import Case, make_engine

LAYERS, DIM = 8, 128
SHAPE: dict[str, Any] = {
    "model_dim": DIM,
    **{f"{stack}.num_layers": LAYERS for stack in ("encoder", "decoder")},
    **{f"{stack}.layer.ffn.hidden_dim": 4 * DIM for stack in ("encoder", "decoder")},
}
LARGEST = 4 * 4 * DIM * DIM
"""Bytes of the largest parameter: one of a feed-forward block."""


def _build_rank(rank: int, parallel: dict[str, Any], precision: str) -> tuple[int, int, int]:
    """Returns bytes: of the whole model in fp32, at the end, and at most."""
    small = {"zero.bucket_elements": 1000, "zero.prefetch_elements": 1000, "zero.persistence_elements": 0}
    make_engine(Case(parallel=parallel | small), rank=rank)  # What the package allocates once.
    with LiveMemory() as memory:
        # Without moments, beside which a model that is whole for a moment would not show.
        case = Case(parallel=parallel | small, task=SHAPE, precision=precision, learner={"optimizer": SGD.Params()})
        engine: Engine = make_engine(case, rank=rank)
        return 4 * engine.num_parameters, memory.current, memory.peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_under_zero_3_a_rank_never_holds_the_model(precision: str) -> None:
    for whole, end, peak in run_ranks(_build_rank, world_size=4, arguments=({"data": 4, "zero.stage": 3}, precision)):
        # Of each element: what is computed with, gradient and master.
        shares = whole * (2.5 if precision == "bf16" else 3) / 4
        assert end == pytest.approx(shares, rel=0.02)
        # Until the masters are there, what was rounded is kept on the host.
        exact = whole / 4 if precision == "bf16" else 0
        assert peak < end + exact + 2 * LARGEST < 0.95 * whole
