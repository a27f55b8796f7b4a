"""Follows a run directory: every checkpoint that training writes, exactly once, until training has finished."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megaseq.checkpoint import list_steps
from megaseq.train.run_dir import RunDirectory, write_atomically


class Watch:
    """Hands out the checkpoints of a run in order; remembers in a status file which ones are dealt with.

    A job that is killed and started again goes on after the last checkpoint it has finished. Training is finished when
    its own status says so; a run that is stopped or was killed may go on, so its followers wait.
    """

    def __init__(
        self,
        run_dir: RunDirectory,
        *,
        status_file: Path,
        poll_seconds: float = 5.0,
        keep_going: Callable[[], bool] = lambda: True,
    ) -> None:
        self._run_dir = run_dir
        self._status_file = status_file
        self._poll_seconds = poll_seconds
        self._keep_going = keep_going
        self.done: set[int] = self._read()
        """Steps that are dealt with."""

    def _read(self) -> set[int]:
        try:
            status = json.loads(self._status_file.read_text(encoding="utf-8"))
            return {int(step) for step in status["done"]}
        except (OSError, ValueError, TypeError, KeyError):
            return set()

    def mark_done(self, step: int) -> None:
        """Records that the checkpoint of `step` needs no more work, now or after a restart."""
        self.done.add(step)
        write_atomically(self._status_file, json.dumps({"done": sorted(self.done)}) + "\n")

    def steps(self) -> Iterator[int]:
        """Yields each step that has a checkpoint and is not done; the caller marks it done, or it comes again."""
        while self._keep_going():
            # Status first: a checkpoint that is written in between is still seen by the listing.
            finished = self._run_dir.read_status().get("status") == "finished"
            waiting = [step for step in list_steps(self._run_dir.checkpoints) if step not in self.done]
            if waiting:
                yield waiting[0]
            elif finished:
                return
            else:
                self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + self._poll_seconds
        while self._keep_going() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
