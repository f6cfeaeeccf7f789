"""The whole loop: an image goes out by our own source into our own destination, and is the same there."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.engine.image import PAGE_BYTES, Image
from vmferry.engine.incoming import Incoming
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.engine.shared import IncomingOptions
from vmferry.testing.scripted_destination import WAIT_S, make_image
from vmferry.testing.stream_peers import TlsPair

BLOCKS = {"pc.ram": 9000, "pc.rom": 70, "vga.vram": 33}
OLD, NEW = "pc-i440fx-7.2", "pc-i440fx-11.1"
AT_ONCE = OutgoingOptions(postcopy="at-once")


class Loop:
    """Two endpoints over socket pairs."""

    def __init__(self, image: Image, options: OutgoingOptions, *, tls: TlsPair | None = None, **more: Any) -> None:
        self.there = Image()
        self.incoming = Incoming(
            self.there,
            options=IncomingOptions(channels=options.channels, tls=tls.server() if tls else None, **more),
        )
        self.outgoing = Outgoing(
            image, options=options, tls=tls.client() if tls else None, server_name=tls.hostname if tls else None
        )

    def dial(self) -> socket.socket:
        mine, theirs = socket.socketpair()
        self.incoming.take(theirs)
        return mine

    def finish(self) -> None:
        assert self.outgoing.ledger.wait(Fact.PEER_ACK, Fact.ERROR, timeout_s=WAIT_S) is Fact.PEER_ACK
        assert self.incoming.ledger.wait(Fact.ALL_SENT, timeout_s=WAIT_S)
        self.outgoing.saw_running()
        ends = self.outgoing.stop(), self.incoming.stop()
        assert [(end.status, end.error, end.threads_left) for end in ends] == [(S.COMPLETED, None, ())] * 2

    def is_same(self) -> bool:
        mine, theirs = self.outgoing.image, self.there
        assert [block.wire for block in theirs] == [block.wire for block in mine]
        assert (theirs.devices, theirs.early, theirs.configuration) == (mine.devices, mine.early, mine.configuration)
        assert theirs.has_all_pages
        return all((block.pages == theirs.blocks[block.name].pages).all() for block in mine)


MakeLoop = Callable[..., Loop]


@pytest.fixture
def make_loop() -> Iterator[MakeLoop]:
    made: list[Loop] = []

    def make(image: Image, options: OutgoingOptions | None = None, **more: Any) -> Loop:
        loop = Loop(image, options or OutgoingOptions(), **more)
        made.append(loop)
        return loop

    yield make
    for loop in made:
        assert loop.outgoing.stop().threads_left == loop.incoming.stop().threads_left == ()
        loop.outgoing.image.close()
        loop.there.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsPair:
    return TlsPair(tmp_path_factory.mktemp("tls"))


@pytest.mark.conforms("46")
@pytest.mark.proves("S87", "S88")
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("machine", [OLD, NEW])
@pytest.mark.parametrize(
    "options",
    [
        OutgoingOptions(),
        OutgoingOptions(channels=1),
        OutgoingOptions(channels=3),
        AT_ONCE,
        replace(AT_ONCE, preempt=True),
        replace(AT_ONCE, channels=2),
        replace(AT_ONCE, channels=2, preempt=True),
    ],
    ids=["precopy", "multifd-1", "multifd-3", "postcopy", "preempt", "multifd-postcopy", "multifd-preempt"],
)
def test_the_image_is_the_same_at_the_other_end(
    make_loop: MakeLoop, tls: TlsPair, options: OutgoingOptions, machine: str, secure: bool
) -> None:
    loop = make_loop(make_image(BLOCKS, machine=machine), options, tls=tls if secure else None)
    loop.outgoing.start(loop.dial)
    if options.postcopy != "never":
        assert loop.incoming.ledger.wait(Fact.PACKAGE_LOADED, timeout_s=WAIT_S)
        for page in (8000, 3, 8000):
            loop.incoming.request(loop.there.blocks["pc.ram"], page, 5)
    loop.finish()
    assert loop.is_same()
    assert loop.outgoing.outcome().bytes > 6000 * PAGE_BYTES


def test_postcopy_after_a_precopy_part(make_loop: MakeLoop) -> None:
    image = make_image(BLOCKS)
    image.blocks["pc.ram"].have[4000:] = False
    image.is_device_state_whole = False
    loop = make_loop(image, OutgoingOptions(postcopy="on-order"))
    loop.outgoing.start(loop.dial)
    landed = threading.Event()

    def look() -> None:
        if loop.there.blocks and loop.there.blocks["pc.ram"].have[3999]:
            landed.set()

    loop.there.on_pages(look)
    look()
    assert landed.wait(WAIT_S)
    block = image.blocks["pc.ram"]
    block.write(np.arange(50, dtype=np.uint64) * np.uint64(PAGE_BYTES), np.full((50, PAGE_BYTES), 7, np.uint8))
    block.have[:] = True
    image.is_device_state_whole = True
    loop.outgoing.start_postcopy()
    loop.finish()
    assert loop.is_same()


@pytest.mark.proves("S18")
@pytest.mark.parametrize("machine", [OLD, NEW])
@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
def test_a_cut_and_two_recoveries(make_loop: MakeLoop, machine: str, preempt: bool) -> None:
    image = make_image(BLOCKS, machine=machine)
    image.blocks["pc.ram"].have[6000:] = False
    loop = make_loop(image, replace(AT_ONCE, preempt=preempt))
    loop.outgoing.start(loop.dial)
    assert loop.outgoing.ledger.wait(Fact.PACKAGE_LOADED, timeout_s=WAIT_S)
    for round_no in (1, 2):
        loop.outgoing.cut()
        for end in (loop.outgoing, loop.incoming):
            assert end.ledger.wait(Fact.LINK_LOST, timeout_s=WAIT_S, round_no=round_no)
        assert loop.outgoing.outcome().status is S.POSTCOPY_PAUSED
        loop.outgoing.recover(loop.dial)
        assert loop.outgoing.ledger.wait(Fact.RESUME_ACK, timeout_s=WAIT_S, round_no=round_no)
    image.blocks["pc.ram"].have[:] = True
    image.announce_pages()
    loop.finish()
    assert loop.is_same()


@pytest.mark.parametrize("phase", ["begin", "middle"])
def test_a_multifd_channel_that_breaks_ends_a_precopy(make_loop: MakeLoop, phase: str) -> None:
    image = make_image({"pc.ram": 20_000})
    image.is_device_state_whole = False
    channels: queue.Queue[socket.socket] = queue.Queue()
    loop = make_loop(image, OutgoingOptions(channels=2))
    count = 0

    def dial() -> socket.socket:
        nonlocal count
        count += 1
        if count < 3:
            return loop.dial()
        mine, theirs = socket.socketpair()
        channels.put(theirs)
        return mine

    loop.outgoing.start(dial)
    with channels.get(timeout=WAIT_S) as channel:
        if phase == "middle":
            assert len(channel.recv(100_000)) > 0
    assert loop.outgoing.ledger.wait(Fact.CLEANUP, timeout_s=WAIT_S)
    outcome = loop.outgoing.outcome()
    assert outcome.status is S.FAILED
    assert "multifd" in str(outcome.error)


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_a_relay_sends_what_it_receives(make_loop: MakeLoop, postcopy: bool) -> None:
    """Source -> (incoming, image, outgoing) -> destination, all at the same time."""
    options = AT_ONCE if postcopy else OutgoingOptions()
    first = make_loop(make_image({"pc.ram": 20_000, "pc.rom": 70}), options)
    asked: list[int] = []

    def on_absent(block: Any, page: int, pages: int) -> None:
        asked.append(page)
        first.incoming.request(block, page, pages)

    first.outgoing.start(first.dial)
    assert first.incoming.ledger.wait(Fact.SETUP_DONE, timeout_s=WAIT_S)
    relay = make_loop(first.there, options)
    relay.outgoing = Outgoing(first.there, options=options, on_absent=on_absent)
    relay.outgoing.start(relay.dial)
    if postcopy:
        assert relay.incoming.ledger.wait(Fact.PACKAGE_LOADED, timeout_s=WAIT_S)
        for page in range(19_999, 0, -500):
            relay.incoming.request(relay.there.blocks["pc.ram"], page)
    first.finish()
    relay.finish()
    assert first.is_same()
    assert relay.is_same()


def test_a_wrong_certificate_is_told(make_loop: MakeLoop, tls: TlsPair, tmp_path: Path) -> None:
    loop = make_loop(make_image(BLOCKS), tls=tls)
    loop.outgoing._tls = TlsPair(tmp_path).client()
    loop.outgoing.start(loop.dial)
    assert loop.outgoing.ledger.wait(Fact.CLEANUP, timeout_s=WAIT_S)
    assert "certificate" in str(loop.outgoing.error).lower()


def test_a_context_that_cannot_be_used_leaks_no_connection(make_loop: MakeLoop, tls: TlsPair) -> None:
    loop = make_loop(make_image(BLOCKS))
    loop.outgoing._tls = tls.client()  # it wants a name to check, and there is none
    mine, theirs = socket.socketpair()
    loop.outgoing.start(lambda: mine)
    assert loop.outgoing.ledger.wait(Fact.CLEANUP, timeout_s=WAIT_S)
    theirs.settimeout(WAIT_S)
    assert theirs.recv(1) == b""
    theirs.close()


@pytest.mark.proves("S12")
def test_a_peer_that_never_shakes_hands_does_not_hold_up_a_stop(tls: TlsPair) -> None:
    image = make_image(BLOCKS)
    outgoing = Outgoing(image, tls=tls.client(), server_name=tls.hostname, options=OutgoingOptions(handshake_s=1000))
    mine, theirs = socket.socketpair()
    outgoing.start(lambda: mine)
    theirs.settimeout(WAIT_S)
    assert theirs.recv(3) == b"\x16\x03\x01"
    assert outgoing.stop(timeout_s=WAIT_S).threads_left == ()
    assert outgoing.outcome().status is S.FAILED
    theirs.close()
    image.close()


def test_how_things_stand_before_and_after(make_loop: MakeLoop) -> None:
    loop = make_loop(make_image(BLOCKS))
    before = loop.outgoing.outcome()
    assert (before.status, before.error, before.bytes, before.request_p50_us) == (S.NONE, None, 0, None)
    loop.outgoing.cut()  # nothing to cut
    assert loop.outgoing.stop().threads_left == ()
    assert loop.outgoing.stop().status is S.NONE
    assert isinstance(loop.outgoing._tls, ssl.SSLContext | None)
