"""The processes that save and restore together: what one decides or suffers, all know."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megaseq.base.errors import AsText, CheckpointError, MegaseqError, must

T = TypeVar("T")


class Ranks:
    """All ranks of a run, or one process alone, for which everything here is a plain call.

    Checkpoints are agreed on in a process group of their own, on the host: a thread that writes in the background
    never meets the collectives of training. Within it every rank must make the same calls in the same order, so the
    thread that trains waits for the writer before it calls.
    """

    def __init__(self, *, timeout_seconds: float = 1800.0, alone: bool = False) -> None:
        """Makes the group; to be called by all ranks of torch.distributed, where that is initialised, at once.

        Args:
            timeout_seconds: How long a rank waits for the others, a write of theirs included.
            alone: One process that reads beside others.
        """
        self.rank, self.size = 0, 1
        self.group: dist.ProcessGroup | None = None
        if not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            timeout = datetime.timedelta(seconds=timeout_seconds)
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        self._nodes: list[str] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what there is one of."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, by rank, on all of them."""
        if self.group is None:
            return [value]
        values: list[T | None] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise self.lost(error) from error
        return values  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """Returns the value of rank 0 on all ranks."""
        if self.group is None:
            return value
        values = [value]
        try:
            dist.broadcast_object_list(values, src=0, group=self.group)
        except RuntimeError as error:
            raise self.lost(error) from error
        return values[0]

    def together(self, function: Callable[[], T]) -> T:
        """Calls `function` on every rank and returns its own result; an error on one is raised on all, the same."""
        if self.group is None:
            return function()
        result: list[T] = []
        failure: BaseException | None = None
        try:
            result.append(function())
        except BaseException as error:
            failure = error
        for rank, sent in enumerate(self.gather(None if failure is None else _sendable(failure))):
            if sent is not None:
                raise with_rank(failure if failure is not None and rank == self.rank else sent, rank=rank)
        return result[0]

    def on_first(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0; returns its result, or raises its error, on all."""
        if self.group is None:
            return function()
        reply: tuple[T | None, BaseException | None] = (None, None)
        if self.is_first:
            try:
                reply = (function(), None)
            except BaseException as error:
                reply = (None, _sendable(error))
        value, sent = self.broadcast(reply)
        if sent is not None:
            raise with_rank(sent, rank=0)
        return value  # type: ignore[return-value]

    def nodes(self) -> list[str]:
        """Returns the machine of each rank: those of one machine read its files once for all."""
        if self._nodes is None:
            self._nodes = self.gather(_machine())
        return self._nodes

    def lost(self, error: BaseException) -> CheckpointError:
        """Returns the error that says that another rank does not answer."""
        reason = (str(error).splitlines() or ["no reason given"])[0]
        return must(
            f"checkpoint, rank {self.rank}",
            f"be agreed on by {self.size} ranks",
            AsText(f"without an answer from another ({reason})"),
            "See what the other ranks say; the checkpoints before are untouched",
            kind=CheckpointError,
        )


def rank_of(error: BaseException) -> str:
    """Returns " on rank 3" for an error that came from there, empty where there is one process."""
    rank = getattr(error, "failed_rank", None)
    return "" if rank is None else f" on rank {rank}"


def with_rank(error: BaseException, *, rank: int) -> BaseException:
    """Marks where an error happened, and returns it."""
    error.failed_rank = rank  # type: ignore[attr-defined]
    return error


def _sendable(error: BaseException) -> BaseException:
    """Returns the error in a form that arrives elsewhere as what it is."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error))
    if isinstance(error, MegaseqError):
        try:
            return type(error)(str(error))
        except TypeError:
            return CheckpointError(str(error))
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return CheckpointError(
            f"checkpoint: must be finished, but is interrupted ({type(error).__name__}). Save again."
        )
    return RuntimeError(f"{type(error).__name__}: {error}")


def _machine() -> str:
    """Returns what tells this machine from others: names repeat where containers are, boots do not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"
