"""The stand-ins against recorded sources, and against ones that break off, lie or say nothing."""

from __future__ import annotations

import lzma
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vmferry.engine.stand_in import StandInReceiver, ThrowAwaySink
from vmferry.wire import encode
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    DONE,
    NEED_DATA,
    AskBitmap,
    BitmapPiece,
    EndOfRam,
    EndOfSections,
    Event,
    PostcopyResume,
    RamBlock,
    ReceivedBitmap,
    ResumeAck,
    SectionFooter,
    SectionPart,
    Shut,
)
from vmferry.wire.return_path import ReturnPathDecoder
from vmferry.wire.stream import StreamDecoder

SAMPLES = Path(__file__).parents[2] / "golden" / "samples"
PAGE = 4096
BLOCKS = {"pc.ram": 70 * PAGE, "pc.rom": 2 * PAGE}
SILENCE_S = 20.0
RAM_SECTION = 5
Pair = Callable[[], tuple[socket.socket, socket.socket]]
Make = Callable[..., tuple[StandInReceiver, socket.socket]]


def main_channel(name: str) -> bytes:
    """What the recorded source said on its main channel."""
    raw, at, found = lzma.decompress((SAMPLES / name).read_bytes()), 0, bytearray()
    while at < len(raw):
        _time, connection, direction, length = struct.unpack_from("<dBBI", raw, at)
        at += 14
        if (connection, direction) == (0, 0):
            found += raw[at : at + length]
        at += length
    return bytes(found)


def blocks_of(stream: bytes) -> dict[str, int]:
    """The blocks that a first connection introduced."""
    decoder, found = StreamDecoder(), {}
    decoder.feed(stream)
    while (event := decoder.next()) is not NEED_DATA:
        if isinstance(event, RamBlock):
            found[event.name] = event.used_length
    return found


def bytes_of(*events: Event) -> bytes:
    return b"".join(bytes(part) for event in events for part in encode.encode(event))


def end(section: int = RAM_SECTION, *, footer: bool = True) -> bytes:
    """What a source sends that has no page left."""
    parts: list[Event] = [SectionPart(section, last=True), EndOfRam()]
    return bytes_of(*parts, *([SectionFooter(section)] if footer else []), EndOfSections())


def answers(data: bytes) -> list[Event]:
    """The return path; bitmaps as (block, pages that are claimed)."""
    decoder = ReturnPathDecoder()
    found: list[Event] = []
    decoder.feed(data)
    while (event := decoder.next()) is not NEED_DATA:
        assert event is not DONE
        found.append(event)
    assert decoder.is_between
    return found


def claimed(data: bytes) -> dict[str, int]:
    """How many pages each bitmap claims."""
    found: dict[str, int] = {}
    name = ""
    for event in answers(data):
        match event:
            case ReceivedBitmap(block, _):
                name = block
                found[name] = 0
            case BitmapPiece(piece):
                found[name] += int(np.unpackbits(np.frombuffer(piece, np.uint8)).sum())
    return found


def read_all(sock: socket.socket) -> bytes:
    found = bytearray()
    while data := sock.recv(1 << 16):
        found += data
    return bytes(found)


def read_until(sock: socket.socket, end: bytes) -> bytes:
    found = bytearray()
    while not found.endswith(end):
        data = sock.recv(1 << 16)
        assert data, f"it closed the connection after {bytes(found[-32:])!r}"
        found += data
    return bytes(found)


