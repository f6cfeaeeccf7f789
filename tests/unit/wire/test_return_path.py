"""The return path, both ends."""

from __future__ import annotations

import pytest

from tests.wire_streams import BLOCK, BLOCKS, ROM, drain, join
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    BitmapEnd,
    BitmapPiece,
    Pong,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    ReturnPathEvent,
    Shut,
    SwitchoverAck,
)
from vmferry.wire.return_path import RequestEncoder, ReturnPathDecoder, bitmap_bytes, check_request

EVENTS: list[ReturnPathEvent] = [
    Pong(0x42),
    RequestPages(4096, 8192, "pc.ram"),
    RequestPages(0, 4096),
    ReceivedBitmap("pc.ram", 8),
    BitmapPiece(memoryview(b"\xff" * 8)),
    BitmapEnd(),
    ResumeAck(),
    SwitchoverAck(),
    Shut(0),
]


def test_there_and_back_whole_and_in_bytes() -> None:
    data = join(EVENTS)
    decoder = ReturnPathDecoder()
    decoder.feed(data)
    assert drain(decoder) == EVENTS
    assert decoder.is_between
    decoder = ReturnPathDecoder()
    found: list[ReturnPathEvent] = []
    for at in range(len(data)):
        decoder.feed(data[at : at + 1])
        found += drain(decoder)
    assert join(found) == data
    assert [each for each in found if not isinstance(each, BitmapPiece)] == [*EVENTS[:4], *EVENTS[5:]]


def test_a_lone_request_takes_the_shorter_way_and_nothing_else_does() -> None:
    named, short = join([RequestPages(4096, 8192, "pc.ram")]), join([RequestPages(0, 4096)])
    decoder = ReturnPathDecoder()
    assert decoder.lone_request(memoryview(short)) is None  # no request has named a block yet
    decoder.feed(named)
    assert len(drain(decoder)) == 1
    assert decoder.lone_request(memoryview(short)) == RequestPages(0, 4096)
    for other in (short * 2, short[:-1], join([Pong(1)]), join([RequestPages(0, 4096, "abc")]), short[:-4] + bytes(4)):
        assert decoder.lone_request(memoryview(other)) is None
    decoder.feed(short[:5])
    assert drain(decoder) == []
    assert decoder.lone_request(memoryview(short)) is None  # it would be put into the middle of another
    decoder.feed(short[5:] + bytes(4))
    with pytest.raises(WireError) as caught:
        drain(decoder)
    assert caught.value.offset == len(named) + 2 * len(short)
    assert decoder.lone_request(memoryview(short)) is None


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("0000 0000", "return-path-message"),
        ("0008 0000", "return-path-message"),
        ("0001 0005", "return-path-message"),
        ("0003 0200", "return-path-message"),
        ("0006 0004 00000002", "return-path-message"),
        ("0003 000e 0000000000000000 00001000 02 61", "return-path-message"),
        ("0005 0003 01 6162 0000000000000008", "return-path-message"),
        ("0005 0002 01 61 0000000000000009", "received-bitmap"),
        ("0005 0002 01 61 ffffffffffffffff", "received-bitmap"),
        ("0005 0002 01 61 0000000000000008 0000000000000000 0123456789abcdee", "received-bitmap"),
        ("0004 000c 0000000000000000 00001000", "request-block"),
        ("0003 000e 0000000000000000 00000000 01 61", "request-range"),
        ("0003 000e ffffffffffffffff 00000000 01 61", "request-range"),
    ],
)
def test_what_is_refused_stays_refused(raw: str, reason: str) -> None:
    decoder = ReturnPathDecoder()
    decoder.feed(bytes.fromhex(raw))
    for _ in range(2):
        with pytest.raises(WireError) as caught:
            drain(decoder)
        assert (caught.value.reason, caught.value.section) == (reason, "return path")


@pytest.mark.conforms("20")
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (RequestPages(0, 4096), "request-block"),
        (RequestPages(0, 4096, "vga"), "request-block"),
        (RequestPages(1, 4096, "pc.ram"), "request-range"),
        (RequestPages(0, 100, "pc.ram"), "request-range"),
        (RequestPages(BLOCK.used_length, 4096, "pc.ram"), "request-range"),
    ],
)
def test_requests_that_a_source_refuses(request_: RequestPages, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        check_request(request_, BLOCKS, None, page_size=4096)
    assert caught.value.reason == reason


@pytest.mark.conforms("20")
def test_requests_name_their_block_first_and_when_it_changes() -> None:
    encoder = RequestEncoder(page_size=4096)
    decoder = ReturnPathDecoder()
    for block in (BLOCK, BLOCK, ROM, BLOCK):
        decoder.feed(encoder.encode(block, 4096, 4096))
    found = drain(decoder)
    assert [each.block for each in found] == ["pc.ram", None, "pc.rom", "pc.ram"]
    assert check_request(found[1], BLOCKS, "pc.ram", page_size=4096) is BLOCK


def test_sizes_of_bitmaps() -> None:
    assert [bitmap_bytes(pages) for pages in (1, 64, 65)] == [8, 8, 16]
