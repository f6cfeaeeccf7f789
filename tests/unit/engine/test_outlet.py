"""What an outlet writes decodes to the pages that were put into it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from vmferry.engine.image import PAGE_BYTES, ForeignMemory, ImageBlock
from vmferry.engine.outlet import RUN_PAGES, Outlet, pages_of
from vmferry.engine.wires import Gone, Waker, Wire
from vmferry.wire.events import NEED_DATA, EndOfRam, PageRun, Ping, RamBlock, ZeroRun
from vmferry.wire.preempt import PreemptDecoder

Kind = Callable[[str, int], ImageBlock]


class Far:
    """The other end: reads all the time, so that nothing is ever full."""

    def __init__(self) -> None:
        mine, self.sock = socket.socketpair()
        self.outlet = Outlet(Wire(mine))
        self.data = bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while data := self.sock.recv(1 << 20):
            self.data += data

    def close(self) -> None:
        self.outlet.wire.close()
        self._thread.join()
        self.sock.close()

    def records(self, *blocks: ImageBlock) -> list[tuple[str, int, bytes]]:
        """(block, page, content), in the order of the wire."""
        self.close()
        decoder = PreemptDecoder({block.name: block.wire for block in blocks})
        decoder.feed(memoryview(self.data))
        found: list[tuple[str, int, bytes]] = []
        while (event := decoder.next()) is not NEED_DATA:
            if isinstance(event, PageRun):
                pages = [page.tobytes() for page in event.pages]
            elif isinstance(event, ZeroRun):
                pages = [bytes(PAGE_BYTES)] * len(event.offsets)
            else:
                assert isinstance(event, EndOfRam)
                break
            numbers = (event.offsets // PAGE_BYTES).tolist()
            found += [(event.block.name, int(number), page) for number, page in zip(numbers, pages, strict=True)]
        assert decoder.is_between
        return found


@pytest.fixture
def far() -> Iterator[Far]:
    made = Far()
    yield made
    made.close()


def content(pages: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Every third page is zero."""
    found = np.random.default_rng(1).integers(1, 255, (pages, PAGE_BYTES), np.uint8)
    found[1::3] = 0
    return found


def own(name: str, pages: int) -> ImageBlock:
    block = ImageBlock(RamBlock(name, pages * PAGE_BYTES))
    filled = np.flatnonzero(np.arange(pages) % 3 != 1)
    block.write(filled.astype(np.uint64) * np.uint64(PAGE_BYTES), content(pages)[filled])
    return block


def foreign(name: str, pages: int) -> ImageBlock:
    fd = os.memfd_create("another's")
    os.write(fd, b"?" * 100 + content(pages).tobytes())
    return ImageBlock(RamBlock(name, pages * PAGE_BYTES), ForeignMemory(fd, 100))


def wanted(block: ImageBlock, first: int, count: int) -> list[tuple[str, int, bytes]]:
    return [(block.name, number, content(block.count)[number].tobytes()) for number in range(first, first + count)]


@pytest.mark.parametrize("kind", [own, foreign])
@pytest.mark.parametrize("count", [1, 2, 3, RUN_PAGES])
def test_pages_side_by_side(far: Far, kind: Kind, count: int) -> None:
    a, b = kind("a", 300), kind("b", 300)
    expected = []
    for block, first in [(a, 0), (a, 5), (b, 7), (b, 1), (a, 1), (a, 64), (b, 64)]:
        far.outlet.put_pages(block, first, count)
        far.outlet.drain()
        expected += wanted(block, first, count)
    assert far.records(a, b) == expected
    assert far.outlet.bytes == len(far.data)


def test_single_zero_pages_and_the_record_of_the_end(far: Far) -> None:
    a, b = own("a", 9), own("b", 9)
    for block in (a, a, b):
        far.outlet.put_pages(block, 4, 1)
        far.outlet.drain()
    far.outlet.put(EndOfRam())
    far.outlet.drain()
    assert far.records(a, b) == [*wanted(a, 4, 1) * 2, *wanted(b, 4, 1)]
    assert len(far.data) == (8 + 2 + 1) + 9 + (8 + 2 + 1) + 8  # no page travels, and the name only when it changes


def test_runs_with_gaps_and_any_number_of_zeros(far: Far) -> None:
    a = own("a", 300)
    some = np.array([0, 2, 3, 6, 8])
    far.outlet.put_run(a, some, pages_of(a, some))
    far.outlet.drain()
    zeros = np.arange(1, 300, 3)
    far.outlet.put_zeros(a, zeros)
    far.outlet.drain()
    expected = [each for number in [*some.tolist(), *zeros.tolist()] for each in wanted(a, number, 1)]
    assert far.records(a) == expected


@pytest.mark.parametrize("kind", [own, foreign])
@pytest.mark.parametrize("numbers", [[4], [3, 4, 5], [0, 2, 9]])
def test_the_content_of_pages(kind: Kind, numbers: list[int]) -> None:
    assert (pages_of(kind("a", 12), np.array(numbers)) == content(12)[numbers]).all()


def test_many_small_events_are_one_buffer() -> None:
    mine, theirs = socket.socketpair()
    outlet = Outlet(Wire(mine))
    outlet.put(*(Ping(number) for number in range(2000)))
    assert outlet.offer()  # in one write: the kernel takes no more than 1024 buffers at a time
    assert len(theirs.recv(1 << 20)) == outlet.bytes == 2000 * 9
    outlet.wire.close()
    theirs.close()


def test_what_finds_no_room_waits_and_whoever_waits_is_called() -> None:
    mine, theirs = socket.socketpair()
    waker, got = Waker(), bytearray()
    data = os.urandom(4 << 20)

    def read() -> None:
        while len(got) < len(data):
            got.extend(theirs.recv(1 << 20))

    reader = threading.Thread(target=read)

    def while_waiting() -> None:
        if not reader.ident:
            reader.start()

    outlet = Outlet(Wire(mine), waker=waker, while_waiting=while_waiting)
    outlet.put_raw(data)
    outlet.put_raw(b"")
    assert not outlet.offer()
    assert outlet.is_full
    waker.wake()  # nothing is read yet, so only this ends the first wait
    outlet.drain()
    reader.join()
    assert got == data
    theirs.close()
    outlet.put_raw(b"x")
    with pytest.raises(Gone):
        outlet.drain()
    outlet.wire.close()
    waker.close()
