"""Which checkpoints are kept."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

METRICS = "metrics.json"


class MetricHistory:
    """The metrics of each step, in one small file beside the checkpoints, because evaluation often follows the save."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / METRICS
        self._steps: dict[int, dict[str, float]] = {}
        try:
            content = json.loads(self._path.read_bytes())
            self._steps = {int(step): {k: float(v) for k, v in items.items()} for step, items in content.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self._steps = {}  # A lost history costs the choice of the best, not a checkpoint.

    def record(self, *, step: int, metrics: Mapping[str, float]) -> None:
        """Adds finite metrics to those of a step and writes the file, whole or, when the disk is full, not at all."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if not finite:
            return
        self._steps.setdefault(step, {}).update(finite)
        temporary = self._path.with_suffix(".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._steps, indent=1))
            os.replace(temporary, self._path)
        except OSError as error:
            logger.warning("%s: not written (%s); metrics are kept in memory.", self._path, error.strerror or error)

    def best(self, *, metric: str, mode: Literal["max", "min"], steps: Collection[int], count: int = 1) -> list[int]:
        """Returns the `count` best of `steps` by `metric`, best first; of equals the older one is better."""
        sign = -1.0 if mode == "max" else 1.0
        known = [(sign * self._steps[step][metric], step) for step in steps if metric in self._steps.get(step, {})]
        return [step for _, step in sorted(known)[:count]]


def steps_to_delete(
    steps: Sequence[int], *, keep_last: int, keep_every: int, best: Collection[int], damaged: Collection[int]
) -> list[int]:
    """Returns which of `steps` to delete.

    Args:
        steps: All there are, increasing.
        keep_last: So many of the newest whole ones stay; 0 keeps all.
        keep_every: Multiples of this stay; 0 is none.
        best: These stay.
        damaged: Known not to be whole; they count for nothing and go when a rule would not keep them.
    """
    if keep_last == 0:
        return []
    whole = [step for step in steps if step not in damaged]
    kept = set(whole[-keep_last:]) | set(best)
    if keep_every > 0:
        kept |= {step for step in whole if step % keep_every == 0}
    return [step for step in steps if step not in kept]
