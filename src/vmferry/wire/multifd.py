"""Multifd channels: an introduction, then packets of pages.

Theory of operation
-------------------
A packet's head has a fixed size and names one block and up to 512 KiB of pages; its payload follows if, and only
if, there are normal pages. Plain pages are handed out as they come (`MultifdPages`, views of the slab), so a packet
need not lie inside one slab. Compressed payloads pass as they are (`MultifdPayload`): each channel is one endless
compressed stream, which `PageInflater` turns into pages.

Rule 1: the claimed payload size counts only with normal pages; QEMU 7.2 leaves old values in it.
Rule 2: a head is encoded with everything that was in it, leftovers of the offset table included.
Rule 3: blocks may be announced after a channel was opened: `blocks` is looked at when a packet comes, and a packet
        whose block is not there is refused; do not read packets before the block list.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any, Final, NoReturn, assert_never

import numpy as np
import numpy.typing as npt

from vmferry.wire import limits
from vmferry.wire.buffer import Buffer, Bytes
from vmferry.wire.errors import WireError, refuse
from vmferry.wire.events import (
    NEED_DATA,
    Encoded,
    MultifdEvent,
    MultifdInit,
    MultifdPacket,
    MultifdPages,
    MultifdPayload,
    Offsets,
    Pause,
    RamBlock,
    to_text,
)

MAGIC: Final = 0x11223344
VERSION: Final = 1
SYNC, ZLIB, ZSTD, DEVICE_STATE = 0x01, 0x02, 0x04, 0x40
COMPRESSION: Final = 0x3E
_INIT = struct.Struct(">II16sB39s")
_HEAD = struct.Struct(">IIIIIIQI28s256s")
_COMPRESSIONS: Final = {0: "none", ZLIB: "zlib", ZSTD: "zstd"}
_NAMES: Final = slice(36, _HEAD.size)  # of a head: what names its block, and the reserved bytes before
_REGION_PAGES: Final = 4096


def places(page_size: int) -> int:
    """How many pages a packet can describe."""
    return limits.MULTIFD_PACKET_PAGES_BYTES // page_size


class MultifdDecoder:
    """Decodes one multifd channel from its first byte."""

    def __init__(self, blocks: Mapping[str, RamBlock], *, page_size: int = 4096) -> None:
        self._blocks = blocks
        self._page_size = page_size
        self._places = places(page_size)
        self._buffer = Buffer()
        self._introduced = False
        self._packet: MultifdPacket | None = None  # the one whose payload is being read
        self._left = 0  # of its payload, in bytes
        self._row_block: RamBlock | None = None  # of the last packet with pages, as its head names it
        self._row_names = b""
        self._region, self._region_row = -1, b""
        self._error: WireError | None = None

    def feed(self, data: Bytes) -> None:
        """Append bytes; events may be views of them."""
        self._buffer.feed(data)

    @property
    def is_between(self) -> bool:
        """Whether the connection may end here without cutting a packet in two."""
        return len(self._buffer) == 0 and not self._left and self._introduced

    @property
    def is_at_head(self) -> bool:
        """Whether a head comes next, all of it."""
        return self._introduced and not self._left and len(self._buffer) == 0

    @property
    def wanted_bytes(self) -> int:
        """How many bytes from here on belong together: a reader that takes no more needs no copies of leftovers."""
        have = len(self._buffer)
        if not self._introduced:
            return max(1, _INIT.size - have)
        if not self._left:
            return max(1, self.head_bytes - have)
        assert self._packet is not None
        is_torn = have and not self._packet.flags & COMPRESSION
        return (self._page_size if is_torn else self._left) - have

    @property
    def head_bytes(self) -> int:
        """The size of every packet's head."""
        return _HEAD.size + 8 * self._places

    def take_row(self, head: bytes | bytearray) -> tuple[RamBlock, int, int] | None:
        """(block, first page, pages) of a head that names nothing but plain pages side by side; else None: feed it.

        A shorter way for most packets: without numpy, whose code would have to come back into a cache that the pages
        of the packet before have just filled. Only the block of the packet before is known here. After a row the
        decoder is behind the packet: its reader puts the pages into their place.
        """
        block = self._row_block
        if block is None or self._left or len(self._buffer) or self._error is not None or len(head) != self.head_bytes:
            return None
        magic, version, flags, alloc, normal, claimed, _, zero, _, _ = _HEAD.unpack_from(head)
        if (magic, version, flags, zero) != (MAGIC, VERSION, 0, 0) or alloc not in (0, self._places):
            return None
        payload = normal * self._page_size
        if not 0 < normal <= self._places or claimed != payload or head[_NAMES] != self._row_names:
            return None
        start = int.from_bytes(head[_HEAD.size : _HEAD.size + 8], "big")
        first, rest = divmod(start, self._page_size)
        if rest or start + payload > block.used_length:
            return None
        if head[_HEAD.size : _HEAD.size + 8 * normal] != self._row_of(first, normal):
            return None
        self._buffer.offset += len(head) + payload
        return block, first, normal

    def _row_of(self, first: int, count: int) -> bytes:
        """What the offsets of these pages look like on the wire."""
        region, at = divmod(first, _REGION_PAGES)
        if region != self._region:
            start = region * _REGION_PAGES
            numbers = np.arange(start, start + _REGION_PAGES + self._places, dtype=np.uint64)
            self._region, self._region_row = region, (numbers * np.uint64(self._page_size)).astype(">u8").tobytes()
        return self._region_row[8 * at : 8 * (at + count)]

    def plain_pages(self) -> tuple[RamBlock, Offsets] | None:
        """The plain pages that come next, for a reader who puts them in their place itself and says `skip_pages`.

        None when something else comes next, or when a piece of the next page was fed already.
        """
        packet = self._packet
        if not self._left or packet is None or packet.flags & COMPRESSION or len(self._buffer):
            return None
        assert packet.block is not None
        return packet.block, packet.offsets[packet.normal - self._left // self._page_size : packet.normal]

    def skip_pages(self, count: int) -> None:
        """So many of `plain_pages` were read past this decoder."""
        assert 0 <= count * self._page_size <= self._left
        assert len(self._buffer) == 0
        self._left -= count * self._page_size
        self._buffer.offset += count * self._page_size

    def next(self) -> MultifdEvent | Pause:
        """The next event, or NEED_DATA. Raises `WireError`, and from then on the same one."""
        if self._error is not None:
            raise self._error
        try:
            if self._left:
                event = self._next_payload()
            else:
                event = self._next_packet() if self._introduced else self._next_init()
        except WireError as error:
            self._error = error
            raise
        if event is NEED_DATA:
            self._buffer.release()
        return event

    def _next_init(self) -> MultifdEvent | Pause:
        raw = self._buffer.peek(_INIT.size)
        if raw is None:
            return NEED_DATA
        magic, version, uuid, channel, rest = _INIT.unpack(raw)
        if magic != MAGIC or version != VERSION or rest.strip(b"\0"):
            self._refuse("multifd-init", f"the channel begins with {raw[:8].hex()}")
        self._buffer.take(_INIT.size)
        self._introduced = True
        return MultifdInit(channel, uuid)

    def _next_packet(self) -> MultifdEvent | Pause:
        raw = self._buffer.peek(12)
        if raw is None:
            return NEED_DATA
        if raw[:8] != struct.pack(">II", MAGIC, VERSION):
            self._refuse("multifd-magic", f"a packet begins with {raw[:8].hex()}")
        (flags,) = struct.unpack_from(">I", raw, 8)
        if flags & ~SYNC not in _COMPRESSIONS:
            self._refuse("multifd-flags", f"a packet with flags {flags:#x}")
        raw = self._buffer.peek(self.head_bytes)
        if raw is None:
            return NEED_DATA
        packet = self._decode_head(raw)
        self._check_pages(packet)
        self._buffer.take(len(raw))
        if packet.normal:
            self._row_block, self._row_names = packet.block, raw[_NAMES]
            self._packet = packet
            self._left = packet.payload_claimed
        return packet

    def _decode_head(self, raw: bytes) -> MultifdPacket:
        _, _, flags, alloc, normal, claimed, number, zero, reserved, padded = _HEAD.unpack_from(raw)
        name = padded.rstrip(b"\0")
        if reserved.strip(b"\0") or b"\0" in name:
            self._refuse("multifd-head", "reserved bytes are used")
        if alloc not in (0, self._places) or normal + zero > self._places:
            self._refuse("multifd-pages", f"{normal} pages and {zero} zero pages of {alloc}")
        offsets = np.frombuffer(raw, ">u8", self._places, _HEAD.size).astype(np.uint64)
        block = self._blocks.get(to_text(name)) if normal + zero else None
        return MultifdPacket(flags, alloc, normal, zero, claimed, number, block, name, offsets)

    def _check_pages(self, packet: MultifdPacket) -> None:
        if packet.normal + packet.zero == 0:
            return
        if packet.block is None:
            self._refuse("multifd-block", f"block {to_text(packet.name)!r} was not announced")
        used = packet.offsets[: packet.normal + packet.zero]
        bad = (used >= packet.block.used_length) | ((used & np.uint64(self._page_size - 1)) != 0)
        if bad.any():
            where = int(used[int(bad.argmax())])
            self._refuse("multifd-range", f"offset {where:#x} is not a page of block {packet.block.name!r}")
        if packet.normal == 0:
            return
        plain = packet.normal * self._page_size
        if packet.flags & COMPRESSION == 0:
            good = packet.payload_claimed == plain
        else:
            good = 0 < packet.payload_claimed <= limits.MULTIFD_PAYLOAD_BYTES_MAX
        if not good:
            self._refuse("multifd-payload", f"{packet.payload_claimed} bytes for {packet.normal} pages")

    def _next_payload(self) -> MultifdEvent | Pause:
        packet = self._packet
        assert packet is not None
        if packet.flags & COMPRESSION:
            data = self._buffer.take_some(self._left)
            if not data:
                return NEED_DATA
            self._left -= len(data)
            return MultifdPayload(data, last=not self._left)
        assert packet.block is not None
        first = packet.normal - self._left // self._page_size
        count = min(len(self._buffer.window()), self._left) // self._page_size
        data_or_none = self._buffer.take(max(count, 1) * self._page_size)
        if data_or_none is None:
            return NEED_DATA
        pages = np.frombuffer(data_or_none, np.uint8).reshape(-1, self._page_size)
        self._left -= len(data_or_none)
        return MultifdPages(packet.block, packet.offsets[first : first + len(pages)], pages)

    def _refuse(self, reason: str, message: str) -> NoReturn:
        refuse(reason, message, offset=self._buffer.offset, section="multifd")


class PageInflater:
    """Turns the compressed payloads of one channel into pages; keep one per channel, for all of its packets."""

    def __init__(self, *, page_size: int = 4096) -> None:
        self._page_size = page_size
        self._kind = 0
        self._stream: Any = None
        self._errors: type[Exception] = zlib.error
        self._out = bytearray()
        self._wanted = 0

    def begin(self, packet: MultifdPacket) -> None:
        """A packet with compressed pages. Raises `WireError` if its compression is not the channel's."""
        kind = packet.flags & COMPRESSION
        assert kind
        if self._stream is None:
            self._kind = kind
            self._stream, self._errors = _decompressor(kind)
        if kind != self._kind:
            _refuse_inflate("the compression changed within the channel")
        self._out = bytearray()
        self._wanted = packet.normal * self._page_size

    def feed(self, payload: MultifdPayload) -> npt.NDArray[np.uint8] | None:
        """The packet's pages once its last piece is in. Raises `WireError`."""
        data: Bytes = payload.data
        # One byte more than allowed is asked for, so that too much is noticed, and no more is ever produced.
        # Even with nothing more to come out, a call is needed to take the rest of the input in.
        while len(data):
            room = self._wanted + 1 - len(self._out)
            data = self._inflate(data, room)
            if len(self._out) > self._wanted:
                _refuse_inflate("more pages than the packet has")
        if not payload.last:
            return None
        if len(self._out) != self._wanted:
            _refuse_inflate("fewer pages than the packet has")
        return np.frombuffer(self._out, np.uint8).reshape(-1, self._page_size)

    def _inflate(self, data: Bytes, room: int) -> Bytes:
        """Adds at most `room` bytes to what came out; returns the input that is left."""
        try:
            out = self._stream.decompress(data, room)
        except self._errors as error:
            _refuse_inflate(str(error))
        self._out += out
        if self._stream.eof:
            _refuse_inflate("the compressed stream has an end")
        # zstd keeps what it has not taken in; but then the output was full, which is one byte too much already.
        rest: bytes = self._stream.unconsumed_tail if self._kind == ZLIB else b""
        return rest


def _decompressor(kind: int) -> tuple[Any, type[Exception]]:
    """One that has an endless stream before it, and the error that it raises."""
    if kind == ZLIB:
        return zlib.decompressobj(), zlib.error
    try:
        from compression.zstd import (  # type: ignore[import-not-found,unused-ignore]
            DecompressionParameter,
            ZstdDecompressor,
            ZstdError,
        )
    except ImportError:
        from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError
    options = {DecompressionParameter.window_log_max: limits.ZSTD_WINDOW_BITS_MAX}
    return ZstdDecompressor(options=options), ZstdError


def _refuse_inflate(message: str) -> NoReturn:
    refuse("multifd-compressed", message, offset=0, section="multifd payload")


# --- encode -------------------------------------------------------------------------------------------------


def encode(event: MultifdEvent) -> list[Encoded]:
    """The bytes of one event."""
    match event:
        case MultifdInit(channel, uuid):
            return [_INIT.pack(MAGIC, VERSION, uuid, channel, bytes(39))]
        case MultifdPacket():
            head = _HEAD.pack(
                MAGIC, VERSION, event.flags, event.pages_alloc, event.normal, event.payload_claimed,
                event.number, event.zero, bytes(28), event.name,
            )  # fmt: skip
            return [head, event.offsets.astype(">u8").view(np.uint8)]
        case MultifdPages():
            return [event.pages.reshape(-1)]
        case MultifdPayload(data, _):
            return [data]
        case _ as never:  # pragma: no cover
            assert_never(never)


def make_packet(
    block: RamBlock,
    normal: npt.NDArray[np.uint64],
    zero: npt.NDArray[np.uint64],
    *,
    number: int,
    flags: int = 0,
    payload_bytes: int | None = None,
    page_size: int = 4096,
) -> MultifdPacket:
    """The head of a packet; its payload is to follow. `payload_bytes` only for compressed ones."""
    offsets = np.zeros(places(page_size), np.uint64)
    assert len(normal) + len(zero) <= len(offsets)
    offsets[: len(normal)] = normal
    offsets[len(normal) : len(normal) + len(zero)] = zero
    payload = len(normal) * page_size if payload_bytes is None else payload_bytes
    name = block.name.encode("utf-8", "surrogateescape")
    return MultifdPacket(flags, len(offsets), len(normal), len(zero), payload, number, block, name, offsets)


def make_sync(*, number: int, page_size: int = 4096) -> MultifdPacket:
    """An empty packet that says SYNC, as QEMU writes it since 9.0."""
    return MultifdPacket(SYNC, 0, 0, 0, 0, number, None, b"", np.zeros(places(page_size), np.uint64))
