"""What decoding needs from a model, and nothing more.

Shapes: B sources still in the batch, K hypotheses of each, S source positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import torch

from megaseq.base import NestedMap
from megaseq.decode.errors import DecodeError

State = Any
"""Whatever a decoder keeps between steps; decoding hands it back and looks at `attention_probs` only."""


class StepDecoder(Protocol):
    """A model that extends hypotheses by one token at a time.

    The state holds what belongs to a source (encoder output, cross-attention keys and values) once for each source,
    with B rows, and what belongs to a hypothesis (the self-attention cache) with B * K rows, the hypotheses of one
    source next to each other.
    """

    def prefill(self, source: NestedMap) -> State:
        """Encodes `source` (ids [B, S], ...); returns the state of one empty hypothesis for each source, K = 1."""
        ...

    def step(self, state: State, *, tokens: torch.Tensor) -> tuple[torch.Tensor, State]:
        """Feeds `tokens` [B * K], each hypothesis' last token; returns (logits [B * K, V], new state).

        The old state is not used again, so the cache may be extended in place.

        A decoder that can report its attention also takes `need_attention=True`, and then leaves `attention_probs`
        [B * K, S], a distribution over source positions, in the new state. Only the coverage penalty asks for it.
        """
        ...

    def select(self, state: State, *, sources: torch.Tensor, hyps: torch.Tensor) -> State:
        """Returns the state of B' sources with K' hypotheses each.

        Args:
            state: The state of B sources with K hypotheses each. It is not used again.
            sources: [B'], ascending rows of the B sources: those not listed are finished and leave the batch.
            hyps: [B', K'], which of the K hypotheses of that source each new hypothesis continues.
        """
        ...


class Reordering(Protocol):
    """What a `StepDecoder` may have beside, so that a search on a device need not wait for the host."""

    def reorder(self, state: State, *, hyps: torch.Tensor) -> State:
        """As `StepDecoder.select` with all B sources, reading nothing back from the device; `hyps` [B, K']."""
        ...


@runtime_checkable
class Fixing(Protocol):
    """What a `StepDecoder` may have beside, so that a CUDA graph can hold its steps."""

    def fix(self, state: State, *, num_hyps: int, num_tokens: int) -> tuple[State, int]:
        """Keeps the memory of steps in place: all of them, and all calls of `reorder`, are then the same ops on it.

        The first step, with one hypothesis of each source, need not be like the others; nor those before and after
        `select`. `step` and `reorder` return the state that they were given.

        Args:
            state: After `prefill`; or later, to make more room.
            num_hyps: Hypotheses of each source after the first step.
            num_tokens: How many steps in all are wanted.

        Returns:
            The state, and how many steps in all there is room for: more than there have been, but fewer than
            `num_tokens` if the model can do no more.
        """
        ...


def reorder(decoder: StepDecoder, *, state: State, sources: torch.Tensor, hyps: torch.Tensor) -> State:
    """Goes on with the hypotheses `hyps` [B, K'] of all sources; `sources` are the numbers 0 to B - 1, [B]."""
    if hasattr(decoder, "reorder"):
        return cast(Reordering, decoder).reorder(state, hyps=hyps)
    return decoder.select(state, sources=sources, hyps=hyps)


class StepBest(Protocol):
    """The method `step_best` of a decoder whose logits lie elsewhere: it fetches what a search reads of them.

    A decoder that has it also has `vocab_size`. Only searches that need no more than the best tokens call it.
    """

    def __call__(
        self,
        state: State,
        *,
        tokens: torch.Tensor,
        best: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        count: int,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], State]:
        """Does a step; returns what `best` makes of its logits, and the new state.

        Args:
            state: as in `StepDecoder.step`.
            tokens: [B * K], each hypothesis' last token.
            best: maps logits [B * K, V] to fp32 values [B * K, N], ids [B * K, N] and fp32 values [B * K]; called where
                the logits are.
            count: N, unless V is less.
        """
        ...


def step_with_attention(
    decoder: StepDecoder, *, state: State, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, State]:
    """One step that also gives attention: (logits [B * K, V], attention [B * K, S], state).

    Raises:
        DecodeError: The decoder does not report its attention.
    """
    name = type(decoder).__name__
    remedy = "Set coverage_penalty to 0, or decode with a model that leaves attention_probs in its state."
    try:
        logits, state = decoder.step(state, tokens=tokens, need_attention=True)  # type: ignore[call-arg]
    except TypeError as error:
        # Only a missing keyword is the user's mistake; any other TypeError is the decoder's own fault.
        if "need_attention" not in str(error):
            raise
        raise DecodeError(
            f"coverage_penalty: must meet a decoder that takes need_attention, but {name} does not. {remedy}"
        ) from error
    attention = state.get("attention_probs") if isinstance(state, dict) else getattr(state, "attention_probs", None)
    if attention is None:
        raise DecodeError(
            f"coverage_penalty: must meet a decoder that reports attention_probs, but {name} gives none. {remedy}"
        )
    return logits, attention, state


def source_lengths(source: NestedMap) -> torch.Tensor:
    """Number of real positions of each source, [B], from segment ids where there are any.

    Raises:
        DecodeError: A row holds several packed sources.
    """
    segments = source.get("segment_ids")
    if segments is None:
        known = source.get("lengths")
        if known is not None:
            return torch.as_tensor(known)
        ids = source["ids"] if "ids" in source else source["features"]
        return torch.full((ids.shape[0],), ids.shape[1], dtype=torch.long, device=ids.device)
    if segments.numel() and int(segments.max()) > 1:
        raise DecodeError(
            "source.segment_ids: must hold one source a row to be decoded, but holds "
            f"{int(segments.max())}. Decode bucketed batches, not packed ones."
        )
    lengths: torch.Tensor = (segments > 0).sum(dim=1)
    return lengths
