"""The matrix of moves: every layout goes on from what any other saved, with the losses of the run that stayed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megaseq.checkpoint import Checkpointer, Ranks, inspect
from megaseq.learner import MovingAverage
from megaseq.train.engine import Engine

from .harness import run_ranks
from .parity import Case, gather_parameters, local_rows, make_engine, packed_batch
from .test_parity import EXPERTS, KEY_HEADS

LAYOUTS: dict[str, Mapping[str, Any]] = {
    "one": {},
    "dp4-zero1": {"data": 4, "zero.stage": 1},
    "dp4-zero3": {"data": 4, "zero.stage": 3},
    "dp2-tp2-zero2": {"data": 2, "tensor": 2, "zero.stage": 2},
    "tp2-pp2": {"tensor": 2, "pipe": 2},
    "dp2-pp2-zero1": {"data": 2, "pipe": 2, "zero.stage": 1},
    "pp4": {"pipe": 4},
}
"""By name: what is set of `parallel`. All but the first have four ranks."""

WIDE: dict[str, Any] = {"source_vocab_size": 500, "target_vocab_size": 500}
"""Embeddings that are larger than a share."""
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp4-sequence-shared-key-heads": ({"tensor": 4, "sequence": True}, {"task": KEY_HEADS}),
    "dp2-tp2-zero3-shared-key-heads": ({"data": 2, "tensor": 2, "zero.stage": 3}, {"task": KEY_HEADS}),
    "ep2-dp2": ({"data": 4, "expert": 2}, {"task": EXPERTS}),
    "ep2-tp2": ({"data": 2, "expert": 2, "tensor": 2}, {"task": EXPERTS}),
    "ep2-dp2-zero1": ({"data": 4, "expert": 2, "zero.stage": 1}, {"task": EXPERTS}),
    "ep2-dp2-zero3": ({"data": 4, "expert": 2, "zero.stage": 3}, {"task": EXPERTS}),
    "ep2-pp2-zero2": ({"data": 2, "expert": 2, "pipe": 2, "zero.stage": 2}, {"task": EXPERTS}),
    "ep4": ({"data": 4, "expert": 4}, {"task": EXPERTS}),
    "dp4-zero1-experts": ({"data": 4, "zero.stage": 1}, {"task": EXPERTS}),
    "cp2-pp2": ({"context": 2, "pipe": 2}, {}),
    "dp2-pp2-zero-bubble": ({"data": 2, "pipe": 2, "pipeline.schedule": "zero_bubble_v"}, {}),
    "dp4-zero3-offload": (
        {"data": 4, "zero.stage": 3, "zero.offload_optimizer": "cpu", "zero.offload_parameters": "cpu"},
        {},
    ),
    # Stages that hold the same matrix have it in other places of their shares.
    "dp2-pp2-zero1-wide": ({"data": 2, "pipe": 2, "zero.stage": 1}, {"task": WIDE}),
    "dp2-pp2-zero2-wide": ({"data": 2, "pipe": 2, "zero.stage": 2}, {"task": WIDE}),
    "dp4-zero2-nvme": (
        {"data": 4, "zero.stage": 2, "zero.offload_optimizer": "nvme", "zero.nvme_path": tempfile.gettempdir()},
        {},
    ),
    "dp4-zero2-bf16": ({"data": 4, "zero.stage": 2}, {"precision": "bf16"}),
    "dp2-tp2-zero1-bf16": ({"data": 2, "tensor": 2, "zero.stage": 1}, {"precision": "bf16"}),
}
"""Layouts that move from one process and back: params of `parallel`, and what else their runs have."""
ALONE = "-alone"
"""Ends the name of the same run in one process."""

BEFORE, AFTER = 3, 3
"""Steps before the save, and after it."""


def case_of(name: str) -> Case:
    """The run of a layout; with moving averages, which move too."""
    parallel, options = OTHERS.get(name.removesuffix(ALONE), ({}, {}))
    parallel = {} if name.endswith(ALONE) else dict(LAYOUTS.get(name, parallel))
    return Case(parallel=parallel, steps=BEFORE + AFTER, learner={"ema": MovingAverage.Params(decay=0.5)}, **options)


def train(engine: Engine, *, first: int, stop: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    figures = []
    for step in range(first, stop):
        result = engine.train_step(local_rows(packed_batch(step), mesh=engine.mesh), step=step)
        figures.append((result.loss_sum / result.weight, result.grad_norm))
    return figures


def all_state(engine: Engine) -> dict[str, NDArray[np.float32]]:
    """Parameters, moments and averages, whole, by logical name."""
    return {name: tensor.numpy() for name, tensor in gather_parameters(engine, prefix="").items()}


def save_rank(rank: int, folder: str, names: list[str]) -> dict[str, Any]:
    """Trains on each layout and saves in between; what the run that never moved gives."""
    torch.set_flush_denormal(True)
    figures: dict[str, Any] = {}
    ranks = Ranks()
    for name in names:
        engine = make_engine(case_of(name), rank=rank)
        checkpointer = Checkpointer.Params().instantiate(directory=Path(folder) / name, ranks=ranks, layout=name)
        before = train(engine, first=0, stop=BEFORE)
        tensors = all_state(engine)
        state = {"learner": engine.learner.state()}
        checkpointer.save(step=BEFORE, tensors=engine.pieces(), state=state)
        after = train(engine, first=BEFORE, stop=BEFORE + AFTER)  # While it is written.
        checkpointer.wait()
        figures[name] = (before, after, tensors if rank == 0 else None)
    return figures


def load_rank(rank: int, folder: str, moves: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Goes on, for each (written, name), on the layout `name` from what the other has saved."""
    torch.set_flush_denormal(True)
    figures: dict[tuple[str, str], Any] = {}
    ranks = Ranks()
    for written, name in moves:
        engine = make_engine(case_of(name), rank=rank)
        if dist.is_initialized():
            dist.barrier()
        checkpointer = Checkpointer.Params().instantiate(directory=Path(folder) / written, ranks=ranks)
        restored = checkpointer.restore(tensors=engine.pieces())
        engine.loaded(learner_state=restored.state["learner"])
        tensors = all_state(engine)
        after = train(engine, first=BEFORE, stop=BEFORE + AFTER)
        figures[written, name] = (restored.step, after, tensors if rank == 0 else None)
    return figures


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a checkpoint of each layout, and the figures of the runs that wrote them."""
    folder = tmp_path_factory.mktemp("reshard")
    many = [name for name in LAYOUTS if name != "one"]
    figures = run_ranks(save_rank, world_size=1, arguments=(str(folder), ["one"]))[0]
    figures |= run_ranks(save_rank, world_size=4, arguments=(str(folder), many), timeout_seconds=400)[0]
    return folder, figures


def check_moves(
    folder: Path, stayed: Mapping[str, Any], *, world_size: int, moves: list[tuple[str, str]], rtol: float = 1e-5
) -> None:
    """Makes the moves, on layouts of `world_size` ranks, and compares with the runs that stayed."""
    moved = run_ranks(load_rank, world_size=world_size, arguments=(str(folder), moves), timeout_seconds=400)[0]
    assert list(moved) == moves
    for (written, name), (step, after, tensors) in moved.items():
        _, expected, saved_tensors = stayed[written]
        assert step == BEFORE
        assert tensors.keys() == saved_tensors.keys()
        assert all(np.array_equal(tensors[key], value) for key, value in saved_tensors.items()), (written, name)
        np.testing.assert_allclose(after, expected, rtol=rtol, err_msg=f"{written} -> {name}")


@pytest.mark.slow
def test_the_runs_that_never_move_agree(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = saved
    for name, (before, after, _) in figures.items():
        np.testing.assert_allclose([*before, *after], [*figures["one"][0], *figures["one"][1]], rtol=1e-5, err_msg=name)
        assert "whole" in inspect(folder / name)


@pytest.mark.slow
def test_one_process_goes_on_from_any_layout(saved: tuple[Path, dict[str, Any]]) -> None:
    check_moves(*saved, world_size=1, moves=[(written, "one") for written in LAYOUTS])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_any_layout_goes_on_from_any_other(saved: tuple[Path, dict[str, Any]], name: str) -> None:
    check_moves(*saved, world_size=4, moves=[(written, name) for written in LAYOUTS])


def test_shared_experts_move_to_other_layouts(tmp_path: Path) -> None:
    name = "ep2-dp2-zero1"
    stayed = run_ranks(save_rank, world_size=4, arguments=(str(tmp_path), [name]))[0]
    check_moves(tmp_path, stayed, world_size=4, moves=[(name, "dp4-zero1-experts"), (name, "ep4")])
    check_moves(tmp_path, stayed, world_size=1, moves=[(name, name + ALONE)])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_move_from_one_process_and_back(tmp_path: Path, name: str) -> None:
    alone = name + ALONE
    rtol = 1e-2 if "bf16" in name else 1e-5
    stayed = run_ranks(save_rank, world_size=1, arguments=(str(tmp_path), [alone]))[0]
    stayed |= run_ranks(save_rank, world_size=4, arguments=(str(tmp_path), [name]))[0]
    np.testing.assert_allclose(stayed[name][0], stayed[alone][0], rtol=rtol)
    check_moves(tmp_path, stayed, world_size=4, moves=[(alone, name)], rtol=rtol)
    check_moves(tmp_path, stayed, world_size=1, moves=[(name, alone)], rtol=rtol)
