"""Layers that are computed again train as ever on every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest

from .parity import check_layout

ROWS: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
    ("one-process", {}, 1, {}),
    ("dp2-zero2", {"data": 2, "zero.stage": 2}, 2, {"accumulation": 2}),
    ("dp2-zero3", {"data": 2, "zero.stage": 3, "zero.persistence_elements": 0}, 2, {}),
    ("tp2-sequence", {"tensor": 2, "sequence": True}, 2, {"varying": True}),
    ("pp2-1f1b", {"pipe": 2}, 2, {"accumulation": 4}),
    ("pp2-interleaved", {"pipe": 2, "pipeline.schedule": "interleaved"}, 2, {}),
    ("cp2-ring", {"context": 2}, 2, {}),
    ("cp2-ulysses", {"context": 2, "context_method": "ulysses"}, 2, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective", "offload"])
@pytest.mark.parametrize(("parallel", "world_size", "options"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_layout_trains_as_one_process_that_keeps_everything(
    parallel: dict[str, Any], world_size: int, options: dict[str, Any], mode: str
) -> None:
    check_layout(parallel, world_size=world_size, checkpointing=mode, **options)


@pytest.mark.slow
def test_zero_bubble_computes_attention_again() -> None:
    # Whole layers are refused: see the table of parallel.refusals.
    layout = {"pipe": 2, "pipeline.schedule": "zero_bubble_v"}
    check_layout(layout, world_size=2, checkpointing="selective", accumulation=4)


def test_stages_are_computed_again() -> None:
    check_layout({"pipe": 2}, world_size=2, checkpointing="full", steps=4, accumulation=4)
