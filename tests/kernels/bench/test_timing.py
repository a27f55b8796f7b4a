"""The clock: the device is given its work ahead, and the host's part is told apart."""

from __future__ import annotations

import pytest
import torch

from megaseq.kernels.bench import timing
from megaseq.kernels.bench.timing import ceiling, measure

HOST = torch.device("cpu")


def test_times_on_the_host() -> None:
    calls: list[int] = []
    found = measure(lambda: calls.append(1), device=HOST)
    assert 0 <= found.seconds < 1 and found.host_seconds == found.seconds and len(calls) > 2
    best = ceiling(HOST)
    assert best.bytes_per_second > 0 and best.flops_per_second > 0


class Device:
    """A device in whose queue things wait, each for as long as it takes; the host enqueues at a time of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.busy_until = 0.0, 0.0
        monkeypatch.setattr(timing, "_event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.enqueue(cycles / 1e9))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def enqueue(self, seconds: float, *, launch: float = 0.0) -> None:
        self.host += launch
        self.busy_until = max(self.busy_until, self.host) + seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.busy_until)


class Event:
    """Knows when the device came to it."""

    def __init__(self, device: Device) -> None:
        self.device, self.time = device, 0.0

    def record(self) -> None:
        self.time = max(self.device.busy_until, self.device.host)

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


@pytest.mark.parametrize(("cycles", "seconds"), [(10_000_000, 3e-3), (0, 6e-3)])
def test_a_pause_hides_the_launch(cycles: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kernels of 1 ms that the host takes 2 ms each to launch: without a pause they wait for it."""
    device = Device(monkeypatch)

    def run() -> None:
        for _ in range(3):
            device.enqueue(1e-3, launch=2e-3)

    found = timing._device_seconds(run, count=4, flush=lambda: device.enqueue(1e-4), cycles=cycles)
    assert len(found) == 4
    assert min(found) == pytest.approx(seconds, rel=0.3)


def test_cycles_are_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    timing._cycles_per_second.cache_clear()
    assert timing._cycles_per_second() == pytest.approx(1e9)
    timing._cycles_per_second.cache_clear()
