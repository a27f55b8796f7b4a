"""Workers that come, lag, die and come back, as bare connections."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megaseq.base.errors import TrainingError
from megaseq.train.local_sgd.compression import decode, encode
from megaseq.train.local_sgd.messages import Channel, Message
from megaseq.train.local_sgd.params import LocalSGD
from megaseq.train.local_sgd.server import OuterServer

SIZE = 10


@pytest.fixture
def server() -> Iterator[OuterServer]:
    made = OuterServer("127.0.0.1:0")
    made.start()
    yield made
    made.close()


class Peer:
    """A worker without a model."""

    def __init__(self, server: OuterServer, *, worker: int, params: LocalSGD.Params, fingerprint: str = "f") -> None:
        host, _, port = server.address.rpartition(":")
        self.channel = Channel(socket.create_connection((host, int(port)), timeout=20))
        self.channel.send("join", worker=worker, count=SIZE, fingerprint=fingerprint, settings=params.shared())
        self.version = 0

    def receive(self) -> Message:
        return self.channel.receive(max_bytes=1000)

    def joined(self, *, first: torch.Tensor | None = None) -> torch.Tensor:
        message = self.receive()
        if message.kind == "send_values":
            assert first is not None
            self.channel.send("values", data=encode(first, compression="none"))
            message = self.receive()
        assert message.kind == "values", message.header
        self.version = message.header["version"]
        return decode(message.data, count=SIZE, compression="none")

    def push(self, change: torch.Tensor, *, fragments: tuple[int, ...] = (0,)) -> None:
        data = encode(change, compression="none")
        self.channel.send("push", data=data, fragments=list(fragments), version=self.version)

    def answer(self) -> tuple[Message, torch.Tensor]:
        message = self.receive()
        self.version = message.header["version"]
        return message, decode(message.data, count=len(message.data) // 4, compression="none")


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `call`; what is returned waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()

    def wait() -> Any:
        thread.join(timeout=20)
        return results[0]

    return wait


def settings(**changes: Any) -> LocalSGD.Params:
    return LocalSGD.Params(**{"workers": 2, "outer_learning_rate": 1.0, "outer_momentum": 0.0, **changes})


def two(server: OuterServer, *, params: LocalSGD.Params) -> tuple[Peer, Peer]:
    """Both workers, joined."""
    one = Peer(server, worker=0, params=params)
    start = in_thread(lambda: one.joined(first=torch.arange(10.0)))
    while server.state is None:
        time.sleep(0.01)
    other = Peer(server, worker=1, params=params)
    assert torch.equal(other.joined(), torch.arange(10.0)) and torch.equal(start(), torch.arange(10.0))
    return one, other


def test_an_exchange_waits_for_all_and_gives_all_the_same(server: OuterServer) -> None:
    one, other = two(server, params=settings())
    one.push(torch.full((10,), 1.0))
    waits = in_thread(one.answer)
    time.sleep(0.2)
    assert server.state is not None and server.state.version == 0
    other.push(torch.full((10,), 3.0))
    message, change = other.answer()
    assert message.kind == "change" and torch.equal(change, torch.full((10,), -2.0))
    assert torch.equal(waits()[1], change)
    assert torch.equal(server.state.published, torch.arange(10.0) - 2.0)


def test_fragments_that_one_worker_alone_sent_reach_both(server: OuterServer) -> None:
    one, other = two(server, params=settings(fragments=2))
    one.push(torch.full((5,), 1.0))
    waits = in_thread(one.answer)
    other.push(torch.full((10,), 2.0), fragments=(0, 1))
    message, change = other.answer()
    assert message.header["fragments"] == [0, 1]
    assert torch.equal(change, torch.tensor([-1.5] * 5 + [-2.0] * 5)) and torch.equal(waits()[1], change)


def test_a_worker_that_dies_is_left_out_and_may_come_back(server: OuterServer) -> None:
    one, other = two(server, params=settings())
    one.push(torch.full((10,), 1.0))
    waits = in_thread(one.answer)
    other.channel.close()  # In the middle of an exchange.
    assert torch.equal(waits()[1], torch.full((10,), -1.0))
    one.push(torch.full((10,), 1.0))
    assert torch.equal(one.answer()[1], torch.full((10,), -1.0))
    again = Peer(server, worker=1, params=settings())
    assert torch.equal(again.joined(), torch.arange(10.0) - 2.0) and server.members == [0, 1]
    one.push(torch.full((10,), 1.0))
    waits = in_thread(one.answer)
    again.push(torch.full((10,), 5.0))
    assert torch.equal(again.answer()[1], torch.full((10,), -3.0)) and torch.equal(waits()[1], torch.full((10,), -3.0))


def test_a_worker_that_is_too_late_is_left_out(server: OuterServer) -> None:
    one, other = two(server, params=settings(timeout_seconds=1.0))
    one.push(torch.full((10,), 1.0))
    assert torch.equal(one.answer()[1], torch.full((10,), -1.0))
    assert server.members == [0]
    with pytest.raises(OSError):
        other.receive()


def test_asynchronous_workers_wait_for_nobody(server: OuterServer) -> None:
    params = settings(mode="asynchronous", max_staleness=3)
    one = Peer(server, worker=0, params=params)
    one.joined(first=torch.arange(10.0))  # Nor do they for the first exchange.
    lagging = Peer(server, worker=1, params=params)
    lagging.joined()
    for count in range(1, 4):
        one.push(torch.full((10,), 2.0))
        message, values = one.answer()
        assert message.header["applied"] and torch.equal(values, torch.arange(10.0) - count)
    lagging.push(torch.full((10,), 2.0))
    message, values = lagging.answer()
    assert message.header["staleness"] == 3 and message.header["applied"]
    assert torch.equal(values, torch.arange(10.0) - 4.0)
    for _ in range(4):
        one.push(torch.full((10,), 2.0))
        one.answer()
    lagging.push(torch.full((10,), 100.0))
    message, values = lagging.answer()
    assert message.header["staleness"] == 4 and not message.header["applied"] and server.dropped == 1
    assert torch.equal(values, torch.arange(10.0) - 8.0)
    lagging.channel.close()
    one.push(torch.full((10,), 2.0))
    one.answer()


def test_workers_that_do_not_belong_together_are_told(server: OuterServer) -> None:
    one = Peer(server, worker=0, params=settings())
    starts = in_thread(lambda: one.joined(first=torch.zeros(10)))
    while server.state is None:
        time.sleep(0.01)
    refused = Peer(server, worker=1, params=settings(inner_steps=10)).receive()
    assert refused.kind == "refused"
    assert "train.local_sgd.inner_steps: must be the same in all workers, but is 10" in refused.header["text"]
    assert "same parameters" in Peer(server, worker=1, params=settings(), fingerprint="g").receive().header["text"]
    assert server.members == [0]
    Peer(server, worker=1, params=settings()).joined()
    starts()


def test_changes_that_are_not_finite_are_refused(server: OuterServer) -> None:
    one, other = two(server, params=settings())
    other.push(torch.full((10,), float("nan")))
    assert "finite" in other.receive().header["text"]
    one.push(torch.full((10,), 1.0))
    assert torch.equal(one.answer()[1], torch.full((10,), -1.0))


def test_what_is_no_message_harms_nobody(server: OuterServer) -> None:
    one, other = two(server, params=settings())
    host, _, port = server.address.rpartition(":")
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"", b"msq1" + b"\xff" * 12):
        with socket.create_connection((host, int(port)), timeout=5) as stray:
            stray.sendall(data)
    time.sleep(0.1)
    assert server.members == [0, 1]
    waits = in_thread(one.answer)
    one.push(torch.ones(10))
    other.push(torch.ones(10))
    other.answer()
    waits()


def test_it_is_done_when_all_have_finished(server: OuterServer) -> None:
    one, other = two(server, params=settings())
    one.channel.send("leave", finished=True)
    other.channel.send("leave", finished=False)
    time.sleep(0.3)
    assert not server.done
    again = Peer(server, worker=1, params=settings())
    again.joined()
    again.channel.send("leave", finished=True)
    deadline = time.monotonic() + 10
    while not server.done and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.done and server.sent_bytes > 80 and server.received_bytes > 40


def test_an_address_that_cannot_be_listened_at_is_named(server: OuterServer) -> None:
    for address in (server.address, "127.0.0.1:port", "nowhere.invalid:1"):
        with pytest.raises(TrainingError, match=r"must be a free HOST:PORT of this machine, but is "):
            OuterServer(address)
