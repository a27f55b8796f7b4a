"""Whole runs that are killed and go on with another layout, against one process that was left alone."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from megaseq.checkpoint import difference, inspect, load_checkpoint
from megaseq.train.tracking.jsonl import read_metrics
from tests.distributed.launching import (
    environment,
    finish,
    losses,
    rank_processes,
    run_megaseq,
    start,
    train,
    wait_for,
)

STEPS = 40
OPTIONS = (
    f"train.max_steps={STEPS}",
    "task.encoder.dropout=0.1",
    "task.decoder.dropout=0.1",
    "learner.optimizer.epsilon=1e-4",
    # Where a unit is nearly zero, rounding would decide whether relu lets a gradient through.
    "task.encoder.layer.ffn.activation=gelu",
    "task.decoder.layer.ffn.activation=gelu",
    "learner.ema.cls=megaseq.learner.ema.MovingAverage",
    "checkpoint.interval_steps=3",
    # The losses are compared to 1e-5, which is not to be had where the processor multiplies bfloat16.
    "train.precision=fp32",
)
LAYOUTS = (
    ("parallel.data=2", "parallel.zero.stage=1"),
    ("parallel.tensor=2",),
    ("parallel.pipe=2",),
    ("parallel.data=1",),
)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_layouts(tmp_path: Path) -> None:
    cache, whole, moved, log = (tmp_path / name for name in ("cache", "whole", "moved", "log"))
    code, text = run_megaseq(train(whole, cache=cache, overrides=OPTIONS), log=log)
    assert code == 0, text
    draw = random.SystemRandom()
    resumed = 0
    for number, layout in enumerate(LAYOUTS[:-1], start=1):
        # By step 7 that of step 3 is written, since the one of step 6 waits for it.
        stop = draw.randint(10 * number - 3, 10 * number)
        command = [sys.executable, "-m", "megaseq", *train(moved, cache=cache, overrides=(*OPTIONS, *layout))]
        process = start(command, log=log, env=environment())
        wait_for(lambda stop=stop: max(losses(moved), default=0) >= stop, process=process, log=log, timeout_seconds=500)
        os.kill(rank_processes(process.pid)[draw.randrange(2)], signal.SIGKILL)
        code, text = finish(process, log=log)
        assert code != 0, text
        assert (f"goes on from step {resumed}" if number > 1 else "begins in") in text
        resumed = load_checkpoint(moved).step
        assert resumed >= stop - 2 * 3  # One is due every third step, and one may be unfinished.
    code, text = run_megaseq(train(moved, cache=cache, overrides=(*OPTIONS, *LAYOUTS[-1])), log=log)
    assert code == 0, text
    assert f"goes on from step {resumed}" in text and "changed: parallel.pipe : 2 -> 1" in text

    ours, theirs = losses(moved), losses(whole)
    assert [row["step"] for row in read_metrics(moved / "metrics.jsonl") if "train/loss" in row] == [
        *range(1, STEPS + 1)
    ]
    assert [ours[step] for step in theirs] == pytest.approx(list(theirs.values()), rel=1e-5)
    final = [load_checkpoint(run) for run in (whole, moved)]
    assert final[0].state["data"] == final[1].state["data"]
    found = difference(whole, moved)
    assert not (found.only[0] or found.only[1] or found.unlike)
    assert all(one.max_absolute < 1e-4 for one in found.tensors)
    assert "written by 1 rank, layout one process" in inspect(moved / "checkpoints" / f"step_{STEPS:08}")


@pytest.mark.slow
def test_no_room_for_a_checkpoint_is_one_line_of_all_ranks(tmp_path: Path) -> None:
    cache, run_dir, log = (tmp_path / name for name in ("cache", "run", "log"))
    options = ("train.max_steps=4", "checkpoint.interval_steps=4", "parallel.data=2", "train.log_interval_steps=4")
    code, text = run_megaseq(train(run_dir, cache=cache, overrides=options), log=log)
    assert code == 0, text
    size = max(path.stat().st_size for path in run_dir.rglob("*.safetensors"))
    more = ("train.max_steps=40", *options[1:], "--allow-changed-params")
    # A limit on the size of files is the disk's end for whoever writes one.
    limit = f'ulimit -f {size // 2048}; exec "$0" "$@"'
    command = ["bash", "-c", limit, sys.executable, "-m", "megaseq", *train(run_dir, cache=cache, overrides=more)]
    code, text = finish(start(command, log=log, env=environment()), log=log)
    assert code == 2, text
    errors = [line for line in text.splitlines() if "must be written whole" in line]
    assert len(errors) == 1 and "File too large on rank" in errors[0] and "Traceback" not in text, text
    assert [path.name for path in (run_dir / "checkpoints").glob("*step*")] == ["step_00000004"]
    assert load_checkpoint(run_dir).step == 4
