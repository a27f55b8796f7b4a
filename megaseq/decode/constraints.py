"""Constraints on the next token: composable functions of the scores and of the tokens so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megaseq.base import Configurable


@dataclass(frozen=True)
class View:
    """What a constraint may look at.

    Attributes:
        ids: [B, K, t] tokens so far, without the start token.
        rows: [B] index of each source in the batch that the search began with.
        last: [B] whether this is the last step that a source's length limit allows.
        eos_id: The end-of-sequence token.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    last: torch.Tensor
    eos_id: int


class LogitsProcessor(Configurable):
    """Changes the scores of the next token; forbids one by -inf."""

    class Params(Configurable.Params):
        pass

    params: Params

    def __call__(self, scores: torch.Tensor, *, view: View) -> torch.Tensor:
        """Returns new scores for `scores` [B, K, V]; must not change its argument.

        Beam search hands it log-probabilities, greedy search and sampling hand it logits.
        """
        raise NotImplementedError


class Constraints:
    """A chain of processors."""

    def __init__(self, processors: Sequence[LogitsProcessor]) -> None:
        self._processors = tuple(processors)

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __call__(self, scores: torch.Tensor, *, view: View) -> torch.Tensor:
        """Applies them in order to `scores` [B, K, V]."""
        for processor in self._processors:
            scores = processor(scores, view=view)
        return scores


def forbid_early_end(scores: torch.Tensor, *, step: int, least: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Forbids the end-of-sequence token to sources that need `least` [B] tokens, in `scores` [B, K, V]."""
    early = (least > step).view(-1, 1)
    scores = scores.clone()
    scores[..., eos_id] = scores[..., eos_id].masked_fill(early, float("-inf"))
    return scores


def force_prefix(scores: torch.Tensor, *, wanted: torch.Tensor) -> torch.Tensor:
    """Leaves only the `wanted` [B] token in `scores` [B, K, V], with its own score; a negative id leaves all."""
    vocab = torch.arange(scores.shape[-1], device=scores.device)
    other = (vocab != wanted.view(-1, 1)) & (wanted >= 0).view(-1, 1)
    return scores.masked_fill(other.unsqueeze(1), float("-inf"))
