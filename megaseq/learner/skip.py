"""Which updates are not made: gradients that are not finite, and outliers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from megaseq.base import Configurable, Problem

MIN_DEVIATION = 0.01
"""Floor of the deviation of log(1 + norm): equal norms would otherwise make any larger one an outlier, for ever."""

SkipReason = Literal["", "non-finite", "outlier"]


class NormTracker(Configurable):
    """Says whether a gradient norm is an outlier of the norms before it.

    Keeps moving averages of x = log(1 + max(norm, floor)) and of x squared, both divided by the weight gathered so
    far. A norm is an outlier when x > max(mean + num_deviations * deviation, log(1 + always_accept)) and the weight
    exceeds `min_weight` (with decay 0.995, after 277 norms). The averages then take the limit in place of x, so that
    a lasting change of scale is accepted in the end; a norm that is not finite must not be shown to the tracker.
    """

    class Params(Configurable.Params):
        decay: float = 0.995
        """Share of the old average that is kept at each norm."""
        num_deviations: float = 4.0
        """How many standard deviations above the mean of the logarithm is too far."""
        always_accept: float = 0.0
        """Norms up to this are never outliers."""
        floor: float = 0.01
        """Smaller norms count as this."""
        min_weight: float = 0.75
        """Weight, 1 - decay ** norms, that must be gathered before anything is an outlier."""
        dry_run: bool = False
        """Only count outliers; never skip."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports a decay outside (0, 1)."""
            yield from super().validate()
            if not 0.0 < self.decay < 1.0:
                yield f"decay: must be in (0, 1), but is {self.decay}. The usual value is 0.995."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self._sum = 0.0
        self._sum_of_squares = 0.0
        self._weight = 0.0
        self.num_outliers = 0

    @property
    def limit(self) -> float:
        """The norm above which the next one is an outlier; inf while too few were seen."""
        if self._weight <= self.params.min_weight:
            return math.inf
        return math.expm1(self._log_limit())

    def is_outlier(self, norm: float) -> bool:
        """Judges the finite `norm`, and takes it into the averages."""
        p = self.params
        value = math.log1p(max(norm, p.floor))
        outlier = False
        if self._weight > 0.0:
            limit = self._log_limit()
            outlier = value > limit and self._weight > p.min_weight
            if outlier:
                value = limit
        self._sum = p.decay * self._sum + (1.0 - p.decay) * value
        self._sum_of_squares = p.decay * self._sum_of_squares + (1.0 - p.decay) * value * value
        self._weight = p.decay * self._weight + (1.0 - p.decay)
        self.num_outliers += outlier
        return outlier and not p.dry_run

    def _log_limit(self) -> float:
        mean = self._sum / self._weight
        variance = max(0.0, self._sum_of_squares / self._weight - mean * mean)
        deviation = max(math.sqrt(variance), MIN_DEVIATION)
        return max(mean + self.params.num_deviations * deviation, math.log1p(self.params.always_accept))

    def state(self) -> dict[str, float]:
        """Returns the averages, for the checkpoint."""
        return {
            "sum": self._sum,
            "sum_of_squares": self._sum_of_squares,
            "weight": self._weight,
            "num_outliers": self.num_outliers,
        }

    def load(self, state: dict[str, float]) -> None:
        """Takes back what `state` returned."""
        self._sum = state["sum"]
        self._sum_of_squares = state["sum_of_squares"]
        self._weight = state["weight"]
        self.num_outliers = int(state["num_outliers"])


class SkipPolicy(Configurable):
    """Decides from the gradient norm alone whether an update is made, so that all ranks decide the same."""

    class Params(Configurable.Params):
        max_norm: float | None = None
        """A norm above this is an outlier; None is no fixed limit."""
        tracker: NormTracker.Params | None = None
        """Finds outliers by the norms before; None is off."""
        max_consecutive: int = 20
        """Training stops with an error when this many updates in a row were skipped."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports limits that are not positive."""
            yield from super().validate()
            if self.max_norm is not None and self.max_norm <= 0:
                yield f"max_norm: must be positive, but is {self.max_norm}. Leave it out for no limit."
            if self.max_consecutive < 1:
                yield f"max_consecutive: must be at least 1, but is {self.max_consecutive}. Use 1 to stop at the first."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.tracker: NormTracker | None = p.tracker.instantiate() if p.tracker is not None else None

    def judge(self, norm: float) -> SkipReason:
        """Returns why an update with this gradient `norm` must be skipped, or "" when it must not."""
        if not math.isfinite(norm):
            return "non-finite"
        # The tracker sees every finite norm, also one that the fixed limit rejects.
        outlier = self.tracker is not None and self.tracker.is_outlier(norm)
        if outlier or (self.params.max_norm is not None and norm > self.params.max_norm):
            return "outlier"
        return ""
