"""The matrix of moves: every layout goes on from what any other saved, with the losses of the run that stayed."""

from __future__ import annotations

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

BEFORE, AFTER = 3, 3
"""Steps before the save, and after it."""


def case_of(layout: str) -> Case:
    """The run of a layout; with moving averages, which move too."""
    return Case(parallel=LAYOUTS[layout], steps=BEFORE + AFTER, learner={"ema": MovingAverage.Params(decay=0.5)})


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


def load_rank(rank: int, folder: str, written: list[str], names: list[str]) -> dict[str, Any]:
    """Goes on, on each layout, from what each has saved."""
    torch.set_flush_denormal(True)
    figures: dict[str, Any] = {}
    ranks = Ranks()
    for name in names:
        for source in written:
            engine = make_engine(case_of(name), rank=rank)
            if dist.is_initialized():
                dist.barrier()
            checkpointer = Checkpointer.Params().instantiate(directory=Path(folder) / source, ranks=ranks)
            restored = checkpointer.restore(tensors=engine.pieces())
            engine.loaded(learner_state=restored.state["learner"])
            tensors = all_state(engine)
            after = train(engine, first=BEFORE, stop=BEFORE + AFTER)
            figures[f"{source}->{name}"] = (restored.step, after, tensors if rank == 0 else None)
    return figures


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a checkpoint of each layout, and the figures of the runs that wrote them."""
    folder = tmp_path_factory.mktemp("reshard")
    many = [name for name in LAYOUTS if name != "one"]
    figures = run_ranks(save_rank, world_size=1, arguments=(str(folder), ["one"]))[0]
    figures |= run_ranks(save_rank, world_size=4, arguments=(str(folder), many))[0]
    return folder, figures


def check_moves(saved: tuple[Path, dict[str, Any]], *, world_size: int, names: list[str]) -> None:
    """Goes on with all that was saved, on layouts of `world_size` ranks."""
    folder, stayed = saved
    moved = run_ranks(load_rank, world_size=world_size, arguments=(str(folder), list(LAYOUTS), names))[0]
    assert len(moved) == len(LAYOUTS) * len(names)
    for move, (step, after, tensors) in moved.items():
        _, expected, written = stayed[move.split("->")[0]]
        assert step == BEFORE
        assert tensors.keys() == written.keys()
        assert all(np.array_equal(tensors[name], value) for name, value in written.items()), move
        np.testing.assert_allclose(after, expected, rtol=1e-5, err_msg=move)


@pytest.mark.slow
def test_the_runs_that_never_move_agree(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = saved
    for name, (before, after, _) in figures.items():
        np.testing.assert_allclose([*before, *after], [*figures["one"][0], *figures["one"][1]], rtol=1e-5, err_msg=name)
        assert "whole" in inspect(folder / name)


@pytest.mark.slow
def test_one_process_goes_on_from_any_layout(saved: tuple[Path, dict[str, Any]]) -> None:
    check_moves(saved, world_size=1, names=["one"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_any_layout_goes_on_from_any_other(saved: tuple[Path, dict[str, Any]], name: str) -> None:
    check_moves(saved, world_size=4, names=[name])
