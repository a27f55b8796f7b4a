"""Where workers meet: keeps the outer parameters; a thread for each worker that is there."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import Any

import torch
from torch import Tensor

from megaseq.base.errors import AsText, ParamsError, TrainingError, must
from megaseq.train.local_sgd.compression import decode, encode
from megaseq.train.local_sgd.messages import Channel, Message
from megaseq.train.local_sgd.outer import OuterState
from megaseq.train.local_sgd.params import LocalSGD

_logger = logging.getLogger("megaseq.train.local_sgd")
_MAX_FIRST_BYTES = 1 << 16


class _RefusedError(Exception):
    """A worker that does not belong here; told why."""


class OuterServer:
    """Serves one run. A worker that dies or is cut off is left out until it joins again."""

    def __init__(self, address: str) -> None:
        """Opens the port; `serve` answers.

        Args:
            address: HOST:PORT to listen at; an empty host is all of this machine's, port 0 a free one.

        Raises:
            TrainingError: the port cannot be opened.
        """
        host, _, port = address.rpartition(":")
        try:
            self._listener = socket.create_server((host, int(port)), backlog=64, reuse_port=False)
        except (OSError, ValueError) as error:
            raise must(
                address, "be a free HOST:PORT of this machine", AsText(str(error)), "Choose another", kind=TrainingError
            ) from None
        self.address = f"{host or '127.0.0.1'}:{self._listener.getsockname()[1]}"
        self.sent_bytes = 0
        self.received_bytes = 0
        self.dropped = 0
        """Changes that were too stale."""
        self.state: OuterState | None = None
        self._settings: dict[str, Any] | None = None
        self._fingerprint = ""
        self._params = LocalSGD.Params()
        self._changed = threading.Condition()
        self._members: dict[int, Channel] = {}
        self._first: int | None = None
        """The worker that is asked for the first values."""
        self._started = False
        self._round: dict[int, dict[int, Tensor]] = {}
        self._round_begun = 0.0
        self._answer: tuple[list[int], bytes] = ([], b"")
        self._finished: set[int] = set()

    # ---- connections ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serves in a thread until `close`."""
        threading.Thread(target=self.serve, name="outer-server", daemon=True).start()

    def serve(self) -> None:
        """Serves until all workers that the run is planned for have finished, or until `close`."""
        self._listener.settimeout(0.2)
        while not self.done:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return  # Closed.
            connection.settimeout(None)
            threading.Thread(target=self._attend, args=(Channel(connection),), daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether all workers have finished and left."""
        with self._changed:
            return bool(self._settings) and not self._members and len(self._finished) >= self._params.workers

    @property
    def members(self) -> list[int]:
        """Workers that are there."""
        with self._changed:
            return sorted(self._members)

    def close(self) -> None:
        """Ends all connections."""
        self._listener.close()
        with self._changed:
            channels = list(self._members.values())
        for channel in channels:
            channel.close()

    def _attend(self, channel: Channel) -> None:
        worker = -1
        try:
            worker = self._join(channel, hello=channel.receive(max_bytes=_MAX_FIRST_BYTES))
            while True:
                message = channel.receive(max_bytes=self._max_bytes())
                if message.kind == "leave":
                    with self._changed:
                        if message.header.get("finished"):
                            self._finished.add(worker)
                    break
                self._answer_to(channel, worker=worker, message=message)
        except _RefusedError as refusal:
            with contextlib.suppress(OSError):
                channel.send("refused", text=str(refusal))
        except (OSError, ValueError, LookupError, TypeError) as error:
            if worker >= 0:
                _logger.warning("worker %d is gone (%s): the others go on", worker, error)
        finally:
            self._forget(channel, worker=worker)
            channel.close()

    def _max_bytes(self) -> int:
        return 64 + 4 * (len(self.state.values) if self.state is not None else 0)

    def _forget(self, channel: Channel, *, worker: int) -> None:
        with self._changed:
            self.sent_bytes += channel.sent_bytes
            self.received_bytes += channel.received_bytes
            if self._first == worker and self.state is None:
                self._first = None
            if self._members.get(worker) is channel:
                del self._members[worker]
                self._end_round_if_complete()
            self._changed.notify_all()

    # ---- joining -------------------------------------------------------------------------------------------------

    def _join(self, channel: Channel, *, hello: Message) -> int:
        if hello.kind != "join":
            raise _RefusedError("worker: must begin with join, but did not. Connect megaseq train to this server.")
        worker, count = int(hello.header["worker"]), int(hello.header["count"])
        self._check(hello.header)
        with self._changed:
            if worker in self._members:
                # Its machine came back before the old connection was known to be dead.
                self._members[worker].close()
                self._changed.wait_for(lambda: worker not in self._members, timeout=5.0)
            while self.state is None and self._first is not None:
                self._changed.wait()
            asked = self.state is None
            if asked:
                self._first = worker
        if asked:
            channel.send("send_values")
            values = channel.receive(max_bytes=64 + 4 * count)
            with self._changed:
                decoded = decode(values.data, count=count, compression="none")
                self.state = OuterState(decoded, params=self._params)
                self._changed.notify_all()
        synchronous = self._params.mode == "synchronous"
        with self._changed:
            # A round that has begun goes on with those that began it.
            self._changed.wait_for(lambda: not (synchronous and self._round))
            self._members[worker] = channel
            self._finished.discard(worker)
            self._started = self._started or len(self._members) >= self._params.workers
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._started or not synchronous or worker not in self._members)
            version, data = self._all_values()
        _logger.info("worker %d has joined", worker)
        channel.send("values", data=data, version=version)
        return worker

    def _check(self, header: dict[str, Any]) -> None:
        """Compares a worker with the first one."""
        with self._changed:
            if self._settings is None:
                try:
                    params = LocalSGD.Params(**header["settings"])
                    problems = "\n".join(map(str, params.check()))
                except ParamsError as error:
                    problems = str(error)
                if problems:
                    raise _RefusedError(problems)
                self._params, self._settings = params, dict(header["settings"])
                self._fingerprint = str(header["fingerprint"])
                return
            if header["fingerprint"] != self._fingerprint:
                raise _RefusedError(
                    "train.local_sgd: must have the same parameters in all workers, but has others in worker "
                    f"{header['worker']} than in the first. Start all workers with the same params."
                )
            for name, value in self._settings.items():
                if header["settings"].get(name) != value:
                    raise _RefusedError(
                        f"train.local_sgd.{name}: must be the same in all workers, but is "
                        f"{header['settings'].get(name)!r} in worker {header['worker']} and {value!r} in the first. "
                        "Start all workers with the same params."
                    )

    def _all_values(self) -> tuple[int, bytes]:
        assert self.state is not None
        return self.state.version, encode(self.state.published, compression="none")

    # ---- exchanging ----------------------------------------------------------------------------------------------

    def _answer_to(self, channel: Channel, *, worker: int, message: Message) -> None:
        state = self.state
        assert state is not None
        if message.kind == "pull":
            with self._changed:
                version, data = self._all_values()
            channel.send("values", data=data, version=version)
            return
        if message.kind != "push":
            raise ValueError(f"what is {message.kind!r}?")
        fragments = [int(index) for index in message.header["fragments"]]
        count = state.size(fragments)
        gradient = decode(message.data, count=count, compression=self._params.compression)
        if not bool(torch.isfinite(gradient).all()):
            raise _RefusedError(f"worker {worker}: must send finite changes, but has not. Look at its loss.")
        parts = torch.split(gradient, [state.size([index]) for index in fragments])
        gradients = dict(zip(fragments, parts, strict=True))
        if self._params.mode == "synchronous":
            touched, data = self._exchange(worker, gradients=gradients)
            channel.send("change", data=data, fragments=touched, version=state.version)
            return
        with self._changed:
            staleness = state.version - int(message.header["version"])
            applied = staleness <= self._params.max_staleness
            if applied:
                state.add(gradients, workers=max(1, len(self._members)))
            else:
                self.dropped += 1
            # A worker that lags gets everything, not only what it sent.
            wanted = fragments if applied else list(range(len(state.bounds)))
            values = encode(state.read(wanted), compression="none")
            version = state.version
        channel.send("parts", data=values, fragments=wanted, version=version, staleness=staleness, applied=applied)

    def _exchange(self, worker: int, *, gradients: dict[int, Tensor]) -> tuple[list[int], bytes]:
        """Waits until all members have given theirs; returns what changes."""
        with self._changed:
            if not self._round:
                self._round_begun = time.monotonic()
            self._round[worker] = gradients
            mine = self._round
            self._end_round_if_complete()
            while self._round is mine:
                self._changed.wait(timeout=1.0)
                if self._round is mine and time.monotonic() - self._round_begun > self._params.timeout_seconds:
                    for late in [index for index in self._members if index not in mine]:
                        _logger.warning("worker %d is late: the others go on", late)
                        self._members.pop(late).close()
                    self._end_round_if_complete()
            return self._answer

    def _end_round_if_complete(self) -> None:
        """To be called with the lock held."""
        if not self._round or self.state is None or not set(self._members) <= set(self._round):
            return
        found: dict[int, list[Tensor]] = {}
        for gradients in self._round.values():
            for index, gradient in gradients.items():
                found.setdefault(index, []).append(gradient)
        means = {index: torch.stack(parts).mean(dim=0) for index, parts in found.items()}
        self._answer = self.state.step(means)
        self._round = {}
        self._changed.notify_all()


def serve(address: str) -> None:
    """Serves a run at `address` until all its workers have finished.

    Raises:
        TrainingError: the port cannot be opened.
    """
    server = OuterServer(address)
    print(f"megaseq: the outer server listens at {server.address}", flush=True)
    try:
        server.serve()
    finally:
        server.close()
