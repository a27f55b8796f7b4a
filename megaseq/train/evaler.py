"""The evaluation job: the loss of a checkpoint, or of every checkpoint of a run, on the evaluation inputs."""

from __future__ import annotations

from pathlib import Path

from megaseq.train.jobs import Edit, Job, run_once, watch_run
from megaseq.train.saving import TrainedModel
from megaseq.train.validation import Validation


def _work(model: TrainedModel, validation: Validation) -> dict[str, float]:
    with model.evaluating() as task:
        return validation.evaluate(task, step=model.step)


def evaluate_checkpoint(
    path: Path | str, *, edit: Edit = lambda params: None, averaged: bool = True
) -> dict[str, float]:
    """Returns `eval/NAME/loss` and the other figures of a checkpoint, or of the newest of a run directory.

    Args:
        path: of a checkpoint or a run directory.
        edit: changes the checkpoint's params first.
        averaged: use the moving averages where there are any.
    """
    return run_once(Job(name="eval", work=_work, edit=edit, averaged=averaged), path=path)


def watch(path: Path | str, *, edit: Edit, averaged: bool = True, poll_seconds: float = 5.0) -> None:
    """Evaluates each checkpoint of the run in `path` once, until training is finished; figures go to RUN/eval."""
    watch_run(Job(name="eval", work=_work, edit=edit, averaged=averaged), path=path, poll_seconds=poll_seconds)
