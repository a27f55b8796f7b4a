"""The comparison of two checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint import Checkpointer, difference
from megaseq.checkpoint.piece import Piece

from .conftest import make_tensors
from .test_convert import run

Make = Callable[..., Checkpointer]


def saved(make: Make, *versions: dict[str, Tensor]) -> list[str]:
    """The paths of checkpoints with these tensors."""
    checkpointer = make(keep_last=0, check_finite=False)
    for step, tensors in enumerate(versions, start=1):
        checkpointer.save(step=step, tensors=tensors, state={}, wait=True)
    return [str(checkpointer.path(step)) for step in range(1, len(versions) + 1)]


def test_equal_checkpoints_do_not_differ(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = saved(make, make_tensors(1), make_tensors(1))
    assert not difference(first, second)
    assert run("diff", first, second) == 0
    assert "9 tensors are equal, 0 have other values" in capsys.readouterr().out


def test_pieces_are_compared_as_what_they_make_up(make: Make) -> None:
    values = torch.arange(20.0).reshape(4, 5)
    checkpointer = make()
    checkpointer.save(step=1, tensors={"task.w": values}, state={}, wait=True)
    pieces = [Piece("task.w", (4, 5), (0, 0), values[:, :2]), Piece("task.w", (4, 5), (0, 2), values[:, 2:])]
    checkpointer.save(step=2, tensors=pieces, state={}, wait=True)
    assert not difference(checkpointer.path(1), checkpointer.path(2))


def test_names_shapes_types_and_values_are_compared(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_tensors(1)
    two = make_tensors(1)
    two["task.new"] = two.pop("task.mask")
    two["task.encoder.half"] = two["task.encoder.half"].float()
    two["task.encoder.empty"] = torch.empty(0, 5)
    two["task.count"] = two["task.count"] + torch.tensor([0, 0, 3])
    two["task.encoder.weight"] = two["task.encoder.weight"].clone()
    two["task.encoder.weight"][2, 3] += 0.5
    two["ema.task.encoder.weight"] = two["ema.task.encoder.weight"].clone()
    two["ema.task.encoder.weight"][0, 0] = float("nan")
    first, second = saved(make, one, two)
    found = difference(first, second)
    assert found.only == (("task.mask",), ("task.new",))
    assert found.unlike == (
        "task.encoder.empty  float32 [0, 4] and float32 [0, 5]",
        "task.encoder.half  bfloat16 [3, 3] and float32 [3, 3]",
    )
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert by_name.keys() == {"task.count", "task.encoder.weight", "ema.task.encoder.weight"}
    weight = by_name["task.encoder.weight"]
    assert weight.max_absolute == pytest.approx(0.5, abs=1e-6) and weight.num_different == 1
    assert weight.max_relative == pytest.approx(0.5 / float(one["task.encoder.weight"].abs().max()), rel=1e-5)
    assert by_name["ema.task.encoder.weight"].max_absolute == float("inf")
    assert found.num_equal == 3
    assert run("diff", first, second, "--limit", "1") == 1
    text = capsys.readouterr().out
    assert "and 2 more" in text and "of another shape or type: 2" in text
    assert run("diff", first, second, "--tensors", "scale") == 0


def test_a_bad_pattern_is_one_line(make: Make) -> None:
    first, second = saved(make, make_tensors(1), make_tensors(1))
    with pytest.raises(CheckpointError, match="must be a regular expression"):
        difference(first, second, pattern="[")
