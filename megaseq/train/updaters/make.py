"""Chooses the updater of a run."""

from __future__ import annotations

import torch

from megaseq.base.errors import must
from megaseq.learner import Adafactor, Learner
from megaseq.parallel.layout import Parallel
from megaseq.parallel.mesh import Mesh
from megaseq.parallel.spec import shard_of
from megaseq.tasks.base import BaseTask
from megaseq.train.precision import Precision
from megaseq.train.updaters.base import Updater
from megaseq.train.updaters.first_shares import Values
from megaseq.train.updaters.replicated import Replicated


def make_updater(
    task: BaseTask,
    *,
    learner_params: Learner.Params,
    precision: Precision,
    mesh: Mesh | None,
    parallel: Parallel.Params,
    device: torch.device,
    values: Values | None = None,
) -> Updater:
    """Returns the updater for the ZeRO stage of `parallel`.

    Args:
        task: initialised, on its device; or, with `values`, without values.
        learner_params: of the run.
        precision: of the weights that the task computes with.
        mesh: None is one process.
        parallel: of the run.
        device: of this process.
        values: in stage 3, first values of parameters that have no memory yet.

    Raises:
        ParamsError: the stage does not work with the other params.
    """
    if issubclass(learner_params.optimizer.cls, Adafactor) and any(shard_of(p) for p in task.parameters()):
        raise must(
            "learner.optimizer",
            "work on parts of matrices where parallel.tensor or parallel.expert is above 1",
            "Adafactor",
            "Its factored moments are means over whole rows and columns: use AdamW",
        )
    if parallel.zero.stage == 0:
        return Replicated(
            task,
            learner_params=learner_params,
            precision=precision,
            mesh=mesh,
            bucket_elements=parallel.zero.bucket_elements,
            overlap=parallel.zero.overlap is not False,
        )
    _check_zero(learner_params, parallel=parallel)
    from megaseq.train.updaters.zero import Zero

    return Zero(
        task,
        learner_params=learner_params,
        precision=precision,
        mesh=mesh,
        parallel=parallel,
        device=device,
        values=values,
    )


def _check_zero(learner_params: Learner.Params, *, parallel: Parallel.Params) -> None:
    """Refuses what cannot be done on flat shares."""
    stage = parallel.zero.stage
    if issubclass(learner_params.optimizer.cls, Adafactor):
        raise must(
            "learner.optimizer",
            f"work on runs of elements with ZeRO stage {stage}",
            "Adafactor",
            "It needs whole matrices: set parallel.zero.stage=0, where its factored moments are small, or use AdamW",
        )
    if stage == 1 and parallel.zero.overlap:
        raise must(
            "parallel.zero.overlap",
            "be false with ZeRO stage 1",
            True,
            "Stage 1 reduces when all micro-batches are done: set parallel.zero.overlap=false or stage 2",
        )
