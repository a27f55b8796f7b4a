"""One decoded sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hypothesis:
    """A decoded sequence and what it is worth.

    Attributes:
        ids: The tokens, without the start token and without the final end-of-sequence token.
        score: What hypotheses of one source are ranked by: `logprob` after length and coverage terms.
        logprob: Sum of the log-probabilities of the tokens, the end-of-sequence token included, in nats.
        ended: Whether an end-of-sequence token closed it; False when it ran into the length limit.
    """

    ids: tuple[int, ...]
    score: float
    logprob: float
    ended: bool = True
