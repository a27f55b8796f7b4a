"""Params of training by workers that meet seldom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from megaseq.base import Configurable, Problem

Compression = Literal["none", "bfloat16", "int8"]

_SHARED = (
    "workers", "mode", "inner_steps", "outer_learning_rate", "outer_momentum", "fragments", "compression",
    "max_staleness", "timeout_seconds",
)  # fmt: skip


class LocalSGD(Configurable):
    """Workers train on their own for `inner_steps` and then exchange what they have learned, through a server.

    Each worker is a run of its own, of one process or of a data-parallel group, with its share of every batch. Its
    optimizer's state stays with it. The server takes the mean of the workers' parameter changes for the gradient of an
    outer step with Nesterov's momentum: DiLoCo (Douillard et al. 2023, arxiv.org/abs/2311.08105). With an outer
    learning rate of 1 and no momentum that is the mean of the parameters, local SGD (Stich 2019,
    arxiv.org/abs/1805.09767).
    """

    class Params(Configurable.Params):
        workers: int = 0
        """Workers that the run is planned for; 0: no local SGD."""
        worker: int = -1
        """Which of them this run is, from 0. -1: `megaseq train` starts all of them here, and the server."""
        address: str = ""
        """HOST:PORT of the server, which `megaseq outer` starts; needed where `worker` is set."""
        mode: Literal["synchronous", "asynchronous"] = "synchronous"
        """synchronous: an exchange waits for all workers that are there. asynchronous: it waits for nobody."""
        inner_steps: int = 50
        """Optimiser steps of a worker between two exchanges of a parameter."""
        outer_learning_rate: float = 0.7
        """Of the outer step."""
        outer_momentum: float = 0.9
        """Nesterov's, of the outer step."""
        fragments: int = 1
        """Parts of the parameters that are exchanged in turn, one every inner_steps / fragments steps, so that less is
        sent at a time (Douillard et al. 2025, arxiv.org/abs/2501.18512)."""
        compression: Literal["none", "bfloat16", "int8"] = "none"
        """How changes are sent; what rounding takes from one is added to the next."""
        max_staleness: int = 16
        """asynchronous: a worker's change is dropped, and the worker begins anew with the others' parameters, where
        more than so many of others' changes came since it last did."""
        timeout_seconds: float = 600.0
        """How long a worker waits for the server, and an exchange for a worker before it goes on without it."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports values that make no training."""
            yield from super().validate()
            for name in ("workers", "max_staleness"):
                if getattr(self, name) < 0:
                    yield f"{name}: must not be negative, but is {getattr(self, name)}. Use 0 or more."
            for name in ("inner_steps", "fragments"):
                if getattr(self, name) < 1:
                    yield f"{name}: must be at least 1, but is {getattr(self, name)}. Raise it."
            if self.fragments > 0 and self.inner_steps % self.fragments:
                yield (
                    f"fragments: must divide inner_steps, which is {self.inner_steps}, but is {self.fragments}. "
                    "One of them is exchanged every inner_steps / fragments steps."
                )
            if self.worker >= max(self.workers, 0) or self.worker < -1:
                yield f"worker: must be -1 or below workers ({self.workers}), but is {self.worker}. Count from 0."
            elif self.worker >= 0 and not self.address:
                yield "address: must be HOST:PORT where worker is set, but is ''. Start the server with megaseq outer."
            if self.address and not self.address.rpartition(":")[2].isdecimal():
                yield f"address: must be HOST:PORT, but is {self.address!r}. An example is 10.0.0.1:29600."
            if self.outer_learning_rate <= 0 or not 0 <= self.outer_momentum < 1:
                yield (
                    "outer_learning_rate: must be above 0 and outer_momentum in [0, 1), but are "
                    f"{self.outer_learning_rate} and {self.outer_momentum}. DiLoCo has 0.7 and 0.9, local SGD 1 and 0."
                )
            if self.timeout_seconds <= 0:
                yield f"timeout_seconds: must be above 0, but is {self.timeout_seconds}. 600 is usual."

        def shared(self) -> dict[str, Any]:
            """Returns what all workers must agree on."""
            return {name: getattr(self, name) for name in _SHARED}

    params: Params
