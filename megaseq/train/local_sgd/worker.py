"""A worker's side: what it tells the server after its inner steps, and what it takes over from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megaseq.base.errors import AsText, TrainingError, must
from megaseq.checkpoint.piece import Piece
from megaseq.parallel.process import Team
from megaseq.train.engine import Engine
from megaseq.train.local_sgd.compression import decode, encode, encoded_size
from megaseq.train.local_sgd.messages import Channel, Message
from megaseq.train.local_sgd.outer import bounds
from megaseq.train.local_sgd.params import LocalSGD

_SEED_STRIDE = 0x9E3779B9


class Worker:
    """The exchanges of one worker. Of its ranks, the first talks to the server; all call the same methods together."""

    def __init__(self, params: LocalSGD.Params, *, engine: Engine, team: Team) -> None:
        """Looks at the parameters; `join` connects.

        Args:
            params: with `worker` and `address`.
            engine: on each rank of which the whole model lies.
            team: the ranks of this worker.
        """
        self.params = params
        self._engine, self._team = engine, team
        pieces = [piece for piece in engine.updater.parameter_pieces() if piece.tensor.dtype == torch.float32]
        self._pieces = sorted(pieces, key=lambda piece: piece.name)
        _check_whole(self._pieces)
        self._count = sum(piece.tensor.numel() for piece in self._pieces)
        self._bounds = bounds(self._count, fragments=params.fragments)
        self._anchor = torch.zeros(self._count)
        """The parameters as the server has published them."""
        self._lost = torch.zeros(self._count if params.compression != "none" else 0)
        """What rounding took from the changes sent so far."""
        self._channel: Channel | None = None
        self._version = 0
        self._steps = 0
        self._pushed_at = [0] * params.fragments
        self._figures = {"exchanges": 0.0, "dropped": 0.0, "staleness": 0.0, "wait_seconds": 0.0}

    @classmethod
    def of(cls, params: LocalSGD.Params, *, engine: Engine, team: Team) -> Worker | None:
        """Returns the worker that `params` make of this process, None where they make none.

        The parameters of a worker begin as those of all, but its dropout is its own.

        Raises:
            ParamsError: there are workers, but none is this process.
        """
        if params.workers == 0:
            return None
        if params.worker < 0:
            raise must(
                "train.local_sgd.worker",
                f"say which of the {params.workers} workers this process is",
                params.worker,
                "Give each worker its own, and the server's address; one process of megaseq train starts all itself",
            )
        engine.context.seed += params.worker * _SEED_STRIDE
        return cls(params, engine=engine, team=team)

    # ---- coming and going ----------------------------------------------------------------------------------------

    def join(self) -> None:
        """Meets the server, and begins with its parameters; with those of this worker where it is the first.

        Raises:
            TrainingError: the server cannot be reached, or refuses this worker.
        """
        if self._team.is_first:
            self._channel = Channel(self._connect())
            names = [(piece.name, list(piece.global_shape)) for piece in self._pieces]
            fingerprint = hashlib.sha256(json.dumps(names).encode()).hexdigest()
            shared = self.params.shared()
            self._send("join", worker=self.params.worker, count=self._count, fingerprint=fingerprint, settings=shared)
            message = self._receive()
            if message.kind == "send_values":
                self._send("values", data=encode(self._read(), compression="none"))
                message = self._receive()
            self._take_values(message)
        self._spread(range(self.params.fragments))
        self._steps = 0
        self._pushed_at = [0] * self.params.fragments

    def _connect(self) -> socket.socket:
        host, _, port = self.params.address.rpartition(":")
        deadline = time.monotonic() + self.params.timeout_seconds
        while True:
            try:
                connection = socket.create_connection((host or "127.0.0.1", int(port)), timeout=10.0)
                connection.settimeout(self.params.timeout_seconds * 1.25 + 10.0)
                return connection
            except OSError as error:
                if time.monotonic() > deadline:
                    raise must(
                        f"train.local_sgd.address: {self.params.address}",
                        "be where the outer server can be reached",
                        AsText(str(error)),
                        "Start it with megaseq outer, and check the firewall",
                        kind=TrainingError,
                    ) from None
                time.sleep(0.2)

    def leave(self, *, finished: bool) -> None:
        """Goes; the others do not wait for this worker any more.

        Args:
            finished: whether it has done all its steps and will not come back.
        """
        if self._channel is not None:
            with contextlib.suppress(OSError):  # The server has gone first.
                self._channel.send("leave", finished=finished)
            self._channel.close()
            self._channel = None

    # ---- exchanging ----------------------------------------------------------------------------------------------

    def after_step(self, *, last: bool) -> None:
        """To be called after every optimiser step: exchanges what is due.

        Args:
            last: whether no step follows. Then all is exchanged, and the worker ends with the published parameters.

        Raises:
            TrainingError: the server is gone.
        """
        self._steps += 1
        interval = self.params.inner_steps // self.params.fragments
        due = [self._steps // interval % self.params.fragments] if self._steps % interval == 0 else []
        if last:
            due = [index for index, before in enumerate(self._pushed_at) if before < self._steps]
        if due:
            begin = time.perf_counter()
            with self._team.watchdog.paused("exchange with other workers"):
                self._exchange(due, last=last)
            self._figures["wait_seconds"] += time.perf_counter() - begin
            self._figures["exchanges"] += 1
            for index in due:
                self._pushed_at[index] = self._steps

    def figures(self) -> dict[str, float]:
        """Returns what the exchanges have cost so far; empty on ranks that do not talk to the server."""
        if self._channel is None:
            return {}
        totals = {"sent_bytes": float(self._channel.sent_bytes), "received_bytes": float(self._channel.received_bytes)}
        return {f"local_sgd/{name}": value for name, value in (self._figures | totals).items()}

    def _exchange(self, fragments: Sequence[int], *, last: bool) -> None:
        taken = torch.zeros(len(self._bounds))
        if self._team.is_first:
            taken[self._push(fragments)] = 1.0
            if last:
                self._send("pull")
                self._take_values(self._receive())
                taken[:] = 1.0
        if self._grouped:
            dist.broadcast(taken, src=0)
        self._spread(taken.nonzero()[:, 0].tolist())

    def _push(self, fragments: Sequence[int]) -> list[int]:
        """Sends changes; returns the fragments that have new values in `_anchor`."""
        now = self._read()
        for index in range(len(self._bounds)):
            if index not in fragments:
                part = slice(*self._bounds[index])
                now[part] -= self._anchor[part]  # What this worker has learned since, which is not lost.
        changes = []
        for index in fragments:
            part = slice(*self._bounds[index])
            changes.append(self._anchor[part] - now[part] + (self._lost[part] if len(self._lost) else 0.0))
        change = torch.cat(changes)
        data = encode(change, compression=self.params.compression)
        if len(self._lost):
            rounded = decode(data, count=len(change), compression=self.params.compression)
            self._scatter(self._lost, fragments=fragments, values=change - rounded)
        self._send("push", data=data, fragments=list(fragments), version=self._version)
        message = self._receive()
        touched = [int(index) for index in message.header["fragments"]]
        count = sum(self._bounds[index][1] - self._bounds[index][0] for index in touched)
        self._version = int(message.header["version"])
        before = self._anchor.clone()
        if message.kind == "change":
            values = decode(message.data, count=count, compression=self.params.compression)
            self._scatter(self._anchor, fragments=touched, values=values, add=True)
        else:
            self._figures["staleness"] = float(message.header["staleness"])
            self._figures["dropped"] += float(not message.header["applied"])
            self._scatter(self._anchor, fragments=touched, values=decode(message.data, count=count, compression="none"))
        # What other workers sent of fragments that were not this one's turn goes below its own changes.
        dropped = message.kind == "parts" and not message.header["applied"]
        for index in touched:
            if index not in fragments and not dropped:
                part = slice(*self._bounds[index])
                self._carry(part, own=now[part], before=before[part])
        return [index for index in touched if index in fragments or dropped]

    def _carry(self, part: slice, *, own: Tensor, before: Tensor) -> None:
        """Moves the parameters of `part` as the published ones have moved, with the worker's own change on top."""
        values = self._read()
        values[part] = self._anchor[part] + own
        self._write(values)

    def _scatter(self, target: Tensor, *, fragments: Sequence[int], values: Tensor, add: bool = False) -> None:
        start = 0
        for index in fragments:
            first, last = self._bounds[index]
            part = values[start : start + last - first]
            target[first:last] = target[first:last] + part if add else part
            start += last - first

    # ---- parameters ----------------------------------------------------------------------------------------------

    @property
    def _grouped(self) -> bool:
        return self._team.world_size > 1

    def _read(self) -> Tensor:
        return torch.cat([piece.tensor.detach().reshape(-1).cpu() for piece in self._pieces])

    @torch.no_grad()
    def _write(self, values: Tensor) -> None:
        start = 0
        for piece in self._pieces:
            size = piece.tensor.numel()
            piece.tensor.copy_(values[start : start + size].view(piece.tensor.shape))
            start += size
        self._engine.updater.publish()

    def _spread(self, fragments: Sequence[int]) -> None:
        """Makes the published values of `fragments` the parameters, on all ranks of the worker."""
        values = self._read()
        for index in fragments:
            part = slice(*self._bounds[index])
            values[part] = self._anchor[part]
        if self._grouped:
            dist.broadcast(values, src=0)
        self._write(values)

    def _take_values(self, message: Message) -> None:
        self._anchor = decode(message.data, count=self._count, compression="none")
        self._version = int(message.header["version"])

    # ---- the connection ------------------------------------------------------------------------------------------

    def _send(self, kind: str, *, data: bytes = b"", **values: object) -> None:
        assert self._channel is not None
        try:
            self._channel.send(kind, data=data, **values)
        except OSError as error:
            raise self._gone(error) from None

    def _receive(self) -> Message:
        assert self._channel is not None
        try:
            message = self._channel.receive(max_bytes=64 + encoded_size(self._count, compression="none"))
        except (OSError, ValueError) as error:
            raise self._gone(error) from None
        if message.kind == "refused":
            raise TrainingError(str(message.header["text"]))
        return message

    def _gone(self, error: Exception) -> TrainingError:
        return must(
            f"train.local_sgd.address: {self.params.address}",
            "answer while the workers train",
            AsText(f"gone ({error})"),
            "Start the outer server again, and then the workers, which go on from their checkpoints",
            kind=TrainingError,
        )


def _check_whole(pieces: Sequence[Piece]) -> None:
    """Refuses an engine that was not made from the params of a run: those are refused before anything starts."""
    for piece in pieces:
        if not piece.is_whole:
            raise must(
                "train.local_sgd",
                "have the whole model on each rank of a worker",
                AsText(f"given a part of {piece.name}"),
                "Set parallel.zero.stage=0, parallel.tensor=1, parallel.pipe=1 and parallel.expert=1",
            )
