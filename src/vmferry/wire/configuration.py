"""The configuration section: the source's machine type and three optional subsections."""

from __future__ import annotations

import struct
from typing import Any, Final, NoReturn

from vmferry.wire import limits
from vmferry.wire.buffer import Buffer
from vmferry.wire.errors import refuse
from vmferry.wire.events import NEED_DATA, Configuration, Pause, to_raw, to_text

TAG: Final = 0x07
_SUBSECTION: Final = 0x05
_U32 = struct.Struct(">I")
PAGE_BITS, CAPABILITIES, UUID = "configuration/target-page-bits", "configuration/capabilities", "configuration/uuid"
_NAMES: Final = {PAGE_BITS: "page_bits", CAPABILITIES: "capabilities", UUID: "uuid"}


def decode(buffer: Buffer) -> Configuration | Pause:
    """The section at the cursor, tag included; it ends where no subsection follows. Raises `WireError`."""
    head = buffer.peek(5)
    if head is None:
        return NEED_DATA
    (length,) = _U32.unpack_from(head, 1)
    if not 0 < length <= limits.MACHINE_NAME_BYTES_MAX:
        _refuse(buffer, f"a machine name of {length} bytes")
    at = 5 + length
    values: dict[str, Any] = {}
    order: list[str] = []
    while True:
        whole = buffer.peek(at + 1)
        if whole is None:
            return NEED_DATA
        if whole[at] != _SUBSECTION:
            break
        found = _subsection(buffer, at)
        if found is None:
            return NEED_DATA
        name, values[_NAMES[name]], at = found[0], found[1], found[2]
        if name in order or len(order) >= limits.CONFIGURATION_SUBSECTIONS_MAX:
            _refuse(buffer, f"subsection {name!r} comes twice")
        order.append(name)
    buffer.take(at)
    return Configuration(to_text(whole[5 : 5 + length]), **values, order=tuple(order))


def _subsection(buffer: Buffer, at: int) -> tuple[str, Any, int] | None:
    """Name, value and end of the subsection at `at`."""
    head = buffer.peek(at + 2)
    whole = None if head is None else buffer.peek(at + 2 + head[-1] + 4)
    if head is None or whole is None:
        return None
    end = at + 2 + head[-1]
    name = to_text(whole[at + 2 : end])
    (version,) = _U32.unpack_from(whole, end)
    if name not in _NAMES or version != 1:
        _refuse(buffer, f"subsection {name!r} of version {version}")
    end += 4
    if name == UUID:
        body = buffer.peek(end + 16)
        return None if body is None else (name, body[end:], end + 16)
    body = buffer.peek(end + 4)
    if body is None:
        return None
    (number,) = _U32.unpack_from(body, end)
    end += 4
    if name == PAGE_BITS:
        if not limits.TARGET_PAGE_BITS_MIN <= number <= limits.TARGET_PAGE_BITS_MAX:
            _refuse(buffer, f"target pages of {number} bits")
        return name, number, end
    if number > limits.CAPABILITIES_MAX:
        _refuse(buffer, f"{number} capabilities")
    found: list[str] = []
    for _ in range(number):
        length = buffer.peek(end + 1)
        entry = None if length is None else buffer.peek(end + 1 + length[-1])
        if entry is None:
            return None
        found.append(to_text(entry[end + 1 :]))
        end = len(entry)
    _check_capabilities(buffer, found)
    return name, tuple(found), end


def _check_capabilities(buffer: Buffer, found: list[str]) -> None:
    """An unknown one may change the wire."""
    for each in found:
        if each not in ("x-ignore-shared", "mapped-ram"):
            _refuse(buffer, f"capability {each!r} is not known")


def encode(event: Configuration) -> bytes:
    """The whole section."""
    machine = to_raw(event.machine)
    parts = [bytes([TAG]), _U32.pack(len(machine)), machine]
    for name in event.order:
        parts += [bytes([_SUBSECTION, len(name)]), name.encode(), _U32.pack(1), _encode_value(event, name)]
    return b"".join(parts)


def _encode_value(event: Configuration, name: str) -> bytes:
    if name == UUID:
        assert event.uuid is not None
        assert len(event.uuid) == 16
        return event.uuid
    if name == PAGE_BITS:
        assert event.page_bits is not None
        return _U32.pack(event.page_bits)
    assert event.capabilities is not None
    raw = [to_raw(each) for each in event.capabilities]
    return _U32.pack(len(raw)) + b"".join(bytes([len(each)]) + each for each in raw)


def _refuse(buffer: Buffer, message: str) -> NoReturn:
    refuse("configuration", message, offset=buffer.offset, section="configuration")
