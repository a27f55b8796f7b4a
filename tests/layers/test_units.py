"""Units run one after the other, wherever the model is cut, compute what the model does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megaseq.layers.base import initialize
from megaseq.layers.decoding_part import DecodingPart
from megaseq.layers.families import stacks
from megaseq.layers.positions import SinusoidalPositions
from megaseq.layers.relative import BucketedBias
from megaseq.tasks.translation import Translation
from tests.train.tiny import random_batch, task_params


def _task() -> Translation:
    sizes = stacks(num_layers=2, num_heads=2, hidden_dim=32, dropout=0.0, positions=SinusoidalPositions.Params())
    params = task_params(source_vocab_size=30, target_vocab_size=30, **sizes)
    params.encoder.position_bias = BucketedBias.Params()
    params.decoder.position_bias = BucketedBias.Params()
    task: Translation = params.instantiate()
    initialize(task, seed=2)
    return task.eval()


@pytest.mark.parametrize("cut", range(1, 8))
def test_pieces_compute_what_the_whole_does(cut: int) -> None:
    task, batch = _task(), random_batch()
    units = task.units()
    carry = task.run_units({}, batch=batch, units=units[:cut])
    assert list(carry) == [flow.name for flow in units[cut - 1].leaves]
    shapes = task.flow_shapes(batch)
    for flow in units[cut - 1].leaves:
        assert tuple(carry[flow.name].shape) == (*shapes[flow.name], flow.width)
    left = task.run_units(carry, batch=batch, units=units[cut:])
    torch.testing.assert_close(left["hidden"], task.decode_hidden(batch.target, memory=task.encode(batch.source)))
    whole, pieces = task.compute_loss(batch), task.output_of(left, batch=batch)
    torch.testing.assert_close(pieces.loss_sum, whole.loss_sum)
    assert pieces.metrics.keys() == whole.metrics.keys()


def test_units_read_every_parameter_and_cost_what_their_matrices_do() -> None:
    task = _task()
    units = task.units()
    assert frozenset.union(*(unit.tensors for unit in units)) == {name for name, _ in task.named_parameters()}
    encoder_layer, decoder_layer = units[1], units[5]
    attention, ffn = 4 * 16 * 16, 2 * 16 * 32
    assert encoder_layer.source_flops == 2 * (attention + ffn)
    assert encoder_layer.target_flops == 0
    # Keys and values of the memory are computed for each token of the source.
    assert decoder_layer.source_flops == 2 * (2 * 16 * 16)
    assert decoder_layer.target_flops == 2 * (attention + 2 * 16 * 16 + ffn)
    assert units[-1].target_flops == 2 * 30 * 16


@pytest.mark.parametrize("cuts", [(5,), (6,), (4, 6), (5, 6, 7)])
def test_parts_of_a_decoder_step_as_the_whole(cuts: tuple[int, ...]) -> None:
    task, batch = _task(), random_batch(rows=3)
    units = task.units()
    runs = [units[start:stop] for start, stop in itertools.pairwise((0, *cuts, len(units)))]
    # The decoder begins with the fifth unit.
    parts = [DecodingPart(task, units=run) for run in runs if run[-1].name.startswith("decoder.")]
    memory = task.encode(batch.source)
    state = task.prefill(batch.source)
    states = [part.prefill(memory) for part in parts]
    tokens = torch.tensor([5, 6, 7])
    with torch.no_grad():
        for hyps in ([[0, 0]] * 3, [[1, 0]] * 3, [[0, 1]] * 3):
            expected, state = task.step(state, tokens=tokens)
            x: Tensor = tokens
            for index, part in enumerate(parts):
                x, states[index] = part.step(states[index], x=x)
            torch.testing.assert_close(x, expected)
            chosen = {"sources": torch.arange(3), "hyps": torch.tensor(hyps)}
            state = task.select(state, **chosen)
            states = [part.select(own, **chosen) for part, own in zip(parts, states, strict=True)]
            tokens = torch.arange(6) + 4
