"""An op without kernels, that is right or wrong as the test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from megaseq.kernels import triton_runtime
from megaseq.kernels.bench_case import BenchCase, Comparison, Timed
from megaseq.kernels.triton_runtime import Config

DEFAULT = Config({"BLOCK": 16})


def compared(found: object, expected: object, *, tolerance: float = 1e-3) -> Comparison:
    return Comparison(torch.as_tensor(found), torch.as_tensor(expected), tolerance)


def case(
    name: str = "shape",
    *,
    found: float = 1.0,
    timed: Timed | None = None,
    candidates: Mapping[str, list[Config]] | None = None,
    check: Callable[[torch.device], Mapping[str, Comparison]] | None = None,
) -> BenchCase:
    """A case whose output is `found` where 1 is right, and which asks for the tile sizes of the kernel "double"."""

    def run() -> object:
        return triton_runtime.config("double", key="float32", default=DEFAULT)

    return BenchCase(
        "dropout",
        name,
        check=check or (lambda device: {"output": compared(found, 1.0)}),
        prepare=lambda device: timed or Timed(run, bytes=100.0),
        candidates=candidates or {},
    )
