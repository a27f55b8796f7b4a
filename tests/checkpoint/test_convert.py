"""Checkpoints written anew."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint import Checkpointer, convert, load_checkpoint
from megaseq.checkpoint.piece import Piece
from megaseq.cli import checkpoint as command

from .conftest import assert_same, make_tensors, save

Make = Callable[..., Checkpointer]


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = parser.parse_args(["checkpoint", *argv])
    return int(arguments.run(arguments))


def test_one_file_has_the_averages_where_there_are_any(make: Make, tmp_path: Path) -> None:
    checkpointer = make()
    tensors = save(checkpointer, 3)
    out = tmp_path / "model.safetensors"
    assert run("convert", str(checkpointer.path(3)), str(out)) == 0
    expected = {name: tensor for name, tensor in tensors.items() if name.startswith("task.")}
    expected["task.encoder.weight"] = tensors["ema.task.encoder.weight"]
    assert_same(load_file(out), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_of_floating_point_get_another_type(make: Make, tmp_path: Path, dtype: str) -> None:
    checkpointer = make()
    tensors = save(checkpointer, 3)
    arguments = (str(checkpointer.path(3)), str(tmp_path / "new"), "--dtype", dtype, "--weights", "parameters")
    assert run("convert", *arguments) == 0
    kind = getattr(torch, dtype)
    expected = {
        name: tensor.to(kind) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if name.startswith("task.")
    }
    restored = load_checkpoint(tmp_path / "new")
    assert_same(restored.tensors, expected)
    assert (restored.step, restored.state, restored.files) == (3, {"step": 3}, {"a/b.txt": b"text"})


def test_all_state_of_many_pieces_becomes_that_of_one_process(make: Make, folder: Path, tmp_path: Path) -> None:
    values = torch.arange(20.0).reshape(4, 5)
    pieces = [
        Piece("task.w", (4, 5), (0, 0), values[:3]),
        Piece("task.w", (4, 5), (3, 0), values[3:, :2]),
        Piece("task.w", (4, 5), (3, 2), values[3:, 2:]),
    ]
    make().save(step=1, tensors=pieces, state={"a": 1}, wait=True)
    out = convert(folder, output=tmp_path / "whole" / "step_00000001", weights="all")
    target = {"task.w": torch.zeros(4, 5)}
    restored = Checkpointer.Params().instantiate(directory=out.parent).restore(tensors=target)
    assert restored.state == {"a": 1}
    assert torch.equal(target["task.w"], values)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": "all", "dtype": "bfloat16"}, "must be auto, parameters or ema for a number type"),
        ({"weights": "all", "output": "x.safetensors"}, "must be auto, parameters or ema for one file"),
        ({"output": "."}, "must not exist, but does"),
    ],
)
def test_what_cannot_be_converted_is_refused(make: Make, tmp_path: Path, options: dict[str, str], text: str) -> None:
    checkpointer = make()
    save(checkpointer, 3)
    output = tmp_path / options.pop("output", "new")
    with pytest.raises(CheckpointError, match=text):
        convert(checkpointer.path(3), output=output, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_missing_average_is_named(make: Make, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in make_tensors().items() if not name.startswith("ema.")}
    checkpointer = make()
    checkpointer.save(step=1, tensors=tensors, state={}, wait=True)
    with pytest.raises(CheckpointError, match="must have moving averages, but has none"):
        convert(checkpointer.path(1), output=tmp_path / "new", weights="ema")


def test_values_beyond_a_type_are_refused(make: Make, tmp_path: Path) -> None:
    checkpointer = make()
    checkpointer.save(step=1, tensors={"task.w": torch.tensor([1.0, 1e6])}, state={}, wait=True)
    with pytest.raises(CheckpointError, match=r"task\.w: must fit into float16, but has values beyond it"):
        convert(checkpointer.path(1), output=tmp_path / "new", dtype="float16")
    assert list(tmp_path.glob("new*")) == []