def read_some(sock: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        data = sock.recv(count - len(found))
        assert data, f"it closed the connection after {bytes(found[-32:])!r}"
        found += data
    return bytes(found)


BITMAP_BYTES = {name: len(bytes_of(ReceivedBitmap(name, 8))) + -(-size // PAGE // 64) * 8 + 8
                for name, size in BLOCKS.items()}  # fmt: skip
ACK_BYTES = len(bytes_of(ResumeAck()))


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Connected sockets; the second one of each pair is the test's and has a deadline."""
    made: list[socket.socket] = []

    def make_pair() -> tuple[socket.socket, socket.socket]:
        mine, theirs = socket.socketpair()
        theirs.settimeout(SILENCE_S)
        made.append(theirs)
        return mine, theirs

    yield make_pair
    for sock in made:
        sock.close()


@pytest.fixture
def make(pair: Pair) -> Iterator[Make]:
    """A started receiver and the source's end. At the end nothing of it runs any more."""
    made: list[StandInReceiver] = []

    def make_one(blocks: dict[str, int] | None = None, **more: object) -> tuple[StandInReceiver, socket.socket]:
        mine, theirs = pair()
        receiver = StandInReceiver(mine, blocks or BLOCKS, **more)  # type: ignore[arg-type]
        receiver.start()
        made.append(receiver)
        return receiver, theirs

    yield make_one
    for receiver in made:
        assert receiver.stop().thread_left == ""


def shake_hands(source: socket.socket) -> None:
    """A source up to the acknowledgement of its resume."""
    source.sendall(bytes_of(*map(AskBitmap, BLOCKS)))
    read_some(source, sum(BITMAP_BYTES.values()))
    source.sendall(bytes_of(PostcopyResume()))
    assert read_some(source, ACK_BYTES) == bytes_of(ResumeAck())


@pytest.mark.proves("S59")
@pytest.mark.parametrize("name", ["recover-q111-m111", "recover-q72", "recover-preempt-q111-m111"])
def test_a_recorded_source_is_led_to_its_end(name: str, make: Make) -> None:
    blocks = blocks_of(main_channel(f"{name}.rec.xz"))
    stream = main_channel(f"{name}-r.rec.xz")
    resume = bytes_of(PostcopyResume())
    asked, rest = stream.split(resume, 1)
    receiver, source = make(blocks)
    source.sendall(asked + resume)
    said = read_until(source, bytes_of(ResumeAck()))
    source.sendall(rest)
    said += read_until(source, bytes_of(Shut(0)))
    source.close()
    assert receiver.wait(SILENCE_S)
    outcome = receiver.outcome()
    assert (outcome.is_complete, outcome.error, outcome.bytes) == (True, None, len(stream))
    assert outcome.pages > 1000  # what the recording sent, although nobody lacked it
    assert claimed(said) == {block: size // PAGE for block, size in blocks.items()}
    assert answers(said)[-2:] == [ResumeAck(), Shut(0)]


@pytest.mark.parametrize("footer", [True, False])
def test_a_source_without_a_page_left_completes_byte_by_byte(footer: bool, make: Make) -> None:
    """The number of RAM's section is learned, and whether sections have footers (machine types from 2.4 on)."""
    receiver, source = make()
    shake_hands(source)
    for byte in end(footer=footer):
        source.sendall(bytes([byte]))
    assert read_some(source, len(bytes_of(Shut(0)))) == bytes_of(Shut(0))
    source.close()
    assert receiver.wait(SILENCE_S)
    assert receiver.outcome().is_complete
    assert receiver.outcome().pages == 0


def test_the_number_of_the_section_may_be_told(make: Make) -> None:
    receiver, source = make(ram_section=RAM_SECTION)
    shake_hands(source)
    source.sendall(end(RAM_SECTION + 1))
    assert receiver.wait(SILENCE_S)
    error = receiver.outcome().error
    assert isinstance(error, WireError)
    assert error.reason == "section-id"


def test_the_word_just_written_is_not_lost_by_closing(make: Make) -> None:
    """A source that still says something after the end must be able to read the result."""
    receiver, source = make()
    shake_hands(source)
    source.sendall(end() + b"whatever")
    source.shutdown(socket.SHUT_WR)
    assert receiver.wait(SILENCE_S)
    assert read_all(source) == bytes_of(Shut(0))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (bytes_of(AskBitmap("pc.other")), "recv-bitmap"),
        (bytes_of(PostcopyResume()), "resume"),
        (b"QEVM\x00\x00\x00\x03", "tag"),
        (b"\x08\x00\x63\x00\x00", "command-unknown"),
        (end(), "section-id"),
    ],
)
def test_a_source_out_of_turn_is_left_before_anything_is_acknowledged(said: bytes, reason: str, make: Make) -> None:
    receiver, source = make()
    source.sendall(said)
    assert read_all(source) == b""
    assert receiver.wait(SILENCE_S)
    outcome = receiver.outcome()
    assert isinstance(outcome.error, WireError)
    assert outcome.error.reason == reason
    assert not outcome.is_complete
    assert not outcome.is_acknowledged


@pytest.mark.parametrize("said", [b"\x01\x00\x00\x00\x05", bytes_of(PostcopyResume())])
def test_something_else_than_a_part_after_the_resume_ends_it(said: bytes, make: Make) -> None:
    receiver, source = make()
    shake_hands(source)
    source.sendall(said)
    assert read_all(source) == b""  # above all no SHUT: the source pauses again
    assert receiver.wait(SILENCE_S)
    assert receiver.outcome().is_acknowledged
    assert not receiver.outcome().is_complete


def test_a_second_resume_is_refused(make: Make) -> None:
    receiver, source = make(ram_section=RAM_SECTION)
    shake_hands(source)
    source.sendall(bytes_of(PostcopyResume()))
    assert read_all(source) == b""
    error = receiver.outcome().error if receiver.wait(SILENCE_S) else None
    assert isinstance(error, WireError)
    assert error.reason == "resume"


@pytest.mark.parametrize("is_acknowledged", [False, True])
def test_a_source_that_leaves_is_told_as_trouble_that_may_be_tried_again(is_acknowledged: bool, make: Make) -> None:
    receiver, source = make()
    if is_acknowledged:
        shake_hands(source)
    source.close()
    assert receiver.wait(SILENCE_S)
    outcome = receiver.outcome()
    assert outcome.error is not None
    assert (outcome.error.guest, outcome.error.retry) == ("paused", "yes")
    assert (outcome.is_complete, outcome.is_acknowledged) == (False, is_acknowledged)


@pytest.mark.parametrize("is_acknowledged", [False, True])
def test_a_silent_source_is_given_up(is_acknowledged: bool, make: Make) -> None:
    receiver, source = make(silence_s=0.2)
    if is_acknowledged:
        shake_hands(source)
    assert receiver.wait(SILENCE_S)
    assert "silent" in str(receiver.outcome().error)
    assert read_all(source) == b""


def test_a_source_that_reads_nothing_is_given_up(pair: Pair) -> None:
    mine, theirs = pair()
    receiver = StandInReceiver(mine, {"pc.ram": 1 << 36}, silence_s=0.2)  # a bitmap of 2 MiB
    receiver.start()
    theirs.sendall(bytes_of(*[AskBitmap("pc.ram")] * 4))
    assert receiver.wait(SILENCE_S)
    assert receiver.outcome().error is not None
    assert receiver.stop().thread_left == ""


def test_a_cut_from_outside_ends_it_at_once(make: Make) -> None:
    receiver, source = make()
    shake_hands(source)
    receiver.cut()
    assert receiver.wait(SILENCE_S)
    assert "cut from this side" in str(receiver.outcome().error)
    assert read_all(source) == b""


def test_one_that_was_never_started_can_be_stopped(pair: Pair) -> None:
    mine, theirs = pair()
    receiver = StandInReceiver(mine, BLOCKS)
    assert receiver.stop().is_over
    assert receiver.stop().thread_left == ""
    assert theirs.recv(1) == b""


def test_its_end_is_told(pair: Pair) -> None:
    mine, theirs = pair()
    told = threading.Event()
    receiver = StandInReceiver(mine, BLOCKS, on_end=told.set)
    receiver.start()
    theirs.close()
    assert told.wait(SILENCE_S)
    receiver.stop()


def test_the_sink_forgets_everything_and_says_how_much_it_was(pair: Pair) -> None:
    mine, theirs = pair()
    sink = ThrowAwaySink(mine)
    sink.start()
    theirs.sendall(bytes(3 << 20))
    theirs.close()
    assert sink.wait(SILENCE_S)
    outcome = sink.stop()
    assert (outcome.is_complete, outcome.bytes, outcome.error) == (True, 3 << 20, None)


def test_a_sink_that_is_cut_is_not_complete(pair: Pair) -> None:
    mine, theirs = pair()
    sink = ThrowAwaySink(mine)
    sink.start()
    theirs.sendall(b"QEVM")
    sink.cut()
    assert sink.wait(SILENCE_S)
    assert not sink.stop().is_complete
    theirs.close()
