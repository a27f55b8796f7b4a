"""Times on a GPU, and what the card can do at best."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import torch

WARM_UP_SECONDS = 0.1
SECONDS = 0.5
FEWEST, MOST = 10, 1000
"""Bounds of the number of timed calls."""
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 50e-6, 20e-3
"""Bounds of how long the device waits before a run, while the host launches it."""
CALIBRATION_CYCLES = 20_000_000
CACHE_BYTES = 256 << 20
"""More than any card's cache: written between calls, so that each finds its tensors in memory and not in the cache."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one call took."""

    seconds: float
    """Median."""
    peak_bytes: int
    """Memory that it took on top of what was there."""
    host_seconds: float = 0.0
    """Median of what the host takes to launch it, in which a GPU that is not given work ahead stands still."""


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What the card does at best, measured on it."""

    bytes_per_second: float
    """Read and written, by copying."""
    flops_per_second: float
    """Of a product of large bf16 matrices."""


def measure(run: Callable[[], object], *, device: torch.device, seconds: float = SECONDS) -> Measured:
    """Times `run` on the device alone, with a cold cache; and apart from that what the host takes to launch it.

    Args:
        run: the call.
        device: where it runs.
        seconds: about how long to repeat it.
    """
    peak = _peak_bytes(run, device=device)
    if device.type != "cuda":
        taken = _host_seconds(run)
        return Measured(taken, peak, taken)
    estimate = _warm_up(run, seconds=min(WARM_UP_SECONDS, seconds / 5))
    host = _launch_seconds(run)
    pause = min(LONGEST_PAUSE_SECONDS, SHORTEST_PAUSE_SECONDS + 2 * host)
    count = max(FEWEST, min(MOST, int(seconds / (estimate + pause))))
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    times = _device_seconds(run, count=count, flush=cache.zero_, cycles=int(pause * _cycles_per_second()))
    return Measured(statistics.median(times), peak, host)


def _device_seconds(run: Callable[[], object], *, count: int, flush: Callable[[], object], cycles: int) -> list[float]:
    """Seconds of each of `count` runs, from the start of its first kernel to the end of its last one.

    Before each the device writes over its cache and then waits `cycles`, in which the host launches all of the run:
    the device goes from one kernel to the next without waiting for the host.
    """
    marks = [(_event(), _event()) for _ in range(count)]
    for start, end in marks:
        flush()
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


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


def _warm_up(run: Callable[[], object], *, seconds: float) -> float:
    """Seconds of a call, after the card has left its idle clock."""
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        run()
        torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - start) / count


def _launch_seconds(run: Callable[[], object]) -> float:
    """Seconds until the host has launched a run, on a device that is idle."""
    times = []
    for _ in range(FEWEST):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


@functools.cache
def _cycles_per_second() -> float:
    """Of the clock that `torch.cuda._sleep` counts, measured."""
    start, end = _event(), _event()
    for event in (start, end):
        # The first one brings the card to its clock.
        torch.cuda._sleep(CALIBRATION_CYCLES)  # type: ignore[no-untyped-call]
        event.record()
    torch.cuda.synchronize()
    seconds: float = start.elapsed_time(end) / 1e3
    return CALIBRATION_CYCLES / seconds


def _host_seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
