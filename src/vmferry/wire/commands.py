"""Commands of the source (tag 0x08): number, length, payload.

Rule 1: a command of fixed length with another length is refused, and so is a number that is not in the table.
Rule 2: ENABLE_COLO is refused: vmferry never switches COLO on and cannot follow it.
"""

from __future__ import annotations

import struct
from typing import Final, NoReturn, assert_never

from vmferry.wire import limits
from vmferry.wire.errors import refuse
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
    to_raw,
    to_text,
)

TAG: Final = 0x08
HEAD: Final = struct.Struct(">HH")
_VALUE: Final = struct.Struct(">I")
_PAIR: Final = struct.Struct(">QQ")

OPEN_RETURN_PATH, PING, ADVISE, LISTEN, RUN, DISCARD, PACKAGED, COLO, RESUME, RECV_BITMAP, SWITCHOVER_START = range(
    1, 12
)
# Number → allowed lengths of the payload, (least, most).
LENGTHS: Final[dict[int, tuple[int, int]]] = {
    OPEN_RETURN_PATH: (0, 0),
    PING: (4, 4),
    ADVISE: (0, 16),
    LISTEN: (0, 0),
    RUN: (0, 0),
    DISCARD: (20, 0xFFFF),
    PACKAGED: (4, 4),
    RESUME: (0, 0),
    RECV_BITMAP: (2, 256),
    SWITCHOVER_START: (0, 0),
}


def is_plausible(number: int, length: int) -> bool:
    """Whether such a command exists; asked where a footer is searched for."""
    least, most = LENGTHS.get(number, (1, 0))
    return least <= length <= most


def check_head(number: int, length: int, offset: int) -> None:
    """Before the payload is waited for. Raises `WireError`."""
    if number == COLO:
        refuse("command-colo", "COLO is not supported", offset=offset, section="command")
    if number not in LENGTHS:
        refuse("command-unknown", f"command {number}", offset=offset, section="command")
    if not is_plausible(number, length):
        refuse("command-length", f"command {number} with {length} bytes", offset=offset, section="command")


def decode(number: int, payload: bytes, offset: int) -> Command:
    """One command whose head was checked. Raises `WireError`."""
    match number:
        case 1:
            return OpenReturnPath()
        case 2:
            return Ping(_VALUE.unpack(payload)[0])
        case 3:
            return _decode_advise(payload, offset)
        case 4:
            return PostcopyListen()
        case 5:
            return PostcopyRun()
        case 6:
            return _decode_discard(payload, offset)
        case 7:
            return _decode_packaged(payload, offset)
        case 9:
            return PostcopyResume()
        case 10:
            if payload[0] != len(payload) - 1:
                _refuse("the name and the command differ in length", offset)
            return AskBitmap(to_text(payload[1:]))
        case _:
            assert number == SWITCHOVER_START
            return SwitchoverStart()


def _decode_advise(payload: bytes, offset: int) -> PostcopyAdvise:
    if not payload:
        return PostcopyAdvise()
    if len(payload) != 16:
        _refuse(f"advice of {len(payload)} bytes", offset)
    page_sizes, target_page_size = _PAIR.unpack(payload)
    return PostcopyAdvise(page_sizes, target_page_size)


def _decode_discard(payload: bytes, offset: int) -> Discard:
    name_end = 2 + payload[1]
    ranges_bytes = len(payload) - name_end - 1
    if payload[0] != 0 or ranges_bytes < 16 or ranges_bytes % 16 or payload[name_end] != 0:
        _refuse("a malformed discard", offset)
    ranges = tuple(_PAIR.iter_unpack(payload[name_end + 1 :]))
    for start, length in ranges:
        if length == 0 or start + length > limits.RAM_BYTES_MAX:
            _refuse(f"a discard of {length} bytes at {start:#x}", offset)
    return Discard(to_text(payload[2:name_end]), ranges)


def _decode_packaged(payload: bytes, offset: int) -> Packaged:
    (length,) = _VALUE.unpack(payload)
    if not 0 < length <= limits.PACKAGE_BYTES_MAX:
        _refuse(f"a package of {length} bytes", offset)
    return Packaged(length)


def _refuse(message: str, offset: int) -> NoReturn:
    refuse("command-payload", message, offset=offset, section="command")


def encode(event: Command) -> bytes:
    """Tag, head and payload. Of `Packaged` the package itself follows."""
    number, payload = _parts(event)
    return bytes([TAG]) + HEAD.pack(number, len(payload)) + payload


def _parts(event: Command) -> tuple[int, bytes]:
    match event:
        case OpenReturnPath():
            return OPEN_RETURN_PATH, b""
        case Ping(value):
            return PING, _VALUE.pack(value)
        case PostcopyAdvise(None, _):
            return ADVISE, b""
        case PostcopyAdvise(page_sizes, target_page_size):
            return ADVISE, _PAIR.pack(page_sizes, target_page_size)
        case PostcopyListen():
            return LISTEN, b""
        case PostcopyRun():
            return RUN, b""
        case Discard(block, ranges):
            name = to_raw(block)
            body = b"".join(_PAIR.pack(*each) for each in ranges)
            return DISCARD, bytes([0, len(name)]) + name + b"\0" + body
        case Packaged(length):
            return PACKAGED, _VALUE.pack(length)
        case PostcopyResume():
            return RESUME, b""
        case AskBitmap(block):
            name = to_raw(block)
            return RECV_BITMAP, bytes([len(name)]) + name
        case SwitchoverStart():
            return SWITCHOVER_START, b""
        case _ as never:  # pragma: no cover
            assert_never(never)
