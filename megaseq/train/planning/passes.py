"""What a rank's forward and backward passes of a step have in memory at most: activations, and gradients they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megaseq.kernels.cross_entropy.chunked import CHUNK_BYTES, MAX_CHUNK, MIN_CHUNK
from megaseq.parallel.spec import Unit
from megaseq.train.planning.candidate import Candidate
from megaseq.train.planning.halves import moments
from megaseq.train.planning.trace import Shape, UnitTrace


class Walk(NamedTuple):
    """A micro-batch's passes through stages; bytes, gradients included where none were before."""

    forward: int
    """Peak of the forward pass and of what ends it, the loss."""
    backward: int
    """Peak of the backward pass."""
    kept: int
    """Activations between the two."""


@dataclasses.dataclass(frozen=True)
class Output:
    """The decoder's output and the softmax over it."""

    vocab_size: int
    """Rows of the softmax."""
    width: int
    """Of the decoder's output, and of all residual streams."""
    element: int
    """Bytes of an element that travels between layers."""

    def stream(self, shape: Shape) -> int:
        """Returns the bytes of a micro-batch's residual stream, of the longer side."""
        return shape.rows * max(shape.source_length, shape.target_length) * self.width * self.element

    def matrix_gradient(self, *, tensor: int) -> int:
        """Returns the bytes of the softmax's gradient in fp32, on one of `tensor` ranks."""
        return 4 * -(-self.vocab_size // tensor) * self.width

    def loss(self, shape: Shape, *, tensor: int) -> tuple[int, int]:
        """Returns (kept, for a moment) of softmax and cross entropy: gradients are made in the forward pass."""
        tokens, classes = shape.rows * shape.target_length, -(-self.vocab_size // tensor)
        size = self.element
        chunk = min(tokens, min(MAX_CHUNK, max(MIN_CHUNK, CHUNK_BYTES // (self.vocab_size * size))))
        chunk = -(-tokens // max(1, -(-tokens // chunk)))
        kept = 4 * (tokens * self.width + classes * self.width)
        # Logits; probabilities in fp32, which the products read in the logits' format; rows times their weights.
        moment = chunk * classes * (size + 4) + chunk * self.width * size
        if size < 4:
            moment += chunk * classes * size + classes * self.width * size
        return kept, moment


@dataclasses.dataclass(frozen=True)
class RankPasses:
    """All passes of one rank in a step."""

    stages: Sequence[Sequence[Unit]]
    """Units of each stage that it has, in order."""
    candidate: Candidate
    traces: Mapping[str, UnitTrace]
    """Of all units, for the rank's share of tokens and heads."""
    shape: Shape
    """Of a micro-batch on it."""
    output: Output
    heads: frozenset[str]
    """Names of the parameters that may be the softmax's matrix."""
    gradients: Mapping[str, int]
    """Bytes of the gradient of each parameter that it has."""
    pipe_rank: int
    received: Sequence[int]
    """Bytes that each stage gets from the one before, for a micro-batch; 0 of the first of all."""
    returned: Sequence[int]
    """Bytes that each stage sends to a later rank, and gets back as gradients, for a micro-batch."""
    has_loss: bool
    """Whether its last stage ends with the loss."""

    def peak(self) -> Walk:
        """Returns the passes at their worst, with all that other micro-batches have left."""
        return self._zero_bubble() if self.candidate.v_shaped else self._in_turn()

    def _in_turn(self) -> Walk:
        """Returns `peak` where a backward pass goes through a stage at once."""
        alive = self.candidate.alive(self.pipe_rank)
        forward, backward, kept, others = 0, 0, 0, 0
        for index in range(len(self.stages)):
            walk = self._walk(index)
            forward, backward = max(forward, kept + walk.forward), max(backward, kept + walk.backward)
            kept += walk.kept
            others += (alive[index] - 1) * walk.kept
        if len(self.stages) == 1:
            # What was last sent back is let go of when the next is.
            others += sum(self.received)
        else:
            # Schedules of several stages let go of what they have sent, either way, when a step ends.
            gone = (self.candidate.micro_batches - count for count in alive)
            others += sum(n * (a + b) for n, a, b in zip(gone, self.received, self.returned, strict=True))
        return Walk(forward + others, backward + others, kept)

    def _zero_bubble(self) -> Walk:
        """Returns `peak` of a rank of a V.

        A stage's backward pass frees nothing in its first half, which adds the gradients that the second is made of.
        The first stage of all sends nothing back, and has a second half alone; a stage that reads a parameter twice
        has both at once, as all have where torch cannot divide them.
        """
        # Imported where it is used: torch's schedules take as long as torch itself.
        from megaseq.parallel.pipeline.stage import SPLITS_BACKWARD

        walks, between = [], []
        for index, stage in enumerate(self.stages):
            walk, left = self._walk(index), 0
            names = [name for unit in stage for name in unit.tensors if name in self.gradients]
            if not SPLITS_BACKWARD or len(set(names)) < len(names):
                left = -walk.kept
            elif self.received[index]:
                walk, left = self._halves(index)
            walks.append(walk)
            between.append(left)
        found = Walk(0, 0, 0)
        candidate = self.candidate
        for moment in moments(self.pipe_rank, ranks=candidate.layout.pipe, micro_batches=candidate.micro_batches):
            kept = sum(count * walk.kept for count, walk in zip(moment.alive, walks, strict=True))
            kept += sum(count * left for count, left in zip(moment.between, between, strict=True))
            for index, done in enumerate(moment.done):
                # What has been sent, either way, stays until the step ends.
                kept += done * self.received[index]
                kept += max(0, done - moment.between[index] - 1) * self.returned[index]
            walk = walks[moment.stage]
            others = kept - walk.kept
            found = Walk(max(found[0], others + walk.forward), max(found[1], others + walk.backward), kept)
        return found

    def _kept(self, index: int) -> list[int]:
        """Returns the bytes that each unit of a stage keeps of a micro-batch."""
        share = 1.0 - 1.0 / self.candidate.layout.tensor if self.candidate.sequence else 0.0
        traces = (self.traces[unit.name] for unit in self.stages[index])
        return [int(trace.kept - share * trace.divisible) for trace in traces]

    def _ends_with_loss(self, index: int) -> bool:
        return self.has_loss and index == len(self.stages) - 1

    def _halves(self, index: int) -> tuple[Walk, int]:
        """Returns a micro-batch's passes where the backward pass has two halves, and what is there between these."""
        stage = self.stages[index]
        kept = level = sum(self._kept(index))
        forward = kept
        if self._ends_with_loss(index):
            of_loss, moment = self.output.loss(self.shape, tensor=self.candidate.layout.tensor)
            forward, level = kept + of_loss + moment, kept + of_loss
        left, peak = 0, level
        for unit in reversed(stage):
            peak = max(peak, level + left + self.traces[unit.name].half)
            left += self.traces[unit.name].between
        # The second half begins with one parameter's gradient when all of that is there.
        largest = max((size for unit in stage for size in self._gradients_of(unit).values()), default=0)
        return Walk(forward, max(peak, level + left + largest), kept), left

    def _walk(self, index: int) -> Walk:
        """Returns a micro-batch's passes through a stage."""
        stage, tensor = self.stages[index], self.candidate.layout.tensor
        kept = self._kept(index)
        total = sum(kept)
        first = self.candidate.micro_batches == 1 and not self.candidate.parallel.zero.stage
        level, grads, peak, forward = total, 0, total, total
        # Tokens that tensor ranks share are joined once more for gradients of weights, and those of inputs cut.
        joins = 2 * self.output.stream(self.shape) if self.candidate.sequence else 0
        done: set[str] = set()
        if self._ends_with_loss(index):
            of_loss, moment = self.output.loss(self.shape, tensor=tensor)
            forward = total + of_loss + moment
            matrix = self.output.matrix_gradient(tensor=tensor)
            # The head's gradient is scaled into a new tensor, and cast.
            peak = max(peak, total + of_loss + matrix + (0 if first else matrix))
            # Matrices of other units may be as large.
            heads = self.heads & stage[-1].tensors
            if first:
                done.update(heads)
                grads += sum(self.gradients[name] for name in heads)
            level += of_loss - matrix
        for unit, bytes_kept in zip(reversed(stage), reversed(kept), strict=True):
            trace = self.traces[unit.name]
            peak = max(peak, level + grads + joins + (trace.first if first else trace.again))
            if first:
                fresh = {name: size for name, size in self._gradients_of(unit).items() if name not in done}
                done.update(fresh)
                grads += sum(fresh.values())
            level -= bytes_kept
        return Walk(forward, peak, total)

    def _gradients_of(self, unit: Unit) -> dict[str, int]:
        """Returns the bytes of the gradients of what a unit reads, by name."""
        return {name: self.gradients[name] for name in unit.tensors if name in self.gradients}
