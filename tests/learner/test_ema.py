"""The moving average of the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaseq.base import TrainingError
from megaseq.learner import SGD, Learner, MovingAverage

from .conftest import make_gradients, make_parameters


def make_learner(parameters: dict[str, Tensor], **ema: object) -> Learner:
    p = Learner.Params(learning_rate=0.1, optimizer=SGD.Params(), ema=MovingAverage.Params(**ema))
    learner: Learner = p.instantiate(named_parameters=parameters)
    return learner


def test_the_decay_is_that_of_the_formula() -> None:
    ema = MovingAverage.Params(decay=0.9).instantiate(named_parameters={})
    assert [ema.decay(n) for n in (0, 1, 79, 80, 81, 1000)] == [0.1, 2 / 11, 80 / 89, 0.9, 0.9, 0.9]
    plain = MovingAverage.Params(decay=0.9, warm_up=False).instantiate(named_parameters={})
    assert plain.decay(0) == 0.9


def test_the_average_follows_the_recurrence(parameters: dict[str, Tensor]) -> None:
    learner = make_learner(parameters, decay=0.9)
    expected = {name: tensor.double() for name, tensor in parameters.items()}
    for step in range(100):
        learner.update(step=step, grads=make_gradients(step))
        decay = min((1 + step) / (10 + step), 0.9)
        expected = {name: decay * e + (1 - decay) * parameters[name].double() for name, e in expected.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(learner.state_tensors()[f"ema.{name}"], tensor.float(), rtol=1e-5, atol=1e-6)


def test_averages_are_swapped_in_and_out_bit_by_bit(parameters: dict[str, Tensor]) -> None:
    learner = make_learner(parameters, decay=0.9)
    for step in range(3):
        learner.update(step=step, grads=make_gradients(step))
    trained = {name: tensor.clone() for name, tensor in parameters.items()}
    averaged = {name: learner.state_tensors()[f"ema.{name}"].clone() for name in parameters}
    changes: list[Tensor] = []
    with (
        pytest.raises(KeyError),
        learner.averages(on_change=lambda: changes.append(parameters["task.decoder.kernel"].clone())),
    ):
        assert all(torch.equal(parameters[name], averaged[name]) for name in parameters)
        raise KeyError("an evaluation that fails")
    assert all(torch.equal(parameters[name], trained[name]) for name in parameters)
    assert all(torch.equal(learner.state_tensors()[f"ema.{name}"], averaged[name]) for name in parameters)
    assert torch.equal(changes[0], averaged["task.decoder.kernel"])
    assert torch.equal(changes[1], trained["task.decoder.kernel"])


def test_nothing_is_updated_or_saved_while_averages_are_in(parameters: dict[str, Tensor]) -> None:
    learner = make_learner(parameters)
    with learner.averages():
        with pytest.raises(TrainingError, match=r"learner\.update: must be called outside"):
            learner.update(step=0, grads=make_gradients(0))
        with pytest.raises(TrainingError, match=r"learner\.state_tensors: must be called outside"):
            learner.state_tensors()
        with pytest.raises(TrainingError, match=r"learner\.averages: must be called outside"), learner.averages():
            pass
    learner.update(step=0, grads=make_gradients(0))


def test_without_an_average_the_context_does_nothing() -> None:
    parameters = make_parameters()
    learner = Learner.Params(learning_rate=0.1).instantiate(named_parameters=parameters)
    with learner.averages(on_change=lambda: pytest.fail("nothing changed")):
        learner.update(step=0, grads=make_gradients(0))
