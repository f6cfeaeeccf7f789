"""A channel through the agent: QEMU hears nothing before the source speaks; ends and breaks reach the other side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmferry import limits
from vmferry.agent.channel import ChannelListener, dial
from vmferry.agent.relayed import RelayedChannel

OVER_S = 30.0
MUCH = os.urandom(1 << 20) * 4


@dataclass
class Ends:
    """The source's connection, the relay, and the socket at which QEMU would listen."""

    source: socket.socket
    relay: RelayedChannel
    listener: socket.socket
    path: Path

    def accept(self) -> socket.socket:
        qemu, _ = self.listener.accept()
        qemu.settimeout(OVER_S)
        return qemu

    def is_connected(self) -> bool:
        """Whether somebody waits to be accepted."""
        self.listener.setblocking(False)
        try:
            self.listener.accept()[0].close()
        except BlockingIOError:
            return False
        finally:
            self.listener.settimeout(OVER_S)
        return True

    def hangs_up(self) -> bool:
        """Whether the source is told that it is over."""
        try:
            return self.source.recv(1) == b""
        except ConnectionError:
            return True


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[Ends]:
    """Nothing of it is left: neither threads nor the path."""
    threads = threading.active_count()
    path = tmp_path / "rec1.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(OVER_S)
    door = await ChannelListener.open("job", ["127.0.0.1"])
    near, far = await asyncio.gather(
        dial(door.addresses, door.expect("again"), deadline_s=OVER_S), door.arrived("again", deadline_s=OVER_S)
    )
    await door.close()
    with listener, near.hand_over() as source:
        source.settimeout(OVER_S)
        relay = RelayedChannel(far, str(path))
        yield Ends(source, relay, listener, path)
        relay.cut()
        assert relay.wait_over(OVER_S)
    assert not path.exists()
    assert threading.active_count() == threads


def read_all(sock: socket.socket) -> bytes:
    read = b""
    with contextlib.suppress(TimeoutError):
        while piece := sock.recv(1 << 20):
            read += piece
    return read


def test_qemu_is_connected_to_by_the_first_byte_of_the_source(ends: Ends) -> None:
    assert not ends.is_connected()
    assert ends.path.exists()
    ends.source.sendall(b"Q")
    with ends.accept() as qemu:
        assert qemu.recv(10) == b"Q"
        assert not ends.path.exists()


@pytest.mark.parametrize("from_source", [True, False])
def test_everything_passes_and_half_an_end_is_half_an_end(ends: Ends, from_source: bool) -> None:
    ends.source.sendall(b"Q")
    with ends.accept() as qemu:
        assert qemu.recv(1) == b"Q"
        giver, taker = (ends.source, qemu) if from_source else (qemu, ends.source)
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(read_all(taker)))
        reader.start()
        giver.sendall(MUCH)
        giver.shutdown(socket.SHUT_WR)
        reader.join(OVER_S)
        assert found == [MUCH]
        taker.sendall(b"and back")
        assert giver.recv(100) == b"and back"
        taker.close()
        assert ends.relay.wait_over(OVER_S)


@pytest.mark.parametrize("who", ["source", "qemu", "agent"])
def test_a_break_is_one_for_both(ends: Ends, who: str) -> None:
    ends.source.sendall(b"Q")
    qemu = ends.accept()
    assert qemu.recv(1) == b"Q"
    if who == "agent":
        ends.relay.cut()
        assert ends.relay.is_cut
    elif who == "source":
        ends.source.close()
    else:
        qemu.close()
    if who != "source":
        assert ends.hangs_up()
        ends.source.close()
    if who != "qemu":
        assert qemu.recv(1) == b""
        qemu.close()
    assert ends.relay.wait_over(OVER_S)
    assert not ends.relay.is_held_by(os.getpid())


@pytest.mark.parametrize("how", ["the source leaves", "cut", "close"])
def test_a_source_that_says_nothing_costs_qemu_nothing(ends: Ends, how: str) -> None:
    """QEMU goes on listening: for a QEMU before 8.0 a connection without a byte would be the last one."""
    if how == "the source leaves":
        ends.source.close()
    elif how == "cut":
        ends.relay.cut()
    else:
        ends.relay.close()
    assert ends.relay.wait_over(OVER_S)
    assert not ends.is_connected()
    ends.relay.cut()  # may be done twice


def test_an_attempt_that_is_over_does_not_end_what_qemu_still_has_to_say(ends: Ends) -> None:
    ends.source.sendall(b"Q")
    with ends.accept() as qemu:
        assert qemu.recv(1) == b"Q"  # a QEMU that hangs up on unread bytes would be a break
        ends.relay.close()
        qemu.sendall(b"the last words")
    assert read_all(ends.source) == b"the last words"
    ends.source.close()
    assert ends.relay.wait_over(OVER_S)


def test_a_qemu_that_does_not_listen_any_more_is_a_break(ends: Ends) -> None:
    ends.listener.close()
    ends.source.sendall(b"Q")
    assert ends.hangs_up()
    assert ends.relay.wait_over(OVER_S)


def test_who_never_speaks_or_never_ends_is_given_up(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RELAY_LINGER_S", 0.05)
    ends.source.sendall(b"Q")
    with ends.accept() as qemu:
        qemu.shutdown(socket.SHUT_WR)  # and then does not close
        assert ends.relay.wait_over(OVER_S)
        assert ends.relay.is_cut


async def test_a_first_byte_that_does_not_come_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RELAY_FIRST_BYTE_S", 0.05)
    door = await ChannelListener.open("job", ["127.0.0.1"])
    near, far = await asyncio.gather(
        dial(door.addresses, door.expect("again"), deadline_s=OVER_S), door.arrived("again", deadline_s=OVER_S)
    )
    await door.close()
    relay = RelayedChannel(far, str(tmp_path / "nobody"))
    assert await asyncio.to_thread(relay.wait_over, OVER_S)
    near.close()
