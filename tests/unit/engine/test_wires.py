"""Connections and wakers: nothing blocks, everything ends."""

from __future__ import annotations

import gc
import os
import socket
import ssl
import threading
import time

import pytest

from vmferry.engine.barrier import Barrier, Gate
from vmferry.engine.image import Image
from vmferry.engine.incoming import Incoming
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.wires import Gone, Waker, Wire
from vmferry.wire.errors import WireError


def pair() -> tuple[Wire, socket.socket]:
    near, far = socket.socketpair()
    return Wire(near), far


def test_a_waker_that_was_closed_touches_nobody_elses_descriptor() -> None:
    waker = Waker()
    fd = waker.fd
    waker.close()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    assert other == fd, "the number is used again, which is the case in question"
    waker.wake()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)


def test_endpoints_that_nobody_stopped_keep_no_descriptor() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    ends: list[Incoming | Outgoing] = [Incoming(Image()), Outgoing(Image())]
    assert len(os.listdir("/proc/self/fd")) > before
    ends.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_much_takes_what_is_there_and_then_tells_of_the_end() -> None:
    wire, far = pair()
    view = memoryview(bytearray(100))
    assert wire.read_much(view) is None
    far.sendall(b"ab")
    far.sendall(b"cd")
    far.close()
    assert wire.read_much(view) == 4
    assert bytes(view[:4]) == b"abcd"
    assert wire.read_much(view) == 0
    wire.close()


def test_a_full_view_ends_reading() -> None:
    wire, far = pair()
    far.sendall(b"abcdef")
    view = memoryview(bytearray(4))
    assert wire.read_much(view) == 4
    assert wire.read_much(view) == 2
    far.close()
    wire.close()


def test_waiting_for_the_waker_alone_hears_no_closed_connection() -> None:
    wire, far = pair()
    waker = Waker()
    wire.wait(readable=True, timeout_s=0)
    far.close()
    wire.wait(readable=True, timeout_s=30, waker=waker)  # it is readable: its end is
    assert wire.is_hung_up()
    waker.wake()
    wire.wait(waker=waker, timeout_s=30)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(waker.fd)  # it was cleared, so it was the waker that ended the wait
    waker.wake()
    wire.wait_for_hangup(waker, is_known=True, timeout_s=30)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(waker.fd)
    waker.close()
    wire.close()


def test_a_cut_is_heard_by_the_owner_and_the_peer() -> None:
    wire, far = pair()
    thread = threading.Thread(target=wire.cut)
    thread.start()
    wire.wait(readable=True, timeout_s=30)
    thread.join()
    assert wire.is_cut
    assert wire.read_into(memoryview(bytearray(1))) == 0
    assert far.recv(1) == b""
    far.close()
    wire.close()
    with pytest.raises(Gone):
        wire.wait(readable=True)


def test_a_connection_that_tls_cannot_wrap_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    near, far = socket.socketpair(type=socket.SOCK_DGRAM)
    with pytest.raises((OSError, ValueError, NotImplementedError)):
        Wire(near, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), server_side=True)
    near.close()
    far.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_gate_lets_through_who_waited_and_sends_the_cut_ones_away() -> None:
    gate = Gate()
    wire, far = pair()
    wire.cut()
    with pytest.raises(Gone):
        gate.wait(wire)
    gate.open()
    gate.wait(wire)
    far.close()
    wire.close()


def test_a_barrier_counts_only_who_introduced_himself() -> None:
    woken: list[int] = []
    barrier = Barrier(2, lambda: woken.append(1))
    assert [barrier.introduce(each) for each in (0, 0, 2, 1)] == [True, False, False, True]
    assert barrier.has_all
    assert not barrier.try_pass(0)
    threads = [threading.Thread(target=barrier.arrive) for _ in range(2)]
    for each in threads:
        each.start()
    while not barrier.try_pass(0):
        assert any(each.is_alive() for each in threads)
    for each in threads:
        each.join()
    assert len(woken) == 2
    assert not barrier.try_pass(0), "the next point waits for the next SYNCs"
    barrier.end_channel()
    barrier.end_channel()
    with pytest.raises(WireError, match="before its barrier"):
        barrier.try_pass(7)


def test_a_broken_barrier_lets_everybody_go() -> None:
    barrier, errors = Barrier(1, lambda: None), []

    def arrive() -> None:
        try:
            barrier.arrive()
        except Gone as error:
            errors.append(error)

    thread = threading.Thread(target=arrive)
    thread.start()
    barrier.break_up()
    thread.join()
    # Whoever comes first: the one that arrives later finds it broken, too.
    assert len(errors) == 1
    with pytest.raises(Gone):
        barrier.try_pass(0)


def test_a_close_between_the_look_and_the_wait_is_not_waited_for_in_vain() -> None:
    """1. the owner looks: the peer is there  2. the peer closes  3. the owner waits for that."""
    near, far = socket.socketpair()
    wire, waker = Wire(near), Waker()
    try:
        is_known = wire.is_hung_up()
        far.close()
        began_s = time.monotonic()
        wire.wait_for_hangup(waker, is_known=is_known, timeout_s=20)
        assert time.monotonic() - began_s < 10
        assert wire.is_hung_up()
    finally:
        wire.close()
        waker.close()
