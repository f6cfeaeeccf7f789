"""Device sections: found, split, and passed on untouched.

Theory of operation
-------------------
A device section has no length. Two things tell where it ends.

* The vmdescription behind a precopy stream lists every device with the sizes of its fields. It is found by its own
  shape (`00 06 <length> {"`) and believed only if the sections that it describes fill exactly the bytes before
  it, each with the right head and footer. This is how the end of a live stream is recognised: `Tail`.
* Where there is none (postcopy's package, early sections, streams without it), footers do: `split_chain`. A footer
  may occur inside a device's state by chance (it does in a recorded stream), so one is believed only if what
  follows goes on plausibly, and is given up again if the chain breaks later.

Rule 1: no body is ever interpreted here; `fields` of `description` is for people who look at streams.
Rule 2: both searches end after a bounded number of candidates, whatever the bytes.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from vmferry.wire import commands, limits
from vmferry.wire.description import Device, parse
from vmferry.wire.errors import refuse
from vmferry.wire.events import DeviceSection, to_text

FULL: Final = 0x04
START: Final = 0x01
FOOTER: Final = 0x7E
DESCRIPTION: Final = 0x06
_ID = struct.Struct(">I")
_TAIL = struct.Struct(">II")
_DESCRIPTION_HEAD = re.compile(rb'\x00\x06(?=(....)\{")', re.DOTALL)
FOOTER_BYTES: Final = 5


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a START or FULL section; the body begins at `end`."""

    tag: int
    section_id: int
    idstr: str
    instance: int
    version: int
    end: int

    @property
    def is_plausible(self) -> bool:
        """Whether a real source would write this; asked only where a footer is searched for."""
        return (
            self.section_id < limits.PLAUSIBLE_SECTION_ID_MAX
            and self.version < limits.PLAUSIBLE_VERSION_MAX
            and bool(self.idstr)
            and self.idstr.isascii()
            and self.idstr.isprintable()
        )


def head_at(data: bytes | bytearray, at: int) -> Head | None:
    """The section head at `at`, or None while bytes are missing. The tag is the caller's business."""
    if len(data) < at + 6:
        return None
    name_end = at + 6 + data[at + 5]
    if len(data) < name_end + 8:
        return None
    (section_id,) = _ID.unpack_from(data, at + 1)
    instance, version = _TAIL.unpack_from(data, name_end)
    return Head(data[at], section_id, to_text(data[at + 6 : name_end]), instance, version, name_end + 8)


def section_of(head: Head, body: bytes, *, early: bool = False) -> DeviceSection:
    """The event."""
    return DeviceSection(head.section_id, head.idstr, head.instance, head.version, body, early)


# --- by the vmdescription -----------------------------------------------------------------------------------


class Tail:
    """Collects everything from the first device section on, and knows when it is whole.

    `early`: (idstr, instance) of the devices that came before RAM; the vmdescription lists them too.
    """

    def __init__(self, *, offset: int, footers: bool, early: frozenset[tuple[str, int]]) -> None:
        self.data = bytearray()
        self.sections: list[DeviceSection] = []
        self.description: tuple[int, int] | None = None  # where its text begins and ends
        self._offset = offset
        self._footers = footers
        self._early = early
        self._scanned = 0
        self._found = 0
        self._candidates: list[tuple[int, int]] = []

    def feed(self, data: bytes | memoryview) -> bool:
        """Whether the stream is whole now; then `sections` and `description` are there. Raises `WireError`."""
        self.data += data
        while True:
            match = _DESCRIPTION_HEAD.search(self.data, self._scanned)
            # What ended before the next candidate begins is tried first: behind the end there may be anything.
            if self._try_ended(len(self.data) if match is None else match.start()):
                return True
            if match is None:
                break
            self._scanned = match.end()
            (length,) = _ID.unpack(match[1])
            begin = match.start()
            del match  # it pins the bytearray
            if length <= limits.DESCRIPTION_BYTES_MAX:
                self._found += 1
                if self._found > limits.DESCRIPTION_CANDIDATES_MAX:
                    self._refuse("devices-candidates", "too much looks like a vmdescription")
                self._candidates.append((begin, begin + 6 + length))
        self._scanned = max(self._scanned, len(self.data) - 7)
        if len(self.data) > limits.DEVICES_BYTES_MAX:
            self._refuse("devices-size", "the device sections do not end")
        return False

    def _try_ended(self, up_to: int) -> bool:
        for candidate in sorted(self._candidates, key=lambda each: each[1]):
            begin, end = candidate
            if end > up_to:
                break
            self._candidates.remove(candidate)
            sections = self._try(begin, end)
            if sections is not None:
                self.sections = sections
                self.description = (begin + 6, end)
                return True
        return False

    def _try(self, begin: int, end: int) -> list[DeviceSection] | None:
        if self.data[end - 1] != ord("}"):
            return None
        described = parse(bytes(self.data[begin + 6 : end]))
        if described is None:
            return None
        devices = [each for each in described.devices if (each.name, each.instance) not in self._early]
        return split_described(bytes(self.data[:begin]), devices, footers=self._footers)

    def _refuse(self, reason: str, message: str) -> None:
        refuse(reason, message, offset=self._offset, section="device sections")


