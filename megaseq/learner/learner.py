"""The learner: turns summed gradients into one update of the parameters, or into none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaseq.base import REQUIRED, Configurable, Problem
from megaseq.base.errors import CheckpointError, TrainingError
from megaseq.learner.adamw import AdamW
from megaseq.learner.clipping import CountedViews, SquaredNormReduction, clip_coefficient, global_norm
from megaseq.learner.ema import MovingAverage
from megaseq.learner.optimizer import Optimizer, ParameterGroup, copy_named
from megaseq.learner.rules import ParameterRule, assign, listing
from megaseq.learner.schedule import Schedule
from megaseq.learner.schedules import Constant
from megaseq.learner.skip import SkipPolicy, SkipReason

OPTIMIZER_PREFIX = "learner."
AVERAGE_PREFIX = "ema."


@dataclass(frozen=True)
class UpdateStats:
    """What one call of `Learner.update` did."""

    step: int
    learning_rate: float
    grad_norm: float
    """Norm of the normalised gradient, before clipping."""
    clip_coefficient: float
    """Factor that clipping put on the gradient; 1 when it was within the limit, 0 when the update was skipped."""
    skipped: SkipReason
    """Why nothing was changed, or ""."""
    num_skipped: int
    """Skipped updates of the whole run."""
    num_missing: int
    """Trainable parameters that had no gradient, which counts as zero."""


class Learner(Configurable):
    """Updates fp32 parameters from their gradients, in this order, all of it or nothing:

    1. the gradients' global norm, after the caller's normalisation;
    2. the skip decision: not finite, or an outlier; a skipped update leaves parameters, moments, average and their
       counts as they were. A norm that is not finite leaves the outlier statistics alone as well; an outlier enters
       them, capped;
    3. clipping by the global norm, the schedule's learning rate, weight decay and the optimizer's step;
    4. the moving average.

    `step` counts steps over the data and drives the schedule: it goes on over skipped updates. The optimizer's own
    count, which corrects the bias of its moments and warms up the average, counts the updates that were applied.
    """

    class Params(Configurable.Params):
        learning_rate: float = REQUIRED
        """Peak learning rate; the schedule multiplies it."""
        schedule: Schedule.Params = Constant.Params()
        """Multiplier of the learning rate by step."""
        optimizer: Optimizer.Params = AdamW.Params()
        """The update rule."""
        clip_norm: float | None = 1.0
        """Limit of the gradient's global norm; None is no limit."""
        weight_decay: float = 0.0
        """Weight decay of every parameter that `rules` say nothing else of."""
        weight_decay_min_dims: int = 2
        """Parameters with fewer dimensions (biases, norm scales) are not decayed without a rule; 0 decays all."""
        rules: tuple[ParameterRule.Params, ...] = ()
        """Weight decay and learning-rate scale by pattern; the first that matches wins."""
        freeze_patterns: tuple[str, ...] = ()
        """Parameters whose path one of these patterns matches do not change and have no optimizer state."""
        train_only_patterns: tuple[str, ...] = ()
        """When given, parameters that none of these patterns matches are frozen."""
        ema: MovingAverage.Params | None = None
        """Moving average of the parameters, for evaluation; None keeps none."""
        skip: SkipPolicy.Params = SkipPolicy.Params()
        """Which updates are not made."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports rates and limits below zero."""
            yield from super().validate()
            if self.clip_norm is not None and self.clip_norm <= 0.0:
                yield f"clip_norm: must be positive, but is {self.clip_norm}. Use null for no clipping."
            for name in ("learning_rate", "weight_decay"):
                value = getattr(self, name)
                if isinstance(value, float) and value < 0.0:
                    yield f"{name}: must be at least 0, but is {value}. Use 0 for none."

    params: Params

    def __init__(
        self,
        p: Params,
        *,
        named_parameters: Mapping[str, Tensor],
        reduce_squared_norm: SquaredNormReduction | None = None,
        counted: CountedViews | None = None,
        deferred: bool = False,
        known: Sequence[str] = (),
    ) -> None:
        """Allocates the optimizer's state.

        Args:
            p: The learner's params.
            named_parameters: fp32 parameters by full path, for example "task.encoder.layers.0.ffn.up.weight", on one
                device. They are updated in place.
            reduce_squared_norm: Sums the squared gradient norm over ranks when each holds a part of the gradients.
            counted: Says what of a gradient this rank counts in the norm; None is all.
            deferred: Allocate nothing: `take_shares` will say what is updated instead of the parameters themselves.
            known: Paths of the whole model, where this process holds a part of it; patterns may match any of them.

        Raises:
            ParamsError: When a pattern matches nothing.
            TrainingError: When a parameter is not fp32 or fp64, or they are on several devices.
        """
        super().__init__(p)
        _check_parameters(named_parameters)
        self._parameters = dict(named_parameters)
        self._reduce = reduce_squared_norm
        self._counted = counted
        self.assignment = assign(
            self._parameters,
            freeze=p.freeze_patterns,
            train_only=p.train_only_patterns,
            rules=p.rules,
            weight_decay=p.weight_decay,
            weight_decay_min_dims=p.weight_decay_min_dims,
            known=known,
        )
        frozen = set(self.assignment.frozen)
        self.trainable: dict[str, Tensor] = {n: t for n, t in self._parameters.items() if n not in frozen}
        """The parameters that are updated, by path."""
        self.schedule: Schedule = p.schedule.instantiate()
        self.ema: MovingAverage | None = None
        self.optimizer: Optimizer
        if not deferred:
            self._allocate(self.assignment.groups, averaged=self.trainable)
        self.skip: SkipPolicy = p.skip.instantiate()
        self.num_skipped = 0
        self.num_consecutive_skips = 0
        self._zeros: dict[str, Tensor] = {}
        self._averages_in_use = False

    def _allocate(self, groups: Sequence[ParameterGroup], *, averaged: Mapping[str, Tensor]) -> None:
        self.optimizer = self.params.optimizer.instantiate(groups=groups)
        if self.params.ema is not None:
            zeros = next((group.zeros for group in groups), torch.zeros_like)
            self.ema = self.params.ema.instantiate(named_parameters=averaged, zeros=zeros)

    def take_shares(self, groups: Sequence[ParameterGroup]) -> None:
        """Allocates the state of a learner that was made `deferred`.

        Args:
            groups: Flat runs of elements of the parameters that train, under names of the caller; what is in one run
                is treated alike, as `assignment` says.
        """
        averaged = {name: tensor for group in groups for name, tensor in zip(group.names, group.tensors, strict=True)}
        self._allocate(groups, averaged=averaged)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Paths of the parameters that are never updated."""
        return self.assignment.frozen

    def listing(self) -> str:
        """Returns the table of patterns and the parameters that each matched."""
        return listing(self.assignment, named_parameters=self._parameters)

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of the update with index `step`, 0 being the first."""
        return self.params.learning_rate * self.schedule(step)

    def update(
        self, *, step: int, gradient_scale: float = 1.0, grads: Mapping[str, Tensor] | None = None
    ) -> UpdateStats:
        """Makes one update, or skips it whole.

        Args:
            step: Index of this step over the data, 0 being the first.
            gradient_scale: Multiplied into all gradients: 1 / global target weight, when they are sums.
            grads: Gradients by parameter path; None takes each parameter's `.grad`. Their contents are consumed. A
                gradient that is missing counts as zero; one of a frozen parameter is ignored.

        Raises:
            TrainingError: When a gradient does not fit its parameter, or too many updates in a row were skipped.
        """
        self._forbid_averages("update")
        gradients, num_missing = self._gradients(grads)
        counted = self._counted_gradients(gradients)
        norm = global_norm(counted, reduce=self._reduce, device=self.optimizer.device) * gradient_scale
        stats = self.decide(step=step, norm=norm, num_missing=num_missing)
        if not stats.skipped:
            for index, row in enumerate(gradients):
                self.apply(stats, group=index, gradients=row, gradient_scale=gradient_scale)
            self.average()
        return stats

    def decide(self, *, step: int, norm: float, num_missing: int = 0) -> UpdateStats:
        """Decides on the update with the gradient `norm`: the first half of `update`, for who makes it in parts.

        Unless it is to be skipped, `apply` is to be called for every group, and `average` at the end.

        Args:
            step: as in `update`.
            norm: of the normalised gradient, over all ranks.
            num_missing: parameters without a gradient, for the report.

        Raises:
            TrainingError: too many updates in a row were skipped.
        """
        reason = self.skip.judge(norm)
        coefficient = 0.0
        if reason:
            self._count_skip(step=step, norm=norm, reason=reason)
        else:
            self.num_consecutive_skips = 0
            coefficient = clip_coefficient(norm, limit=self.params.clip_norm)
            self.optimizer.num_updates += 1
        return UpdateStats(
            step=step,
            learning_rate=self.learning_rate(step),
            grad_norm=norm,
            clip_coefficient=coefficient,
            skipped=reason,
            num_skipped=self.num_skipped,
            num_missing=num_missing,
        )

    @torch.no_grad()
    def apply(
        self, stats: UpdateStats, *, group: int, gradients: Sequence[Tensor], gradient_scale: float = 1.0
    ) -> None:
        """Updates the parameters of one of the optimizer's groups as `decide` said; `gradients` are consumed."""
        self.optimizer.step(
            group,
            gradients=gradients,
            learning_rate=stats.learning_rate,
            gradient_scale=gradient_scale * stats.clip_coefficient,
        )

    def average(self, *, group: int | None = None) -> None:
        """Moves the averages of one of the optimizer's groups, or of all, after it was updated."""
        if self.ema is not None:
            names = None if group is None else self.optimizer.groups[group].names
            self.ema.update(num_updates=self.optimizer.num_updates - 1, names=names)

    def _gradients(self, grads: Mapping[str, Tensor] | None) -> tuple[list[list[Tensor]], int]:
        """Collects the gradients group by group; returns them and how many were missing."""
        num_missing = 0
        collected: list[list[Tensor]] = []
        for group in self.assignment.groups:
            row: list[Tensor] = []
            for name, parameter in zip(group.names, group.tensors, strict=True):
                gradient = parameter.grad if grads is None else grads.get(name)
                if gradient is None:
                    num_missing += 1
                    gradient = self._zero_gradient(name, parameter)
                elif gradient.shape != parameter.shape or gradient.dtype != parameter.dtype:
                    raise TrainingError(
                        f"learner.update {name}: must get a gradient {parameter.dtype} {list(parameter.shape)}, "
                        f"but it is {gradient.dtype} {list(gradient.shape)}. "
                        "Accumulate gradients in the parameters' type."
                    )
                row.append(gradient)
            collected.append(row)
        return collected, num_missing

    def _counted_gradients(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        if self._counted is None:
            return [gradient for group in gradients for gradient in group]
        return [
            view
            for group, row in zip(self.assignment.groups, gradients, strict=True)
            for name, gradient in zip(group.names, row, strict=True)
            for view in self._counted(name, gradient)
        ]

    def _zero_gradient(self, name: str, parameter: Tensor) -> Tensor:
        # Kept, because a parameter without a gradient usually stays so. SGD's weight decay writes into it.
        if name not in self._zeros:
            self._zeros[name] = torch.zeros_like(parameter, requires_grad=False)
        return self._zeros[name].zero_()

    def _count_skip(self, *, step: int, norm: float, reason: SkipReason) -> None:
        self.num_skipped += 1
        self.num_consecutive_skips += 1
        limit = self.skip.params.max_consecutive
        if self.num_consecutive_skips >= limit:
            raise TrainingError(
                f"learner.update: must not skip {limit} updates in a row, but did, up to step {step}, where the "
                f"gradient norm is {norm:g} ({reason}). Lower learner.learning_rate, lengthen the warm-up, or look at "
                "the data of that step."
            )

    @contextmanager
    def averages(self, *, on_change: Callable[[], None] | None = None) -> Iterator[None]:
        """Within the context the parameters hold their moving averages; without `ema` nothing happens.

        Args:
            on_change: Called after the values changed, on entering and on leaving: refreshes copies of the parameters.
        """
        if self.ema is None:
            yield
            return
        self._forbid_averages("averages")
        self._swap(on_change)
        try:
            yield
        finally:
            self._swap(on_change)

    def _swap(self, on_change: Callable[[], None] | None) -> None:
        if self.ema is not None:
            self.ema.swap()
            self._averages_in_use = not self._averages_in_use
        if on_change is not None:
            on_change()

    def _forbid_averages(self, operation: str) -> None:
        if self._averages_in_use:
            raise TrainingError(
                f"learner.{operation}: must be called outside `with learner.averages()`, but is inside it. "
                f"Leave it first."
            )

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns the state for a checkpoint, not copies: `learner.<slot>.<path>` and `ema.<path>`."""
        self._forbid_averages("state_tensors")
        tensors = {OPTIMIZER_PREFIX + name: tensor for name, tensor in self.optimizer.state_tensors().items()}
        if self.ema is not None:
            tensors.update({AVERAGE_PREFIX + name: tensor for name, tensor in self.ema.tensors.items()})
        return tensors

    def state(self) -> dict[str, Any]:
        """Returns the counts and outlier statistics, as JSON values."""
        tracker = self.skip.tracker
        return {
            "optimizer": type(self.optimizer).__name__,
            "num_updates": self.optimizer.num_updates,
            "num_skipped": self.num_skipped,
            "num_consecutive_skips": self.num_consecutive_skips,
            "tracker": tracker.state() if tracker is not None else None,
        }

    def load(self, *, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Takes back what `state_tensors` and `state` returned; further training is bitwise that of the saved learner.

        Args:
            tensors: May hold more than the learner's; names outside `learner.` and `ema.` are ignored.
            state: From `state`.

        Raises:
            CheckpointError: When the state is of another optimizer or other parameters.
        """
        self._forbid_averages("load")
        self._check_state(state)
        prefixes = (OPTIMIZER_PREFIX, AVERAGE_PREFIX)
        given = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
        copy_named(self.state_tensors(), given, what="learner.load")
        self.load_counts(state)

    def load_counts(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` returned, where the tensors of `state_tensors` were written to in place.

        Raises:
            CheckpointError: When the state is of another optimizer.
        """
        self._check_state(state)
        self.optimizer.num_updates = int(state["num_updates"])
        self.num_skipped = int(state["num_skipped"])
        self.num_consecutive_skips = int(state["num_consecutive_skips"])
        if self.skip.tracker is not None and state.get("tracker") is not None:
            self.skip.tracker.load(state["tracker"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        name = type(self.optimizer).__name__
        if state.get("optimizer") != name:
            raise CheckpointError(
                f"learner.load: must get the state of {name}, but it is of {state.get('optimizer')}. "
                "Resume with the optimizer of the run, or start anew from its weights."
            )


def _check_parameters(named_parameters: Mapping[str, Tensor]) -> None:
    """Raises TrainingError unless there are parameters, all fp32 (or all fp64), on one device."""
    if not named_parameters:
        raise TrainingError(
            "learner: must get at least one parameter, but named_parameters is empty. Pass the model's."
        )
    for name, tensor in named_parameters.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TrainingError(
                f"learner {name}: must be a float32 master parameter, but is {tensor.dtype}. Keep an fp32 copy "
                f"for the learner."
            )
    devices = {tensor.device for tensor in named_parameters.values()}
    if len(devices) > 1:
        raise TrainingError(
            f"learner: must get parameters on one device, but they are on {sorted(map(str, devices))}. Move "
            f"them together."
        )
