"""Ends a process that stands still, or whose run has failed on another rank, where its main thread cannot."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

HANG_CODE = 3
"""Exit code of a run that stood still for longer than `parallel.timeout_seconds`."""


class Watchdog:
    """Two threads beside the main one: one that looks at the clock, one that asks whether another rank has failed.

    The main thread says how far it is with `beat`; where it says nothing for `timeout_seconds`, which a collective
    that waits for a rank that is gone or lost its way looks like, its stack is written to stderr and the process
    ends. The second thread is one of its own because what it asks may hang as well.
    """

    def __init__(self, *, rank: int, timeout_seconds: float, poll_seconds: float = 0.5) -> None:
        """Watches nothing until `start`."""
        self.rank = rank
        self.timeout_seconds = timeout_seconds
        self._poll_seconds = poll_seconds
        self._step = 0
        self._doing = "starting"
        self._last = time.monotonic()
        self._paused = 0
        self._stopped = threading.Event()

    def beat(self, *, step: int | None = None, doing: str = "") -> None:
        """Notes that the main thread has come further; cheap.

        Args:
            step: optimiser steps done; None: as before.
            doing: what it begins now; empty: as before.
        """
        self._step = self._step if step is None else step
        self._doing = doing or self._doing
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """Context of work that may take any time, such as reading a corpus."""
        self._doing = doing
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.beat()

    def start(self, *, failed_elsewhere: Callable[[], int | None], tell: Callable[[str], object]) -> None:
        """Begins to watch.

        Args:
            failed_elsewhere: asked now and then; returns the exit code once another rank has failed.
            tell: told, in a thread, that this rank stands still.
        """
        self.beat()
        threading.Thread(target=self._watch_clock, args=(tell,), name="watchdog-clock", daemon=True).start()
        threading.Thread(target=self._watch_others, args=(failed_elsewhere,), name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Ends the threads: what follows is not watched."""
        self._stopped.set()

    def report(self) -> str:
        """Writes where this rank stands, with the stack of its main thread, to stderr; returns the first line."""
        still = time.monotonic() - self._last
        line = f"rank {self.rank} has stood still for {still:.0f} s after step {self._step}: {self._doing}"
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        # One write, so that the reports of several ranks are not mixed.
        print(f"megaseq: {line}\n{stack}", file=sys.__stderr__, end="", flush=True)
        return line

    def _watch_clock(self, tell: Callable[[str], object]) -> None:
        pause = min(self._poll_seconds, self.timeout_seconds / 10)
        while not self._stopped.wait(pause):
            if self._paused or time.monotonic() - self._last <= self.timeout_seconds:
                continue
            line = self.report()
            # The others stand still too, some a little less long: they are given the time to say where.
            time.sleep(min(5.0, self.timeout_seconds / 4))
            told = threading.Thread(target=tell, args=(line,), daemon=True)
            told.start()
            told.join(timeout=5.0)
            os._exit(HANG_CODE)

    def _watch_others(self, failed_elsewhere: Callable[[], int | None]) -> None:
        while not self._stopped.wait(self._poll_seconds):
            code = failed_elsewhere()
            if code is None:
                continue
            if code == HANG_CODE:
                self.report()
            # The main thread may be on its way out already, and says nothing wrong then.
            if not self._stopped.wait(5.0):
                os._exit(code)
