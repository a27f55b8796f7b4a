"""Whether an op computes what its reference does: the condition for timing it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from megaseq.kernels import dispatch
from megaseq.kernels.bench_case import BenchCase, Comparison

SMALLEST_UNIT = 1e-3
"""A result whose largest magnitude is smaller is judged as if it had this one: what is left there is rounding."""


@contextlib.contextmanager
def forced(op: str) -> Iterator[None]:
    """The op runs its Triton kernels while this is open, or fails: it never falls back."""
    before = os.environ.get(dispatch.VARIABLE)
    if "triton" in dispatch.IMPLEMENTATIONS.get(op, ()):
        os.environ[dispatch.VARIABLE] = f"{op}=triton"
    try:
        yield
    finally:
        os.environ.pop(dispatch.VARIABLE, None)
        if before is not None:
            os.environ[dispatch.VARIABLE] = before


def difference(comparison: Comparison) -> float:
    """Largest difference in the comparison's units; infinite where a shape differs, or something is not finite.

    An infinity or NaN is right where the reference has the same.
    """
    found, expected = comparison.found, comparison.expected
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    found, expected = found.detach().double(), expected.detach().double().to(found.device)
    finite = expected.isfinite()
    # NaN differs from itself, so that it is compared by name.
    if not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    odd = ~finite & ~expected.isnan()
    if not torch.equal(found[odd], expected[odd]):
        return float("inf")
    if not finite.any():
        return 0.0
    unit = max(SMALLEST_UNIT, expected[finite].abs().max().item())
    distance = (found[finite] - expected[finite]).abs().max().item()
    return distance / unit


def prove(case: BenchCase, *, device: torch.device) -> list[str]:
    """Runs the case's check; returns a sentence for each output that is wrong."""
    with forced(case.op):
        comparisons = case.check(device)
    if not comparisons:
        return [f"{case.op}: {case.name} compares nothing"]
    found = {name: (difference(comparison), comparison.tolerance) for name, comparison in comparisons.items()}
    return [
        f"{case.op}: {name} of {case.name} is off by {distance:.1e} of its reference, of {tolerance:.1e} allowed"
        for name, (distance, tolerance) in found.items()
        if not distance <= tolerance
    ]
