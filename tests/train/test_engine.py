"""One optimiser step."""

from __future__ import annotations

import math

import pytest
import torch

from megaseq.learner import SGD, AdamW, Constant, Learner, MovingAverage
from megaseq.train.engine import Engine, split_rows
from megaseq.train.precision import resolve_precision

from .tiny import random_batch, task_params

VOCAB = 30


def make_engine(*, accumulation: int = 1, precision: str = "fp32", **learner: object) -> Engine:
    settings = {"learning_rate": 0.1, "schedule": Constant.Params(), "optimizer": SGD.Params(), **learner}
    return Engine(
        task_params(source_vocab_size=VOCAB, target_vocab_size=VOCAB),
        learner_params=Learner.Params(**settings),
        seed=3,
        precision=precision,
        accumulation=accumulation,
    )


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.state_tensors().items() if name.startswith("task.")}


@pytest.mark.parametrize(("accumulation", "rows"), [(2, 4), (4, 2), (8, 1)])
def test_update_does_not_depend_on_the_split(accumulation: int, rows: int) -> None:
    whole, parts = make_engine(clip_norm=None), make_engine(accumulation=accumulation, clip_norm=None)
    batch = random_batch(rows=8)
    assert [part.source.ids.shape[0] for part in split_rows(batch, parts=accumulation)] == [rows] * accumulation
    for step in range(3):
        first, second = whole.train_step(batch, step=step), parts.train_step(batch, step=step)
        assert second.loss_sum == pytest.approx(first.loss_sum, rel=1e-6)
        assert second.weight == first.weight
        assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)
    left, right = weights_of(whole), weights_of(parts)
    for name in left:
        torch.testing.assert_close(right[name], left[name], rtol=0, atol=1e-6, msg=name)


def test_gradient_is_that_of_the_mean_over_all_target_tokens() -> None:
    engine = make_engine(clip_norm=None, accumulation=3)
    batch = random_batch(rows=7)
    before = weights_of(engine)
    reference = make_engine()
    reference.task.train()
    output = reference.task.compute_loss(batch)
    (output.loss_sum / batch.target.weights.sum()).backward()
    engine.train_step(batch, step=0)
    for name, parameter in reference.task.named_parameters():
        expected = before[f"task.{name}"] - 0.1 * parameter.grad
        torch.testing.assert_close(engine.state_tensors()[f"task.{name}"], expected, rtol=0, atol=1e-6)


def test_split_of_uneven_rows_keeps_every_row_once() -> None:
    batch = random_batch(rows=5)
    parts = split_rows(batch, parts=3)
    assert torch.equal(torch.cat([part.source.ids for part in parts]), batch.source.ids)
    assert [part.target.weights.shape[0] for part in parts] == [1, 2, 2]
    assert len(split_rows(batch, parts=9)) == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nonfinite_step_changes_nothing(bad: float, precision: str) -> None:
    engine = make_engine(
        accumulation=2, precision=precision, optimizer=AdamW.Params(), ema=MovingAverage.Params(decay=0.5)
    )
    batch = random_batch()
    engine.train_step(batch, step=0)
    before = {name: value.clone() for name, value in engine.state_tensors().items()}
    poisoned = batch.deep_copy()
    poisoned.target.weights = batch.target.weights.clone()
    poisoned.target.weights[-1, 0] = bad
    result = engine.train_step(poisoned, step=1)
    assert result.skipped == "non-finite"
    for name, value in engine.state_tensors().items():
        assert torch.equal(value, before[name]), name
    assert engine.train_step(batch, step=2).skipped == ""
    assert not torch.equal(
        engine.state_tensors()["task.source_embedding.weight"], before["task.source_embedding.weight"]
    )


def test_bf16_keeps_fp32_masters_and_follows_fp32() -> None:
    exact, rounded = (
        make_engine(optimizer=AdamW.Params(), learning_rate=1e-3),
        make_engine(optimizer=AdamW.Params(), learning_rate=1e-3, precision="bf16", accumulation=2),
    )
    assert rounded.task.source_embedding.weight.dtype is torch.bfloat16
    assert rounded.task.encoder.layers[0].ffn.norm.weight.dtype is torch.float32
    batch = random_batch()
    for step in range(20):
        first, second = exact.train_step(batch, step=step), rounded.train_step(batch, step=step)
        assert second.loss_sum / second.weight == pytest.approx(first.loss_sum / first.weight, abs=0.02)
    masters = {n: t for n, t in rounded.state_tensors().items() if n.startswith("task.")}
    assert all(tensor.dtype is torch.float32 for tensor in masters.values())
    # The computing weights are the masters, rounded; not something that drifts by itself.
    torch.testing.assert_close(
        rounded.task.source_embedding.weight, masters["task.source_embedding.weight"].bfloat16(), rtol=0, atol=0
    )


def test_autocast_keeps_fp32_weights() -> None:
    engine = make_engine(precision="bf16_autocast")
    first = engine.train_step(random_batch(), step=0)
    assert engine.task.source_embedding.weight.dtype is torch.float32
    exact = make_engine().train_step(random_batch(), step=0)
    assert first.loss_sum == pytest.approx(exact.loss_sum, rel=0.01)
    assert first.loss_sum != exact.loss_sum


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluating_uses_the_average_and_puts_the_weights_back(precision: str) -> None:
    engine = make_engine(ema=MovingAverage.Params(decay=0.9, warm_up=False), precision=precision)
    for step in range(3):
        engine.train_step(random_batch(), step=step)
    before = {name: value.clone() for name, value in engine.state_tensors().items()}
    name = "source_embedding.weight"
    with engine.evaluating() as task:
        assert not task.training
        used = task.get_parameter(name).detach().clone()
    torch.testing.assert_close(
        used.float(), before[f"ema.task.{name}"], rtol=1e-2 if precision == "bf16" else 0, atol=0
    )
    for key, value in engine.state_tensors().items():
        assert torch.equal(value, before[key]), key
    assert engine.task.training
    with engine.evaluating(averaged=False) as task:
        assert torch.equal(task.get_parameter(name).float(), before[f"task.{name}"].to(used.dtype).float())


def test_state_restores_bitwise() -> None:
    first = make_engine(optimizer=AdamW.Params(), ema=MovingAverage.Params())
    for step in range(3):
        first.train_step(random_batch(seed=step), step=step)
    second = make_engine(optimizer=AdamW.Params(), ema=MovingAverage.Params())
    for piece, saved in zip(second.pieces(), first.pieces(), strict=True):
        assert piece.name == saved.name
        piece.tensor.copy_(saved.tensor)
    second.loaded(learner_state=first.learner.state())
    for step in range(3, 6):
        assert first.train_step(random_batch(seed=step), step=step) == second.train_step(
            random_batch(seed=step), step=step
        )
    for name, value in second.state_tensors().items():
        assert torch.equal(value, first.state_tensors()[name]), name


def test_auto_precision_is_bf16_only_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("megaseq.train.precision.has_native_bf16", lambda device, native=native: native)
        assert resolve_precision("auto", device=cpu) == expected
    assert resolve_precision("bf16_autocast", device=cpu) == "bf16_autocast"
    with pytest.raises(ValueError, match="precision: must be auto"):
        resolve_precision("fp8", device=cpu)
