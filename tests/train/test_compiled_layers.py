"""Compiled layers compute the same, for every length, with our own attention and dropout between the pieces."""

from __future__ import annotations

import pytest
import torch

from megaseq.learner import AdamW, Constant, Learner
from megaseq.train.activation_checkpointing import ActivationCheckpointing
from megaseq.train.engine import Engine

from .tiny import random_batch, stacks, task_params


def make_engine(*, compiled: bool, mode: str = "none") -> Engine:
    sides = stacks(num_layers=1, num_heads=2, hidden_dim=32, dropout=0.2, attention_dropout=0.1)
    return Engine(
        task_params(source_vocab_size=30, target_vocab_size=30, **sides),
        learner_params=Learner.Params(
            learning_rate=1e-2, schedule=Constant.Params(), optimizer=AdamW.Params(epsilon=1e-4)
        ),
        seed=3,
        precision="fp32",
        activation_checkpointing=ActivationCheckpointing.Params(mode=mode),
        compiled=compiled,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_steps_are_those_of_layers_that_are_not_compiled(mode: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset() leaves those of the mode before
    plain, compiled = make_engine(compiled=False), make_engine(compiled=True, mode=mode)
    for step, (rows, length) in enumerate([(8, 9), (6, 12), (4, 17), (5, 30), (8, 9)]):
        batch = random_batch(rows=rows, length=length)
        expected, found = plain.train_step(batch, step=step), compiled.train_step(batch, step=step)
        assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    # Two layers, compiled for one shape and then for all: few pieces, whatever the number of shapes.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 40


def test_nothing_is_compiled_without_being_asked() -> None:
    engine = make_engine(compiled=False)
    assert "forward" not in vars(engine.task.encoder.layers[0])
