"""TensorBoard event files, when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaseq.base import optional
from megaseq.train.tracking.callback import Callback, RunFacts, Sample


class TensorboardWriter(Callback):
    """Writes scalars and sample texts below `log_dir`; steps past a resume are purged from the plots."""

    def __init__(self, log_dir: Path) -> None:
        optional("tensorboard", needed_for="tracking.tensorboard")
        self._log_dir = log_dir
        self._writer: Any = None

    def on_start(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._log_dir), purge_step=facts.first_step + 1 if facts.first_step else None)

    def on_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        if self._writer is not None:
            for key, value in metrics.items():
                self._writer.add_scalar(key, value, step)

    def on_samples(self, samples: Sequence[Sample], *, step: int, name: str) -> None:
        if self._writer is not None:
            rows = "\n".join(f"| {s.source} | {s.output} | {s.reference} |" for s in samples)
            self._writer.add_text(f"decode/{name}", f"| source | output | reference |\n|---|---|---|\n{rows}", step)

    def on_finish(self, *, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
