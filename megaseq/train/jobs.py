"""What the evaler and the decoder have in common: one checkpoint, or every checkpoint of a run that trains."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megaseq.base.errors import AsText, CheckpointError, TrainingError, must
from megaseq.train import parts
from megaseq.train.experiment import Run
from megaseq.train.run_dir import RunDirectory
from megaseq.train.saving import TrainedModel, load_trained
from megaseq.train.signals import StopSignals
from megaseq.train.tracking import Callback, Callbacks, RunFacts
from megaseq.train.tracking.git import git_state
from megaseq.train.validation import Validation
from megaseq.train.watch import Watch

Edit = Callable[[Run.Params], object]
Work = Callable[[TrainedModel, Validation], dict[str, float]]
"""Does a job's work on one checkpoint; returns its figures, none when it was interrupted."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job beside training, and where it keeps its own files."""

    name: str
    """Folder of the job in the run directory: its metrics, its status."""
    work: Work
    edit: Edit = lambda params: None
    """Changes the params of a checkpoint before it is built."""
    averaged: bool = True
    """Whether moving averages are used where there are any."""


def run_dir_of(path: Path | str) -> RunDirectory | None:
    """Returns the run directory that `path` is, or that the checkpoint `path` lies in; None outside one."""
    path = Path(path)
    for candidate in (path, path.parent, path.parent.parent):
        run_dir = RunDirectory(candidate)
        if run_dir.params_yaml.is_file() and run_dir.checkpoints.is_dir():
            return run_dir
    return None


def run_once(job: Job, *, path: Path | str, callback: Callback | None = None) -> dict[str, float]:
    """Does the job on one checkpoint, or on the newest of a run directory; returns its figures."""
    with StopSignals() as signals:
        model = load_trained(path, edit=job.edit, averaged=job.averaged)
        run_dir = run_dir_of(model.path)
        with _validation(model, run_dir=run_dir, callback=callback or Callback(), signals=signals) as validation:
            return job.work(model, validation)


def watch_run(job: Job, *, path: Path | str, poll_seconds: float = 5.0) -> None:
    """Does the job on every checkpoint of the run in `path` as it appears, each once, until training is finished.

    Raises:
        TrainingError: `path` is no run directory.
    """
    run_dir = RunDirectory(path)
    params = run_dir.read_params()
    own = run_dir.path / job.name
    own.mkdir(exist_ok=True)
    with StopSignals() as signals:
        watch = Watch(
            run_dir,
            status_file=own / "status.json",
            poll_seconds=poll_seconds,
            keep_going=lambda: not signals.requested,
        )
        tracking = params.tracking.replace(progress="plain").instantiate()
        callback = Callbacks(tracking.callbacks(run_dir=own))
        status = "failed"
        try:
            callback.on_start(_facts(params, own=own, first_step=max(watch.done, default=0)))
            for step in watch.steps():
                if _work_on(job, run_dir=run_dir, step=step, callback=callback, signals=signals):
                    watch.mark_done(step)
            status = "stopped" if signals.requested else "finished"
        finally:
            callback.on_finish(status=status)


def _facts(params: Run.Params, *, own: Path, first_step: int) -> RunFacts:
    return RunFacts(
        name=f"{params.name} {own.name}",
        run_dir=own,
        params={path: value for path, value in params.leaves()},
        first_step=first_step,
        max_steps=params.train.max_steps,
        git=git_state(),
    )


def _work_on(job: Job, *, run_dir: RunDirectory, step: int, callback: Callback, signals: StopSignals) -> bool:
    """Does the job on one checkpoint of a run; returns whether it is dealt with: done, or gone."""
    path = run_dir.checkpoints / f"step_{step:08d}"
    try:
        model = load_trained(path, edit=job.edit, averaged=job.averaged)
    except CheckpointError as error:
        if path.exists():
            callback.on_message(f"{job.name}: skipped step {step}: {error}")
        else:
            callback.on_message(f"{job.name}: skipped step {step}, its checkpoint was deleted before its turn came")
        return True
    with _validation(model, run_dir=run_dir, callback=callback, signals=signals) as validation:
        job.work(model, validation)
    return not signals.requested


@contextlib.contextmanager
def _validation(
    model: TrainedModel, *, run_dir: RunDirectory | None, callback: Callback, signals: StopSignals
) -> Iterator[Validation]:
    parts.set_up_process(model.params)
    if not model.params.eval_inputs:
        raise must(
            "eval_inputs",
            "name at least one data set",
            AsText("empty"),
            "Add one to the experiment, or decode a file with --input",
            kind=TrainingError,
        )
    with contextlib.ExitStack() as stack:
        if run_dir is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megaseq-")))
        else:
            scratch = run_dir.path
        yield Validation(
            params=model.params,
            vocabulary=model.vocabulary,
            cache=parts.cache_dir(model.params, run_dir=scratch),
            run_dir=run_dir,
            callback=callback,
            keep_going=lambda: not signals.requested,
            to_device=model.to_device,
        )


def print_figures(figures: dict[str, float]) -> None:
    """Prints one figure a line on stdout."""
    for name, value in figures.items():
        print(f"{name} : {value:.6g}", file=sys.stdout)
