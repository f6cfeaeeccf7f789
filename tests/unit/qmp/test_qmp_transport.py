"""The unix transport where clients rarely take it: descriptors, full sockets, peers that go away."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from vmferry.errors import QemuError
from vmferry.qmp.sockets import peer_credentials
from vmferry.qmp.transport import StreamTransport, UnixTransport


class Receiver:
    def __init__(self) -> None:
        self.data = b""
        self.got: asyncio.Queue[bytes] = asyncio.Queue()
        self.ends: list[str] = []
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.got.put_nowait(data)

    def connection_lost(self, reason: str) -> None:
        self.ends.append(reason)
        self.ended.set()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


Pair = tuple[socket.socket, socket.socket]


def receive_with_fds(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, ancillary, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(64))
    fds = array.array("i")
    for _, kind, content in ancillary:
        assert kind == socket.SCM_RIGHTS
        fds.frombytes(content)
    return data, list(fds)


async def test_descriptors_arrive_with_their_bytes(pair: Pair) -> None:
    ours, theirs = pair
    transport = UnixTransport(ours, Receiver())
    assert transport.peer_pid == os.getpid() == peer_credentials(theirs).pid
    read_end, write_end = os.pipe()
    transport.send(b"plain", ())
    assert receive_with_fds(theirs) == (b"plain", [])
    transport.send(b"with", (write_end,))
    os.close(write_end)
    data, (copy,) = receive_with_fds(theirs)
    assert data == b"with"
    os.write(copy, b"through")
    os.close(copy)
    assert os.read(read_end, 100) == b"through"
    assert os.read(read_end, 100) == b""  # nobody kept a copy
    os.close(read_end)
    await transport.close()


async def test_what_a_full_socket_does_not_take_waits_with_its_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    transport = UnixTransport(ours, Receiver())
    read_end, write_end = os.pipe()
    big = b"x" * 2_000_000
    transport.send(big, ())
    transport.send(b"!", (write_end,))
    os.close(write_end)  # the transport has its own copy by now
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    received = 0
    while received < len(big):
        received += len(await loop.sock_recv(theirs, len(big) - received))
    await asyncio.sleep(0)
    theirs.setblocking(True)
    waiting = asyncio.to_thread(receive_with_fds, theirs)
    data, (copy,) = await waiting
    assert data == b"!"
    os.close(copy)
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    transport.send(b"after", ())
    assert theirs.recv(10) == b"after"
    transport.abort()
    transport.abort()


async def test_closing_with_a_full_queue_keeps_no_descriptor(pair: Pair) -> None:
    ours, _ = pair
    transport = UnixTransport(ours, Receiver())
    read_end, write_end = os.pipe()
    transport.send(b"x" * 2_000_000, ())
    transport.send(b"!", (write_end,))
    os.close(write_end)
    await transport.close()
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    transport.send(b"too late", ())


async def test_what_the_peer_said_before_it_went_is_heard_although_writing_fails(pair: Pair) -> None:
    ours, theirs = pair
    receiver = Receiver()
    transport = UnixTransport(ours, receiver)
    theirs.sendall(b"last words")
    theirs.close()
    transport.send(b"anybody?", ())
    transport.send(b"hello?", ())
    assert receiver.ends == []
    await receiver.ended.wait()
    assert receiver.data == b"last words"
    assert receiver.ends == ["the other side closed it"]
    await transport.close()
    assert len(receiver.ends) == 1


async def test_a_reset_is_an_end_with_its_reason(pair: Pair) -> None:
    ours, theirs = pair
    receiver = Receiver()
    transport = UnixTransport(ours, receiver)
    transport.send(b"unread", ())
    theirs.close()  # with bytes unread: a reset
    await receiver.ended.wait()
    assert receiver.ends == ["Connection reset by peer"]
    await transport.close()


async def test_a_wakeup_without_data_is_nothing(pair: Pair) -> None:
    ours, theirs = pair
    receiver = Receiver()
    transport = UnixTransport(ours, receiver)
    transport._on_readable()
    theirs.sendall(b"x")
    assert await receiver.got.get() == b"x"
    assert receiver.ends == []
    await transport.close()


async def test_a_stream_transport_reports_a_broken_connection_once(pair: Pair) -> None:
    ours, theirs = pair
    receiver = Receiver()
    transport = StreamTransport(*await asyncio.open_connection(sock=ours), receiver, name="t")
    with pytest.raises(QemuError, match="unix socket"):
        transport.send(b"x", (0,))
    transport.send(b"unread", ())
    theirs.sendall(b"y")
    assert await receiver.got.get() == b"y"
    theirs.close()
    await receiver.ended.wait()
    transport.send(b"after", ())
    transport.abort()
    await transport.close()
    assert receiver.ends == ["Connection reset by peer"]
