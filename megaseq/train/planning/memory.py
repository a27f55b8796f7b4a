"""Peak memory of a rank: weights, gradients, optimizer state and activations at the worst moment of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from megaseq.kernels.cross_entropy.chunked import CHUNK_BYTES, MAX_CHUNK, MIN_CHUNK
from megaseq.parallel.gradient_sums import overlapped_bucket
from megaseq.parallel.spec import Unit
from megaseq.train.planning.candidate import Candidate
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
        chunk = min(tokens, min(MAX_CHUNK, max(MIN_CHUNK, CHUNK_BYTES // (classes * size))))
        chunk = -(-tokens // max(1, -(-tokens // chunk)))
        kept = 4 * (tokens * self._width + classes * self._width)
        return kept, chunk * classes * (size + 4)

    def rank(
        self,
        stages: Sequence[Sequence[Unit]],
        *,
        candidate: Candidate,
        traces: Mapping[str, UnitTrace],
        shape: Shape,
        pipe_rank: int = 0,
        received: Sequence[int] = (),
        has_loss: bool = True,
    ) -> RankMemory:
        """Returns the peak of a rank.

        Args:
            stages: units of each of its stages, in order.
            candidate: the layout.
            traces: of all units, for its share of tokens and heads.
            shape: of a micro-batch on it.
            pipe_rank: place in the pipeline.
            received: bytes that each stage gets from the one before, for a micro-batch.
            has_loss: whether its last stage ends with the loss.
        """
        names = {name for stage in stages for unit in stage for name in unit.tensors if name in self.weights}
        state = self.state(names, candidate=candidate)
        own = {name: self._gradient_bytes({name}, candidate=candidate) for name in names}
        several = candidate.micro_batches > 1
        peak, kept = 0, 0
        for index, stage in enumerate(stages):
            last = has_loss and index == len(stages) - 1
            walk = self._walk(stage, candidate=candidate, traces=traces, shape=shape, own=own, loss=last)
            peak, kept = max(peak, kept + walk[0]), kept + walk[1]
        waiting = (candidate.in_flight(pipe_rank) - 1) * kept
        links = sum(received) * candidate.micro_batches
        gathered = self._gathered(stages, candidate=candidate) if candidate.parallel.zero.stage == 3 else 0
        peak += self._travelling(shape, candidate=candidate)
        extra = self._buckets(sum(own.values()), candidate=candidate) + gathered
        if several or candidate.parallel.zero.stage:
            activations = waiting + links + peak + extra
            if candidate.parallel.zero.stage == 1:
                # When activations are gone, gradients become fp32 shares of their own.
                shares = 4 * state.gradients // (self.numbers.activation * candidate.layout.data)
                activations = max(activations, shares)
            return dataclasses.replace(state, activations=activations)
        # One micro-batch: gradients come while activations go. Their sums begin meanwhile, or when all are there.
        meanwhile = extra if candidate.overlaps and extra < state.gradients else 0
        both = max(peak + waiting + links + meanwhile, state.gradients + extra)
        return dataclasses.replace(state, activations=both - state.gradients)

    def _walk(
        self,
        stage: Sequence[Unit],
        *,
        candidate: Candidate,
        traces: Mapping[str, UnitTrace],
        shape: Shape,
        own: Mapping[str, int],
        loss: bool,
    ) -> tuple[int, int]:
        """Returns (peak, kept) of a micro-batch's passes through a stage, gradients included where none were before."""
        tensor = candidate.layout.tensor
        share = 1.0 - 1.0 / tensor if candidate.sequence else 0.0
        kept = [int(trace.kept - share * trace.divisible) for trace in (traces[unit.name] for unit in stage)]
        total = sum(kept)
        first = candidate.micro_batches == 1 and not candidate.parallel.zero.stage
        level, grads, peak = total, 0, total
        done: set[str] = set()
        if loss:
            of_loss, moment = self.loss(shape, tensor=tensor)
            peak = max(peak, total + of_loss + moment)
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
            peak = max(peak, level + grads + (trace.first if first else trace.again))
            if first:
                fresh = [name for name in unit.tensors if name in own and name not in done]
                done.update(fresh)
                grads += sum(own[name] for name in fresh)
            level -= bytes_kept
        return peak, total

    def _gradient_bytes(self, names: Iterable[str], *, candidate: Candidate) -> int:
        layout = candidate.layout
        weights = [self.weights[name] for name in names]
        return sum(w.local(tensor=layout.tensor, expert=layout.expert) * self.numbers.computed(w) for w in weights)

    def _buckets(self, gradient_bytes: int, *, candidate: Candidate) -> int:
        """Returns the bytes of the flat copies of gradients that are there beside these, for sums over data ranks."""
        if candidate.layout.data * candidate.layout.context == 1 and not candidate.parallel.zero.stage:
            return 0
        zero = candidate.parallel.zero
        if zero.stage:
            # DeepSpeed's buffers have their full size, however small the model is.
            return zero.bucket_elements * self.numbers.activation * (2 if zero.overlap else 1)
        bucket = zero.bucket_elements
        if candidate.overlaps:
            bucket = overlapped_bucket(gradient_bytes // self.numbers.activation, bucket_elements=bucket)
        return min(gradient_bytes, bucket * 4)

    def _travelling(self, shape: Shape, *, candidate: Candidate) -> int:
        """Returns the bytes that context ranks exchange within an attention's backward pass.

        Keys, values and their gradients, those that leave and those that arrive.
        """
        if candidate.layout.context == 1:
            return 0
        longest = max(shape.source_length, shape.target_length)
        return 2 * 4 * shape.rows * longest * self._width * self.numbers.activation

    def _gathered(self, stages: Sequence[Sequence[Unit]], *, candidate: Candidate) -> int:
        """Returns the bytes of whole parameters that stage 3 has at the same time: those in use and the next."""
        sizes = [
            self._gradient_bytes([n for n in unit.tensors if n in self.weights], candidate=candidate)
            for stage in stages
            for unit in stage
        ]
        prefetched = candidate.parallel.zero.prefetch_elements * self.numbers.activation
        return int(min(sum(sizes), max(sizes, default=0) + min(prefetched, sum(sizes))))


def gib(size: float) -> str:
    """Writes bytes for a person: `1.25 GiB`, `310 MiB`."""
    if size >= 1 << 30:
        return f"{size / (1 << 30):.2f} GiB"
    return f"{size / (1 << 20):.0f} MiB" if size >= 10 << 20 else f"{math.ceil(size / 1024)} KiB"
