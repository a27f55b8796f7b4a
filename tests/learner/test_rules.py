"""Weight decay, learning-rate scales and freezing by pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaseq.base import ParamsError
from megaseq.learner import SGD, AdamW, Learner, MovingAverage, ParameterRule

from .conftest import make_gradients


def test_frozen_parameters_are_bit_identical_and_have_no_state(parameters: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    learner = Learner.Params(
        learning_rate=0.1, weight_decay=0.1, freeze_patterns=(r"encoder\.layers", "temp"), ema=MovingAverage.Params()
    ).instantiate(named_parameters=parameters)
    for step in range(3):
        learner.update(step=step, grads=make_gradients(step))
    for name, tensor in parameters.items():
        frozen = "encoder.layers" in name or "temperature" in name
        assert torch.equal(tensor, before[name]) == frozen
        assert any(key.endswith(name) for key in learner.state_tensors()) != frozen
        assert (name in learner.frozen) == frozen
        assert (name in learner.trainable) != frozen


def test_gradients_of_frozen_parameters_are_not_in_the_norm(parameters: dict[str, Tensor]) -> None:
    learner = Learner.Params(learning_rate=0.1, train_only_patterns=("temperature$",)).instantiate(
        named_parameters=parameters
    )
    gradients = make_gradients(0)
    expected = abs(float(gradients["task.decoder.temperature"]))
    assert learner.update(step=0, grads=gradients).grad_norm == pytest.approx(expected)
    assert learner.frozen == tuple(name for name in parameters if not name.endswith("temperature"))


def test_small_tensors_are_not_decayed_by_default(parameters: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    learner = Learner.Params(learning_rate=0.5, weight_decay=0.1, optimizer=AdamW.Params()).instantiate(
        named_parameters=parameters
    )
    learner.update(step=0, grads={})
    for name, tensor in parameters.items():
        expected = before[name] * 0.95 if tensor.dim() >= 2 else before[name]
        torch.testing.assert_close(tensor, expected)


def test_the_first_rule_that_sets_a_value_wins(parameters: dict[str, Tensor]) -> None:
    learner = Learner.Params(
        learning_rate=0.1,
        weight_decay=0.5,
        rules=(
            ParameterRule.Params(pattern=r"^task\.encoder", learning_rate_scale=0.1),
            ParameterRule.Params(pattern="bias", weight_decay=0.25, learning_rate_scale=7.0),
        ),
    ).instantiate(named_parameters=parameters)
    got = {
        name: (group.weight_decay, group.learning_rate_scale)
        for group in learner.assignment.groups
        for name in group.names
    }
    assert got == {
        "task.encoder.embedding.weight": (0.5, 0.1),
        "task.encoder.layers.0.ffn.up.weight": (0.5, 0.1),
        "task.encoder.layers.0.ffn.up.bias": (0.25, 0.1),
        "task.encoder.layers.0.norm.scale": (0.0, 0.1),
        "task.decoder.kernel": (0.5, 1.0),
        "task.decoder.temperature": (0.0, 1.0),
    }


def test_the_learning_rate_scale_scales_the_update() -> None:
    parameters = {"slow": torch.zeros(3), "fast": torch.zeros(3)}
    learner = Learner.Params(
        learning_rate=1.0,
        optimizer=SGD.Params(),
        clip_norm=None,
        rules=(ParameterRule.Params(pattern="slow", learning_rate_scale=0.25),),
    ).instantiate(named_parameters=parameters)
    learner.update(step=0, grads={name: torch.ones(3) for name in parameters})
    assert parameters["slow"].tolist() == [-0.25] * 3
    assert parameters["fast"].tolist() == [-1.0] * 3


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"freeze_patterns": ("bias", "biass")}, r"learner\.freeze_patterns\.1"),
        ({"train_only_patterns": ("enkoder",)}, r"learner\.train_only_patterns\.0"),
        ({"rules": (ParameterRule.Params(pattern="enkoder", weight_decay=0.0),)}, r"learner\.rules\.0\.pattern"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(
    parameters: dict[str, Tensor], changes: dict[str, object], path: str
) -> None:
    p = Learner.Params(learning_rate=0.1).replace(**changes)
    with pytest.raises(ParamsError, match=rf"^{path}: must match a parameter, but is '\w+', which matches none of 6"):
        p.instantiate(named_parameters=parameters)


def test_a_bad_pattern_and_a_model_frozen_whole_are_errors(parameters: dict[str, Tensor]) -> None:
    with pytest.raises(ParamsError, match=r"freeze_patterns\.0: must be a regular expression, but is '\('"):
        Learner.Params(learning_rate=0.1, freeze_patterns=("(",)).instantiate(named_parameters=parameters)
    with pytest.raises(ParamsError, match="must leave a parameter to train, but all 6 are frozen"):
        Learner.Params(learning_rate=0.1, freeze_patterns=("task",)).instantiate(named_parameters=parameters)
    with pytest.raises(ParamsError, match="weight_decay: must be set, or learning_rate_scale"):
        ParameterRule.Params(pattern="x").instantiate()


def test_the_listing_names_every_match(parameters: dict[str, Tensor]) -> None:
    learner = Learner.Params(
        learning_rate=0.1,
        weight_decay=0.01,
        freeze_patterns=("norm",),
        rules=(ParameterRule.Params(pattern="embedding", weight_decay=0.0),),
    ).instantiate(named_parameters=parameters)

    def treatment(name: str, parameter: Tensor) -> str:
        if "norm" in name:
            return "frozen  by norm"
        decay = "0" if "embedding" in name or parameter.dim() < 2 else "0.01"
        return f"weight_decay={decay} learning_rate_scale=1" + ("  by embedding" if "embedding" in name else "")

    assert learner.listing().splitlines() == [
        "patterns (re.search on the full path):",
        "  freeze  norm  -> 1 parameters, 6 elements",
        "    task.encoder.layers.0.norm.scale",
        "  weight_decay=0  embedding  -> 1 parameters, 72 elements",
        "    task.encoder.embedding.weight",
        "groups:",
        "  weight_decay=0 learning_rate_scale=1  -> 3 parameters, 81 elements",
        "  weight_decay=0.01 learning_rate_scale=1  -> 2 parameters, 118 elements",
        "  frozen  -> 1 parameters, 6 elements",
        "parameters:",
    ] + [f"  {name}  {list(parameter.shape)}  {treatment(name, parameter)}" for name, parameter in parameters.items()]
