"""A real process, killed with -9 at random steps and started again, against one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megaseq.checkpoint import load_checkpoint
from megaseq.data import Input
from megaseq.train import parts
from megaseq.train.run_dir import RunDirectory
from megaseq.train.tracking.jsonl import read_metrics

STEPS = 60
COMMAND = (
    "quickstart.Numbers",
    f"train.max_steps={STEPS}",
    "train.log_interval_steps=1",
    "train.eval_interval_steps=20",
    "train.decode_at_end=false",
    "train.num_threads=1",
    "train.accumulation=2",
    "train_input.source.num_examples=2000",
    "train_input.batching.rows=4",
    "eval_inputs.held_out.source.num_examples=20",
    "task.model_dim=32",
    "task.encoder.num_layers=1",
    "task.decoder.num_layers=1",
    "task.decoder.dropout=0.1",
    "learner.ema.cls=megaseq.learner.ema.MovingAverage",
    "checkpoint.interval_steps=7",
)


def start(run_dir: Path, cache: Path) -> subprocess.Popen[bytes]:
    arguments = [*COMMAND, f"train.cache_dir={cache}", "--run-dir", str(run_dir)]
    return subprocess.Popen(
        [sys.executable, "-m", "megaseq", "train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


def steps_done(run_dir: Path) -> int:
    return max((record["step"] for record in read_metrics(run_dir / "metrics.jsonl")), default=0)


def kill_after(process: subprocess.Popen[bytes], *, step: int, run_dir: Path) -> None:
    """Kills the process once it has logged `step`, or fails if it ends before."""
    deadline = time.monotonic() + 240
    while steps_done(run_dir) < step:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[bytes]) -> None:
    _, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr.decode()


@pytest.mark.slow
def test_killed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    finish(start(whole, cache))
    draw = random.SystemRandom()
    first, second = draw.randint(3, 25), draw.randint(30, 55)
    kill_after(start(killed, cache), step=first, run_dir=killed)
    kill_after(start(killed, cache), step=second, run_dir=killed)
    finish(start(killed, cache))

    kept = ("step", "train/loss", "train/grad_norm", "train/padding_fraction", "eval/held_out/loss")
    lines = [
        [{name: record[name] for name in kept if name in record} for record in read_metrics(run / "metrics.jsonl")]
        for run in (whole, killed)
    ]
    assert lines[0] == lines[1], (first, second)
    assert [line["step"] for line in lines[0] if "train/loss" in line] == list(range(1, STEPS + 1))
    checkpoints = [load_checkpoint(run) for run in (whole, killed)]
    assert [checkpoint.step for checkpoint in checkpoints] == [STEPS, STEPS]
    for name, tensor in checkpoints[0].tensors.items():
        assert torch.equal(tensor, checkpoints[1].tensors[name]), name
    assert checkpoints[0].state["data"] == checkpoints[1].state["data"]
    following = [
        next_batches(run, checkpoint.state["data"])
        for run, checkpoint in zip((whole, killed), checkpoints, strict=True)
    ]
    assert all(torch.equal(left, right) for left, right in zip(*following, strict=True))


def next_batches(run: Path, state: dict[str, object]) -> list[torch.Tensor]:
    """Returns the tensors of the two batches that training would see next."""
    params = RunDirectory(run).read_params()
    vocabulary = parts.read_vocabulary(params, directory=RunDirectory(run).vocabulary)
    cache = parts.cache_dir(params, run_dir=run)
    data: Input = parts.train_input(params, vocabulary=vocabulary, cache=cache)
    data.load_state_dict(state)
    batches = iter(data)
    return [tensor for _ in range(2) for tensor in next(batches).flatten()]
