"""When the search of a source is over."""

from __future__ import annotations

import torch

from megaseq.decode.finished import Finished
from megaseq.decode.scoring import Scoring


def score_gap(active: torch.Tensor, *, finished: Finished, rows: torch.Tensor, gap: float, needed: int) -> torch.Tensor:
    """Lingvo's rule: every active hypothesis is `gap` or more below the best finished one, in log-probability.

    Args:
        active: [B, K] log-probabilities of the beam; -inf where there is no hypothesis.
        finished: Of all sources.
        rows: [B] the sources of the beam.
        gap: Greatest useful difference, `beam_size`.
        needed: Hypotheses that must have finished.

    Returns:
        [B] bool.
    """
    below = active[:, 0] <= finished.best_logprob[rows] - gap
    return below & (finished.count[rows] >= needed) if needed else below


def full_beam(*, finished: Finished, rows: torch.Tensor, num_hyps: int) -> torch.Tensor:
    """As many hypotheses have finished as the beam is wide, [B]; transformers' `early_stopping=True`."""
    return finished.count[rows] >= num_hyps


def no_better(
    active: torch.Tensor,
    *,
    finished: Finished,
    rows: torch.Tensor,
    num_hyps: int,
    length: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """The best active hypothesis, were it to end at `length` [B] with no further loss, is not above the worst of the
    `num_hyps` best finished ones, [B]; transformers' `early_stopping=False` (length so far) and `"never"` (longest
    possible length, which bounds the score for a positive length exponent)."""
    return active[:, 0] / scoring.norm(length) <= finished.score[rows, num_hyps - 1]
