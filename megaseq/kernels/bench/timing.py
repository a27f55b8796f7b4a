"""Times on a GPU, and what the card can do at best."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

WARM_UP_SECONDS = 0.1
SECONDS = 0.5
FEWEST, MOST = 10, 1000
"""Bounds of the number of timed calls."""
CACHE_BYTES = 256 << 20
"""More than any card's cache: written between calls, so that each finds its tensors in memory and not in the cache."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one call took."""

    seconds: float
    """Median."""
    peak_bytes: int
    """Memory that it took on top of what was there."""


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What the card does at best, measured on it."""

    bytes_per_second: float
    """Read and written, by copying."""
    flops_per_second: float
    """Of a product of large bf16 matrices."""


def measure(run: Callable[[], object], *, device: torch.device) -> Measured:
    """Times `run`, with a cold cache, without the time that the host takes to launch it."""
    peak = _peak_bytes(run, device=device)
    if device.type != "cuda":
        return Measured(_host_seconds(run), peak)
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    estimate = _warm_up(run)
    count = max(FEWEST, min(MOST, int(SECONDS / max(estimate, 1e-6))))
    marks = [(_event(), _event()) for _ in range(count)]
    for start, end in marks:
        cache.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return Measured(statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3, peak)


def ceiling(device: torch.device) -> Ceiling:
    """Measures the card: copies of 1 GiB, products of 8192 x 8192 matrices (less on a host)."""
    small = device.type != "cuda"
    source = torch.zeros((1 << 20) if small else (1 << 30), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device=device)
    size = 128 if small else 8192
    left = torch.randn(size, size, device=device).bfloat16()
    product = measure(lambda: left @ left, device=device)
    return Ceiling(2 * source.numel() / copy.seconds, 2 * size**3 / product.seconds)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _peak_bytes(run: Callable[[], object], *, device: torch.device) -> int:
    # The first call compiles, and makes what is kept.
    run()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _warm_up(run: Callable[[], object]) -> float:
    """Seconds of a call, after the card has left its idle clock."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        run()
        torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - start) / count


def _host_seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
