"""Tensor and sequence parallelism: every kind of model has the loss, gradients and outputs of one process."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megaseq.base import ParamsError
from megaseq.decode import BeamSearch, GreedySearch, Sampler
from megaseq.layers.attention import Attention
from megaseq.layers.base import bind, initialize
from megaseq.parallel.apply import apply, whole_parameters, whole_tensor
from megaseq.parallel.layout import Parallel, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.tasks.translation import Translation

from .harness import run_ranks
from .models import MODELS, batch_of, task_of

LENGTHS = [(8, 4), (8, 5), (7, 4), (7, 5)]
"""Of source and target: both, one or none of them divided by two and four ranks."""

Arrays = dict[str, NDArray[Any]]


def build(name: str, *, rank: int, parallel: dict[str, Any]) -> tuple[Translation, Mesh | None]:
    """This rank's part of a model, initialised and bound."""
    task: Translation = task_of(MODELS[name]()).instantiate()
    mesh = None
    if dist.is_initialized():
        params = Parallel.Params()
        for path, value in parallel.items():
            params.set(path, value, origin="the test")
        mesh = Mesh(resolve_layout(params, world_size=dist.get_world_size()), rank=rank)
        apply(task, mesh=mesh, params=params)
    initialize(task, seed=3)
    context = bind(task, seed=3)
    context.step, context.row_start, context.row_stride = 5, 1, 3
    return task, mesh


def whole(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: tensor.detach().float().numpy().copy() for name, tensor in tensors.items()}


def train_rank(rank: int, names: list[str], parallel: dict[str, Any], dtype: str = "float32") -> dict[str, Arrays]:
    """Loss, metrics, first values and gradients of models on batches of several lengths, all dropouts on."""
    results: dict[str, Arrays] = {}
    for name in names:
        task, mesh = build(name, rank=rank, parallel=parallel)
        first = dict(task.named_parameters()) if mesh is None else whole_parameters(task, mesh=mesh)
        results[f"{name} first values"] = whole(first)
        for lengths in LENGTHS:
            task.zero_grad()
            batch = batch_of(rows=3, source_length=lengths[0], target_length=lengths[1])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                output = task.compute_loss(batch)
            output.loss_sum.backward()
            found = {"loss": output.loss_sum} | {key: value[0] for key, value in output.metrics.items()}
            for path, parameter in task.named_parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found[path] = gradient if mesh is None else whole_tensor(gradient, parameter=parameter, mesh=mesh)
            results[f"{name} {lengths}"] = whole(found)
    return results


@functools.cache
def alone(names: tuple[str, ...], dtype: str = "float32") -> dict[str, Arrays]:
    result: dict[str, Arrays] = run_ranks(train_rank, world_size=1, arguments=(list(names), {}, dtype))[0]
    return result


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        ({"tensor": 2}, 2),
        ({"tensor": 2, "sequence": True}, 2),
        pytest.param({"tensor": 4}, 4, marks=pytest.mark.slow),
        pytest.param({"tensor": 4, "sequence": True}, 4, marks=pytest.mark.slow),
        ({"tensor": 2, "rules": {"vocab": "none"}, "sequence": True}, 2),
        ({"tensor": 2, "rules": {"heads": "none"}}, 2),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_loss_and_gradients_are_those_of_one_process(parallel: dict[str, Any], world_size: int) -> None:
    names = tuple(MODELS)
    expected = alone(names)
    results = run_ranks(train_rank, world_size=world_size, arguments=(list(names), parallel))
    for result in results:
        assert result.keys() == expected.keys()
        for place, arrays in expected.items():
            exact = place.endswith("first values")
            for key, values in arrays.items():
                scale = max(1e-2, float(np.abs(values).max()))
                np.testing.assert_allclose(
                    result[place][key], values, rtol=0, atol=0 if exact else 2e-5 * scale, err_msg=f"{place} {key}"
                )


def test_replicated_parameters_have_the_same_gradients_bit_by_bit() -> None:
    """Else weights that ranks hold together would drift apart."""
    names = ["grouped", "bart"]
    results = run_ranks(local_gradients, world_size=2, arguments=(names, {"tensor": 2, "sequence": True}))
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    for key in results[0]:
        np.testing.assert_array_equal(results[0][key], results[1][key], err_msg=key)


