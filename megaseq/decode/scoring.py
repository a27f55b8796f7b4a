"""Scores of finished hypotheses: length normalisation and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scoring:
    """How a finished hypothesis is ranked.

    With log-probability s, length n (the end-of-sequence token included) and attention a summed over the steps for each
    source position: score = s / norm(n) + ratio * beta * sum over positions of log(clamp(a / ratio, 0.001, 0.5)).
    norm is ((n + 5) / 5) ** alpha, from Wu et al. 2016 (arxiv.org/abs/1609.08144, equation 14), or n ** length_penalty.

    Attributes:
        length_normalization: alpha; 0 turns it off.
        length_penalty: Exponent of the plain length; None takes `length_normalization`.
        coverage_penalty: beta; 0 turns it off.
        target_seq_length_ratio: Mean target length over mean source length.
    """

    length_normalization: float = 0.0
    length_penalty: float | None = None
    coverage_penalty: float = 0.0
    target_seq_length_ratio: float = 1.0

    def norm(self, length: torch.Tensor) -> torch.Tensor:
        """What a log-probability is divided by, for `length` of any shape, end-of-sequence token included."""
        lengths = length.float()
        if self.length_penalty is not None:
            return lengths**self.length_penalty
        return ((lengths + 5.0) / 5.0) ** self.length_normalization

    def coverage(self, attention: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
        """The coverage term [...] for summed `attention` [..., S]; `mask` [..., S] is True at real positions."""
        ratio = self.target_seq_length_ratio
        per_position = (attention / ratio).clamp(0.001, 0.5).log()
        return ratio * self.coverage_penalty * (per_position * mask).sum(dim=-1)
