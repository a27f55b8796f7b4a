"""The learner as a whole: normalisation, clipping, state, and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaseq.base import CheckpointError, ParamsError, TrainingError
from megaseq.learner import (
    SGD,
    Adafactor,
    AdamW,
    InverseSqrt,
    Learner,
    MovingAverage,
    NormTracker,
    Optimizer,
    SkipPolicy,
    Warmup,
)

from .conftest import make_gradients, make_parameters


def full_params(optimizer: Optimizer.Params) -> Learner.Params:
    return Learner.Params(
        learning_rate=0.05,
        schedule=Warmup.Params(num_steps=4, schedule=InverseSqrt.Params()),
        optimizer=optimizer,
        weight_decay=0.01,
        freeze_patterns=("norm",),
        ema=MovingAverage.Params(decay=0.99),
        skip=SkipPolicy.Params(tracker=NormTracker.Params(decay=0.8)),
    )


def test_stats_report_what_was_done(parameters: dict[str, Tensor]) -> None:
    p = Learner.Params(learning_rate=0.5, schedule=Warmup.Params(num_steps=10), clip_norm=1.0)
    learner = p.instantiate(named_parameters=parameters)
    gradients = make_gradients(0)
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    stats = learner.update(step=3, grads=gradients, gradient_scale=0.5)
    assert stats.step == 3
    assert stats.learning_rate == learner.learning_rate(3) == pytest.approx(0.2)
    assert stats.grad_norm == pytest.approx(norm / 2, rel=1e-6)
    assert stats.clip_coefficient == pytest.approx(2 / norm, rel=1e-6)
    assert (stats.skipped, stats.num_skipped, stats.num_missing) == ("", 0, 0)


def test_clipping_limits_the_update() -> None:
    weight = torch.zeros(4)
    p = Learner.Params(learning_rate=1.0, optimizer=SGD.Params(), clip_norm=0.5)
    p.instantiate(named_parameters={"w": weight}).update(step=0, grads={"w": torch.full((4,), 10.0)})
    torch.testing.assert_close(weight, torch.full((4,), -0.25))


@settings(max_examples=20, deadline=None)
@given(splits=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_sums_over_any_micro_batches_give_one_update(splits: list[int], seed: int) -> None:
    """Gradients of sums are added over micro-batches of unequal weight and divided once by the whole weight."""
    total = sum(splits)
    examples = [make_gradients(seed + index) for index in range(total)]
    once, several = make_parameters(), make_parameters()
    p = Learner.Params(learning_rate=0.1, optimizer=SGD.Params(momentum=0.9))
    mean = {name: torch.stack([e[name] for e in examples]).mean(dim=0) for name in once}
    p.instantiate(named_parameters=once).update(step=0, grads=mean)
    accumulated = {name: torch.zeros_like(tensor) for name, tensor in several.items()}
    iterator = iter(examples)
    for size in splits:
        for example in [next(iterator) for _ in range(size)]:
            for name, gradient in example.items():
                accumulated[name] += gradient
    p.instantiate(named_parameters=several).update(step=0, grads=accumulated, gradient_scale=1 / total)
    for name, tensor in once.items():
        torch.testing.assert_close(several[name], tensor, rtol=1e-5, atol=1e-6)


def test_gradients_are_taken_from_the_parameters_when_not_given() -> None:
    given, own = make_parameters(), make_parameters()
    p = Learner.Params(learning_rate=0.1)
    p.instantiate(named_parameters=given).update(step=0, grads=make_gradients(0))
    leaves = {name: torch.nn.Parameter(tensor) for name, tensor in own.items()}
    for name, gradient in make_gradients(0).items():
        leaves[name].grad = gradient
    p.instantiate(named_parameters=leaves).update(step=0)
    assert all(torch.equal(leaves[name], given[name]) for name in given)


def test_a_missing_gradient_counts_as_zero(parameters: dict[str, Tensor]) -> None:
    missing, zero = make_parameters(), make_parameters()
    p = full_params(SGD.Params(momentum=0.5)).replace(weight_decay=0.3)
    one, other = p.instantiate(named_parameters=missing), p.instantiate(named_parameters=zero)
    for step in range(3):
        gradients = make_gradients(step)
        partial = {name: g.clone() for name, g in gradients.items() if name != "task.decoder.kernel"}
        assert one.update(step=step, grads=partial).num_missing == 1
        gradients["task.decoder.kernel"].zero_()
        other.update(step=step, grads=gradients)
    assert all(torch.equal(missing[name], zero[name]) for name in missing)


@pytest.mark.parametrize("optimizer", [AdamW.Params(), SGD.Params(momentum=0.9), Adafactor.Params(min_dim_to_factor=4)])
def test_training_goes_on_bitwise_after_a_round_trip(optimizer: Optimizer.Params) -> None:
    p = full_params(optimizer)
    straight = make_parameters()
    learner = p.instantiate(named_parameters=straight)
    for step in range(6):
        learner.update(step=step, grads=make_gradients(step))
    learner.update(step=6, grads={name: g * float("nan") for name, g in make_gradients(6).items()})
    saved_parameters = {name: tensor.clone() for name, tensor in straight.items()}
    saved = {name: tensor.clone() for name, tensor in learner.state_tensors().items()}
    state = json.loads(json.dumps(learner.state()))
    resumed_parameters = {
        name: torch.empty_like(tensor).copy_(saved_parameters[name]) for name, tensor in straight.items()
    }
    resumed = p.instantiate(named_parameters=resumed_parameters)
    resumed.load(tensors={**saved, **{f"{n}": t for n, t in saved_parameters.items()}}, state=state)
    for step in range(7, 15):
        stats = [one.update(step=step, grads=make_gradients(step)) for one in (learner, resumed)]
        assert stats[0] == stats[1]
    assert all(torch.equal(straight[name], resumed_parameters[name]) for name in straight)
    ours, theirs = learner.state_tensors(), resumed.state_tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert learner.state() == resumed.state()


def test_state_has_logical_names(parameters: dict[str, Tensor]) -> None:
    learner = full_params(AdamW.Params()).instantiate(named_parameters=parameters)
    trained = [name for name in parameters if "norm" not in name]
    prefixes = ("learner.first_moment.", "learner.second_moment.", "ema.")
    assert set(learner.state_tensors()) == {prefix + name for prefix in prefixes for name in trained}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors, state: state.update(optimizer="SGD"), "must get the state of AdamW, but it is of SGD"),
        (lambda tensors, state: tensors.pop("ema.task.decoder.kernel"), "1 missing, first ema.task.decoder.kernel"),
        (lambda tensors, state: tensors.update({"learner.x": torch.ones(1)}), "1 unknown, first learner.x"),
        (
            lambda tensors, state: tensors.update({"ema.task.decoder.kernel": torch.ones(3)}),
            r"ema.task.decoder.kernel: must be torch.float32 \[2, 5, 7\], but is torch.float32 \[3\]",
        ),
    ],
)
def test_state_of_another_learner_is_refused(parameters: dict[str, Tensor], change: Any, text: str) -> None:
    learner = full_params(AdamW.Params()).instantiate(named_parameters=parameters)
    learner.update(step=0, grads=make_gradients(0))
    tensors, state = dict(learner.state_tensors()), learner.state()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, state)
    with pytest.raises(CheckpointError, match=text):
        learner.load(tensors=tensors, state=state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_tensors().items())


def test_wrong_tensors_are_refused(parameters: dict[str, Tensor]) -> None:
    p = Learner.Params(learning_rate=0.1)
    with pytest.raises(TrainingError, match="must get at least one parameter"):
        p.instantiate(named_parameters={})
    with pytest.raises(
        TrainingError, match=r"learner half: must be a float32 master parameter, but is torch\.bfloat16"
    ):
        p.instantiate(named_parameters={"half": torch.ones(2, dtype=torch.bfloat16)})
    learner = p.instantiate(named_parameters=parameters)
    with pytest.raises(TrainingError, match=r"task\.decoder\.kernel: must get a gradient torch\.float32 \[2, 5, 7\]"):
        learner.update(step=0, grads={"task.decoder.kernel": torch.ones(2, 5)})
    with pytest.raises(ParamsError, match="clip_norm: must be positive"):
        Learner.Params(learning_rate=0.1, clip_norm=0.0).instantiate(named_parameters=parameters)


def test_the_norm_is_summed_over_ranks(parameters: dict[str, Tensor]) -> None:
    learner = Learner.Params(learning_rate=0.1).instantiate(
        named_parameters=parameters, reduce_squared_norm=lambda squared: squared * 4.0
    )
    norm = float(torch.cat([g.flatten() for g in make_gradients(0).values()]).norm())
    assert learner.update(step=0, grads=make_gradients(0)).grad_norm == pytest.approx(2 * norm, rel=1e-6)
