"""One loss for every layout: trains the same tiny model on a layout and in one process, and compares."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megaseq.base import NestedMap
from megaseq.layers.embedding import Embedding
from megaseq.layers.families import stacks
from megaseq.layers.positions import SinusoidalPositions
from megaseq.learner import AdamW, Constant, Learner
from megaseq.parallel.layout import Parallel, resolve_layout
from megaseq.parallel.mesh import Mesh
from megaseq.tasks.translation import Translation
from megaseq.train.activation_checkpointing import ActivationCheckpointing
from megaseq.train.engine import Engine

from .harness import run_ranks

VOCAB, ROWS, SOURCE_LENGTH, TARGET_LENGTH = 64, 8, 16, 8
CLIP_NORM = 0.05
"""Below every norm of these runs, so that a wrong norm shows."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how; `parallel` alone differs between the two runs that are compared."""

    parallel: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Params of `parallel` by path: `{"data": 2, "zero.stage": 1}`."""
    accumulation: int = 1
    precision: str = "fp32"
    varying: bool = False
    """Whether each step has lengths of its own."""
    shorten: int = 0
    """Tokens that the rows of both sides are shorter, so that ranks cannot share them evenly."""
    rows: int = ROWS
    steps: int = 20
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Params of the task by path, instead of those of `task_params`."""
    learner: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Params of the learner by path."""
    checkpointing: str = "none"
    """Mode of activation checkpointing; the one process has none."""

    def alone(self) -> Case:
        """The same in one process."""
        return dataclasses.replace(self, parallel={}, accumulation=1, checkpointing="none")

    def key(self) -> str:
        """What decides the result."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run gave."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, NDArray[np.float32]]
    """Whole, by logical name; not tensors, which processes pass on by reference."""


def task_params() -> Translation.Params:
    """2+2 layers, one matrix for both embeddings and the softmax, every kind of dropout on."""
    return Translation.Params(
        model_dim=32,
        source_vocab_size=VOCAB,
        target_vocab_size=VOCAB,
        source_embedding=Embedding.Params(scale_by_sqrt_dim=True),
        label_smoothing=0.1,
        **stacks(
            num_layers=2,
            num_heads=4,
            hidden_dim=64,
            # With relu rounding would decide whether a unit that is nearly zero lets a gradient through.
            activation="gelu",
            dropout=0.1,
            attention_dropout=0.1,
            activation_dropout=0.1,
            positions=SinusoidalPositions.Params(),
        ),
    )


def learner_params() -> Learner.Params:
    """Clips at every step; the epsilon does not let Adam amplify rounding where the true gradient is zero."""
    return Learner.Params(
        learning_rate=3e-3,
        schedule=Constant.Params(),
        optimizer=AdamW.Params(epsilon=1e-4),
        weight_decay=0.01,
        clip_norm=CLIP_NORM,
    )


def packed_batch(step: int, *, rows: int = ROWS, varying: bool = False, shorten: int = 0) -> NestedMap:
    """The global batch of a step: up to three pairs a row, padding at the ends; lengths are multiples of 4, less
    `shorten`."""
    generator = torch.Generator().manual_seed(1000 + step)
    lengths = (SOURCE_LENGTH, TARGET_LENGTH)
    if varying:
        lengths = (8 + 4 * (step % 3), 4 + 4 * (step * 2 % 3))
    cuts = torch.rand(rows, 2, generator=generator).sort(dim=1).values
    ends = 0.6 + 0.4 * torch.rand(rows, 1, generator=generator)

    def side(length: int) -> NestedMap:
        bounds = torch.cat([cuts * ends, ends], dim=1).mul(length).round().long()
        places = torch.arange(length).expand(rows, length)
        number = (places.unsqueeze(2) >= bounds.unsqueeze(1)).sum(dim=2) + 1
        segment_ids = torch.where(number <= 3, number, 0)
        starts = torch.cat([torch.zeros(rows, 1, dtype=torch.long), bounds], dim=1)
        positions = (places - starts.gather(1, (number - 1).clamp_max(3))) * (segment_ids > 0)
        ids = torch.randint(4, VOCAB, (rows, length), generator=generator) * (segment_ids > 0)
        return NestedMap(ids=ids, segment_ids=segment_ids, positions=positions)

    source, target = side(lengths[0] - shorten), side(lengths[1] - shorten)
    target.weights = (target.segment_ids > 0).float()
    # Something to learn: the label is a function of the token before it.
    target.labels = (target.ids * 7 + 3) % VOCAB * (target.segment_ids > 0)
    return NestedMap(source=source, target=target)


