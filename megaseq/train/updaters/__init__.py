"""What turns the gradients of a step into new weights: by ourselves, or by DeepSpeed's engine for ZeRO."""

from __future__ import annotations

from megaseq.train.updaters.base import Updater
from megaseq.train.updaters.make import make_updater
from megaseq.train.updaters.replicated import Replicated

__all__ = ["Replicated", "Updater", "make_updater"]
