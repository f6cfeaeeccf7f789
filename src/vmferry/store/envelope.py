"""Index and manifest objects on the outside: a head of JSON, and sections that may be large.

    bytes 0-3   "VMFS"          6-7    0
    byte  4     version, 1      8-11   length of the sealed head
    byte  5     kind            12-15  0
    then the sealed head, then the sealed sections, one after the other, and nothing behind them

The head is JSON: what the owner wrote (`head`), and for each section its sealed and its plain length. Sections are
compressed with zstd, then sealed. Numbers are little-endian.

Rule 1: every length is compared with what is there, and with its limit, before anything is allocated for it.
Rule 2: nothing of a piece is looked at before its seal was opened.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from vmferry.limits import STORE_HEAD_BYTES_MAX
from vmferry.store.compression import Compressor, inflate
from vmferry.store.errors import Damaged
from vmferry.store.seal import SEAL_BYTES, Seal

MAGIC: Final = b"VMFS"
VERSION: Final = 1
PREFIX: Final = struct.Struct("<4sBBHII")
PACK, INDEX, MANIFEST, LOCK = 1, 2, 3, 4
_SECTION_MORE: Final = 64 + SEAL_BYTES
"""What a section has beside its data: zstd's frame, and the seal."""


class Lengths(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One section."""

    sealed: int
    plain: int


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    head: dict[str, Any]
    sections: list[Lengths]


def prefix(kind: int, head_bytes: int = 0) -> bytes:
    """The first 16 bytes of an object."""
    return PREFIX.pack(MAGIC, VERSION, kind, 0, head_bytes, 0)


def read_prefix(name: str, data: bytes, kind: int) -> int:
    """The sealed head's length. Raises Damaged."""
    if len(data) < PREFIX.size:
        raise Damaged(name, f"it has {len(data)} bytes, fewer than its first {PREFIX.size}")
    magic, version, found, zero, length, last = PREFIX.unpack_from(data)
    if magic != MAGIC or found != kind or zero or last:
        raise Damaged(name, "it does not begin like an object of its kind")
    if version != VERSION:
        raise Damaged(name, f"it has version {version}, and this vmferry knows version {VERSION}")
    return int(length)


def seal_object(
    seal: Seal, name: str, kind: int, head: dict[str, Any], sections: Sequence[bytes], level: int = 3
) -> bytes:
    """The whole object."""
    compressor = Compressor(level)
    sealed = [seal.close(name, number, compressor.frame(data)) for number, data in enumerate(sections, 1)]
    lengths = [Lengths(len(after), len(before)) for after, before in zip(sealed, sections, strict=True)]
    first = seal.close(name, 0, msgspec.json.encode(_Head(head, lengths)))
    assert len(first) <= STORE_HEAD_BYTES_MAX, "the owner wrote too much into it"
    return b"".join((prefix(kind, len(first)), first, *sealed))


class Opened:
    """An object's head; its sections are opened when they are asked for."""

    def __init__(self, seal: Seal, name: str, kind: int, data: bytes, size_bytes: int) -> None:
        """`data` is the object or its beginning, up to its head at least (`head_end`). Raises Damaged."""
        self._seal, self._name, self._data = seal, name, data
        end = head_end(name, data, kind, size_bytes)
        if len(data) < end:
            raise Damaged(name, "its head is not all there")
        plain = seal.open(name, 0, data[PREFIX.size : end])
        try:
            found = msgspec.json.decode(plain, type=_Head)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Damaged(name, f"its head is not what a head is: {error}") from None
        self.head = found.head
        self._sections = found.sections
        if any(one.sealed < SEAL_BYTES or one.plain < 0 for one in found.sections):
            raise Damaged(name, "a section has no possible length")
        self._starts = [end]
        for one in found.sections:
            self._starts.append(self._starts[-1] + one.sealed)
        if self._starts[-1] != size_bytes:
            raise Damaged(name, f"it has {size_bytes} bytes, and its head speaks of {self._starts[-1]}")

    @property
    def count(self) -> int:
        """How many sections there are."""
        return len(self._sections)

    def plain_bytes(self, number: int) -> int:
        """How long section `number` (from 0) says that it is."""
        return self._sections[number].plain

    def is_tight(self, number: int) -> bool:
        """Whether section `number` takes no more bytes than it may: what cannot be compressed grows by a little."""
        one = self._sections[number]
        return one.sealed <= one.plain + one.plain // 128 + _SECTION_MORE

    def section(self, number: int, bytes_max: int) -> bytes:
        """Section `number`, from 0. Raises Damaged, also when it has more than `bytes_max`."""
        plain = self._sections[number].plain
        if plain > bytes_max:
            raise Damaged(self._name, f"section {number} would have {plain} bytes, more than {bytes_max}")
        sealed = self._data[self._starts[number] : self._starts[number + 1]]
        return inflate(self._name, self._seal.open(self._name, number + 1, sealed), plain)


def head_end(name: str, data: bytes, kind: int, size_bytes: int) -> int:
    """Where the head ends. Raises Damaged when that cannot be."""
    length = read_prefix(name, data, kind)
    end = PREFIX.size + length
    if not SEAL_BYTES <= length <= STORE_HEAD_BYTES_MAX or end > size_bytes:
        raise Damaged(name, f"its head would have {length} bytes")
    return end
