"""The relay does to bytes exactly what it is told, at exactly the byte, and leaves no thread behind."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.testing.relay import Endpoint, Relay


class Peers:
    """A client and a target with the relay between them."""

    def __init__(self, family: socket.AddressFamily, bind: Endpoint, listen: Endpoint) -> None:
        self.server = socket.socket(family, socket.SOCK_STREAM)
        self.server.bind(bind)
        self.server.listen()
        name = self.server.getsockname()
        self.relay = Relay(name if isinstance(name, str) else name[:2], listen=listen)
        self.family = family
        self.connections = 0
        self.client, self.target = self.connect()

    def connect(self) -> tuple[socket.socket, socket.socket]:
        client = socket.socket(self.family, socket.SOCK_STREAM)
        client.settimeout(5)
        client.connect(self.relay.address)
        target, _ = self.server.accept()
        target.settimeout(5)
        self.connections += 1
        self.relay.wait_connections(self.connections, 5)
        return client, target

    def close(self) -> None:
        self.relay.stop()
        for end in (self.client, self.target, self.server):
            end.close()


@pytest.fixture(params=["tcp", "tcp6", "unix"])
def peers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Peers]:
    if request.param == "unix":
        made = Peers(socket.AF_UNIX, str(tmp_path / "target"), str(tmp_path / "relay"))
    elif request.param == "tcp6":
        made = Peers(socket.AF_INET6, ("::1", 0), ("::1", 0))
    else:
        made = Peers(socket.AF_INET, ("127.0.0.1", 0), ("127.0.0.1", 0))
    yield made
    made.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("relay")]
    assert left == []
    assert not (tmp_path / "relay").exists()


def receive(end: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = end.recv(count - len(received))
        if not piece:
            break
        received += piece
    return received


def nothing_comes(end: socket.socket, wait_s: float = 0.05) -> bool:
    end.settimeout(wait_s)
    try:
        return end.recv(1, socket.MSG_PEEK) is None
    except TimeoutError:
        return True
    finally:
        end.settimeout(5)


def is_over(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except ConnectionError:
        return True


def test_bytes_pass_both_ways_and_the_end_too(peers: Peers) -> None:
    data = bytes(range(256)) * 4096  # more than the sockets' buffers, so the relay meets back-pressure
    sender = threading.Thread(target=peers.client.sendall, args=(data,))
    sender.start()
    assert receive(peers.target, len(data)) == data
    sender.join()
    peers.target.sendall(b"pong")
    assert receive(peers.client, 4) == b"pong"
    peers.client.shutdown(socket.SHUT_WR)
    assert is_over(peers.target)
    peers.target.sendall(b"last words")
    peers.target.close()
    assert receive(peers.client, 100) == b"last words"
    peers.relay.stop()  # its threads count after they have sent: the counters are final once they are joined
    assert (peers.relay.to_target.passed_bytes, peers.relay.to_client.passed_bytes) == (len(data), 4 + 10)
    with pytest.raises(TimeoutError, match="1 of 2 connections"):
        peers.relay.wait_connections(2, 0.01)


@pytest.mark.proves("S86")
def test_hold_and_release(peers: Peers) -> None:
    peers.relay.to_target.hold()
    peers.client.sendall(b"one")
    assert nothing_comes(peers.target)
    peers.target.sendall(b"the other way goes on")
    assert receive(peers.client, 21) == b"the other way goes on"
    peers.relay.to_target.release()
    assert receive(peers.target, 3) == b"one"


def test_drop_one_direction(peers: Peers) -> None:
    peers.relay.to_client.drop()
    peers.target.sendall(b"lost")
    peers.client.sendall(b"heard")
    assert receive(peers.target, 5) == b"heard"
    assert nothing_comes(peers.client)


@pytest.mark.parametrize("reset", [False, True])
def test_cut_and_connect_again(peers: Peers, reset: bool) -> None:
    peers.relay.to_target.hold()
    peers.client.sendall(b"never arrives")
    peers.relay.cut(reset=reset)
    assert is_over(peers.client)
    assert is_over(peers.target)
    peers.relay.to_target.release()
    client, target = peers.connect()
    client.sendall(b"again")
    assert receive(target, 5) == b"again"
    client.close()
    target.close()


def test_cut_one_of_several(peers: Peers) -> None:
    client, target = peers.connect()
    with client, target:
        peers.relay.cut(number=3)  # the second of two
        assert is_over(client)
        peers.client.sendall(b"still here")
        assert receive(peers.target, 10) == b"still here"


@pytest.mark.proves("S86")
def test_half_close(peers: Peers) -> None:
    peers.relay.half_close(peers.relay.to_target)
    assert is_over(peers.target)
    peers.target.sendall(b"still")
    assert receive(peers.client, 5) == b"still"


def test_refuse(peers: Peers) -> None:
    peers.relay.refuse()
    with socket.socket(peers.family, socket.SOCK_STREAM) as late:
        late.settimeout(5)
        late.connect(peers.relay.address)
        assert is_over(late)
    assert peers.relay.refused == 1
    peers.relay.refuse(refusing=False)
    client, target = peers.connect()
    client.close()
    target.close()


def test_a_dead_target_is_a_closed_connection(peers: Peers) -> None:
    peers.server.close()
    if isinstance(peers.relay.target, str):
        Path(peers.relay.target).unlink()
    with socket.socket(peers.family, socket.SOCK_STREAM) as late:
        late.settimeout(5)
        late.connect(peers.relay.address)
        assert is_over(late)


def test_throttle(peers: Peers) -> None:
    peers.relay.to_target.throttle(100_000)
    began = time.monotonic()
    peers.client.sendall(bytes(20_000))
    assert len(receive(peers.target, 20_000)) == 20_000
    assert 0.15 <= time.monotonic() - began < 2
    peers.relay.to_target.throttle(None)
    peers.client.sendall(bytes(20_000))
    assert len(receive(peers.target, 20_000)) == 20_000


def test_delay_adds_time_but_keeps_the_rate(peers: Peers) -> None:
    peers.relay.to_client.delay(0.1)
    began = time.monotonic()
    for _ in range(20):
        peers.target.sendall(b"x")
        time.sleep(0.002)
    assert receive(peers.client, 20) == b"x" * 20
    assert 0.1 <= time.monotonic() - began < 1


@pytest.mark.parametrize(("when", "passed"), [("before", b"..pr"), ("after", b"..pro")])
@pytest.mark.parametrize("cuts", [[], [3], [3, 4], [1, 2, 3, 4, 5]])
def test_a_pattern_holds_at_exactly_its_byte(peers: Peers, when: str, passed: bytes, cuts: list[int]) -> None:
    relay, text = peers.relay, b"..pro-and-pro"
    assert when in ("before", "after")
    seen = relay.to_target.at_pattern(b"pro", relay.to_target.hold, when="after" if when == "after" else "before")
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        peers.client.sendall(text[start:end])
        time.sleep(0.002)
    seen.wait(5)
    assert seen.fired_at == len(passed)
    assert receive(peers.target, len(passed)) == passed
    assert nothing_comes(peers.target)
    relay.to_target.release()
    assert receive(peers.target, len(text) - len(passed)) == text[len(passed) :]


def test_an_offset_cuts_at_exactly_its_byte(peers: Peers) -> None:
    seen = peers.relay.to_target.at_offset(70_000, peers.relay.cut)
    later = peers.relay.to_target.at_offset(80_000, peers.relay.cut)
    peers.client.sendall(bytes(90_000))
    assert len(receive(peers.target, 90_000)) == 70_000
    seen.wait(5)
    assert not later.has_fired
    with pytest.raises(TimeoutError, match="80000"):
        later.wait(0.01)


def test_the_nearest_of_several_marks_comes_first(peers: Peers) -> None:
    order: list[str] = []
    way = peers.relay.to_target
    marks = [
        way.at_pattern(b"c", lambda: order.append("c")),
        way.at_pattern(b"a", lambda: order.append("a"), when="after"),
        way.at_offset(2, lambda: order.append("2")),
    ]
    peers.client.sendall(b"abcabc")
    assert receive(peers.target, 6) == b"abcabc"
    for mark in marks:
        mark.wait(5)
    assert sorted(order) == ["2", "a", "c"]
    assert order[0] == "a"


def test_a_reset_by_one_peer_ends_the_other(peers: Peers) -> None:
    peers.client.sendall(b"x")
    assert receive(peers.target, 1) == b"x"
    peers.target.sendall(b"unread")
    time.sleep(0.01)
    peers.client.close()  # with bytes unread, which is a reset on TCP
    peers.target.settimeout(5)
    assert is_over(peers.target)


def test_a_bad_listen_address_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Relay(("127.0.0.1", 1), listen=str(tmp_path / "none" / "relay"))


def test_as_context_manager() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Relay(server.getsockname()) as relay:
        assert relay.refused == 0
    relay.stop()
