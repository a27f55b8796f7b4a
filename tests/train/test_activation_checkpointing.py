"""Layers that are computed again give the same losses and gradients, to the bit, and keep less."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaseq.base.errors import ParamsError
from megaseq.layers.base import bind, initialize
from megaseq.layers.families import t5
from megaseq.layers.transformer import TransformerLayer
from megaseq.tasks.translation import Translation
from megaseq.train import activation_checkpointing
from megaseq.train.activation_checkpointing import (
    ActivationCheckpointing,
    check_rules,
    checkpoint_activations,
    layer_paths,
    mode_of,
)
from megaseq.train.planning.live_memory import LiveMemory

from .tiny import random_batch, stacks, task_params

SETTINGS: list[dict[str, Any]] = [
    {"mode": "full"},
    {"mode": "selective"},
    {"mode": "offload"},
    {"rules": {r"encoder\.": "full", r"decoder\.layers\.1": "selective"}},
]


def make_task(settings: dict[str, Any], *, family: str = "plain") -> Translation:
    if family == "t5":
        p = t5(model_dim=16, hidden_dim=32, num_heads=2, head_dim=8, num_layers=2, dropout=0.2)
        p = Translation.Params(**{name: p.get(name) for name in type(p).__params_fields__})
    else:
        sides = stacks(num_layers=2, num_heads=2, hidden_dim=32, dropout=0.2, attention_dropout=0.1)
        p = task_params(**sides)
    task: Translation = p.replace(source_vocab_size=30, target_vocab_size=30).instantiate()
    initialize(task, seed=3)
    bind(task, seed=3)
    checkpoint_activations(task, params=ActivationCheckpointing.Params(**settings))
    return task


def gradients(task: Translation, *, steps: int = 2) -> list[torch.Tensor]:
    """Losses and gradients of forward passes that all come before the backward passes, as in a pipeline."""
    found = []
    for step in range(steps):
        losses = []
        for micro_batch in range(3):
            task.context.step, task.context.row_start = step, 8 * micro_batch
            losses.append(task.compute_loss(random_batch(seed=micro_batch)).loss_sum)
        for loss in losses:
            loss.backward()
        found += [loss.detach() for loss in losses]
    return found + [parameter.grad for parameter in task.parameters()]


@pytest.mark.parametrize("family", ["plain", "t5"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_losses_and_gradients_are_the_same_to_the_bit(
    settings: dict[str, Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_checkpointing, "leaves_device", lambda tensor: True)
    before = torch.get_rng_state()
    expected, found = gradients(make_task({}, family=family)), gradients(make_task(settings, family=family))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_modes_follow_the_first_rule_that_matches() -> None:
    params = ActivationCheckpointing.Params(mode="full", rules={"decoder": "none", r"layers\.1$": "selective"})
    expected = {"encoder.layers.0": "full", "encoder.layers.1": "selective", "decoder.layers.1": "none"}
    assert {path: mode_of(f"task.{path}", params=params) for path in expected} == expected


def test_a_rule_without_layers_is_refused() -> None:
    task = make_task({})
    paths = [f"task.{name}" for name, layer in task.named_modules() if isinstance(layer, TransformerLayer)]
    assert layer_paths(task.params) == paths
    check_rules(ActivationCheckpointing.Params(rules={"decoder": "full"}), task=task.params)
    with pytest.raises(ParamsError, match=r"must have patterns that match a layer, but is 'decodr'. Layers are task"):
        check_rules(ActivationCheckpointing.Params(rules={"decodr": "full"}), task=task.params)
    assert "must have regular expressions" in str(ActivationCheckpointing.Params(rules={"(": "full"}).check()[0])


def test_no_gradient_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task({"mode": "full"}).eval()
    monkeypatch.setattr(activation_checkpointing, "checkpoint", None)
    with torch.no_grad():
        task.compute_loss(random_batch())


def kept_bytes(settings: dict[str, Any]) -> int:
    """Bytes that live after a forward pass and not before it."""
    task = make_task(settings)
    batch = random_batch(rows=16, length=64)
    with LiveMemory() as memory:
        memory.track([*task.parameters(), *batch.flatten()])
        before = memory.current
        loss = task.compute_loss(batch).loss_sum
        kept = memory.current - before
        loss.backward()
        assert memory.peak >= before + kept
    return kept


def test_what_is_computed_again_is_not_kept() -> None:
    everything, selective, full = (kept_bytes({"mode": mode}) for mode in ("none", "selective", "full"))
    assert full < 0.25 * everything
    assert selective < 0.7 * everything
    half = kept_bytes({"rules": {"encoder": "full"}})
    assert full < half < everything
