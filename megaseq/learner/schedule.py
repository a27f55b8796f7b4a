"""The learning-rate schedule: a pure function from the step to a multiplier."""

from __future__ import annotations

from megaseq.base import Configurable


class Schedule(Configurable):
    """Maps the step to the multiplier of the learner's `learning_rate`.

    Steps are counted from 0 and are absolute: `end_step=100_000` means step 100,000 of the run, also under a warm-up or
    inside a `Piecewise`. What changes there is the start: a schedule that begins at step `start` is at its initial
    value at that step. A schedule has no state, so there is nothing to save and any step can be asked for in any order.
    """

    class Params(Configurable.Params):
        """A schedule without params of its own."""

    params: Params

    def __call__(self, step: int) -> float:
        """Returns the multiplier for the update with index `step` (0 is the first) of a run."""
        return self.value(step=step, start=0)

    def value(self, *, step: int, start: int) -> float:
        """Returns the multiplier at the absolute `step` >= `start` - 1 for a schedule that begins at `start`."""
        raise NotImplementedError(f"{type(self).__name__}: must define value()")


def progress(*, step: int, start: int, end: int) -> float:
    """Returns how far `step` is on the way from `start` to `end`, within [0, 1]; 1 where the way has no length."""
    if step >= end:
        return 1.0
    if step <= start:
        return 0.0
    return (step - start) / (end - start)
