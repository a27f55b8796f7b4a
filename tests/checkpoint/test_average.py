"""Averages of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megaseq.base import CheckpointError
from megaseq.checkpoint import Checkpointer, average, load_checkpoint, newest, write_average

from .conftest import assert_same, make_tensors, save

Make = Callable[..., Checkpointer]


def expected_mean(steps: list[int], *, ema: bool) -> dict[str, Tensor]:
    all_tensors = [make_tensors(step) for step in steps]
    result = {}
    for name, last in all_tensors[-1].items():
        if not name.startswith("task."):
            continue
        source = f"ema.{name}" if ema and f"ema.{name}" in all_tensors[0] else name
        stacked = torch.stack([tensors[source].double() for tensors in all_tensors])
        result[name] = stacked.mean(dim=0).to(last.dtype) if last.is_floating_point() else last
    return result


@pytest.mark.parametrize(("weights", "ema"), [("parameters", False), ("ema", True), ("auto", True)])
def test_the_mean_of_the_last(make: Make, weights: str, ema: bool) -> None:
    checkpointer = make()
    for step in (1, 2, 3):
        save(checkpointer, step)
    got = checkpointer.average(last=2, weights=weights)
    assert_same(got, expected_mean([2, 3], ema=ema))


def test_auto_takes_moving_averages_only_when_all_have_them(make: Make) -> None:
    checkpointer = make()
    for step in (1, 2):
        tensors = make_tensors(step)
        if step == 2:
            tensors.pop("ema.task.encoder.weight")
        checkpointer.save(step=step, tensors=tensors, state={})
    assert_same(checkpointer.average(last=2), expected_mean([1, 2], ema=False))
    with pytest.raises(CheckpointError, match="must have moving averages, but has none"):
        checkpointer.average(last=2, weights="ema")


def test_one_checkpoint_is_its_own_average(make: Make) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    assert_same(average([checkpointer.path(1)], weights="parameters"), expected_mean([1], ema=False))


def test_an_average_is_a_checkpoint_or_a_file(make: Make, folder: Path, tmp_path: Path) -> None:
    checkpointer = make()
    for step in (1, 2):
        save(checkpointer, step)
    paths = newest(folder.parent, count=2)
    assert paths == [checkpointer.path(1), checkpointer.path(2)]
    restored = load_checkpoint(write_average(paths, output=tmp_path / "averaged", weights="parameters"))
    assert_same(restored.tensors, expected_mean([1, 2], ema=False))
    assert restored.state == {"step": 2, "average": {"steps": [1, 2], "weights": "parameters"}}
    assert (restored.step, restored.files) == (2, {"a/b.txt": b"text"})
    file = write_average(paths, output=tmp_path / "averaged.safetensors", weights="ema")
    assert_same(load_file(file), expected_mean([1, 2], ema=True))
    with pytest.raises(CheckpointError, match="must not exist, but does"):
        write_average(paths, output=tmp_path / "averaged")


def test_what_cannot_be_averaged_is_refused(make: Make) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    with pytest.raises(CheckpointError, match="must have 2 checkpoints to average, but has 1"):
        checkpointer.average(last=2)
    with pytest.raises(CheckpointError, match="must get at least one checkpoint"):
        average([])
    checkpointer.save(step=2, tensors={**make_tensors(2), "task.mask": torch.ones(4).bool()}, state={})
    with pytest.raises(CheckpointError, match=r"must have the parameters of .*, but task\.mask differs"):
        checkpointer.average(last=2)
