"""The metrics file of a run: one JSON object a line, each step's figures once."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from megaseq.train.tracking.callback import Callback, RunFacts


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a metrics file; a line that a kill has cut short is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "step" in record:
                yield record


def _finite(value: float) -> float | str:
    # NaN and infinities are no JSON; their names read back with float().
    return value if math.isfinite(value) else str(value)


class JsonlWriter(Callback):
    """Appends to `path`; a resumed run first drops the lines past the step from which it goes on.

    Those steps are about to be done again, so keeping their lines would list them twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def on_start(self, facts: RunFacts) -> None:
        kept = [record for record in read_metrics(self._path) if record["step"] <= facts.first_step]
        temporary = self._path.with_name(self._path.name + f".{os.getpid()}.tmp")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def on_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        record = {"step": step, "time": round(time.time(), 3)} | {key: _finite(value) for key, value in metrics.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def on_finish(self, *, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
