"""What a person at the terminal sees: a bar where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING

from megaseq.train.tracking.callback import Callback, RunFacts, Sample

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def duration_text(seconds: float) -> str:
    """Returns `seconds` as h:mm:ss, or m:ss below one hour."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def metrics_lines(metrics: Mapping[str, float]) -> list[str]:
    """Returns short lines: one of the training figures that a person watches, or one for each evaluation input."""
    short = (
        ("train/loss", "loss {:.4f}"),
        ("train/learning_rate", "lr {:.2e}"),
        ("train/grad_norm", "grad norm {:.3f}"),
        ("train/tokens_per_second", "{:,.0f} tokens/s"),
        ("train/padding_fraction", "padding {:.1%}"),
    )
    if any(key in metrics for key, _ in short):
        return ["  ".join(text.format(metrics[key]) for key, text in short if key in metrics)]
    lines: dict[str, list[str]] = {}
    for key, value in metrics.items():
        name, _, figure = key.rpartition("/")
        shown = f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
        lines.setdefault(name, []).append(f"{figure} {shown}")
    return [f"{name}:  {'  '.join(figures)}" if name else "  ".join(figures) for name, figures in lines.items()]


class PlainProgress(Callback):
    """One line per logging interval; for files, pipes and batch systems."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream
        self._start, self._first_step, self._max_steps = time.monotonic(), 0, 0

    def _print(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)

    def on_start(self, facts: RunFacts) -> None:
        self._start, self._first_step, self._max_steps = time.monotonic(), facts.first_step, facts.max_steps

    def on_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        left = ""
        if "train/loss" in metrics and step > self._first_step:
            elapsed = time.monotonic() - self._start
            left = f"  left {duration_text(elapsed / (step - self._first_step) * (self._max_steps - step))}"
        for line in metrics_lines(metrics):
            self._print(f"step {step}/{self._max_steps}  {line}{left}")

    def on_samples(self, samples: Sequence[Sample], *, step: int, name: str) -> None:
        self._print(samples_text(samples, name=name, step=step))

    def on_message(self, text: str) -> None:
        self._print(text)


_LONGEST_SAMPLE = 400
"""Characters of a text at the terminal: a model that has learnt little may repeat itself for thousands."""


def samples_text(samples: Sequence[Sample], *, name: str, step: int) -> str:
    """Returns decoded examples as three lines each; what is left out of long ones is in the run's decodes."""
    lines = [f"{name} at step {step}:"]
    for sample in samples:
        for title, text in (("source", sample.source), ("output", sample.output), ("reference", sample.reference)):
            more = len(text) - _LONGEST_SAMPLE
            lines.append(
                f"  {title:9}  {text if more <= 0 else f'{text[:_LONGEST_SAMPLE]}... ({more} characters more)'}"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


class SamplesPrinter(Callback):
    """Prints decoded samples and nothing else."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def on_samples(self, samples: Sequence[Sample], *, step: int, name: str) -> None:
        print(samples_text(samples, name=name, step=step), file=self._stream)


_FIGURES_WIDTH = len("/  loss 12.345  12,345 tokens/s left 12:34:56   ")
"""Characters of the bar's line beside name, steps and the bar itself."""


class BarProgress(Callback):
    """A rich progress bar with loss, tokens/s and the time left; other lines scroll above it."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._bar: TaskID | None = None

    def on_start(self, facts: RunFacts) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        # What the figures leave of the line: a bar that grows by itself would push them out of a narrow terminal.
        others = len(facts.name) + 2 * len(str(facts.max_steps)) + _FIGURES_WIDTH
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=max(4, min(40, console.width - others))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
        )
        self._bar = self._progress.add_task(
            facts.name, total=facts.max_steps, completed=facts.first_step, figures="starting"
        )
        self._progress.start()

    def on_progress(self, *, step: int) -> None:
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step)

    def on_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        if self._progress is None or self._bar is None:
            return
        if "train/loss" in metrics:
            figures = f"loss {metrics['train/loss']:.3f}  {metrics.get('train/tokens_per_second', 0):,.0f} tokens/s"
            self._progress.update(self._bar, completed=step, figures=figures)
        else:
            for line in metrics_lines(metrics):
                self._say(f"step {step}  {line}")

    def on_samples(self, samples: Sequence[Sample], *, step: int, name: str) -> None:
        self._say(samples_text(samples, name=name, step=step))

    def on_message(self, text: str) -> None:
        self._say(text)

    def on_finish(self, *, status: str) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, text: str) -> None:
        if self._progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False)
