"""Stops a run whose watched figure no longer gets better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from megaseq.base import Configurable, Problem


class EarlyStop(Configurable):
    """Says when `metric` has not improved in `window_steps` optimiser steps."""

    class Params(Configurable.Params):
        metric: str = ""
        """Watched figure, such as `eval/valid/loss` or `decode/valid/bleu`; empty: never stop early."""
        mode: Literal["min", "max"] = "min"
        """Whether smaller or larger is better."""
        window_steps: int = 0
        """Steps without an improvement after which the run ends."""
        tolerance: float = 0.0
        """An improvement is a change by more than this."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports values out of range."""
            yield from super().validate()
            if self.metric and self.window_steps < 1:
                yield f"window_steps: must be at least 1 with a metric, but is {self.window_steps}. Set both or none."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self._best = math.inf if p.mode == "min" else -math.inf
        self._best_step = 0

    def observe(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Takes note of the figures of one evaluation."""
        value = metrics.get(self.params.metric)
        if value is None or math.isnan(value):
            return
        gain = self._best - value if self.params.mode == "min" else value - self._best
        if gain > self.params.tolerance:
            self._best, self._best_step = value, step

    def reason_to_stop(self, *, step: int) -> str:
        """Returns why the run should end after `step`; empty if it should go on."""
        p = self.params
        if not p.metric or not math.isfinite(self._best) or step - self._best_step < p.window_steps:
            return ""
        return f"{p.metric} has not improved on {self._best:.4g}, of step {self._best_step}, in {p.window_steps} steps"

    def state_dict(self) -> dict[str, float | int | None]:
        """JSON-able state for a checkpoint."""
        return {"best": self._best if math.isfinite(self._best) else None, "best_step": self._best_step}

    def load_state_dict(self, state: Mapping[str, float | int | None]) -> None:
        """Takes the state of `state_dict` back."""
        if state.get("best") is not None:
            self._best, self._best_step = float(state["best"] or 0.0), int(state["best_step"] or 0)
