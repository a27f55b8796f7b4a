"""The descriptions of checkpoints, and the command that prints them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from megaseq.base import CheckpointError
from megaseq.checkpoint import Checkpointer, inspect, load_checkpoint
from megaseq.cli import checkpoint as command

from .conftest import save

Make = Callable[..., Checkpointer]


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = parser.parse_args(["checkpoint", *argv])
    return int(arguments.run(arguments))


def test_a_checkpoint_is_described(make: Make) -> None:
    checkpointer = make()
    save(checkpointer, 7, bleu=31.5)
    text = inspect(checkpointer.path(7), pattern="half|scale")
    assert text.splitlines()[1] == "step 7"
    for line in (
        "written by 1 rank, layout unknown",
        "  task  7 tensors, 75 elements in 7 pieces",
        "  learner  1 tensors, 35 elements in 1 pieces",
        "  bleu 31.5",
        "tensors that match 'half|scale': 2",
        "  task.encoder.half  bfloat16 [3, 3]",
        "  task.encoder.scale  float32 []",
    ):
        assert line in text.splitlines()
    with pytest.raises(CheckpointError, match=r"pattern: must be a regular expression, but is '\['"):
        inspect(checkpointer.path(7), pattern="[")


def test_a_run_is_a_table_with_the_damaged_marked(make: Make, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpointer = make()
    for step in (1, 2):
        save(checkpointer, step, loss=2.0)
    (checkpointer.path(1) / "state.json").unlink()
    assert run("inspect", str(folder.parent)) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step_00000001  damaged: ") and "state.json" in first
    assert second.startswith("step_00000002  0.0 MB  whole  loss 2")
    assert run("inspect", str(folder.parent), "--tensors", "scale") == 0
    assert "  task.encoder.scale  float32 []" in capsys.readouterr().out.splitlines()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        run("inspect", str(checkpointer.path(1)))


def test_the_command_averages(make: Make, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpointer = make()
    for step in (1, 2, 3):
        save(checkpointer, step)
    output = tmp_path / "out"
    assert run("average", str(folder.parent), "--last", "2", "--output", str(output)) == 0
    assert str(checkpointer.path(2)) in capsys.readouterr().out
    assert load_checkpoint(output).state["average"]["steps"] == [2, 3]
    with pytest.raises(CheckpointError, match="must get one run directory with --last, but got 2 paths"):
        run("average", "a", "b", "--last", "2", "--output", "x")
