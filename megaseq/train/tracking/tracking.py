"""Which trackers a run has, and the fan-out to them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from megaseq.base import Configurable
from megaseq.train.tracking.callback import Callback, RunFacts, Sample
from megaseq.train.tracking.jsonl import JsonlWriter
from megaseq.train.tracking.progress import BarProgress, PlainProgress


class Tracking(Configurable):
    """Builds a run's trackers; the metrics JSONL is always among them."""

    class Params(Configurable.Params):
        progress: Literal["auto", "bar", "plain", "none"] = "auto"
        """What the terminal shows; `auto`: a bar on a terminal, plain lines elsewhere."""
        wandb: bool = False
        """Whether to report to Weights & Biases."""
        wandb_project: str = "megaseq"
        """Project of the run there."""
        wandb_entity: str = ""
        """Team or user there; empty: the key's default."""
        wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
        """`auto`: what WANDB_MODE says, else online where a key is at hand, else offline."""
        wandb_tags: tuple[str, ...] = ()
        """Tags of the run there."""
        tensorboard: bool = False
        """Whether to write TensorBoard event files to the run directory."""

    params: Params

    def callbacks(self, *, run_dir: Path) -> list[Callback]:
        """Returns the trackers of a run in `run_dir`, the metrics file first."""
        p = self.params
        made: list[Callback] = [JsonlWriter(run_dir / "metrics.jsonl")]
        if p.wandb:
            from megaseq.train.tracking.wandb import WandbWriter

            made.append(
                WandbWriter(project=p.wandb_project, entity=p.wandb_entity, mode=p.wandb_mode, tags=p.wandb_tags)
            )
        if p.tensorboard:
            from megaseq.train.tracking.tensorboard import TensorboardWriter

            made.append(TensorboardWriter(run_dir / "tensorboard"))
        if p.progress == "bar" or (p.progress == "auto" and sys.stderr.isatty()):
            made.append(BarProgress())
        elif p.progress != "none":
            made.append(PlainProgress())
        return made


class Callbacks(Callback):
    """Passes every event on to each of `callbacks`, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)

    def on_start(self, facts: RunFacts) -> None:
        for callback in self._callbacks:
            callback.on_start(facts)

    def on_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        for callback in self._callbacks:
            callback.on_metrics(metrics, step=step)

    def on_samples(self, samples: Sequence[Sample], *, step: int, name: str) -> None:
        for callback in self._callbacks:
            callback.on_samples(samples, step=step, name=name)

    def on_progress(self, *, step: int) -> None:
        for callback in self._callbacks:
            callback.on_progress(step=step)

    def on_message(self, text: str) -> None:
        for callback in self._callbacks:
            callback.on_message(text)

    def on_finish(self, *, status: str) -> None:
        for callback in self._callbacks:
            callback.on_finish(status=status)
