"""Where a run's figures go: the metrics file, the terminal, wandb, TensorBoard."""

from __future__ import annotations

from megaseq.train.tracking.callback import Callback, RunFacts, Sample
from megaseq.train.tracking.tracking import Callbacks, Tracking

__all__ = ["Callback", "Callbacks", "RunFacts", "Sample", "Tracking"]
