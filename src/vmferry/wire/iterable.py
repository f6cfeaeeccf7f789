"""Iterable sections beside RAM: the one that can be delimited is dirty bitmaps.

A section body has no length, so a reader that does not understand a body cannot find the section behind it. An
unknown iterable section is therefore refused by name at its START, while the source still has everything. (Slirp
and other old devices are no iterable sections: they are device sections, which `devices` delimits.)

Rule 1: what is not in `KNOWN` is refused. VFIO's state has tags, but its config part has no length.
"""

from __future__ import annotations

import struct
from typing import Final, NoReturn

from vmferry.wire import limits
from vmferry.wire.buffer import Buffer
from vmferry.wire.errors import refuse
from vmferry.wire.events import NEED_DATA, BitmapChunk, Pause, to_raw, to_text

RAM: Final = "ram"
DIRTY_BITMAP: Final = "dirty-bitmap"
# idstr → the version that this codec reads.
KNOWN: Final = {RAM: 4, DIRTY_BITMAP: 1}

EOS, ZEROES, BITMAP_NAME, DEVICE_NAME, START, COMPLETE, BITS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
_ALLOWED: Final = frozenset(
    {EOS, START, COMPLETE, BITS, BITS | ZEROES, 0}  # one kind a chunk; 0: names only
)
_START = struct.Struct(">IB")
_BITS = struct.Struct(">QI")
_SIZE = struct.Struct(">Q")


def check_known(idstr: str, instance: int, version: int, offset: int) -> None:
    """At a START. Raises `WireError` for a section that cannot be delimited."""
    if idstr not in KNOWN:
        message = f"iterable section {idstr!r} cannot be carried: nothing tells where it ends"
        refuse("section-unknown", message, offset=offset, section=repr(idstr))
    if instance != 0 or version != KNOWN[idstr]:
        message = f"instance {instance}, version {version}; known is instance 0, version {KNOWN[idstr]}"
        refuse("section-version", message, offset=offset, section=idstr)


def next_chunk(buffer: Buffer) -> BitmapChunk | Pause:
    """One chunk of dirty bitmaps. Its flags tell whether it is the last of its body. Raises `WireError`."""
    first = buffer.peek(1)
    if first is None:
        return NEED_DATA
    flags = first[0]
    if flags & ~(DEVICE_NAME | BITMAP_NAME) not in _ALLOWED or (flags & EOS and flags != EOS):
        _refuse(buffer, f"a chunk with flags {flags:#x}")
    at = 1
    names: dict[int, str | None] = {DEVICE_NAME: None, BITMAP_NAME: None}
    for flag in names:
        if flags & flag:
            length = buffer.peek(at + 1)
            name = None if length is None else buffer.peek(at + 1 + length[at])
            if length is None or name is None:
                return NEED_DATA
            names[flag] = to_text(name[at + 1 :])
            at += 1 + length[at]
    more = _SIZES.get(flags & ~(DEVICE_NAME | BITMAP_NAME), 0)
    head = buffer.peek(at + more)
    if head is None:
        return NEED_DATA
    node, bitmap = names[DEVICE_NAME], names[BITMAP_NAME]
    if flags & START:
        granularity, bitmap_flags = _START.unpack_from(head, at)
        chunk = BitmapChunk(flags, node, bitmap, granularity, bitmap_flags)
    elif flags & BITS:
        first_sector, sectors = _BITS.unpack_from(head, at)
        data = b""
        if not flags & ZEROES:
            (length_claimed,) = _SIZE.unpack_from(head, at + _BITS.size)
            if length_claimed > limits.BITMAP_CHUNK_BYTES_MAX:
                _refuse(buffer, f"{length_claimed} bytes of bitmap")
            whole = buffer.peek(at + more + length_claimed)
            if whole is None:
                return NEED_DATA
            data = whole[at + more :]
        chunk = BitmapChunk(flags, node, bitmap, first_sector=first_sector, sectors=sectors, data=data)
    else:
        chunk = BitmapChunk(flags, node, bitmap)
    buffer.take(at + more + len(chunk.data))
    return chunk


_SIZES: Final = {START: _START.size, BITS: _BITS.size + _SIZE.size, BITS | ZEROES: _BITS.size}


def encode_chunk(chunk: BitmapChunk) -> bytes:
    """The bytes of one chunk."""
    parts = [bytes([chunk.flags])]
    for flag, name in ((DEVICE_NAME, chunk.node), (BITMAP_NAME, chunk.bitmap)):
        assert bool(chunk.flags & flag) == (name is not None)
        if name is not None:
            raw = to_raw(name)
            parts += [bytes([len(raw)]), raw]
    if chunk.flags & START:
        parts.append(_START.pack(chunk.granularity, chunk.bitmap_flags))
    if chunk.flags & BITS:
        parts.append(_BITS.pack(chunk.first_sector, chunk.sectors))
        if not chunk.flags & ZEROES:
            parts += [_SIZE.pack(len(chunk.data)), chunk.data]
    return b"".join(parts)


def _refuse(buffer: Buffer, message: str) -> NoReturn:
    refuse("bitmap-chunk", message, offset=buffer.offset, section=DIRTY_BITMAP)
