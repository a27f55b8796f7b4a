"""Chooses the updater of a run."""

from __future__ import annotations

from megaseq.base.errors import must
from megaseq.learner import Learner
from megaseq.parallel.layout import Parallel
from megaseq.parallel.mesh import Mesh
from megaseq.tasks.base import BaseTask
from megaseq.train.precision import Precision
from megaseq.train.updaters.base import Updater
from megaseq.train.updaters.replicated import Replicated


def make_updater(
    task: BaseTask,
    *,
    learner_params: Learner.Params,
    precision: Precision,
    mesh: Mesh | None,
    parallel: Parallel.Params,
) -> Updater:
    """Returns the updater for the ZeRO stage of `parallel`.

    Raises:
        ParamsError: the stage does not work with the other params.
    """
    if parallel.zero.stage == 0:
        return Replicated(
            task,
            learner_params=learner_params,
            precision=precision,
            mesh=mesh,
            bucket_elements=parallel.zero.bucket_elements,
        )
    raise must(
        "parallel.zero.stage",
        "be 0 in this version",
        parallel.zero.stage,
        "Set parallel.zero.stage=0",
    )
