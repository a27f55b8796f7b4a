"""Turns SIGTERM, SIGINT and SIGUSR1 into a flag that the training loop reads between steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any] | int | None


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that end a run in order; batch systems send SIGUSR1 ahead of their time limit."""


class Interrupted(BaseException):
    """A signal came while there was nothing to save; no Exception, so that nothing on its way takes it for an error."""


class StopSignals:
    """Context in which the first SIGTERM, SIGINT or SIGUSR1 only sets `requested`; a second SIGINT exits at once.

    While `raises` is set, the first one raises `Interrupted` as well: for work that may be left at any point.
    Outside the main thread, where Python allows no handlers, the flag is never set.
    """

    def __init__(self) -> None:
        self.requested: str = ""
        """Name of the signal that came, empty so far."""
        self.raises = False
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            # Not sys.exit(): a save that hangs must not keep a person waiting.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopped at once, nothing more was saved\n")
            os._exit(128 + number)
        self.requested = signal.Signals(number).name
        if self.raises:
            self.raises = False  # What is cleaned up on the way out is not interrupted again.
            raise Interrupted
