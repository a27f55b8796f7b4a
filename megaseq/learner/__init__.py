"""Optimizers, schedules, clipping, moving averages, and which parameters they apply to."""

from __future__ import annotations

from megaseq.learner.adafactor import Adafactor
from megaseq.learner.adamw import AdamW
from megaseq.learner.clipping import clip_coefficient, global_norm
from megaseq.learner.ema import MovingAverage
from megaseq.learner.learner import Learner, UpdateStats
from megaseq.learner.optimizer import Optimizer, ParameterGroup
from megaseq.learner.rules import ParameterRule
from megaseq.learner.schedule import Schedule
from megaseq.learner.schedules import (
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    Piecewise,
    Polynomial,
    Warmup,
    WarmupStableDecay,
)
from megaseq.learner.sgd import SGD
from megaseq.learner.skip import NormTracker, SkipPolicy

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "Constant",
    "Cosine",
    "InverseSqrt",
    "Learner",
    "Linear",
    "MovingAverage",
    "NormTracker",
    "Optimizer",
    "ParameterGroup",
    "ParameterRule",
    "Piecewise",
    "Polynomial",
    "Schedule",
    "SkipPolicy",
    "UpdateStats",
    "Warmup",
    "WarmupStableDecay",
    "clip_coefficient",
    "global_norm",
]
