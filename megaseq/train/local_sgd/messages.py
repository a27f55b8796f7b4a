"""Messages between workers and the server: a few JSON values, and bytes of tensors. Nothing in them is executed."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import Any, NamedTuple

_SIZES = struct.Struct("!4sIQ")
_MAGIC = b"msq1"
_MAX_HEADER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


class Message(NamedTuple):
    """What came."""

    header: dict[str, Any]
    data: bytearray

    @property
    def kind(self) -> str:
        """What it is about."""
        return str(self.header.get("kind", ""))


class Channel:
    """A connection that counts what goes over it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Finds out that a machine at the other end has gone without a word.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self.sent_bytes = 0
        self.received_bytes = 0

    def send(self, kind: str, *, data: bytes = b"", **values: Any) -> None:
        """Sends a message.

        Raises:
            OSError: the other end is gone.
        """
        header = json.dumps({"kind": kind, **values}).encode()
        start = _SIZES.pack(_MAGIC, len(header), len(data)) + header
        self._connection.sendall(start)
        if data:
            self._connection.sendall(data)
        self.sent_bytes += len(start) + len(data)

    def receive(self, *, max_bytes: int) -> Message:
        """Waits for a message.

        Raises:
            OSError: the other end is gone, or nothing came within the connection's timeout.
            ValueError: it is no message, or holds more than `max_bytes`.
        """
        magic, header_size, size = _SIZES.unpack(self._read(_SIZES.size))
        if magic != _MAGIC or header_size > _MAX_HEADER_BYTES or size > max_bytes:
            raise ValueError(f"no message of at most {max_bytes} bytes")
        header = json.loads(self._read(header_size))
        if not isinstance(header, dict):
            raise ValueError("a message without names")
        data = self._read(size)
        self.received_bytes += _SIZES.size + header_size + size
        return Message(header, data)

    def close(self) -> None:
        """Ends the connection; who waits at it, in another thread too, hears of it."""
        with contextlib.suppress(OSError):  # The other end was faster.
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            count = self._connection.recv_into(view[done:], min(size - done, _CHUNK_BYTES))
            if count == 0:
                raise ConnectionResetError("the other end has closed the connection")
            done += count
        return data
