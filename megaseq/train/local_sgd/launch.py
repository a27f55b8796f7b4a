"""All workers of a run on this machine, and their server, from one command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megaseq.parallel.spawn import FORWARDED, cores
from megaseq.train.local_sgd.server import OuterServer

MAX_RESTARTS = 3
"""How often a worker that something has killed is started again."""


def run_workers(arguments: Sequence[str], *, workers: int, run_dir: Path | str) -> int:
    """Runs `megaseq ARGUMENTS` as every worker, each in RUN_DIR/worker-INDEX; returns the first exit code but 0.

    A worker that something has killed is started again, goes on from its newest checkpoint and joins the others; these
    do not wait for it.

    Args:
        arguments: of `megaseq train`.
        workers: how many.
        run_dir: over those of the workers.
    """
    server = OuterServer("127.0.0.1:0")
    server.start()
    print(f"megaseq: {workers} workers in {run_dir}/worker-0 and so on, server at {server.address}", flush=True)
    try:
        return _Workers(arguments, address=server.address, run_dir=Path(run_dir)).run(workers)
    finally:
        server.close()
        total = (server.sent_bytes + server.received_bytes) / 2**20
        print(f"megaseq: {total:.1f} MiB to the server and back, {server.dropped} changes too stale", flush=True)


class _Workers:
    """Processes that need each other only now and then."""

    def __init__(self, arguments: Sequence[str], *, address: str, run_dir: Path) -> None:
        self._arguments, self._address, self._run_dir = list(arguments), address, run_dir
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._restarts: dict[int, int] = {}
        self._stopping = False

    def run(self, workers: int) -> int:
        """Starts all, waits for all."""
        for number in FORWARDED:
            signal.signal(number, self._forward)
        share = str(max(1, cores() // workers))
        for index in range(workers):
            self._start(index, threads=share)
        first_code = 0
        while self._processes:
            for index, process in list(self._processes.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._processes[index]
                if code < 0 and not self._stopping and self._restarts.get(index, 0) < MAX_RESTARTS:
                    self._restarts[index] = self._restarts.get(index, 0) + 1
                    name = signal.Signals(-code).name
                    print(f"megaseq: worker {index} was ended by {name}, starts again", file=sys.stderr, flush=True)
                    self._start(index, threads=share)
                elif code:
                    first_code = first_code or (code if code > 0 else 128 - code)
            time.sleep(0.05)
        return first_code

    def _start(self, index: int, *, threads: str) -> None:
        # Where a param or an option comes twice, the last one counts.
        own = [f"train.local_sgd.worker={index}", f"train.local_sgd.address={self._address}"]
        if index:
            own.append("tracking.progress=none")
        options = ["--run-dir", str(self._run_dir / f"worker-{index}")]
        self._processes[index] = subprocess.Popen(
            [sys.executable, "-m", "megaseq", *self._arguments, *own, *options],
            env={"OMP_NUM_THREADS": threads, **os.environ},
            # Out of the terminal's reach: Ctrl-C would come twice, from there and from here.
            process_group=0,
        )

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(number)
