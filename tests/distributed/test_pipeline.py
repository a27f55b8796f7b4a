"""Stages against the whole model: losses and gradients of every schedule, forward passes alone, tied tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaseq.layers.base import StepContext, bind, initialize
from megaseq.layers.embedding import Embedding
from megaseq.layers.relative import BucketedBias
from megaseq.parallel.layout import Parallel, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.pipeline import StagePlan, TiedTensors, keep_tensors, make_plan
from megaseq.parallel.pipeline.job import PipelineJob
from megaseq.parallel.pipeline.runner import PipelineRunner
from megaseq.parallel.pipeline_params import Pipeline
from megaseq.tasks.translation import Translation
from megaseq.train.rows import split_rows

from .harness import run_ranks
from .parity import packed_batch, task_params
from .test_parity import MIXED


def _task(changes: dict[str, Any]) -> tuple[Translation, StepContext]:
    params = task_params()
    for path, value in changes.items():
        params.set(path, value, origin="the test")
    task: Translation = params.instantiate()
    initialize(task, seed=3)
    return task, bind(task, seed=3)


def _enter(context: StepContext, *, step: int, index: int, rows: int) -> None:
    context.step, context.row_start = step, index * rows


def _whole(changes: dict[str, Any], *, steps: int, count: int, varying: bool) -> tuple[list[float], dict[str, Any]]:
    """Losses of each micro-batch and gradients, summed over the steps, of the whole model."""
    task, context = _task(changes)
    losses = []
    for step in range(steps):
        for index, batch in enumerate(split_rows(packed_batch(step, varying=varying), parts=count)):
            _enter(context, step=step, index=index, rows=8 // count)
            output = task.compute_loss(batch)
            (output.loss_sum * 0.5).backward()  # type: ignore[no-untyped-call]
            losses.append(float(output.loss_sum.detach()))
    return losses, {name: parameter.grad for name, parameter in task.named_parameters()}


def _setup(
    rank: int, *, world_size: int, pipeline: dict[str, Any], changes: dict[str, Any]
) -> tuple[Translation, StepContext, Mesh, StagePlan, PipelineRunner]:
    layout = resolve_layout(Parallel.Params(pipe=world_size), world_size=world_size)
    mesh = Mesh(layout, rank=rank)
    task, context = _task(changes)
    plan = make_plan(task.units(), params=Pipeline.Params(**pipeline), ranks=world_size)
    keep_tensors(task, names=plan.tensors_of(rank))
    runner = PipelineRunner(task, plan=plan, mesh=mesh, device=torch.device("cpu"))
    return task, context, mesh, plan, runner


def _check_gradients(
    rank: int, world_size: int, pipeline: dict[str, Any], changes: dict[str, Any], count: int, varying: bool
) -> tuple[list[float], float, float]:
    """Compares this rank's gradients of two steps with the whole model's.

    Returns:
        What it saw of the losses of micro-batches; what layers of its other stages added to them; the sum of all.
    """
    task, context, mesh, _, runner = _setup(rank, world_size=world_size, pipeline=pipeline, changes=changes)
    tied = TiedTensors(dict(task.named_parameters()), mesh=mesh)
    expected_losses, expected = _whole(changes, steps=2, count=count, varying=varying)
    losses: list[float] = []
    added: list[float] = []
    done: list[int] = []
    for step in range(2):
        parts = split_rows(packed_batch(step, varying=varying), parts=count)
        job = PipelineJob(
            batches=parts,
            shapes=task.flow_shapes(parts[0]),
            dtype=torch.float32,
            scale=torch.tensor(0.5),
            before_forward=lambda index, step=step: _enter(context, step=step, index=index, rows=8 // count),  # type: ignore[misc]
            after_backward=lambda step=step: done.append(step),  # type: ignore[misc]
        )
        runner.step(job)
        losses += [float(job.outputs[index].loss_sum) for index in sorted(job.outputs)]
        added += [float(loss) for loss, _ in job.added]
    assert done == [0] * count * len(runner.modules) + [1] * count * len(runner.modules)
    gradients = {}
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, f"no gradient of {name}"
        gradients[name] = parameter.grad
    tied.sum(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]
    if losses and not any(path.endswith("num_experts") for path in changes):
        torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
    return losses, sum(added), sum(expected_losses)


CASES = [
    ("gpipe", 2, {"schedule": "gpipe"}, {}, 2, False),
    ("1f1b", 2, {"schedule": "1f1b"}, {}, 4, True),
    ("interleaved", 2, {"schedule": "interleaved"}, {}, 2, True),
    ("zero_bubble_v", 2, {"schedule": "zero_bubble_v"}, {}, 4, True),
    ("uneven", 4, {"schedule": "1f1b"}, {}, 4, False),
    ("one-unit-a-stage", 4, {"schedule": "zero_bubble_v", "split": (1, 1, 1, 1, 1, 1, 1, 1)}, {}, 8, False),
    # Every kind of parameter that several stages read, or that only one does.
    (
        "shared-biases",
        4,
        {"schedule": "1f1b", "split": (2, 1, 3, 2)},
        {
            "encoder.position_bias": BucketedBias.Params(),
            "decoder.position_bias": BucketedBias.Params(),
            "decoder.layer.self_attention.position_bias": None,
            "target_embedding": Embedding.Params(),
            "logits_bias": "parameter",
        },
        4,
        False,
    ),
    (
        "own-softmax-zero-bubble",
        2,
        {"schedule": "zero_bubble_v"},
        {"encoder.position_bias": BucketedBias.Params(), "head": Embedding.Params(), "decoder.model_dim": 48}
        | {"target_embedding": Embedding.Params(), "encoder.residual": "post", "decoder.output_dropout": True},
        4,
        True,
    ),
    # Embedding and softmax of one matrix, and a bias of two layers, in one stage.
    (
        "used-twice-in-a-stage",
        2,
        {"schedule": "zero_bubble_v", "split": (1, 2, 1, 4)},
        {"encoder.position_bias": BucketedBias.Params(), "decoder.position_bias": BucketedBias.Params()},
        2,
        False,
    ),
    ("cut-after-embedding", 2, {"schedule": "zero_bubble_v", "split": (2, 3, 2, 1)}, {}, 4, False),
    # What routers add to the loss, in stages that end with a layer, with the encoder, and with the loss.
    ("experts", 4, {"schedule": "1f1b", "split": (2, 2, 3, 1)}, MIXED, 4, True),
    ("experts-zero-bubble", 2, {"schedule": "zero_bubble_v", "split": (2, 2, 2, 2)}, MIXED, 4, False),
]


@pytest.mark.parametrize(
    ("world_size", "pipeline", "changes", "count", "varying"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_stages_have_the_gradients_of_the_whole(
    world_size: int, pipeline: dict[str, Any], changes: dict[str, Any], count: int, varying: bool
) -> None:
    arguments = (world_size, pipeline, changes, count, varying)
    results = run_ranks(_check_gradients, world_size=world_size, arguments=arguments)
    assert sum(bool(losses) for losses, _, _ in results) == 1
    total = sum(sum(losses) + added for losses, added, _ in results)
    assert total == pytest.approx(results[0][2], rel=1e-6)
