"""The schedules, and the two that are made of others: `Warmup` and `Piecewise`.

Every formula below is in terms of the absolute step `s`, counted from 0, and of `start`, the step at which the schedule
begins (0, the end of a warm-up, or a boundary of `Piecewise`). f = clamp((s - start) / (end_step - start), 0, 1).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from typing import Literal

from megaseq.base import REQUIRED, Problem
from megaseq.learner.schedule import Schedule, progress


class Constant(Schedule):
    """`value` at every step."""

    class Params(Schedule.Params):
        value: float = 1.0
        """The multiplier."""

    params: Params

    def value(self, *, step: int, start: int) -> float:
        """Returns the constant."""
        return self.params.value


class Polynomial(Schedule):
    """From 1 to `final` along final + (1 - final) * (1 - f) ** power, then flat."""

    class Params(Schedule.Params):
        end_step: int = REQUIRED
        """Step from which the multiplier stays at `final`."""
        final: float = 0.0
        """Multiplier at `end_step` and later."""
        power: float = 1.0
        """Exponent of the way that is left; 1 is a straight line."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports an end or a power that is not positive."""
            yield from super().validate()
            if self.end_step < 1:
                yield f"end_step: must be at least 1, but is {self.end_step}. Give the last step of the decay."
            if self.power <= 0:
                yield f"power: must be positive, but is {self.power}. Use 1.0 for a straight line."

    params: Params

    def value(self, *, step: int, start: int) -> float:
        """Returns the point of the polynomial at `step`."""
        p = self.params
        left = 1.0 - progress(step=step, start=start, end=p.end_step)
        return p.final + (1.0 - p.final) * float(left**p.power)


class Linear(Polynomial):
    """A straight line from 1 to `final`, then flat: `Polynomial` with power 1."""


class Cosine(Schedule):
    """Half a cosine from 1 to `final`: final + (1 - final) * (1 + cos(pi f)) / 2 (Loshchilov and Hutter, 2017)."""

    class Params(Schedule.Params):
        end_step: int = REQUIRED
        """Step from which the multiplier stays at `final`."""
        final: float = 0.0
        """Multiplier at `end_step` and later."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports an end that is not positive."""
            yield from super().validate()
            if self.end_step < 1:
                yield f"end_step: must be at least 1, but is {self.end_step}. Give the last step of the decay."

    params: Params

    def value(self, *, step: int, start: int) -> float:
        """Returns the point of the cosine at `step`."""
        p = self.params
        f = progress(step=step, start=start, end=p.end_step)
        return p.final + (1.0 - p.final) * 0.5 * (1.0 + math.cos(math.pi * f))


class InverseSqrt(Schedule):
    """sqrt(t / max(s + 1, t)): flat at 1 for `timescale` steps, then falls with the square root of the step.

    Under a warm-up of as many steps this is the schedule of Vaswani et al., 2017, "Attention is all you need",
    divided by its peak; without one, and with timescale 10,000 and learning rate 0.01, it is that of Raffel et al.,
    2020, "T5".
    """

    class Params(Schedule.Params):
        timescale: int | None = None
        """t: steps until the fall begins; None takes the step at which the schedule starts: the warm-up's end."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports a timescale that is not positive."""
            yield from super().validate()
            if self.timescale is not None and self.timescale < 1:
                yield (
                    f"timescale: must be at least 1, but is {self.timescale}. Leave it out to use the warm-up's length."
                )

    params: Params

    def value(self, *, step: int, start: int) -> float:
        """Returns the multiplier at `step`."""
        timescale = self.params.timescale if self.params.timescale is not None else max(start, 1)
        return math.sqrt(timescale / max(step + 1, timescale))


