"""Workers that meet seldom: local SGD, DiLoCo, and an asynchronous mode."""

from megaseq.train.local_sgd.params import LocalSGD

__all__ = ["LocalSGD"]
