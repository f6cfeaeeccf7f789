"""The multifd channels of an outgoing migration: what they write, and that nobody waits for one that is broken."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from vmferry.engine.image import PAGE_BYTES
from vmferry.engine.multifd_out import QUEUED_MAX, MultifdOut
from vmferry.engine.wires import Gone, Waker, Wire
from vmferry.testing.scripted_destination import WAIT_S, make_image
from vmferry.wire.events import NEED_DATA, MultifdEvent, MultifdInit, MultifdPacket, MultifdPages
from vmferry.wire.multifd import SYNC, MultifdDecoder

UUID = bytes(range(16))


class Full(Exception):
    """Somebody would have to wait for a channel."""


class Channels:
    """Some channels over socket pairs, and their far ends."""

    def __init__(self, count: int) -> None:
        self.waker = Waker()
        self.out = MultifdOut(uuid=UUID, name="test", wake=self.waker.wake, while_full=self.while_full)
        self.far: list[socket.socket] = []
        self.wires: list[Wire] = []
        for _ in range(count):
            mine, theirs = socket.socketpair()
            theirs.settimeout(WAIT_S)
            self.far.append(theirs)
            self.wires.append(Wire(mine))
            self.out.open(self.wires[-1], handshake=lambda wire: wire.handshake(timeout_s=WAIT_S))

    def while_full(self) -> None:
        raise Full

    def fill(self) -> None:
        """More than the queue of the first channel and its socket hold. Raises Full."""
        block = make_image({"pc.ram": 4096}).blocks["pc.ram"]
        for _ in range(QUEUED_MAX + 8):
            self.out.put(block, np.arange(4096))

    def read(self, number: int) -> bytes:
        """All up to the end."""
        found = bytearray()
        while data := self.far[number].recv(1 << 20):
            found += data
        return bytes(found)

    def read_all(self) -> list[bytes]:
        """All of all channels, while they are ended."""
        found: dict[int, bytes] = {}

        def read(number: int) -> None:
            found[number] = self.read(number)

        readers = [threading.Thread(target=read, args=(number,)) for number in range(len(self.far))]
        for reader in readers:
            reader.start()
        self.out.end()
        for thread in self.out.threads:
            thread.join(WAIT_S)
        self.out.finish(timeout_s=WAIT_S)
        for reader in readers:
            reader.join(WAIT_S)
        return [found[number] for number in range(len(self.far))]

    def close(self) -> None:
        for wire in self.wires:
            wire.cut()
        self.out.finish(timeout_s=WAIT_S)
        assert not any(thread.is_alive() for thread in self.out.threads)
        for sock in self.far:
            sock.close()
        self.waker.close()


@pytest.fixture
def two() -> Iterator[Channels]:
    made = Channels(2)
    yield made
    made.close()


@pytest.fixture
def one() -> Iterator[Channels]:
    made = Channels(1)
    yield made
    made.close()


@pytest.mark.conforms("43")
def test_the_channels_decode_to_the_pages_and_a_sync_stands_behind_what_came_before_it(two: Channels) -> None:
    image = make_image({"pc.ram": 700})
    block = image.blocks["pc.ram"]
    rounds = [np.arange(0, 300), np.arange(300, 700, 2), np.array([5]), np.arange(301, 700, 2)]
    for numbers in rounds[:2]:
        two.out.put(block, numbers)
    two.out.sync()
    for numbers in rounds[2:]:
        two.out.put(block, numbers)
    data = two.read_all()
    assert two.out.bytes == sum(len(each) for each in data)
    packets: list[int] = []
    for number, stream in enumerate(data):
        decoder = MultifdDecoder({"pc.ram": block.wire})
        decoder.feed(memoryview(stream))
        turn, pages = 0, list[int]()
        init = decoder.next()
        assert init == MultifdInit(number, UUID)
        event: MultifdEvent | object
        while (event := decoder.next()) is not NEED_DATA:
            match event:
                case MultifdPacket():
                    packets.append(event.number)
                    if event.flags & SYNC:
                        assert pages == rounds[number].tolist()
                        assert event.normal == event.zero == 0
                        turn, pages = 1, []
                case MultifdPages(_, offsets, content):
                    where = (offsets // PAGE_BYTES).astype(np.intp)
                    assert (content == block.pages[where]).all()
                    pages += where.tolist()
                case _:
                    raise AssertionError(event)
        assert turn == 1
        assert pages == rounds[number + 2].tolist()
    assert sorted(packets) == list(range(len(packets)))  # one counter over all channels


def test_a_channel_whose_peer_does_not_read_makes_the_others_owner_wait(one: Channels) -> None:
    with pytest.raises(Full):
        one.fill()


def test_room_in_the_queue_wakes_whoever_waits_for_it(one: Channels) -> None:
    block = make_image({"pc.ram": 4096}).blocks["pc.ram"]
    for _ in range(2):  # the reader takes everything in between
        with pytest.raises(Full):
            one.fill()
        one.waker.clear()
        while one.out._channels[0].queue.full():
            one.far[0].recv(1 << 20)
        assert select.select([one.waker.fd], [], [], WAIT_S)[0]
        one.out.put(block, np.arange(1))


def test_a_broken_channel_says_so_and_nothing_waits_for_it(two: Channels) -> None:
    block = make_image({"pc.ram": 4096}).blocks["pc.ram"]
    two.far[1].close()
    two.out.put(block, np.arange(100))
    two.out.put(block, np.arange(100))
    assert select.select([two.waker.fd], [], [], WAIT_S)[0]  # its owner is woken, wherever it waits
    with pytest.raises(Gone, match="multifd"):
        two.out.check()
    with pytest.raises(Gone, match="multifd"):
        two.out.sync()


def test_finishing_ends_threads_that_have_work_left(one: Channels) -> None:
    with pytest.raises(Full):
        one.fill()
    one.wires[0].cut()
    one.out.finish(timeout_s=WAIT_S)
    assert not one.out.threads[0].is_alive()


def test_without_channels_there_is_nothing_to_do() -> None:
    out = MultifdOut(uuid=UUID, name="test", wake=lambda: None, while_full=lambda: None)
    assert not out.is_open
    out.check()
    out.end()
    out.finish(timeout_s=0)
    assert out.bytes == 0
    assert out.threads == []
