"""Ranks that are killed at random moments, many times over, on one layout after another: the run always goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaseq.checkpoint import Checkpointer, Ranks, list_steps

from .harness import run_ranks
from .parity import Case, local_rows, make_engine, packed_batch, reference

KILLS, AFTER = 20, 4
"""Kills, and steps that the last start is left in peace for."""

LAYOUTS: tuple[tuple[int, Mapping[str, Any]], ...] = (
    (2, {"data": 2, "zero.stage": 1}),
    (2, {"tensor": 2}),
    (4, {"data": 4}),
    (2, {"pipe": 2}),
    (2, {"data": 2, "zero.stage": 3}),
    (1, {}),
)
"""Ranks and params of `parallel`."""


def log(folder: Path, **record: Any) -> None:
    """Adds a line that a kill cannot take back."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def records(folder: Path) -> list[dict[str, Any]]:
    """What was logged, but for a line that a kill has cut short."""
    found = []
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def train_rank(rank: int, folder: Path, parallel: dict[str, Any], stop: int | None) -> None:
    """Goes on from the newest checkpoint and saves after every step; without `stop` until it is killed."""
    (folder / f"rank-{rank}").write_text(str(os.getpid()), encoding="ascii")
    torch.set_flush_denormal(True)
    engine = make_engine(Case(parallel=parallel), rank=rank)
    ranks = Ranks()
    checkpointer = Checkpointer.Params(keep_last=3).instantiate(directory=folder / "checkpoints", ranks=ranks)
    first = 0
    if ranks.on_first(checkpointer.latest) is not None:
        restored = checkpointer.restore(tensors=engine.pieces())
        assert restored.messages == ()
        engine.loaded(learner_state=restored.state["learner"])
        first = restored.step
    if rank == 0:
        log(folder, resumed=first)
    last = first + stop if stop else 10**9
    for step in range(first, last):
        result = engine.train_step(local_rows(packed_batch(step), mesh=engine.mesh), step=step)
        if rank == 0:
            log(folder, step=step, loss=result.loss_sum / result.weight, norm=result.grad_norm)
        checkpointer.save(step=step + 1, tensors=engine.pieces(), state={"learner": engine.learner.state()})
        if rank == 0 and step > first:
            log(folder, complete=step)  # Saving a step waits for the one before.
    checkpointer.wait()


class Killer(threading.Thread):
    """Kills one of the ranks at a random moment, or as soon as a checkpoint is being written."""

    def __init__(self, folder: Path, *, draw: random.Random, num_ranks: int, while_writing: bool) -> None:
        super().__init__()
        self._folder = folder
        self._victim = draw.randrange(num_ranks)
        self._seconds = draw.uniform(0.0, 0.4)
        self._while_writing = while_writing
        self._known = len(records(folder)) if (folder / "log.jsonl").exists() else 0

    def run(self) -> None:
        """Waits until the ranks train, and kills."""
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            log_file = self._folder / "log.jsonl"
            if log_file.exists() and len(records(self._folder)) >= self._known + 3:
                break
            time.sleep(0.01)
        time.sleep(self._seconds)
        while self._while_writing and time.monotonic() < deadline and not self._writing():
            pass
        pid = int((self._folder / f"rank-{self._victim}").read_text(encoding="ascii"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _writing(self) -> bool:
        return any(name.startswith(".writing-") for name in os.listdir(self._folder / "checkpoints"))


@pytest.mark.slow
def test_a_run_goes_on_after_every_kill_of_a_rank(tmp_path: Path) -> None:
    draw = random.Random(4)
    interrupted = 0
    for kill in range(KILLS):
        world_size, parallel = LAYOUTS[kill % len(LAYOUTS)]
        killer = Killer(tmp_path, draw=draw, num_ranks=world_size, while_writing=kill % 2 == 0)
        killer.start()
        with pytest.raises(AssertionError, match=r"died without a word|failed:"):
            run_ranks(train_rank, world_size=world_size, arguments=(tmp_path, dict(parallel), None))
        killer.join()
        interrupted += any(name.startswith(".writing-") for name in os.listdir(tmp_path / "checkpoints"))
        latest = list_steps(tmp_path / "checkpoints")[-1]
        assert latest >= max(record.get("complete", 0) for record in records(tmp_path)), "a complete one is lost"
        log(tmp_path, latest=latest)
    run_ranks(train_rank, world_size=1, arguments=(tmp_path, {}, AFTER))

    assert interrupted >= KILLS // 4, "no kill came while a checkpoint was written"
    history = records(tmp_path)
    resumed = [record["resumed"] for record in history if "resumed" in record]
    assert resumed == [0, *(record["latest"] for record in history if "latest" in record)]
    steps = [record for record in history if "step" in record]
    last = max(record["step"] for record in steps) + 1
    assert {record["step"] for record in steps} == set(range(last))
    expected = reference(Case(steps=last))
    for record in steps:
        # Every layout adds in an order of its own, and these are several times the steps of the parity table.
        figures = (expected.losses[record["step"]], expected.norms[record["step"]])
        np.testing.assert_allclose((record["loss"], record["norm"]), figures, rtol=2e-5, err_msg=str(record))
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".writing-")]
