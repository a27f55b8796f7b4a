"""Params of `parallel` that contradict each other: each problem says what would work."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megaseq.parallel.layout import Parallel

CONTRADICTIONS: list[tuple[dict[str, Any], str, list[str]]] = [
    (
        {"expert": 2, "data": 3},
        "expert: must divide data (3), but is 2. Experts live on data ranks: choose one of [1, 3], or set "
        "parallel.data=4.",
        ["data=4"],
    ),
    (
        {"expert": 8, "data": 2},
        "expert: must divide data (2), but is 8. Experts live on data ranks: choose one of [1, 2], or set "
        "parallel.data=8.",
        ["data=8"],
    ),
    (
        {"sequence": True},
        "sequence: must be false where tensor is 1, but is true. It shares the work of tensor ranks: set "
        "parallel.sequence=false, or parallel.tensor=2.",
        ["sequence=false", "tensor=2"],
    ),
    (
        {"pipe": 0},
        "pipe: must be at least 1, but is 0. Set parallel.pipe=1, which turns it off.",
        ["pipe=1"],
    ),
    (
        {"zero.offload_optimizer": "cpu"},
        "zero.offload_optimizer: must be none below stage 1, but is 'cpu'. Set parallel.zero.stage=1, or "
        "parallel.zero.offload_optimizer=none.",
        ["zero.stage=1", "zero.offload_optimizer=none"],
    ),
    (
        {"zero.offload_parameters": "cpu", "zero.stage": 2},
        "zero.offload_parameters: must be none below stage 3, but is 'cpu'. Set parallel.zero.stage=3, or "
        "parallel.zero.offload_parameters=none.",
        ["zero.stage=3", "zero.offload_parameters=none"],
    ),
    (
        {"zero.offload_optimizer": "nvme", "zero.stage": 1},
        "zero.nvme_path: must name a directory for nvme, but is empty. Set it to one on a local disk, or offload to "
        "cpu.",
        [],
    ),
]


@pytest.mark.parametrize(("given", "said", "remedies"), CONTRADICTIONS, ids=lambda value: str(value)[:30])
def test_each_contradiction_is_told_with_what_works(given: dict[str, Any], said: str, remedies: list[str]) -> None:
    def problems(*more: str) -> list[str]:
        params = Parallel.Params()
        for path, value in given.items():
            params.set(path, value)
        for assignment in more:
            path, _, text = assignment.partition("=")
            params.set_text(path, text)
        return [str(problem) for problem in params.check()]

    assert problems() == [said]
    assert re.findall(r"parallel\.([\w.]+=\w+)", said) == remedies
    for remedy in remedies:
        assert problems(remedy) == []