def local_gradients(rank: int, names: list[str], parallel: dict[str, Any]) -> Arrays:
    found: Arrays = {}
    for name in names:
        task, _ = build(name, rank=rank, parallel=parallel)
        task.compute_loss(batch_of(rows=3, source_length=8, target_length=6)).loss_sum.backward()
        for path, parameter in task.named_parameters():
            shard = getattr(parameter, "shard", None)
            assert parameter.grad is not None, path
            if shard is None:
                found[f"{name} {path}"] = parameter.grad.numpy()
            elif any(shard.shared):
                kept = [box.of_local(parameter.grad) for box, own in zip(shard.boxes, shard.shared, strict=True) if own]
                found[f"{name} {path}"] = torch.cat(kept).numpy()
    return found


def test_bfloat16_is_as_near_to_float32_as_one_process_is() -> None:
    names = ("t5", "widths")
    precise, expected = alone(names), alone(names, "bfloat16")
    got = run_ranks(train_rank, world_size=2, arguments=(list(names), {"tensor": 2, "sequence": True}, "bfloat16"))[0]
    for place, arrays in precise.items():
        error, usual = (
            sum(float(np.square(other[place][key] - values).sum()) for key, values in arrays.items())
            for other in (got, expected)
        )
        assert error <= 4 * usual, f"{place}: {error} against {usual}"
        assert place.endswith("first values") or error > 0


def decode_rank(rank: int, names: list[str], parallel: dict[str, Any]) -> list[Any]:
    """Greedy, beam and sampled outputs, with a coverage penalty, of sources of different lengths."""
    found: list[Any] = []
    for name in names:
        task, _ = build(name, rank=rank, parallel=parallel)
        task.eval()
        source = batch_of(rows=4, source_length=7, target_length=5, packed=False).source
        special = {"target_sos_id": 1, "target_eos_id": 2, "target_seq_len": 9}
        searches = [
            GreedySearch.Params(**special),
            BeamSearch.Params(**special, num_hyps_per_beam=3, num_best=2, coverage_penalty=0.2),
            Sampler.Params(**special, num_samples=2),
        ]
        with torch.inference_mode():
            for search in searches:
                hypotheses = task.decode(source, search=search)
                found.append([[(list(h.ids), round(float(h.score), 3)) for h in row] for row in hypotheses])
    return found


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"tensor": 2, "sequence": True}], ids=["tp2", "tp2-sequence"])
def test_decoding_gives_what_one_process_gives(parallel: dict[str, Any]) -> None:
    names = list(MODELS)
    expected = run_ranks(decode_rank, world_size=1, arguments=(names, {}))[0]
    for result in run_ranks(decode_rank, world_size=2, arguments=(names, parallel)):
        assert result == expected


def refused_rank(rank: int, parallel: dict[str, Any], change: str) -> str:
    p = task_of(MODELS["grouped"]())
    for _, attention in p.find(Attention):
        if change == "key heads":
            attention.num_heads, attention.num_key_value_heads = 12, 3
    if change == "hidden":
        p.encoder.layer.ffn.hidden_dim = 25
    if change == "heads":
        p = task_of(MODELS["t5"]())
        p.decoder.layer.self_attention.num_heads = p.encoder.layer.self_attention.num_heads = 3
    params = Parallel.Params()
    for path, value in parallel.items():
        params.set(path, value, origin="the test")
    mesh = Mesh(resolve_layout(params, world_size=2), rank=rank)
    try:
        apply(p.instantiate(), mesh=mesh, params=params)
    except ParamsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "parallel", "message"),
    [
        (
            "hidden",
            {"tensor": 2},
            "parallel.tensor: must divide the 25 hidden units of task.encoder.layers.1.ffn.up.weight, but is 2. "
            "Choose one of [1, 5, 25].",
        ),
        (
            "heads",
            {"tensor": 2},
            "parallel.tensor: must divide the 3 heads of task.encoder.position_bias.weight, but is 2. "
            "Choose one of [1, 3].",
        ),
        (
            "key heads",
            {"tensor": 2},
            "parallel.tensor: must divide the 3 key heads of task.encoder.layers.0.self_attention.qkv.weight or be a "
            "multiple of them, but is 2. Choose one of [1, 3].",
        ),
        (
            "",
            {"tensor": 2, "sequence": True, "rules": {"hidden": "none"}},
            "parallel.sequence: must be false where heads or hidden units are not divided over tensor ranks, but is "
            "True. Remove parallel.rules.heads and parallel.rules.hidden.",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(change: str, parallel: dict[str, Any], message: str) -> None:
    assert run_ranks(refused_rank, world_size=2, arguments=(parallel, change)) == [message, message]
