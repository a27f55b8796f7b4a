"""What every search shares: special tokens, length limits, constraints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megaseq.base import Configurable, NestedMap
from megaseq.decode.constraints import Constraints, LogitsProcessor
from megaseq.decode.errors import DecodeError
from megaseq.decode.hypothesis import Hypothesis
from megaseq.decode.protocol import StepDecoder, source_lengths

# Ids of the tokenizers that the library learns, for a search without a task.
_DEFAULT_SOS_ID, _DEFAULT_EOS_ID = 2, 3


class Search(Configurable):
    """Turns sources into hypotheses with a `StepDecoder`."""

    class Params(Configurable.Params):
        target_sos_id: int | None = None
        """Start token, fed to the first step; never part of a hypothesis. None: the target vocabulary's; in a search
        without a task 2."""
        target_eos_id: int | None = None
        """End-of-sequence token. None: the target vocabulary's; in a search without a task 3."""
        target_seq_len: int = 256
        """Most decoding steps, the end-of-sequence token included."""
        max_length_ratio: float = 0.0
        """When above 0: at most ratio * source length + `max_length_offset` steps."""
        max_length_offset: int = 0
        """Steps added to the limit by ratio, so that short sources have room."""
        min_seq_len: int = 0
        """Fewest tokens before the end-of-sequence token."""
        min_length_ratio: float = 0.0
        """When above 0: at least ratio * source length tokens before the end-of-sequence token."""
        processors: tuple[LogitsProcessor.Params, ...] = ()
        """Constraints on the next token, applied in this order."""

        def validate(self) -> Iterator[str]:
            """Yields what leaves no length to choose."""
            if self.target_seq_len < 1:
                yield f"target_seq_len: must be at least 1, but is {self.target_seq_len}. Set the longest output."
            for name in ("max_length_ratio", "min_length_ratio", "min_seq_len", "target_sos_id", "target_eos_id"):
                value = getattr(self, name)
                if value is not None and value < 0:
                    yield f"{name}: must not be negative, but is {value}. Use 0 or more."
            if self.min_seq_len >= self.target_seq_len:
                yield (
                    f"min_seq_len: must be below target_seq_len {self.target_seq_len}, but is {self.min_seq_len}. "
                    "Lower it or raise target_seq_len."
                )

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self.sos_id = _DEFAULT_SOS_ID if p.target_sos_id is None else p.target_sos_id
        self.eos_id = _DEFAULT_EOS_ID if p.target_eos_id is None else p.target_eos_id
        self._constraints = Constraints([processor.instantiate() for processor in p.processors])

    def search(
        self,
        decoder: StepDecoder,
        *,
        source: NestedMap,
        prefix: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
    ) -> list[list[Hypothesis]]:
        """Decodes every row of `source`; returns the hypotheses of each source, best first.

        Args:
            decoder: The model.
            source: What `decoder.prefill` takes, B rows, on the device of the model.
            prefix: [B, P] tokens that the outputs must begin with; a negative id leaves that position free.
            keys: [B] identity of each source, its index in the corpus, say; only random choices depend on it.

        Raises:
            DecodeError: The model gives NaN, has no token `target_eos_id`, or lacks what an option needs.
        """
        raise NotImplementedError

    def limits(self, lengths: torch.Tensor) -> Limits:
        """The length limits of sources of these `lengths` [B]."""
        p = self.params
        most = torch.full_like(lengths, p.target_seq_len, dtype=torch.long)
        if p.max_length_ratio > 0:
            by_ratio = (lengths * p.max_length_ratio).ceil().long() + p.max_length_offset
            most = torch.minimum(most, by_ratio).clamp(min=1)
        least = torch.full_like(most, p.min_seq_len)
        if p.min_length_ratio > 0:
            least = torch.maximum(least, (lengths * p.min_length_ratio).floor().long())
        # The last step stays free for the end-of-sequence token.
        return Limits(most=most, least=torch.minimum(least, most - 1))

    def start(self, decoder: StepDecoder, *, source: NestedMap) -> Start:
        """Encodes the source and lays out what a search begins with."""
        lengths = source_lengths(source)
        state = decoder.prefill(source)
        tokens = torch.full((lengths.shape[0],), self.sos_id, dtype=torch.long, device=lengths.device)
        return Start(state=state, tokens=tokens, lengths=lengths, limits=self.limits(lengths))


def check_eos(logits: torch.Tensor, *, eos_id: int) -> None:
    """Raises DecodeError if the vocabulary of `logits` [..., V] has no end-of-sequence token: none would end."""
    if logits.shape[-1] <= eos_id:
        raise DecodeError(
            f"target_eos_id: must be below the vocabulary's {logits.shape[-1]}, but is {eos_id}. "
            "Set the model's own end-of-sequence id."
        )


@dataclass
class Limits:
    """Limits of each source: `most` [B] steps, `least` [B] tokens before the end-of-sequence token."""

    most: torch.Tensor
    least: torch.Tensor

    def take(self, rows: torch.Tensor) -> Limits:
        """The limits of some sources, `rows` [B']."""
        return Limits(most=self.most[rows], least=self.least[rows])


@dataclass
class Start:
    """The decoder's state after prefill, the first tokens [B], source lengths [B] and length limits."""

    state: object
    tokens: torch.Tensor
    lengths: torch.Tensor
    limits: Limits


def raise_nan(step: int) -> None:
    """Reports NaN scores; called with what a search has read back from the device anyway."""
    raise DecodeError(
        f"logits: must hold no NaN, but do at step {step}. Check the checkpoint and the precision of the model."
    )
