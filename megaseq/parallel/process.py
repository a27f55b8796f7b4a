"""The processes of a run: how they find each other, agree, fail together and leave."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

import megaseq
from megaseq.base.errors import AsText, MegaseqError, TrainingError, must
from megaseq.parallel.place import Place
from megaseq.parallel.watchdog import HANG_CODE, Watchdog

_MEETING_SECONDS = 600.0
"""How long processes wait for the first rank to open the meeting point: nodes of a cluster start at different times."""
_FAILURE = "failure"


class EndedElsewhereError(SystemExit):
    """Another rank has failed, or was told to stop, and says so; this one leaves without a word."""


class Team:
    """The processes of a run, seen from one of them. One process alone is a team too, whose every call is trivial."""

    def __init__(self, place: Place, *, store: Store | None = None, name: str = "") -> None:
        """Takes the place of this process; `Team.connect` finds the others.

        Args:
            place: of this process.
            store: at which all meet, under names that no earlier start of the job has used; None for one process.
            name: of this start.
        """
        self.place = place
        self.name = name
        self.rank, self.world_size = place.rank, place.world_size
        self._store = store
        self._owns_group = False
        self._votes: dist.ProcessGroup | None = None
        self.watchdog = Watchdog(rank=self.rank, timeout_seconds=float("inf"))

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.rank == 0

    # ---- coming and going ----------------------------------------------------------------------------------------

    @classmethod
    def connect(cls, place: Place) -> Team:
        """Meets the other processes; nothing is compared or computed yet.

        Raises:
            TrainingError: the meeting point cannot be opened or reached.
        """
        if place.world_size == 1:
            return cls(place)
        wait = datetime.timedelta(seconds=_MEETING_SECONDS)
        is_master = place.keeps_store and place.rank == 0
        try:
            store = TCPStore(place.address, place.port, is_master=is_master, timeout=wait, wait_for_workers=False)
        except (RuntimeError, dist.DistError) as error:
            raise must(
                f"{place.launcher}: {place.address}:{place.port}",
                "be a free port of this machine" if is_master else "be where rank 0 can be reached",
                AsText(str(error).splitlines()[0]),
                "Check MASTER_ADDR, MASTER_PORT and the firewall",
                kind=TrainingError,
            ) from None
        name = _agree(PrefixStore(f"megaseq/{place.attempt}", store), place=place)
        return cls(place, store=PrefixStore(f"megaseq/{name}", store), name=name)

    def open(self, *, device: torch.device, timeout_seconds: float) -> None:
        """Initialises torch.distributed, NCCL for what lies on a GPU and gloo for the rest, and starts the watchdog."""
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        if self._store is None:
            return
        # The watchdog is to report first: torch's own timeout knows no stack.
        timeout = datetime.timedelta(seconds=timeout_seconds * 1.25 + 10)
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        self._owns_group = True
        # A group of its own: votes go on while other collectives of any order do.
        self._votes = dist.new_group(backend="gloo", timeout=timeout)
        self.watchdog = Watchdog(rank=self.rank, timeout_seconds=timeout_seconds)
        # A connection of its own: one that waits for an answer keeps others waiting.
        own = self._store.clone()  # type: ignore[attr-defined]
        self.watchdog.start(
            failed_elsewhere=functools.partial(self._code_elsewhere, own),
            tell=lambda line: _register(own, rank=self.rank, code=HANG_CODE, text=line),
        )

    def __enter__(self) -> Team:
        _Current.team = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves together with the others, or tells them that this rank has failed.

        Raises:
            EndedElsewhereError: in place of `error` where another rank has failed before.
            TrainingError: in place of `error` where the connection to another rank broke.
        """
        _Current.team = None
        if self._store is None:
            return
        if error is None:
            self._close()
            return
        try:
            self._fail(error)
        finally:
            self.watchdog.stop()

    def _close(self) -> None:
        if self._owns_group:
            # Who leaves early breaks the connections by which the others leave.
            dist.all_reduce(torch.zeros(1))
            self.watchdog.stop()
            dist.destroy_process_group()
        self._meet_to_leave()

    def _meet_to_leave(self, *, timeout_seconds: float = 10.0) -> None:
        """Waits, where this process keeps the store, until the others need it no longer."""
        assert self._store is not None
        deadline = time.monotonic() + timeout_seconds
        with contextlib.suppress(RuntimeError, dist.DistError):
            left = self._store.add("left", 1)
            while self.is_first and left < self.world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                left = self._store.add("left", 0)

    def _fail(self, error: BaseException) -> None:
        assert self._store is not None
        lost = _is_lost_connection(error)
        if lost:
            # The rank at the other end may be about to say why.
            time.sleep(1.0)
        if isinstance(error, EndedElsewhereError):
            self._meet_to_leave(timeout_seconds=3.0)
            return
        text = str(error) or type(error).__name__
        code = 2 if isinstance(error, MegaseqError) else 1
        try:
            first = _register(self._store, rank=self.rank, code=code, text=text)
        except (RuntimeError, dist.DistError):
            first, lost = False, True  # The process that keeps the store is gone: its launcher tells of it.
        self._meet_to_leave(timeout_seconds=3.0)
        if not first:
            elsewhere = self._code_elsewhere(self._store)
            raise EndedElsewhereError(code if elsewhere is None else elsewhere) from None
        if lost:
            raise must(
                f"rank {self.rank}",
                "reach the other ranks",
                AsText(f"cut off from one of them ({_first_sentence(text)})"),
                "Look for what the lost rank has written, or for its machine",
                kind=TrainingError,
            ) from None

    def end(self, *, code: int, text: str) -> bool:
        """Tells all ranks to leave with the exit `code`; returns whether this one is the first to say so."""
        return self._store is None or _register(self._store, rank=self.rank, code=code, text=text)

    def _code_elsewhere(self, store: Store) -> int | None:
        """Returns the exit code of a failure that another rank has registered, None where there is none."""
        try:
            if not store.check([_FAILURE]):
                return None
            failure = json.loads(store.get(_FAILURE))
            return None if failure["rank"] == self.rank else int(failure["code"])
        except (RuntimeError, dist.DistError):
            return 1  # Rank 0, which keeps the store, is gone without leaving.

    def check_others(self) -> None:
        """Raises EndedElsewhereError where another rank has failed."""
        if self._store is not None and (code := self._code_elsewhere(self._store)) is not None:
            raise EndedElsewhereError(code)

    # ---- agreeing ------------------------------------------------------------------------------------------------

    def meet(self, name: str) -> None:
        """Waits for all ranks, as long as it takes; no rank may wait under a name twice."""
        if self._store is None:
            if self._in_group:
                dist.all_reduce(torch.zeros(1))
            return
        with self.watchdog.paused(f"waiting for other ranks: {name}"):
            arrived = self._store.add(f"meet/{name}", 1)
            while arrived < self.world_size:
                self.check_others()
                time.sleep(0.02)
                arrived = self._store.add(f"meet/{name}", 0)

    def gather(self, value: Any) -> list[Any]:
        """Returns the JSON values of all ranks, on each of them, by rank."""
        if not self._in_group:
            return [value]
        sizes, data = self._as_bytes(value)
        padded = [torch.zeros_like(data) for _ in range(self.world_size)]
        dist.all_gather(padded, data)
        return _values(padded, sizes=sizes)

    def gather_to_first(self, value: Any) -> list[Any]:
        """Returns the JSON values of all ranks, by rank, on the first; on the others an empty list."""
        if not self._in_group:
            return [value]
        sizes, data = self._as_bytes(value)
        padded = [torch.zeros_like(data) for _ in range(self.world_size)] if self.is_first else None
        dist.gather(data, padded, dst=0)
        return [] if padded is None else _values(padded, sizes=sizes)

    def _as_bytes(self, value: Any) -> tuple[list[int], torch.Tensor]:
        """Returns the lengths of all ranks' values, and this rank's, padded to the longest."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        lengths = [int(size) for size in sizes]
        return lengths, torch.nn.functional.pad(data, (0, max(lengths) - len(data)))

    def share(self, value: Any) -> Any:
        """Returns the JSON value of rank 0; what the others give is not read."""
        if not self._in_group:
            return value
        data = torch.frombuffer(bytearray(json.dumps(value if self.is_first else 0).encode()), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0)
        data = data if self.is_first else torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(data, src=0)
        return json.loads(data.numpy().tobytes())

    def vote(self, values: Sequence[int]) -> Vote:
        """Begins to add up each value over all ranks; work may go on meanwhile."""
        tensor = torch.tensor(list(values), dtype=torch.int64)
        if not self._in_group:
            return Vote(tensor, work=None)
        return Vote(tensor, work=dist.all_reduce(tensor, group=self._votes, async_op=True))

    @property
    def _in_group(self) -> bool:
        return self.world_size > 1 and dist.is_initialized()

    def check_same(self, values: Mapping[str, str]) -> None:
        """Compares values, such as hashes, of all ranks by name.

        Raises:
            ParamsError: on all ranks, with those that differ from rank 0.
        """
        rows = self.gather(dict(values))
        for name, first in rows[0].items():
            others = [str(rank) for rank, row in enumerate(rows) if row.get(name) != first]
            if others:
                shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
                raise must(
                    "parallel",
                    f"have the same {name} on all {self.world_size} ranks",
                    AsText(f"given another on rank{'s' if len(others) > 1 else ''} {shown} than on rank 0"),
                    "Start all ranks from the same installation with the same command line",
                )

    def hosts(self) -> list[str]:
        """Returns the host name of every rank."""
        return [str(host) for host in self.gather(socket.gethostname())]


def _values(padded: Sequence[torch.Tensor], *, sizes: Sequence[int]) -> list[Any]:
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(padded, sizes, strict=True)]


class Vote:
    """Values that are being added to those of other ranks."""

    def __init__(self, values: torch.Tensor, *, work: dist.Work | None) -> None:
        self._values, self._work = values, work

    def result(self) -> list[int]:
        """Returns the sum of each value, the same on every rank."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [int(value) for value in self._values.tolist()]


