"""Several batches decoded at once on the cores of a host.

A step of decoding is many small ops. Shared among cores, each of them waits for the slowest core, and most are too
small to share at all; a batch for each core keeps all of them busy (benchmarks/decode_cpu.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import distributed

MAX_WORKERS = 4
"""Between ops the workers take turns in the interpreter, which about four of them keep busy."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers(device: torch.device) -> int:
    """How many batches to decode at once with a model on `device`.

    One on an accelerator, which has a single queue, and one where the process belongs to a group: collectives must come
    in the same order on all ranks.
    """
    if device.type != "cpu" or (distributed.is_available() and distributed.is_initialized()):
        return 1
    return min(MAX_WORKERS, torch.get_num_threads())


def map_concurrently(
    function: Callable[[Item], Result],
    *,
    items: Sequence[Item],
    workers: int,
    keep_going: Callable[[], bool] = lambda: True,
) -> list[Result | None]:
    """Calls `function` with each of `items`, in order, `workers` of them at a time.

    Each worker has its share of torch's threads and the caller's modes of autograd, inference and autocast.

    Args:
        function: must bear to run in several threads at once.
        items: The largest should come first, so that no worker is left with it at the end.
        workers: 1 calls `function` in the caller's own thread.
        keep_going: Asked before each call, in the caller's thread or a worker's; False ends early.

    Returns:
        The results in the order of `items`; None for those that were not begun.

    Raises:
        Exception: The first that `function` raised; nothing new is begun after it, and what runs is waited for.
    """
    results: list[Result | None] = [None] * len(items)
    workers = min(workers, len(items))
    if workers <= 1:
        for index, item in enumerate(items):
            if not keep_going():
                break
            results[index] = function(item)
        return results
    work = _Work(len(items))

    def call(index: int) -> None:
        if not keep_going():
            work.stop()
            return
        results[index] = function(items[index])

    threads_before = torch.get_num_threads()
    modes = _Modes(threads=max(1, threads_before // workers))
    running = [threading.Thread(target=work.run, args=(call, modes), daemon=True) for _ in range(workers)]
    try:
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        # A signal may have interrupted the wait; the model must not be handed on while a worker reads it.
        work.stop()
        for thread in running:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(threads_before)
    if work.error is not None:
        raise work.error
    return results


class _Work:
    """Indices still to be taken, shared by the workers."""

    def __init__(self, count: int) -> None:
        self.error: BaseException | None = None
        self._next, self._count = 0, count
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Leaves nothing to be taken."""
        with self._lock:
            self._next = self._count

    def _take(self) -> int | None:
        with self._lock:
            if self._next >= self._count:
                return None
            self._next += 1
            return self._next - 1

    def run(self, call: Callable[[int], None], modes: _Modes) -> None:
        """A worker's life."""
        try:
            with modes.entered():
                while (index := self._take()) is not None:
                    call(index)
        except BaseException as error:
            self.stop()
            with self._lock:
                self.error = self.error or error


class _Modes:
    """torch's modes are each thread's own: remembers those of the thread that makes it, for others to enter."""

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._inference = torch.is_inference_mode_enabled()
        self._gradients = torch.is_grad_enabled()
        self._autocast = torch.is_autocast_enabled("cpu")
        self._dtype = torch.get_autocast_dtype("cpu")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Gives the calling thread these modes."""
        torch.set_num_threads(self._threads)
        autocast = torch.autocast("cpu", dtype=self._dtype, enabled=self._autocast)
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._gradients), autocast:
            yield
