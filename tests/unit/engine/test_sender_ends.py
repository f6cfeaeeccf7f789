"""How the outgoing endpoint ends, stops, and goes on after a loss."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

import pytest

from tests.engine_conversations import (
    AT_ONCE,
    BLOCKS,
    Start,
    complete,
    failed,
    paused,
    switch_over,
)
from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.engine.image import PAGE_BYTES
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.testing.scripted_destination import WAIT_S, ScriptedDestination, make_image
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    AskBitmap,
    BitmapPiece,
    EndOfSections,
    PackageEnd,
    PostcopyResume,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
)
from vmferry.wire.stream import Section

# --- recovery -----------------------------------------------------------------------------------------------------


def broken_off(peer: ScriptedDestination, start: Start, **more: Any) -> Outgoing:
    """A postcopy whose connection is lost when some pages have come."""
    image = make_image({"pc.ram": 2000, "pc.rom": 4}, **more)
    outgoing = start(image, AT_ONCE)
    switch_over(peer)
    assert outgoing.ledger.wait(Fact.PACKAGE_LOADED, timeout_s=WAIT_S)
    peer.say(RequestPages(0, PAGE_BYTES, "pc.rom"))
    peer.read_while(lambda: not peer.have["pc.rom"][0], bytes_at_once=1 << 16)
    peer.close()
    paused(outgoing)
    assert not peer.have["pc.ram"].all()
    return outgoing


def recovered(peer: ScriptedDestination, outgoing: Outgoing, round_no: int) -> None:
    peer.begin(is_recovery=True)
    peer.say_bitmap("pc.ram")
    peer.say_bitmap("pc.rom")
    peer.read_until(PostcopyResume)
    peer.say(ResumeAck(), RequestPages(1999 * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
    peer.read_until(EndOfSections)
    assert outgoing.ledger.wait(Fact.RESUME_ACK, timeout_s=WAIT_S, round_no=round_no)
    complete(peer, outgoing)


@pytest.mark.conforms("40")
@pytest.mark.proves("S18")
@pytest.mark.parametrize("losses", [0, 1, 2, 3])
def test_a_recovery_also_after_it_was_lost_again(peer: ScriptedDestination, start: Start, losses: int) -> None:
    """Lost when the first bitmap is half said, after the bitmaps, and after the acknowledgement."""
    outgoing = broken_off(peer, start)
    for loss in range(losses):
        outgoing.recover(peer.dial)
        peer.begin(is_recovery=True)
        if loss == 0:
            peer.say(ReceivedBitmap("pc.ram", 256), BitmapPiece(memoryview(bytes(100))))
        else:
            peer.say_bitmap("pc.ram")
            peer.say_bitmap("pc.rom")
            peer.read_until(PostcopyResume)
            if loss == 2:
                peer.say(ResumeAck())
                assert outgoing.ledger.wait(Fact.RESUME_ACK, timeout_s=WAIT_S, round_no=3)
        peer.close()
        paused(outgoing, loss + 2)
    outgoing.recover(peer.dial)
    recovered(peer, outgoing, losses + 1)


def test_a_recovery_may_begin_in_the_moment_in_which_the_loss_is_told(peer: ScriptedDestination, start: Start) -> None:
    image = make_image({"pc.ram": 2000, "pc.rom": 4})
    outgoing = start(image, AT_ONCE)
    again = threading.Event()

    def on_fact(fact: Fact) -> None:
        if fact is Fact.LINK_LOST and not again.is_set():
            again.set()
            outgoing.recover(peer.dial)

    outgoing.ledger.listen(on_fact)
    switch_over(peer)
    assert outgoing.ledger.wait(Fact.PACKAGE_LOADED, timeout_s=WAIT_S)
    peer.close()
    assert again.wait(WAIT_S)
    recovered(peer, outgoing, 1)


@pytest.mark.proves("S53")
def test_a_recovery_never_ends_without_a_word(peer: ScriptedDestination, start: Start) -> None:
    """A destination that waits for one takes such a connection for its end (QEMU 7.2 and 11.1)."""
    outgoing = broken_off(peer, start)
    dialled, go_on = threading.Event(), threading.Event()

    def dial() -> socket.socket:
        dialled.set()
        assert go_on.wait(WAIT_S)
        return peer.dial()

    outgoing.recover(dial)
    assert dialled.wait(WAIT_S)
    outgoing.cut()
    go_on.set()
    paused(outgoing, 2)
    peer.begin(is_recovery=True)
    assert peer.read_until(AskBitmap) == AskBitmap("pc.ram")
    outgoing.recover(peer.dial)
    recovered(peer, outgoing, 2)


def test_a_recovery_that_nobody_answers(peer: ScriptedDestination, start: Start) -> None:
    outgoing = broken_off(peer, start)

    def refuse() -> socket.socket:
        raise ConnectionRefusedError("nobody is there")

    outgoing.recover(refuse)
    assert "nobody is there" in str(outgoing.ledger.log.entry(Fact.LINK_LOST, 1)) or paused(outgoing, 2)
    outgoing.recover(peer.dial)
    recovered(peer, outgoing, 2)


@pytest.mark.parametrize("lie", ["twice", "unknown", "size", "end", "early-ack"])
def test_lies_in_a_recovery_pause_it_again(peer: ScriptedDestination, start: Start, lie: str) -> None:
    """A bitmap that counted for another block would leave pages unsent for ever."""
    outgoing = broken_off(peer, start)
    outgoing.recover(peer.dial)
    peer.begin(is_recovery=True)
    match lie:
        case "twice":
            peer.say_bitmap("pc.ram")
            peer.say_bitmap("pc.ram")
        case "unknown":
            peer.say(ReceivedBitmap("pc.bios", 8))
        case "size":
            peer.say(ReceivedBitmap("pc.rom", 16))
        case "end":
            peer.say(ReceivedBitmap("pc.rom", 8), BitmapPiece(memoryview(bytes(8))))
            peer.sock.sendall(bytes(8))
        case _:
            peer.say(ResumeAck())
    assert isinstance(paused(outgoing, 2).error, WireError)
    outgoing.recover(peer.dial)
    recovered(peer, outgoing, 2)


def test_a_stand_in_sends_a_host_page_that_came_in_part_as_a_whole(peer: ScriptedDestination) -> None:
    image = make_image({"pc.ram": (1024, 512), "pc.rom": 4})
    outgoing = Outgoing.broken(image, options=AT_ONCE)
    assert outgoing.outcome().status is S.POSTCOPY_PAUSED
    for block in image:
        peer.take(block.wire)
    peer._decoder.ram.blocks.update({block.name: block.wire for block in image})
    peer._decoder._sections[image.ram_section_id] = Section("ram")
    outgoing.recover(peer.dial)
    peer.begin(is_recovery=True)
    peer.have["pc.ram"][5:300] = True
    peer.say_bitmap("pc.ram")
    peer.say_bitmap("pc.rom")
    peer.have["pc.ram"][:] = False  # as the real one: it was never placed
    peer.read_until(PostcopyResume)
    peer.say(ResumeAck())
    peer.read_until(EndOfSections)
    assert outgoing.ledger.wait(Fact.ALL_SENT, timeout_s=WAIT_S)
    complete(peer, outgoing)
    assert outgoing.stop().threads_left == ()
    image.close()


# --- stops --------------------------------------------------------------------------------------------------------


@pytest.mark.proves("S12")
@pytest.mark.parametrize("channels", [0, 2])
@pytest.mark.parametrize("how", ["stop", "cut"])
def test_a_peer_that_never_reads(peer: ScriptedDestination, start: Start, how: str, channels: int) -> None:
    outgoing = start(make_image({"pc.ram": 60_000}), OutgoingOptions(channels=channels))
    assert outgoing.ledger.wait(Fact.SETUP_DONE, timeout_s=WAIT_S)
    if how == "stop":
        assert outgoing.stop(timeout_s=WAIT_S).threads_left == ()
    else:
        outgoing.cut()
    failed(outgoing)


PHASES = [
    "dial",
    "setup",
    "ping",
    "device-state",
    "package",
    "proof",
    "serve",
    "wait-shut",
    "recover",
    "bitmaps",
    "ack",
]


@pytest.mark.proves("S12", "S17")
@pytest.mark.parametrize("phase", PHASES)
def test_it_stops_in_every_phase(peer: ScriptedDestination, start: Start, phase: str) -> None:
    image = make_image(BLOCKS)
    options = AT_ONCE
    if phase == "device-state":
        image.is_device_state_whole = False
    if phase == "ping":
        options = OutgoingOptions(postcopy="at-once", preempt=True)  # which waits for the first answer
    if phase in ("serve", "recover", "bitmaps", "ack"):
        image.blocks["pc.ram"].have[7] = False
    if phase == "dial":
        dialled, go_on = threading.Event(), threading.Event()

        def dial() -> socket.socket:
            dialled.set()
            assert go_on.wait(WAIT_S)
            return peer.dial()

        outgoing = Outgoing(image, options=options)
        outgoing.start(dial)
        assert dialled.wait(WAIT_S)
        assert outgoing.stop(timeout_s=0.01).threads_left == ("outgoing-main-0",)
        go_on.set()
        assert outgoing.ledger.wait(Fact.ERROR, timeout_s=WAIT_S)
        assert outgoing.stop().threads_left == ()
        return
    outgoing = start(image, options)
    if phase in ("setup", "ping", "device-state"):
        assert outgoing.ledger.wait(Fact.SETUP_DONE, timeout_s=WAIT_S)
    elif phase == "package":
        peer.read_until(PackageEnd)
    else:
        switch_over(peer)
        assert outgoing.ledger.wait(Fact.PACKAGE_LOADED, timeout_s=WAIT_S)
        if phase == "wait-shut":
            peer.read_until(EndOfSections)
        if phase in ("recover", "bitmaps", "ack"):
            outgoing.cut()
            paused(outgoing)
            outgoing.recover(peer.dial)
            peer.begin(is_recovery=True)
            if phase != "recover":
                peer.say_bitmap("pc.ram")
            if phase == "ack":
                peer.say_bitmap("pc.rom")
                peer.read_until(PostcopyResume)
    assert outgoing.stop(timeout_s=WAIT_S).threads_left == ()
    committed = phase in ("proof", "serve", "wait-shut", "recover", "bitmaps", "ack")
    assert outgoing.outcome().status is (S.POSTCOPY_PAUSED if committed else S.FAILED)


@pytest.mark.parametrize("garbage", [b"\xff" * 4096, struct.pack(">HHI", 2, 4, 1) * 40_000, bytes(1 << 16)])
def test_a_peer_that_never_stops_talking(peer: ScriptedDestination, start: Start, garbage: bytes) -> None:
    """Nobody waits for the end of what it says: other orders are heard meanwhile."""
    outgoing = start(make_image({"pc.ram": 60_000}))
    talking = threading.Event()

    def talk() -> None:
        try:
            while not talking.is_set():
                peer.sock.sendall(garbage)
        except OSError:
            pass

    talker = threading.Thread(target=talk)
    talker.start()
    assert outgoing.stop(timeout_s=WAIT_S).threads_left == ()
    talking.set()
    peer.sock.shutdown(socket.SHUT_RDWR)
    talker.join(WAIT_S)
    failed(outgoing)


def test_an_image_that_cannot_be_read(peer: ScriptedDestination, start: Start) -> None:
    class Unreadable:
        knows_zeros = True

        def read(self, first: int, count: int) -> Any:
            raise OSError("its process is gone")

        def read_some(self, numbers: Any) -> Any:
            raise OSError("its process is gone")

        def close(self) -> None:
            pass

    image = make_image(BLOCKS)
    image.blocks["pc.ram"].store = Unreadable()
    assert "its process is gone" in str(failed(start(image)).error)


def test_a_defect_of_ours_is_told_too(peer: ScriptedDestination) -> None:
    """However a thread ends, whoever waits for its end hears of it."""
    caught: list[Any] = []
    before = threading.excepthook
    threading.excepthook = caught.append
    try:
        image = make_image(BLOCKS)

        def dial() -> socket.socket:
            raise ZeroDivisionError

        outgoing = Outgoing(image)
        outgoing.start(dial)
        assert "defect" in str(failed(outgoing).error)
        outgoing.stop()
        image.close()
    finally:
        threading.excepthook = before
    assert caught[0].exc_type is ZeroDivisionError