class WarmupStableDecay(Schedule):
    """1 until `decay_start`, then down to `final` at `end_step` (Hu et al., 2024, "MiniCPM").

    Put it under `Warmup` for the first of the three phases. `shape` is the curve of the last: "linear" (1 - f),
    "cosine" ((1 + cos(pi f)) / 2), or "sqrt" (1 - sqrt(f), Hägele et al., 2024).
    """

    class Params(Schedule.Params):
        decay_start: int = REQUIRED
        """First step of the decay."""
        end_step: int = REQUIRED
        """Step from which the multiplier stays at `final`."""
        final: float = 0.0
        """Multiplier at `end_step` and later."""
        shape: Literal["linear", "cosine", "sqrt"] = "sqrt"
        """Curve of the decay."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports a decay that ends before it starts."""
            yield from super().validate()
            if self.end_step < self.decay_start:
                yield (
                    f"end_step: must be at least decay_start ({self.decay_start}), but is {self.end_step}. "
                    f"Raise end_step."
                )

    params: Params

    def value(self, *, step: int, start: int) -> float:
        """Returns 1 in the stable phase, a point of the decay after it."""
        p = self.params
        decay_start = max(p.decay_start, start)
        if step < decay_start:
            return 1.0
        f = progress(step=step, start=decay_start, end=p.end_step)
        left = {"linear": 1.0 - f, "cosine": 0.5 * (1.0 + math.cos(math.pi * f)), "sqrt": 1.0 - math.sqrt(f)}[p.shape]
        return p.final + (1.0 - p.final) * left


class Piecewise(Schedule):
    """One schedule after the other: number i runs from boundary i - 1 to just before boundary i, scaled by `scales[i]`.

    Each begins at its own boundary. With `Constant` pieces this is the step-wise constant schedule.
    """

    class Params(Schedule.Params):
        boundaries: tuple[int, ...] = REQUIRED
        """Steps at which the next schedule takes over, increasing; one fewer than there are schedules."""
        schedules: tuple[Schedule.Params, ...] = REQUIRED
        """The pieces, in order."""
        scales: tuple[float, ...] = ()
        """Factor of each piece; empty is 1 for all."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports lengths that do not fit each other and boundaries that do not increase."""
            yield from super().validate()
            if len(self.schedules) != len(self.boundaries) + 1:
                yield (
                    f"schedules: must be one more than boundaries ({len(self.boundaries)}), but are "
                    f"{len(self.schedules)}. "
                    "Add the piece that is missing."
                )
            if self.scales and len(self.scales) != len(self.schedules):
                yield (
                    f"scales: must be empty or one a schedule ({len(self.schedules)}), but are "
                    f"{len(self.scales)}. Add one each."
                )
            if any(b >= c for b, c in zip((0, *self.boundaries), self.boundaries, strict=False)):
                yield f"boundaries: must increase from above 0, but are {self.boundaries}. Sort them."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self._schedules: list[Schedule] = [piece.instantiate() for piece in p.schedules]

    def value(self, *, step: int, start: int) -> float:
        """Returns the multiplier of the piece that `step` falls into."""
        p = self.params
        index = bisect.bisect_right(p.boundaries, step)
        begin = start if index == 0 else max(start, p.boundaries[index - 1])
        scale = p.scales[index] if p.scales else 1.0
        return scale * self._schedules[index].value(step=step, start=begin)


class Warmup(Schedule):
    """A straight ramp from `initial` to the first value of any other schedule, which begins where the ramp ends.

    At step s < num_steps the multiplier is (initial + (1 - initial) * (s + 1) / num_steps) times the other schedule's
    value in the ramp's last step. s + 1, not s: the first update would otherwise have a rate of 0 and be wasted.
    """

    class Params(Schedule.Params):
        num_steps: int = REQUIRED
        """Length of the ramp; 0 is none."""
        schedule: Schedule.Params = Constant.Params()
        """What follows the ramp; it starts at step `num_steps`."""
        initial: float = 0.0
        """Multiplier from which the ramp rises."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports a negative length."""
            yield from super().validate()
            if self.num_steps < 0:
                yield f"num_steps: must be at least 0, but is {self.num_steps}. Use 0 for no warm-up."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self._schedule: Schedule = p.schedule.instantiate()

    def value(self, *, step: int, start: int) -> float:
        """Returns a point of the ramp, or the wrapped schedule's value after it."""
        p = self.params
        end = start + p.num_steps
        if step >= end:
            return self._schedule.value(step=step, start=end)
        ramp = p.initial + (1.0 - p.initial) * (step - start + 1) / p.num_steps
        # The step before its start: there the inverse square root is still at 1, as the others are.
        return ramp * self._schedule.value(step=end - 1, start=end)
