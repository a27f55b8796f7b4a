"""Starts the processes of a run on this machine, passes signals on to them, and ends all when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from megaseq.parallel.layout import Parallel
from megaseq.parallel.place import SPAWNED, Place

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GRACE_SECONDS = 15.0
"""What the others have to leave in after one has failed: they hear of it within a second."""
_ASKED_SECONDS = 5.0
"""What they have, after that, between a SIGTERM and a SIGKILL."""


@dataclass(frozen=True)
class Batch:
    """The processes to start: some of the world's."""

    count: int
    """Processes on this machine."""
    nodes: int = 1
    """Machines, each with so many."""
    node: int = 0
    """Which of them this is."""
    address: str = "127.0.0.1"
    port: int = 0
    """0: the parent keeps the meeting point, on a free port."""


def num_processes(params: Parallel.Params, *, devices: int = 0) -> int:
    """Returns how many processes `megaseq train` starts itself.

    Args:
        params: of the run.
        devices: GPUs that the run may use; where `data` is open, as many data ranks as have one. 0: one data rank.
    """
    model = params.pipe * params.context * params.tensor
    if params.processes:
        return params.processes
    data = params.data
    if not data:
        # Experts live on data ranks: equally many on each.
        data = max(params.expert if devices else 1, devices // model // params.expert * params.expert)
    return data * model


def batch_of(params: Parallel.Params, *, place: Place, devices: int = 0) -> Batch | None:
    """Returns the processes that this one is to start; None where it is itself the one that trains.

    A Slurm task for each machine starts as many as `processes` says; other launchers start all themselves.

    Args:
        params: of the run.
        place: of this process.
        devices: GPUs of this machine that the run may use.
    """
    if place.launcher == "slurm":
        if params.processes <= 1:
            return None
        return Batch(
            count=params.processes, nodes=place.world_size, node=place.rank, address=place.address, port=place.port
        )
    count = num_processes(params, devices=devices)
    return Batch(count=count) if place.world_size == 1 and place.launcher in ("none", "slurm") and count > 1 else None


def cores() -> int:
    """Returns the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_rank(place: Place, *, environment: Mapping[str, str]) -> int:
    """Returns the cores for one of a machine's processes: its share, or all that Slurm has bound it to.

    Args:
        place: of this process.
        environment: of this process.
    """
    own = cores()
    if place.launcher == "slurm":
        asked, on_node = (environment.get(f"SLURM_CPUS_{name}", "") for name in ("PER_TASK", "ON_NODE"))
        if asked.isdecimal():
            # Less where Slurm has bound the task to fewer; without binding it may run on those of the others too.
            return max(1, min(own, int(asked)))
        if on_node.isdecimal() and own < int(on_node):
            return own
    return max(1, own // place.local_size)


def spawn(arguments: Sequence[str], *, batch: Batch) -> int:
    """Runs `megaseq ARGUMENTS` as every process of `batch`; returns the exit code of the first that failed, or 0."""
    store: Any = None
    port = batch.port
    if port == 0:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # Kept here, so that no other program can take the port before the first rank does.
        store = TCPStore(batch.address, 0, is_master=True, wait_for_workers=False)
        port = store.port
    shared = {
        "MASTER_ADDR": batch.address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(batch.count * batch.nodes),
        "LOCAL_WORLD_SIZE": str(batch.count),
        SPAWNED: "parent" if store is not None else "rank",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, cores() // batch.count))
    children = _Children()
    children.start(
        arguments,
        environments={
            batch.node * batch.count + local: {
                **shared,
                "RANK": str(batch.node * batch.count + local),
                "LOCAL_RANK": str(local),
            }
            for local in range(batch.count)
        },
    )
    return children.wait()


class _Children:
    """Processes of which each needs all others."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._code = 0
        self._deadline = float("inf")
        self._asked = False

    def start(self, arguments: Sequence[str], *, environments: Mapping[int, Mapping[str, str]]) -> None:
        """Starts one process for each rank; from here on signals go to them."""
        for number in FORWARDED:
            signal.signal(number, self._forward)
        for rank, environment in environments.items():
            self._processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "megaseq", *arguments],
                env=os.environ | dict(environment),
                # Out of the terminal's reach: Ctrl-C would come twice, from there and from here.
                process_group=0,
            )

    def _forward(self, number: int, frame: FrameType | None) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Returns the exit code once all have ended."""
        while self._processes:
            for rank, process in list(self._processes.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._processes[rank]
                if code and not self._code:
                    self._note(rank, code=code)
            if time.monotonic() > self._deadline:
                self._end()
            time.sleep(0.05)
        return self._code

    def _note(self, rank: int, *, code: int) -> None:
        """Takes the first failure down; a process that a signal has ended could not say so itself."""
        self._deadline = time.monotonic() + _GRACE_SECONDS
        self._code = code if code > 0 else 128 - code
        if code < 0:
            name = signal.Signals(-code).name
            print(f"megaseq: rank {rank} was ended by {name}, the others leave", file=sys.stderr, flush=True)

    def _end(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGKILL if self._asked else signal.SIGTERM)
        self._asked = True
        self._deadline = time.monotonic() + _ASKED_SECONDS


def follow_parent() -> None:
    """Makes the kernel send SIGTERM to this process when the one that has started it is gone; on Linux only."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