def make_engine(case: Case, *, rank: int) -> Engine:
    """The engine of a rank of `case`; torch.distributed is set up unless it is one process."""
    parallel = Parallel.Params()
    for path, value in case.parallel.items():
        parallel.set(path, value, origin="the test")
    layout = resolve_layout(parallel, world_size=dist.get_world_size() if dist.is_initialized() else 1)
    task, learner = task_params(), learner_params()
    for params, changes in ((task, case.task), (learner, case.learner)):
        for path, value in changes.items():
            params.set(path, value, origin="the test")
    return Engine(
        task,
        learner_params=learner,
        seed=5,
        precision=case.precision,
        accumulation=case.accumulation,
        mesh=Mesh(layout, rank=rank) if layout.world_size > 1 else None,
        parallel=parallel,
        activation_checkpointing=ActivationCheckpointing.Params(mode=case.checkpointing),
    )


def local_rows(batch: NestedMap, *, mesh: Mesh | None) -> NestedMap:
    """What a data rank has of a global batch; dealt out as `PlannedBatch.shard` does."""
    return batch if mesh is None else batch.transform(lambda t: t[mesh.index("data") :: mesh.size("data")])


def train_rank(rank: int, case: Case) -> Trained | None:
    """Trains `case` on this rank; the first rank returns what came of it."""
    torch.set_flush_denormal(True)
    engine = make_engine(case, rank=rank)
    losses, norms = [], []
    for step in range(case.steps):
        whole = packed_batch(step, rows=case.rows, varying=case.varying, shorten=case.shorten)
        batch = local_rows(whole, mesh=engine.mesh)
        result = engine.train_step(batch, step=step)
        assert not result.skipped
        losses.append(result.loss_sum / result.weight)
        norms.append(result.grad_norm)
    parameters = {name: tensor.numpy() for name, tensor in gather_parameters(engine).items()}
    return Trained(losses, norms, parameters) if rank == 0 else None


def gather_parameters(engine: Engine, *, prefix: str = "task.") -> dict[str, torch.Tensor]:
    """All fp32 parameters (with prefix "" all state), whole, by logical name; on every rank.

    What several ranks hold must be equal.
    """
    own = [
        (piece.name, piece.global_shape, piece.start, piece.tensor.clone())
        for piece in engine.pieces()
        if piece.name.startswith(prefix)
    ]
    gathered: list[Any] = [own]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
    whole: dict[str, torch.Tensor] = {}
    for name, shape, start, tensor in (piece for held in gathered for piece in held):
        target = whole.setdefault(name, torch.full(shape, torch.nan))
        view = target[tuple(slice(a, a + n) for a, n in zip(start, tensor.shape, strict=True))]
        known = ~view.isnan()
        torch.testing.assert_close(tensor[known], view[known], rtol=0, atol=1e-6, msg=f"ranks differ in {name}")
        view.copy_(tensor)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"no rank has all of {name}"
    return whole


@functools.cache
def _reference(key: str, case_of_key: _Keyed) -> Trained:
    trained = run_ranks(train_rank, world_size=1, arguments=(case_of_key.case,))[0]
    assert isinstance(trained, Trained)
    return trained


@dataclasses.dataclass(frozen=True, eq=False)
class _Keyed:
    """Carries a case through the cache, which compares keys alone."""

    case: Case

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def reference(case: Case) -> Trained:
    """What `case` gives in one process; computed once."""
    alone = case.alone()
    return _reference(alone.key(), _Keyed(alone))


def check_layout(
    parallel: Mapping[str, Any],
    *,
    world_size: int,
    rtol: float = 1e-5,
    parameter_tolerance: float = 1e-4,
    timeout_seconds: float = 400.0,
    **options: Any,
) -> Trained:
    """Trains on the layout and in one process: losses and gradient norms must agree to `rtol`, relative.

    Args:
        parallel: params by path; those of the one process are the defaults.
        world_size: ranks.
        rtol: of losses and norms.
        parameter_tolerance: of final parameters, absolute and relative.
        timeout_seconds: after which all are killed.
        options: further fields of `Case`.

    Returns:
        What the layout gave.
    """
    case = Case(parallel=dict(parallel), **options)
    expected = reference(case)
    assert min(expected.norms) > 1.5 * CLIP_NORM, "clipping is not active at every step"
    got = run_ranks(train_rank, world_size=world_size, arguments=(case,), timeout_seconds=timeout_seconds)[0]
    assert isinstance(got, Trained)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=rtol, err_msg="losses")
    np.testing.assert_allclose(got.norms, expected.norms, rtol=rtol, err_msg="gradient norms")
    assert got.parameters.keys() == expected.parameters.keys()
    tolerance = parameter_tolerance
    for name, values in expected.parameters.items():
        np.testing.assert_allclose(got.parameters[name], values, rtol=tolerance, atol=tolerance, err_msg=name)
    return got
