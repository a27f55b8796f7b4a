"""What a run tells the outside: the callback interface, and the facts it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Sample:
    """One decoded example, as text."""

    source: str
    output: str
    reference: str


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What is known when a job starts."""

    name: str
    """Registered name of the experiment."""
    run_dir: Path
    params: Mapping[str, object]
    """Every leaf of the run's params, by dotted path."""
    first_step: int
    """Optimiser steps that earlier processes of this run have done: 0 for a new run."""
    max_steps: int
    git: Mapping[str, str]
    """Commit and state of the working tree, empty outside a git checkout."""


class Callback:
    """Hears of a run's events; each method does nothing unless a subclass overrides it."""

    def on_start(self, facts: RunFacts) -> None:
        """The job is ready to do its first step."""

    def on_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """New figures: `train/...` at every logging interval, `eval/NAME/...` and `decode/NAME/...` as they come."""

    def on_samples(self, samples: Sequence[Sample], *, step: int, name: str) -> None:
        """The data set `name` was decoded; `samples` are a few of its lines."""

    def on_progress(self, *, step: int) -> None:
        """An optimiser step is done; called at every step, so it must be cheap."""

    def on_message(self, text: str) -> None:
        """Something that a person should read."""

    def on_finish(self, *, status: str) -> None:
        """The job ends: `finished`, `stopped` (a signal; it can go on later) or `failed`."""