def split_described(data: bytes, devices: list[Device], *, footers: bool) -> list[DeviceSection] | None:
    """The sections that fill `data` exactly as described, or None if they do not."""
    sections: list[DeviceSection] = []
    at = 0
    for device in devices:
        head = head_at(data, at) if at < len(data) and data[at] == FULL else None
        if head is None or (head.idstr, head.instance) != (device.name, device.instance):
            return None
        end = head.end + device.size
        if end > len(data) or (footers and not _is_footer(data, end, head.section_id)):
            return None
        sections.append(section_of(head, data[head.end : end]))
        at = end + (FOOTER_BYTES if footers else 0)
    return sections if at == len(data) else None


def _is_footer(data: bytes, at: int, section_id: int) -> bool:
    return data[at : at + FOOTER_BYTES] == _footer(section_id)


def _footer(section_id: int) -> bytes:
    return bytes([FOOTER]) + _ID.pack(section_id)


# --- by footers ---------------------------------------------------------------------------------------------

# A piece of a chain: a section (its head and the end of its body) or a command (number, payload).
Piece = tuple[Head, int] | tuple[int, bytes]


def split_chain(data: bytes, *, is_package: bool, offset: int) -> tuple[list[Piece], int] | None:
    """Device sections (in a package: and commands) from the first byte on, and where they end.

    A package ends with its last byte; anything else at a 0x00 that is the last byte or has a whole vmdescription
    behind it. None if there is no such chain. Raises `WireError` if the search takes too long.
    """
    pieces: list[Piece] = []
    # For every section of the chain so far: where its piece is in `pieces`, and where the last footer was found.
    choices: list[tuple[int, int]] = []
    failed: set[int] = set()
    at = looked = passed = 0
    while True:
        if at not in failed and _is_chain_end(data, at, is_package=is_package):
            return pieces, at
        step = None if at in failed else _command_at(data, at) if is_package else None
        if step is not None:
            number, payload = step
            pieces.append((number, payload))
            at += 5 + len(payload)
        else:
            head = None if at in failed else _section_at(data, at)
            if head is not None:
                choices.append((len(pieces), head.end))
                pieces.append((head, -1))
            else:
                failed.add(at)
            # Close the newest section at its next footer; give up those that have none left.
            while choices:
                index, search_from = choices.pop()
                section = pieces[index][0]
                assert isinstance(section, Head)
                del pieces[index:]
                found = data.find(_footer(section.section_id), search_from)
                passed += (len(data) if found < 0 else found) - search_from
                if found >= 0:
                    looked += 1
                    choices.append((index, found + 1))
                    pieces.append((section, found))
                    at = found + FOOTER_BYTES
                    break
            else:
                return None
        looked += 1
        too_much = looked > limits.FOOTER_CANDIDATES_MAX or passed > limits.FOOTER_SEARCH_BYTES_MAX
        if too_much or len(pieces) > limits.SECTIONS_MAX:
            refuse("devices-search", "the sections cannot be told apart", offset=offset, section="device sections")


def _is_chain_end(data: bytes, at: int, *, is_package: bool) -> bool:
    if is_package:
        return at == len(data)
    if data[at : at + 1] != b"\0":
        return False
    if at + 1 == len(data):
        return True
    if len(data) < at + 6 or data[at + 1] != DESCRIPTION:
        return False
    (length,) = _ID.unpack_from(data, at + 2)
    return at + 6 + int(length) == len(data)


def _section_at(data: bytes, at: int) -> Head | None:
    head = head_at(data, at) if at < len(data) and data[at] == FULL else None
    return head if head is not None and head.is_plausible else None


def _command_at(data: bytes, at: int) -> tuple[int, bytes] | None:
    if len(data) < at + 5 or data[at] != commands.TAG:
        return None
    number, length = commands.HEAD.unpack_from(data, at + 1)
    if not commands.is_plausible(number, length) or len(data) < at + 5 + length:
        return None
    return number, data[at + 5 : at + 5 + length]


def early_section(data: bytearray, searched: int, *, offset: int) -> tuple[DeviceSection, int] | int:
    """A device section in front of RAM, and where its body ends; or where to search on when more has come.

    Its footer must be followed by a section or a command. Raises `WireError`.
    """
    head = head_at(data, 0)
    if head is None:
        return 0
    footer = _footer(head.section_id)
    found = data.find(footer, max(head.end, searched))
    while found >= 0:
        after = found + FOOTER_BYTES
        follows = _goes_on(data, after)
        if follows is None:
            return found
        if follows:
            return section_of(head, bytes(data[head.end : found]), early=True), found
        found = data.find(footer, found + 1)
    if len(data) > limits.EARLY_SECTION_BYTES_MAX:
        refuse("devices-early", f"section {head.idstr!r} does not end", offset=offset, section="device sections")
    return max(head.end, len(data) - FOOTER_BYTES + 1)


def _goes_on(data: bytearray, at: int) -> bool | None:
    """Whether a section or a command begins here; None: too early to say."""
    if at >= len(data):
        return None
    if data[at] in (START, FULL):
        head = head_at(data, at)
        return None if head is None else head.is_plausible
    if data[at] != commands.TAG:
        return False
    if len(data) < at + 5:
        return None
    return commands.is_plausible(*commands.HEAD.unpack_from(data, at + 1))


def encode(event: DeviceSection) -> list[bytes]:
    """Tag, head and body; its footer is an event of its own."""
    return [encode_head(FULL, event.section_id, event.idstr, event.instance, event.version), event.body]


def encode_head(tag: int, section_id: int, idstr: str, instance: int, version: int) -> bytes:
    """What START and FULL begin with."""
    name = idstr.encode("utf-8", "surrogateescape")
    return bytes([tag]) + _ID.pack(section_id) + bytes([len(name)]) + name + _TAIL.pack(instance, version)
