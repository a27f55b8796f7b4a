"""The translation task."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from train.tiny import random_batch, task_params

from megaseq.base import NestedMap
from megaseq.decode import GreedySearch
from megaseq.layers import families
from megaseq.layers.base import bind, initialize
from megaseq.tasks.translation import Translation

VOCAB = 30


def make(**changes: object) -> Translation:
    task: Translation = task_params(source_vocab_size=VOCAB, target_vocab_size=VOCAB, **changes).instantiate()
    initialize(task, seed=1)
    bind(task, seed=1)
    return task.eval()


def reference_loss(task: Translation, batch: NestedMap, *, smoothing: float, z_loss: float) -> torch.Tensor:
    """The loss from whole logits, in plain torch."""
    logits = task.logits(task.decode_hidden(batch.target, memory=task.encode(batch.source)))
    flat, labels = logits.flatten(0, 1), batch.target.labels.flatten()
    weights = batch.target.weights.flatten()
    loss = functional.cross_entropy(flat, labels, reduction="none", label_smoothing=smoothing)
    return ((loss + z_loss * flat.logsumexp(dim=-1).square()) * weights).sum()


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.1, 1e-2)])
def test_loss_and_gradient_equal_the_plain_formula(smoothing: float, z_loss: float) -> None:
    task = make(label_smoothing=smoothing, z_loss=z_loss)
    batch = random_batch()
    output = task.compute_loss(batch)
    expected = reference_loss(task, batch, smoothing=smoothing, z_loss=z_loss)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-4)
    names = [name for name, _ in task.named_parameters()]
    got = torch.autograd.grad(output.loss_sum, list(task.parameters()))
    wanted = torch.autograd.grad(expected, list(task.parameters()))
    for name, left, right in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4, msg=name)


def test_metrics_are_sums_with_their_weights() -> None:
    task = make(label_smoothing=0.1)
    batch = random_batch()
    output = task.compute_loss(batch)
    count = batch.target.weights.sum()
    assert output.weight == count == task.loss_weight(batch)
    logits = task.logits(task.decode_hidden(batch.target, memory=task.encode(batch.source)))
    right = (logits.argmax(dim=-1) == batch.target.labels) * batch.target.weights
    assert output.metrics["accuracy"] == (right.sum(), count)
    nll, weight = output.metrics["nll"]
    torch.testing.assert_close(nll, reference_loss(task, batch, smoothing=0.0, z_loss=0.0), rtol=1e-5, atol=1e-4)
    assert weight == count and not nll.requires_grad
    assert set(output.metrics) == {"nll", "accuracy"}


def test_padding_does_not_change_the_loss() -> None:
    task = make()
    batch = random_batch()
    wider = NestedMap(
        source=batch.source.transform(lambda value: functional.pad(value, (0, 3))),
        target=batch.target.transform(lambda value: functional.pad(value, (0, 2))),
    )
    torch.testing.assert_close(task.compute_loss(wider).loss_sum, task.compute_loss(batch).loss_sum)


def test_decodes_by_the_search_of_the_params_or_another() -> None:
    task = make()
    source = random_batch(rows=3).source
    with torch.inference_mode():
        beams = task.decode(source, search=task.default_search())
        greedy = task.decode(source, search=GreedySearch.Params(target_seq_len=5))
    assert [len(found) for found in greedy] == [1, 1, 1] and len(beams) == 3
    assert all(len(found[0].ids) <= 5 for found in greedy)


def test_values_out_of_range_are_reported() -> None:
    problems = task_params(label_smoothing=1.0, z_loss=-1.0).check()
    assert [str(problem).split(":")[0] for problem in problems] == ["label_smoothing", "z_loss"]


def test_is_made_of_a_family() -> None:
    model = families.t5(model_dim=16, hidden_dim=24, num_heads=2, head_dim=8, num_layers=1)
    model.source_vocab_size = model.target_vocab_size = 23
    task = Translation.Params.of(model, label_smoothing=0.1)
    assert task.label_smoothing == 0.1 and task.encoder.to_text() == model.encoder.to_text()
    task.encoder.dropout = 0.7
    assert model.encoder.dropout == 0.1
    assert list(task.check()) == []
    made: Translation = task.instantiate()
    assert {name for name, _ in made.named_parameters()} == {name for name, _ in model.instantiate().named_parameters()}
