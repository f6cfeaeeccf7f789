"""Commands: each there and back, and everything that is refused."""

from __future__ import annotations

import pytest

from vmferry.wire import commands
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    AskBitmap,
    Command,
    Discard,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    SwitchoverStart,
)

CASES: list[tuple[Command, str]] = [
    (OpenReturnPath(), "08 0001 0000"),
    (Ping(0x42), "08 0002 0004 00000042"),
    (PostcopyAdvise(4096, 4096), "08 0003 0010 0000000000001000 0000000000001000"),
    (PostcopyAdvise(), "08 0003 0000"),
    (PostcopyListen(), "08 0004 0000"),
    (PostcopyRun(), "08 0005 0000"),
    (
        Discard("m0", ((0, 4096), (8192, 4096))),
        "08 0006 0025 00 02 6d30 00 0000000000000000 0000000000001000 0000000000002000 0000000000001000",
    ),
    (Packaged(13455), "08 0007 0004 0000348f"),
    (PostcopyResume(), "08 0009 0000"),
    (AskBitmap("pc.ram"), "08 000a 0007 06 70632e72616d"),
    (SwitchoverStart(), "08 000b 0000"),
]


@pytest.mark.parametrize(("event", "raw"), CASES)
def test_there_and_back(event: Command, raw: str) -> None:
    data = bytes.fromhex(raw)
    assert commands.encode(event) == data
    number, length = commands.HEAD.unpack_from(data, 1)
    commands.check_head(number, length, 0)
    assert commands.decode(number, data[5:], 0) == event


@pytest.mark.conforms("15")
@pytest.mark.parametrize(
    ("number", "length", "reason"),
    [
        (0, 0, "command-unknown"),
        (12, 0, "command-unknown"),
        (8, 0, "command-colo"),
        (1, 1, "command-length"),
        (2, 5, "command-length"),
        (6, 19, "command-length"),
        (10, 257, "command-length"),
    ],
)
def test_heads_that_are_refused(number: int, length: int, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        commands.check_head(number, length, 77)
    assert (caught.value.reason, caught.value.offset, caught.value.section) == (reason, 77, "command")


@pytest.mark.parametrize(
    ("number", "payload"),
    [
        (3, bytes(8)),
        (6, b"\x01\x01a\x00" + bytes(16)),  # version 1
        (6, b"\x00\x01a\x01" + bytes(8) + b"\0\0\0\0\0\0\x10\0"),  # no 0 behind the name
        (6, b"\x00\x01a\x00" + bytes(17)),
        (6, b"\x00\xffa\x00" + bytes(16)),  # a name longer than the payload
        (6, b"\x00\x01a\x00" + bytes(16)),  # an empty range
        (6, b"\x00\x01a\x00" + b"\xff" * 16),
        (7, bytes(4)),
        (7, b"\xff\xff\xff\xff"),
        (10, b"\x05abc"),
    ],
)
def test_payloads_that_are_refused(number: int, payload: bytes) -> None:
    with pytest.raises(WireError) as caught:
        commands.decode(number, payload, 5)
    assert caught.value.reason == "command-payload"
