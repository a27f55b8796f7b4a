"""Workers that meet seldom: local SGD, DiLoCo, and an asynchronous mode."""

from __future__ import annotations

from megaseq.train.local_sgd.params import LocalSGD

__all__ = ["LocalSGD"]
