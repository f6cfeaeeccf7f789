"""An image whose pages go on to whoever keeps them: order, last versions, and what cannot be kept."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from vmferry.core.facts import Fact
from vmferry.engine.image import PAGE_BYTES, Pages
from vmferry.engine.incoming import Incoming
from vmferry.engine.passing import Numbers, PassingBlock, PassingImage
from vmferry.errors import RepositoryError
from vmferry.testing import fake_stream
from vmferry.wire.errors import WireError
from vmferry.wire.events import RamBlock

WAIT_S = 20.0


class Kept:
    """A sink that remembers the last content of every page."""

    def __init__(self, *, fails_at: int = -1) -> None:
        self.pages: dict[tuple[str, int], bytes] = {}
        self.calls = 0
        self._fails_at = fails_at

    def put(self, block: str, numbers: Numbers, pages: Pages) -> None:
        self.calls += 1
        if self.calls > self._fails_at >= 0:
            raise RepositoryError("the disk is full")
        assert len(set(numbers.tolist())) == len(numbers), "each page once in a call"
        for number, page in zip(numbers.tolist(), pages, strict=True):
            self.pages[block, number] = page.tobytes()

    def put_zeros(self, block: str, numbers: Numbers) -> None:
        for number in numbers.tolist():
            self.pages[block, number] = bytes(PAGE_BYTES)


def content(*values: int) -> Pages:
    return np.repeat(np.array(values, np.uint8)[:, None], PAGE_BYTES, axis=1)


def offsets(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(numbers, np.uint64) * np.uint64(PAGE_BYTES)


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def block(kept: Kept) -> PassingBlock:
    return PassingBlock(RamBlock("ram", 8 * PAGE_BYTES), kept)


def firsts(kept: Kept) -> dict[int, int]:
    return {number: page[0] for (_, number), page in sorted(kept.pages.items())}


def test_the_last_version_of_a_page_counts(block: PassingBlock, kept: Kept) -> None:
    block.write(offsets(1, 2), content(1, 2), is_row=True)
    block.write(offsets(2, 5, 2, 5, 2), content(9, 8, 7, 6, 5))
    block.write_zeros(offsets(1))
    assert firsts(kept) == {1: 0, 2: 5, 5: 6}


def test_what_never_came_is_zero_in_the_end(block: PassingBlock, kept: Kept) -> None:
    block.write(offsets(3), content(3))
    block.assume_zeros()
    assert firsts(kept) == {0: 0, 1: 0, 2: 0, 3: 3, 4: 0, 5: 0, 6: 0, 7: 0}
    assert block.have.all()
    kept.pages.clear()
    block.assume_zeros()
    assert kept.pages == {}


def test_what_needs_an_earlier_page_is_refused(block: PassingBlock) -> None:
    with pytest.raises(WireError, match="the page before it"):
        block.pages  # noqa: B018
    with pytest.raises(WireError, match="postcopy"):
        block.discard(0, PAGE_BYTES)
    with pytest.raises(OSError, match="went on"):
        block.store.read(0, 2)
    block.store.close()


def test_blocks_are_those_of_the_stream(kept: Kept) -> None:
    image = PassingImage(kept)
    wire = RamBlock("ram", PAGE_BYTES)
    assert image.add_block(wire) is image.add_block(wire)
    assert image.total_bytes == PAGE_BYTES
    image.close()


def bytes_of_a_guest(*, asks: bool) -> Iterator[bytes]:
    yield fake_stream._header("pc-q35-7.2", asks=asks) + fake_stream._setup()
    yield fake_stream._part(0x02, fake_stream._pages(first=True))
    yield fake_stream._part(0x03, fake_stream._pages(first=False)) + fake_stream._devices("running")


def received(kept: Kept, *, asks: bool) -> tuple[Incoming, bytes]:
    """A whole guest through an endpoint; and what was said on the return path."""
    incoming = Incoming(PassingImage(kept))
    ours, theirs = socket.socketpair()
    incoming.take(ours)
    with theirs:
        for part in bytes_of_a_guest(asks=asks):
            with contextlib.suppress(BrokenPipeError):  # an endpoint that gives up closes
                theirs.sendall(part)
        if not asks:
            theirs.shutdown(socket.SHUT_WR)
        theirs.settimeout(WAIT_S)
        said = theirs.recv(100)
    ending = incoming.ledger.wait(Fact.ALL_SENT, Fact.ERROR, timeout_s=WAIT_S)
    assert ending is (Fact.ERROR if incoming.error else Fact.ALL_SENT)
    assert incoming.is_over
    assert incoming.stop().threads_left == ()
    return incoming, said


@pytest.mark.parametrize("asks", [True, False])
def test_a_whole_guest_streams_through(kept: Kept, asks: bool) -> None:
    incoming, said = received(kept, asks=asks)
    assert said == (b"\x00\x01\x00\x04" + bytes(4) if asks else b"")
    ram = {number: page for (block, number), page in kept.pages.items() if block == "pc.ram"}
    assert ram == {number: fake_stream.page(number) for number in range(64)}
    assert {number for block, number in kept.pages if block == "pc.bios"} == set(range(4))
    assert incoming.image.is_device_state_whole
    assert {each.idstr: each.body for each in incoming.image.devices} == fake_stream.devices("running")


def test_a_sink_that_fails_sends_the_source_back_to_its_guest() -> None:
    incoming, said = received(Kept(fails_at=0), asks=True)
    assert isinstance(incoming.error, RepositoryError)
    assert said == b"\x00\x01\x00\x04\x00\x00\x00\x01"
    assert not incoming.image.is_device_state_whole
