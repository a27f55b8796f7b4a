"""What the cross entropy op is told and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """How logits are made from hidden states and turned into a loss."""

    label_smoothing: float = 0.0
    """Share of the target distribution that is uniform over the vocabulary (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Factor of log(normaliser)^2, which keeps the logits from drifting (PaLM, Chowdhery et al. 2022)."""
    scale: float = 1.0
    """Factor of the hidden states before the projection (T5 with tied embeddings: D ** -0.5)."""
    soft_cap: float | None = None
    """Logits become `soft_cap * tanh(logits / soft_cap)` (Gemma 2)."""
    chunk: int | None = None
    """Tokens whose logits exist at one time; None: chosen by the width of the vocabulary."""


@dataclass(frozen=True)
class VocabularyShare:
    """Which part of the vocabulary is here, where ranks share it, and how they add up; the op knows nothing else."""

    first: int
    """First class that is here; the others follow."""
    size: int
    """Classes V of the whole vocabulary."""
    total: Callable[[Tensor], Tensor]
    """Sums over the ranks, in place or not."""
    maximum: Callable[[Tensor], Tensor]
    """The largest over the ranks, element by element, in place or not."""


class LossSums(NamedTuple):
    """Sums over tokens, each token counted with its weight; scalars in fp32 (float64 for float64 inputs)."""

    loss: Tensor
    """What is minimised: label-smoothed cross entropy plus z-loss; the only one with a gradient."""
    nll: Tensor
    """Negative log likelihood of the labels, in nats."""
    correct: Tensor
    """Weight of tokens whose label has the highest logit."""
    z_loss: Tensor
    """The z-loss part of `loss`."""
    weight: Tensor
    """Sum of the weights."""
