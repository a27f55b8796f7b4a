"""What a step of beam search is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class StepRule:
    """The numbers of a step that do not change from step to step."""

    eos_id: int
    """The end-of-sequence token."""
    count: int
    """Extensions that each hypothesis proposes; the vocabulary bounds it."""
    size: int
    """E, places of the next beam."""
    max_logit_delta: float
    """The end token is allowed only within this distance of its hypothesis' best token."""
    local_threshold: float
    """... and only when its own log-probability is above this."""


class BeamStep(NamedTuple):
    """The best extensions of B sources' K hypotheses. Scores are log-probabilities of whole hypotheses, fp32."""

    score: Tensor
    """[B, K, C], best first, C = min(count, V); equal tokens' lower id first."""
    ids: Tensor
    """int64 [B, K, C]."""
    eos_score: Tensor
    """[B, K], of the hypothesis ended by the end token."""
    eos_allowed: Tensor
    """bool [B, K], whether the rule allows that."""
    next_score: Tensor
    """[B, E], the best that go on, best first; equals' lower token, then lower hypothesis first; -inf for an empty
    place."""
    next_parents: Tensor
    """int64 [B, E], which of the K each continues."""
    next_ids: Tensor
    """int64 [B, E]."""
