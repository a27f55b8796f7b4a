"""What `megaseq bench kernels` proves of AdamW on a GPU, and does not time: the calls of the tests."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megaseq.kernels.adamw import adamw_
from megaseq.kernels.adamw.cases import CASES, AdamWCase
from megaseq.kernels.adamw.reference import reference_adamw_
from megaseq.kernels.bench_case import BenchCase, Comparison


def proof_cases() -> list[BenchCase]:
    """All calls."""
    return [BenchCase("adamw", case.name, functools.partial(compare, case)) for case in CASES]


def compare(case: AdamWCase, device: torch.device) -> dict[str, Comparison]:
    """All that is written has the bits of the reference in host memory: torch's CUDA kernels round otherwise."""
    results = []
    for function, place in ((adamw_, device), (reference_adamw_, torch.device("cpu"))):
        parameters, gradients, moments = case.tensors(device=place)
        divisor, skip = (_scalar(number, device=place) for number in (case.divisor, case.skip))
        copy = None if case.copy is None else torch.full((case.count,), -5.0, device=place).to(case.copy)
        function(
            parameters,
            gradients=gradients,
            moments=moments,
            settings=case.settings(device=place),
            step=torch.tensor(7.0, device=place),
            divisor=divisor,
            skip=skip,
            copy=copy,
        )
        results.append([parameters, *moments, *([] if copy is None else [copy])])
    names = ("parameters", "first", "second", "copy")
    found, expected = results
    return {name: Comparison(a, b, 0.0) for name, a, b in zip(names, found, expected, strict=False)}


def _scalar(number: float | None, *, device: torch.device) -> Tensor | None:
    return None if number is None else torch.tensor(number, device=device)
