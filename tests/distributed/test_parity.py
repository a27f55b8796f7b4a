"""The table of layouts: each trains as one process does. A row: (name, params of `parallel`, ranks, other options)."""

from __future__ import annotations

from typing import Any

import pytest

from .parity import check_layout

Row = tuple[str, dict[str, Any], int, dict[str, Any]]

ROWS: list[Row] = [
    ("accumulation4", {}, 1, {"accumulation": 4}),
    ("dp2", {"data": 2}, 2, {}),
    ("dp2-varying", {"data": 2}, 2, {"varying": True}),
    ("dp2-accumulation2", {"data": 2}, 2, {"accumulation": 2}),
    ("dp4", {"data": 4}, 4, {}),
    ("dp2-zero1", {"data": 2, "zero.stage": 1}, 2, {}),
    ("dp2-zero2", {"data": 2, "zero.stage": 2}, 2, {}),
    ("dp2-zero3", {"data": 2, "zero.stage": 3}, 2, {}),
    ("tp2", {"tensor": 2}, 2, {}),
    ("tp2-sequence", {"tensor": 2, "sequence": True}, 2, {}),
    ("tp2-sequence-varying", {"tensor": 2, "sequence": True}, 2, {"varying": True}),
    ("tp4", {"tensor": 4}, 4, {}),
    ("dp2-tp2", {"data": 2, "tensor": 2}, 4, {}),
    ("dp2-tp2-sequence", {"data": 2, "tensor": 2, "sequence": True}, 4, {}),
]


@pytest.mark.parametrize(("parallel", "world_size", "options"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_layout_trains_as_one_process(parallel: dict[str, Any], world_size: int, options: dict[str, Any]) -> None:
    check_layout(parallel, world_size=world_size, **options)