class _Current:
    team: Team | None = None


def current_team() -> Team:
    """Returns the team that the process is in; where torch.distributed was initialised otherwise, a team over that."""
    if _Current.team is not None:
        return _Current.team
    if dist.is_initialized() and dist.get_world_size() > 1:
        return Team(Place(rank=dist.get_rank(), world_size=dist.get_world_size(), launcher="environment"))
    return Team(Place())


@functools.cache
def code_hash() -> str:
    """Returns a hash of the package's source files and of torch's version."""
    found = hashlib.sha256(torch.__version__.encode())
    root = Path(megaseq.__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def text_hash(text: str) -> str:
    """Returns a hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _agree(store: Store, *, place: Place) -> str:
    """Returns a name that all ranks of this start agree on and no earlier start at the same store has had.

    torchrun keeps one store over restarts and changes of the number of nodes. What dead processes have left there
    (their addresses, above all) must not be read, so each rank asks with a word that it has just made up.
    """
    own = uuid.uuid4().hex
    deadline = time.monotonic() + _MEETING_SECONDS
    if place.rank == 0:
        missing = set(range(1, place.world_size))
        while missing:
            for rank in sorted(missing):
                if store.check([f"seen/{own}/{rank}"]):
                    missing.remove(rank)
                elif store.check([f"asks/{place.world_size}/{rank}"]):
                    word = store.get(f"asks/{place.world_size}/{rank}").decode()
                    store.set(f"answer/{rank}/{word}", own)
            if missing:
                _wait_a_little(deadline, missing=sorted(missing))
        return own
    store.set(f"asks/{place.world_size}/{place.rank}", own)
    while not store.check([f"answer/{place.rank}/{own}"]):
        _wait_a_little(deadline, missing=[0])
    name = str(store.get(f"answer/{place.rank}/{own}"), "utf-8")
    store.set(f"seen/{name}/{place.rank}", "1")
    return name


def _wait_a_little(deadline: float, *, missing: list[int]) -> None:
    if time.monotonic() > deadline:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise must(
            "parallel",
            f"have all ranks at the start within {_MEETING_SECONDS:g} s",
            AsText(f"without rank {shown}"),
            "Check that every machine has started its processes",
            kind=TrainingError,
        )
    time.sleep(0.01)


def _register(store: Store, *, rank: int, code: int, text: str) -> bool:
    """Tells all ranks that this one has failed; returns whether none had before."""
    if store.add("failures", 1) > 1:
        return False
    store.set(_FAILURE, json.dumps({"rank": rank, "code": code, "text": text}))
    return True


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another rank is gone: such errors have no type of their own in torch."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection")
    )


def _first_sentence(text: str) -> str:
    """Returns what an error of torch says, without the place in its sources and without its advice."""
    return re.sub(r"^\[\S+\]\s*", "", text.splitlines()[0]).partition(". ")[0]


@contextlib.contextmanager
def joined(place: Place) -> Iterator[Team]:
    """Context of a process among those of a run: they meet, and leave or fail together."""
    with Team.connect(place) as team:
        yield team
