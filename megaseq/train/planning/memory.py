"""Peak memory of a rank: weights, gradients, optimizer state and activations at the worst moment of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from megaseq.parallel.gradient_sums import overlapped_bucket
from megaseq.parallel.layout import Layout
from megaseq.parallel.spec import Unit
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.passes import Output, RankPasses
from megaseq.train.planning.trace import Shape, UnitTrace


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of the whole model."""

    elements: int
    axes: tuple[str | None, ...]
    low: bool
    """Whether it is kept in bfloat16 where the run's precision is bf16; norms are not."""

    def local(self, *, tensor: int, expert: int) -> int:
        """Returns the elements of one rank."""
        share = tensor if {"vocab", "heads", "hidden"} & set(self.axes) else 1
        share *= expert if "expert" in self.axes else 1
        return -(-self.elements // share)

    def local_of(self, layout: Layout) -> int:
        """Returns the elements of one rank of a layout."""
        return self.local(tensor=layout.tensor, expert=layout.expert)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Bytes that an element costs, by the run's precision and learner."""

    precision: str
    state: float
    """Bytes of optimizer state and moving average for each element."""

    @property
    def activation(self) -> int:
        """Bytes of an element that travels between layers."""
        return 2 if self.precision == "bf16" else 4

    def computed(self, weight: Weight) -> int:
        """Returns the bytes of an element that the model computes with."""
        return 2 if self.precision == "bf16" and weight.low else 4

    def master(self, weight: Weight) -> int:
        """Returns the bytes of an element's fp32 copy; 0 where the model computes with fp32."""
        return 4 if self.computed(weight) == 2 else 0


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the worst moment of a step."""

    parameters: int
    gradients: int
    optimizer: int
    """Masters, moments, moving average."""
    activations: int
    """What layers keep, what a pass allocates for a moment, and buffers of what travels."""
    host: int = 0
    """In the memory of the host and no part of `total`: what the params offload there."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations


class MemoryModel:
    """Computes `RankMemory` from what a model's weights and units are."""

    def __init__(self, *, weights: Mapping[str, Weight], numbers: Numbers, vocab_size: int, width: int) -> None:
        """Keeps the model's sizes.

        Args:
            weights: all parameters by name.
            numbers: of the run.
            vocab_size: rows of the softmax.
            width: of the decoder's output.
        """
        self.weights = weights
        self.numbers = numbers
        self._output = Output(vocab_size=vocab_size, width=width, element=numbers.activation)

    def state(self, names: Iterable[str], *, candidate: Candidate) -> RankMemory:
        """Returns what a rank that holds the parameters `names` has between steps, and its gradients."""
        layout, stage = candidate.layout, candidate.parallel.zero.stage
        parameters = gradients = optimizer = 0.0
        for weight in (self.weights[name] for name in names):
            count = weight.local(tensor=layout.tensor, expert=layout.expert)
            # Experts are the same on fewer ranks.
            copies = layout.data * layout.context // (layout.expert if "expert" in weight.axes else 1)
            share = count / copies
            computed = self.numbers.computed(weight)
            master, state = self.numbers.master(weight), self.numbers.state
            if stage:
                # DeepSpeed keeps fp32 shares beside the weights, whatever these are.
                master = 4
            if candidate.parallel.zero.offload_optimizer == "nvme":
                # They lie on a disk; DeepSpeed keeps a copy of the shares in the weights' format.
                master, state = computed if stage < 3 else 0, 0
            parameters += (share if stage == 3 else count) * computed
            optimizer += (share if stage else count) * (master + state)
            gradients += share * 4 if stage >= 2 else count * (4 if not stage else computed)
        zero, host = candidate.parallel.zero, 0.0
        if zero.offload_optimizer != "none":
            # Shares of gradients go where they are used.
            away = optimizer + (gradients if stage >= 2 else 0.0)
            gradients, optimizer = 0.0 if stage >= 2 else gradients, 0.0
            host += away if zero.offload_optimizer == "cpu" else 0.0
        if zero.offload_parameters != "none":
            host += parameters if zero.offload_parameters == "cpu" else 0.0
            parameters = 0.0
        return RankMemory(int(parameters), int(gradients), int(optimizer), 0, host=int(host))

    def rank(
        self,
        stages: Sequence[Sequence[Unit]],
        *,
        candidate: Candidate,
        traces: Mapping[str, UnitTrace],
        shape: Shape,
        pipe_rank: int = 0,
        received: Sequence[int] = (),
        returned: Sequence[int] = (),
        has_loss: bool = True,
    ) -> RankMemory:
        """Returns the peak of a rank.

        Args:
            stages: units of each of its stages, in order.
            candidate: the layout.
            traces: of all units, for its share of tokens and heads.
            shape: of a micro-batch on it.
            pipe_rank: place in the pipeline.
            received: bytes that each stage gets from the one before, for a micro-batch; 0 of the first of all.
            returned: bytes that each sends to a later rank, and gets back as gradients, for a micro-batch.
            has_loss: whether its last stage ends with the loss.
        """
        names = {name for stage in stages for unit in stage for name in unit.tensors if name in self.weights}
        state = self.state(names, candidate=candidate)
        local = {name: self.weights[name].local_of(candidate.layout) for name in names}
        matrix = self._output.vocab_size * self._output.width
        passes = RankPasses(
            stages=stages,
            candidate=candidate,
            traces=traces,
            shape=shape,
            output=self._output,
            heads=frozenset(name for name in names if self.weights[name].elements == matrix),
            gradients={name: count * self.numbers.computed(self.weights[name]) for name, count in local.items()},
            pipe_rank=pipe_rank,
            received=received,
            returned=returned,
            has_loss=has_loss,
        )
        forward, backward, _ = passes.peak()
        # A schedule has buffers for all micro-batches of a step.
        buffers = (sum(received) + sum(returned)) * candidate.micro_batches
        forward, backward = forward + buffers, backward + buffers + self._travelling(shape, candidate=candidate)
        buckets = self._buckets(sum(local.values()), candidate=candidate)
        if candidate.parallel.zero.stage:
            activations = self._with_zero(forward, backward, candidate=candidate, state=state, buckets=buckets)
            if candidate.parallel.zero.stage == 3:
                activations += self._gathered(stages, candidate=candidate)
            return dataclasses.replace(state, activations=activations)
        # Sums over ranks begin while activations of the last micro-batch go, or when all are gone.
        meanwhile = buckets if candidate.overlaps and buckets < state.gradients else 0
        # In a single micro-batch gradients come while activations go, and have been counted with these.
        counted = state.gradients if candidate.micro_batches == 1 and not candidate.v_shaped else 0
        peak = max(forward, backward + meanwhile, counted + buckets)
        return dataclasses.replace(state, activations=peak - counted)

    def _with_zero(self, forward: int, backward: int, *, candidate: Candidate, state: RankMemory, buckets: int) -> int:
        """Returns the bytes of activations at the peak, with what DeepSpeed has beside shares.

        Stage 2 has shares of gradients from the first backward pass of a step on, and buckets within such passes; stage
        3 always has both.
        """
        stage = candidate.parallel.zero.stage
        if stage == 2:
            absent = state.gradients if candidate.micro_batches == 1 else 0
            return max(forward - absent, backward + buckets)
        activations = max(forward, backward) + buckets
        if stage == 1:
            # When activations are gone, gradients become fp32 shares of their own.
            shares = 4 * state.gradients // (self.numbers.activation * candidate.layout.data)
            activations = max(activations, shares)
        return activations

    def _buckets(self, elements: int, *, candidate: Candidate) -> int:
        """Returns the bytes of the flat copies of gradients that are there beside these, for sums over data ranks.

        They are in fp32, whatever the weights are.
        """
        if candidate.layout.data * candidate.layout.context == 1 and not candidate.parallel.zero.stage:
            return 0
        zero = candidate.parallel.zero
        if zero.stage:
            # DeepSpeed's buffers have their full size, however small the model is.
            return zero.bucket_elements * 4 * (2 if zero.overlap else 1)
        bucket = zero.bucket_elements
        if candidate.overlaps:
            bucket = overlapped_bucket(elements, bucket_elements=bucket)
        return 4 * min(elements, bucket)

    def _travelling(self, shape: Shape, *, candidate: Candidate) -> int:
        """Returns the bytes that context ranks exchange within an attention's backward pass.

        Keys, values and their gradients, those that leave and those that arrive.
        """
        if candidate.layout.context == 1:
            return 0
        return 2 * 4 * self._output.stream(shape)

    def _gathered(self, stages: Sequence[Sequence[Unit]], *, candidate: Candidate) -> int:
        """Returns the bytes of whole parameters that stage 3 has at the same time.

        Small ones stay, beside their shares; of the others there are those in use and the next.
        """
        size, zero = self.numbers.activation, candidate.parallel.zero
        local = {
            name: self.weights[name].local_of(candidate.layout)
            for stage in stages
            for unit in stage
            for name in unit.tensors
            if name in self.weights
        }
        passing = {name: count for name, count in local.items() if count > zero.persistence_elements}
        units = [sum(passing.get(name, 0) for name in set(unit.tensors)) for stage in stages for unit in stage]
        staying, total = sum(local.values()) - sum(passing.values()), sum(passing.values())
        return size * (staying + min(total, max(units, default=0) + min(zero.prefetch_elements, total)))


def gib(size: float) -> str:
    """Writes bytes for a person: `1.25 GiB`, `310 MiB`."""
    if size >= 1 << 30:
        return f"{size / (1 << 30):.2f} GiB"
    return f"{size / (1 << 20):.0f} MiB" if size >= 10 << 20 else f"{math.ceil(size / 1024)} KiB"
