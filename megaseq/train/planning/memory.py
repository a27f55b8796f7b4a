"""Peak memory of a rank: weights, gradients, optimizer state and activations at the worst moment of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from megaseq.kernels.cross_entropy.chunked import CHUNK_BYTES, MAX_CHUNK, MIN_CHUNK
from megaseq.parallel.gradient_sums import overlapped_bucket
from megaseq.parallel.layout import Layout
from megaseq.parallel.spec import Unit
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.halves import moments
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


class Walk(NamedTuple):
    """A micro-batch's passes through stages; bytes, gradients included where none were before."""

    forward: int
    """Peak of the forward pass and of what ends it, the loss."""
    backward: int
    """Peak of the backward pass."""
    kept: int
    """Activations between the two."""


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
        self._vocab_size, self._width = vocab_size, width

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

    def loss(self, shape: Shape, *, tensor: int) -> tuple[int, int]:
        """Returns (kept, for a moment) of softmax and cross entropy: gradients are made in the forward pass."""
        tokens, classes = shape.rows * shape.target_length, -(-self._vocab_size // tensor)
        size = self.numbers.activation
        chunk = min(tokens, min(MAX_CHUNK, max(MIN_CHUNK, CHUNK_BYTES // (self._vocab_size * size))))
        chunk = -(-tokens // max(1, -(-tokens // chunk)))
        kept = 4 * (tokens * self._width + classes * self._width)
        # Logits; probabilities in fp32, which the products read in the logits' format; rows times their weights.
        moment = chunk * classes * (size + 4) + chunk * self._width * size
        if size < 4:
            moment += chunk * classes * size + classes * self._width * size
        return kept, moment

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
        own = {name: self._gradient_bytes({name}, candidate=candidate) for name in names}
        v_shaped = candidate.layout.pipe > 1 and candidate.parallel.pipeline.schedule == "zero_bubble_v"
        passes = self._zero_bubble if v_shaped else self._passes
        forward, backward, _ = passes(
            stages,
            candidate=candidate,
            traces=traces,
            shape=shape,
            own=own,
            pipe_rank=pipe_rank,
            received=received,
            returned=returned,
            has_loss=has_loss,
        )
        # A schedule has buffers for all micro-batches of a step.
        buffers = (sum(received) + sum(returned)) * candidate.micro_batches
        forward, backward = forward + buffers, backward + buffers + self._travelling(shape, candidate=candidate)
        elements = sum(self.weights[name].local_of(candidate.layout) for name in names)
        buckets = self._buckets(elements, candidate=candidate)
        if candidate.parallel.zero.stage:
            activations = self._with_zero(forward, backward, candidate=candidate, state=state, buckets=buckets)
            if candidate.parallel.zero.stage == 3:
                activations += self._gathered(stages, candidate=candidate)
            return dataclasses.replace(state, activations=activations)
        # Sums over ranks begin while activations of the last micro-batch go, or when all are gone.
        meanwhile = buckets if candidate.overlaps and buckets < state.gradients else 0
        # In a single micro-batch gradients come while activations go, and have been counted with these.
        counted = state.gradients if candidate.micro_batches == 1 and not v_shaped else 0
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

    def _passes(
        self,
        stages: Sequence[Sequence[Unit]],
        *,
        candidate: Candidate,
        traces: Mapping[str, UnitTrace],
        shape: Shape,
        own: Mapping[str, int],
        pipe_rank: int,
        received: Sequence[int],
        returned: Sequence[int],
        has_loss: bool,
    ) -> Walk:
        """Returns the passes of a rank with all that other micro-batches have left."""
        alive = candidate.alive(pipe_rank)
        forward, backward, kept, others = 0, 0, 0, 0
        for index, stage in enumerate(stages):
            last = has_loss and index == len(stages) - 1
            walk = self._walk(stage, candidate=candidate, traces=traces, shape=shape, own=own, loss=last)
            forward, backward = max(forward, kept + walk.forward), max(backward, kept + walk.backward)
            kept += walk.kept
            others += (alive[index] - 1) * walk.kept
        if len(stages) == 1:
            # What was last sent back is let go of when the next is.
            others += sum(received)
        else:
            # Schedules of several stages let go of what they have sent, either way, when a step ends.
            gone = (candidate.micro_batches - count for count in alive)
            others += sum(n * (a + b) for n, a, b in zip(gone, received, returned, strict=True))
        return Walk(forward + others, backward + others, kept)

    def _zero_bubble(
        self,
        stages: Sequence[Sequence[Unit]],
        *,
        candidate: Candidate,
        traces: Mapping[str, UnitTrace],
        shape: Shape,
        own: Mapping[str, int],
        pipe_rank: int,
        received: Sequence[int],
        returned: Sequence[int],
        has_loss: bool,
    ) -> Walk:
        """Returns the same as `_passes` for a rank of a V.

        A stage's backward pass frees nothing in its first half, which adds the gradients that the second is made of.
        The first stage of all sends nothing back, and has a second half alone; a stage that reads a parameter twice
        has both at once, as all have where torch cannot divide them.
        """
        # Imported where it is used: torch's schedules take as long as torch itself.
        from megaseq.parallel.pipeline.stage import SPLITS_BACKWARD

        walks, between = [], []
        for index, stage in enumerate(stages):
            last = has_loss and index == len(stages) - 1
            walk = self._walk(stage, candidate=candidate, traces=traces, shape=shape, own=own, loss=last)
            names = [name for unit in stage for name in unit.tensors if name in self.weights]
            left = 0
            if not SPLITS_BACKWARD or len(set(names)) < len(names):
                left = -walk.kept
            elif received[index]:
                walk, left = self._halves(stage, candidate=candidate, traces=traces, shape=shape, own=own, loss=last)
            walks.append(walk)
            between.append(left)
        found = Walk(0, 0, 0)
        for moment in moments(pipe_rank, ranks=candidate.layout.pipe, micro_batches=candidate.micro_batches):
            kept = sum(count * walk.kept for count, walk in zip(moment.alive, walks, strict=True))
            kept += sum(count * left for count, left in zip(moment.between, between, strict=True))
            for index, done in enumerate(moment.done):
                # What has been sent, either way, stays until the step ends.
                kept += done * received[index] + max(0, done - moment.between[index] - 1) * returned[index]
            walk = walks[moment.stage]
            others = kept - walk.kept
            found = Walk(max(found[0], others + walk.forward), max(found[1], others + walk.backward), kept)
        return found

    def _kept(self, stage: Sequence[Unit], *, candidate: Candidate, traces: Mapping[str, UnitTrace]) -> list[int]:
        """Returns the bytes that each unit keeps of a micro-batch."""
        share = 1.0 - 1.0 / candidate.layout.tensor if candidate.sequence else 0.0
        return [int(trace.kept - share * trace.divisible) for trace in (traces[unit.name] for unit in stage)]

    def _halves(
        self,
        stage: Sequence[Unit],
        *,
        candidate: Candidate,
        traces: Mapping[str, UnitTrace],
        shape: Shape,
        own: Mapping[str, int],
        loss: bool,
    ) -> tuple[Walk, int]:
        """Returns a micro-batch's passes where the backward pass has two halves, and what is there between these."""
        kept = level = sum(self._kept(stage, candidate=candidate, traces=traces))
        forward = kept
        if loss:
            of_loss, moment = self.loss(shape, tensor=candidate.layout.tensor)
            forward, level = kept + of_loss + moment, kept + of_loss
        left, peak = 0, level
        for unit in reversed(stage):
            peak = max(peak, level + left + traces[unit.name].half)
            left += traces[unit.name].between
        # The second half begins with one parameter's gradient when all of that is there.
        largest = max((own[name] for unit in stage for name in unit.tensors if name in own), default=0)
        return Walk(forward, max(peak, level + left + largest), kept), left

    def _walk(
        self,
        stage: Sequence[Unit],
        *,
        candidate: Candidate,
        traces: Mapping[str, UnitTrace],
        shape: Shape,
        own: Mapping[str, int],
        loss: bool,
    ) -> Walk:
        """Returns a micro-batch's passes through a stage."""
        tensor = candidate.layout.tensor
        kept = self._kept(stage, candidate=candidate, traces=traces)
        total = sum(kept)
        first = candidate.micro_batches == 1 and not candidate.parallel.zero.stage
        level, grads, peak, forward = total, 0, total, total
        # Tokens that tensor ranks share are joined once more for gradients of weights, and those of inputs cut.
        joins = 2 * self._tokens(shape) if candidate.sequence else 0
        done: set[str] = set()
        if loss:
            of_loss, moment = self.loss(shape, tensor=tensor)
            forward = total + of_loss + moment
            vocabulary = 4 * -(-self._vocab_size // tensor) * self._width
            # The head's gradient is scaled into a new tensor, and cast.
            peak = max(peak, total + of_loss + vocabulary + (0 if first else vocabulary))
            heads = [name for name in own if self.weights[name].elements == self._vocab_size * self._width]
            if first and heads:
                done.add(heads[-1])
                grads += own[heads[-1]]
            level += of_loss - vocabulary
        for unit, bytes_kept in zip(reversed(stage), reversed(kept), strict=True):
            trace = traces[unit.name]
            peak = max(peak, level + grads + joins + (trace.first if first else trace.again))
            if first:
                fresh = [name for name in unit.tensors if name in own and name not in done]
                done.update(fresh)
                grads += sum(own[name] for name in fresh)
            level -= bytes_kept
        return Walk(forward, peak, total)

    def _gradient_bytes(self, names: Iterable[str], *, candidate: Candidate) -> int:
        weights = [self.weights[name] for name in names]
        return sum(w.local_of(candidate.layout) * self.numbers.computed(w) for w in weights)

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
        return 2 * 4 * self._tokens(shape)

    def _tokens(self, shape: Shape) -> int:
        """Returns the bytes of a micro-batch's residual stream, of the longer side."""
        return shape.rows * max(shape.source_length, shape.target_length) * self._width * self.numbers.activation

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
