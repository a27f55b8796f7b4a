"""Starting from the parameters of another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaseq.base import CheckpointError
from megaseq.checkpoint import Checkpointer, WarmStart, WarmStartRule, init_from

OTHER = {
    "task.encoder.a": torch.full((2, 3), 1.0),
    "task.encoder.b": torch.full((3,), 2.0),
    "task.head": torch.full((4,), 3.0),
    "learner.first_moment.task.head": torch.zeros(4),
    "ema.task.encoder.a": torch.full((2, 3), 10.0),
}


@pytest.fixture
def other(make: Callable[..., Checkpointer], folder: Path) -> Path:
    checkpointer = make()
    checkpointer.save(step=5, tensors=OTHER, state={})
    checkpointer.wait()
    return folder.parent


def own() -> dict[str, Tensor]:
    return {
        "task.encoder.a": torch.zeros(2, 3),
        "task.decoder.a": torch.zeros(2, 3),
        "task.decoder.b": torch.zeros(3),
        "task.new": torch.zeros(1),
    }


def test_rules_rename_and_the_first_match_wins(other: Path) -> None:
    parameters = own()
    rules = [(r"^task\.decoder\.(\w)$", r"task.encoder.\1"), (r"^task\.\w+coder", r"\g<0>")]
    report = init_from(other, named_parameters=parameters, rules=rules, weights="parameters")
    assert {name: float(tensor.flatten()[0]) for name, tensor in parameters.items()} == {
        "task.encoder.a": 1.0,
        "task.decoder.a": 1.0,
        "task.decoder.b": 2.0,
        "task.new": 0.0,
    }
    assert report.kept == ("task.new",)
    assert report.unused == ("task.head",)
    assert str(report).splitlines() == [
        f"{other}/checkpoints/step_00000005: 3 loaded, 1 kept, 1 unused",
        "  task.decoder.a <- task.encoder.a",
        "  task.decoder.b <- task.encoder.b",
        "  task.new keeps its initial value",
    ]


def test_params_load_moving_averages_where_there_are_any(other: Path) -> None:
    parameters = {name: torch.zeros_like(t) for name, t in OTHER.items() if name.startswith("task.")}
    WarmStart.Params(path=str(other)).instantiate().load(parameters)
    assert [float(tensor.flatten()[0]) for tensor in parameters.values()] == [10.0, 2.0, 3.0]
    rule = WarmStartRule.Params(pattern="head", replacement="head")
    parameters["task.head"].zero_()
    report = WarmStart.Params(path=str(other), rules=(rule,)).instantiate().load(parameters)
    assert report.loaded == {"task.head": "task.head"}
    assert parameters["task.head"].tolist() == [3.0] * 4


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([("encoder", "encoder"), ("enkoder", "x")], "rule 'enkoder': must be the first to match some parameter"),
        ([("task", "task"), ("encoder", "encoder")], "rule 'encoder': must be the first to match some parameter"),
        ([(r"decoder\.b", "decoder.c")], "task.decoder.c, for task.decoder.b, is not in it"),
        ([(r"decoder\.b", "encoder.a")], r"task.encoder.a is \[2, 3\], but task.decoder.b is \[3\]"),
        ([("(", "")], "must be a regular expression"),
        ([("encoder", r"\9")], "must have groups that exist in its replacement"),
        ([], "and 0 more|task.decoder.a, for task.decoder.a, is not in it"),
    ],
)
def test_rules_that_do_not_fit_are_refused_and_nothing_is_loaded(
    other: Path, rules: list[tuple[str, str]], text: str
) -> None:
    parameters = own()
    with pytest.raises(CheckpointError, match=text):
        init_from(other, named_parameters=parameters, rules=rules)
    assert all(not tensor.any() for tensor in parameters.values())
