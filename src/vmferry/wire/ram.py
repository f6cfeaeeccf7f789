"""The records of RAM: the block list, pages, and what stands between them.

Theory of operation
-------------------
A body of the `ram` section is a row of records, each beginning with 64 bits: the offset in a block, and flags in
the bits below the page size. More than 95 % of a stream has one of two shapes: an 8-byte head and a page, or an
8-byte head and one zero byte, of the block that the record before had (CONTINUE). Such records stand at a fixed
stride, so numpy looks at all heads inside a slab at once and a whole run of them becomes one event, whose page
array is a strided view of the slab: nothing is copied and there is no Python object per page. Everything else
goes through the slow path, one record at a time.

The same records without sections are the preempt channel.

Rule 1: a page is inside a block that was announced; there is no event for any other.
Rule 2: "the block of the record before" is kept per channel, across sections, and begins unknown.
Rule 3: whatever the slabs, the records and their order are the same; only the borders of runs move.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any, Final, NoReturn, assert_never

import numpy as np
import numpy.typing as npt

from vmferry.wire import limits, mapped_ram
from vmferry.wire.buffer import Buffer
from vmferry.wire.errors import refuse
from vmferry.wire.events import (
    NEED_DATA,
    CompressedPage,
    Encoded,
    EndOfRam,
    MappedData,
    MemorySize,
    MultifdFlush,
    Offsets,
    PageRun,
    Pause,
    RamBlock,
    RamEvent,
    XbzrlePage,
    ZeroRun,
    to_raw,
    to_text,
)

ZERO: Final = 0x002
MEM_SIZE: Final = 0x004
PAGE: Final = 0x008
EOS: Final = 0x010
CONTINUE: Final = 0x020
XBZRLE: Final = 0x040
COMPRESS_PAGE: Final = 0x100
MULTIFD_FLUSH: Final = 0x200
_PAGE_KINDS: Final = frozenset({ZERO, PAGE, XBZRLE, COMPRESS_PAGE})

_WORD = struct.Struct(">Q")
_XBZRLE_HEAD = struct.Struct(">BH")
_LENGTH = struct.Struct(">I")
# So many heads are looked at one by one, then so many by numpy, then sixteen times as many, and so on: a short run
# should cost neither numpy's fixed price per call nor a look at the whole slab.
_FEW: Final = 8
_LOOK: Final = 256
_ROW_PAGES_MAX: Final = 1024
"""Pages that are compared at once with a row of heads made before; twice so many heads are kept, 16 KiB."""


class RamReader:
    """Decodes the records of one channel; the caller owns the buffer and knows where a body begins."""

    def __init__(
        self,
        *,
        page_size: int,
        blocks: dict[str, RamBlock] | None = None,
        compress: bool = False,
        ignore_shared: bool = False,
        mapped: bool = False,
    ) -> None:
        assert page_size.bit_count() == 1
        self.blocks: dict[str, RamBlock] = {} if blocks is None else blocks
        self.page_size = page_size
        self.ignore_shared = ignore_shared
        self.mapped = mapped
        self.has_page_sizes = False  # ADVISE told that some block's page size is not the usual one
        self.is_postcopy = False
        self.is_preempt = False
        self.file_offset = 0  # of the stream's first byte, for mapped-ram
        self._compress = compress
        self._low = page_size - 1
        self._block: RamBlock | None = None
        self._announced = bool(self.blocks)
        self._unlisted_bytes = 0
        self._region, self._region_heads = -1, b""  # what the heads of pages side by side look like here
        self._region_offsets = np.empty(0, np.uint64)

    def set_page_size(self, page_size: int) -> None:
        """The configuration section has told it; nothing was read so far."""
        assert not self._announced
        self.page_size = page_size
        self._low = page_size - 1

    def next(self, buffer: Buffer) -> RamEvent | Pause:
        """The next record or run, or NEED_DATA. Raises `WireError`."""
        if self._unlisted_bytes:
            return self._next_block(buffer)
        if self._block is not None:
            window = buffer.window()
            if len(window) > 8:
                (word,) = _WORD.unpack_from(window)
                flags = word & self._low
                if flags == PAGE | CONTINUE and not self.mapped and word < self._block.used_length:
                    if len(window) < 8 + self.page_size:
                        return NEED_DATA
                    return self._page_run(self._block, buffer, window, word)
                if flags == ZERO | CONTINUE and not self.mapped:
                    zeros = self._zero_run(self._block, window)
                    if zeros is not None:
                        buffer.skip(len(zeros.offsets) * 9)
                        return zeros
        return self._next_record(buffer)

    # --- the fast path ----------------------------------------------------------------------------------------

    def _page_run(self, block: RamBlock, buffer: Buffer, window: memoryview, word: int) -> PageRun:
        """Of a window that begins with the whole record of a page, whose head is `word`."""
        stride = 8 + self.page_size
        offsets = self._row(block, window, word)
        is_row = offsets is not None
        if offsets is None:
            offsets = self._run(window, stride, PAGE | CONTINUE, block.used_length)
        count = len(offsets)
        pages: npt.NDArray[np.uint8] = np.ndarray((count, self.page_size), np.uint8, window, 8, (stride, 1))
        buffer.skip(count * stride)
        return PageRun(block, offsets, pages, named=False, is_row=is_row)

    def _row(self, block: RamBlock, window: memoryview, word: int) -> Offsets | None:
        """The offsets, if the window has nothing but pages that lie side by side in their block too.

        That is how nearly all pages come, and one comparison with what their heads must be then shows it.
        """
        count = min(len(window) // (8 + self.page_size), _ROW_PAGES_MAX)
        if (word | self._low) + (count - 1) * self.page_size >= block.used_length:
            return None
        first = word // self.page_size
        region, at = divmod(first, _ROW_PAGES_MAX)
        if region != self._region:
            start = region * _ROW_PAGES_MAX
            numbers = np.arange(start, start + 2 * _ROW_PAGES_MAX, dtype=np.uint64)
            self._region, self._region_offsets = region, numbers * np.uint64(self.page_size)
            self._region_heads = _heads(self._region_offsets, PAGE | CONTINUE).tobytes()
        heads: npt.NDArray[Any] = np.ndarray((count,), "V8", window, 0, (8 + self.page_size,))
        if heads.tobytes() != self._region_heads[8 * at : 8 * (at + count)]:
            return None
        return self._region_offsets[at : at + count]

    def _zero_run(self, block: RamBlock, window: memoryview) -> ZeroRun | None:
        offsets = self._run(window, 9, ZERO | CONTINUE, block.used_length)
        fills: npt.NDArray[np.uint8] = np.ndarray((len(offsets),), np.uint8, window, 8, (9,))
        if fills.any():
            offsets = offsets[: int((fills != 0).argmax())]
        return ZeroRun(block, offsets, named=False) if len(offsets) else None

    def _run(self, window: memoryview, stride: int, flags: int, used_length: int) -> npt.NDArray[np.uint64]:
        """The offsets of the records in a row that have these flags and lie in the block."""
        count = len(window) // stride
        low = self._low
        few: list[int] = []
        for at in range(0, min(count, _FEW) * stride, stride):
            (word,) = _WORD.unpack_from(window, at)
            if word & low != flags or word >= used_length:
                return np.array(few, np.uint64)
            few.append(word ^ flags)
        if count <= _FEW:
            return np.array(few, np.uint64)
        words: npt.NDArray[Any] = np.ndarray((count,), ">u8", window, 0, (stride,))
        found: list[npt.NDArray[np.uint64]] = []
        start, look = 0, _LOOK
        while start < count:
            offsets = words[start : start + look].astype(np.uint64)
            offsets ^= np.uint64(flags)
            if int(np.bitwise_or.reduce(offsets)) & low or int(offsets.max()) >= used_length:
                bad = ((offsets & np.uint64(low)) != 0) | (offsets >= np.uint64(used_length))
                found.append(offsets[: int(bad.argmax())])
                break
            found.append(offsets)
            start += look
            look *= 16
        return found[0] if len(found) == 1 else np.concatenate(found)

    # --- the slow path ----------------------------------------------------------------------------------------

    def _next_record(self, buffer: Buffer) -> RamEvent | Pause:
        head = buffer.peek(8)
        if head is None:
            return NEED_DATA
        (word,) = _WORD.unpack(head)
        flags, offset = word & self._low, word & ~self._low
        kind = flags & ~CONTINUE
        if kind in _PAGE_KINDS:
            return self._page_record(buffer, kind, offset, continues=bool(flags & CONTINUE))
        if flags == EOS and offset == 0:
            buffer.take(8)
            return EndOfRam()
        if flags == MULTIFD_FLUSH and offset == 0 and not (self.is_postcopy or self.is_preempt or self.mapped):
            buffer.take(8)
            return MultifdFlush()
        if flags == MEM_SIZE and not self._announced and not self.is_preempt:
            return self._begin_blocks(buffer, offset)
        message = f"a record with flags {flags:#x} and offset {offset:#x} cannot be here"
        return self._refuse(buffer, "ram-flags", message)

    def _page_record(self, buffer: Buffer, kind: int, offset: int, *, continues: bool) -> RamEvent | Pause:
        if self.mapped or (kind == XBZRLE and (self.is_postcopy or self.is_preempt)):
            self._refuse(buffer, "ram-flags", f"a page record of kind {kind:#x} cannot be in this stream")
        if kind == COMPRESS_PAGE and not self._compress:
            self._refuse(buffer, "ram-flags", "a compressed page, but `compress` is off")
        found = self._block_of(buffer, continues)
        if found is None:
            return NEED_DATA
        block, head_bytes = found
        if offset >= block.used_length:
            self._refuse(buffer, "ram-range", f"offset {offset:#x} is outside of block {block.name!r}")
        body = self._payload(buffer, kind, head_bytes)
        if body is None:
            return NEED_DATA
        skipped, length = body
        record = buffer.take(head_bytes + skipped + length)
        if record is None:
            return NEED_DATA
        data = record[head_bytes + skipped :]
        self._block = block
        match kind:
            case 0x008:
                pages = np.frombuffer(data, np.uint8).reshape(1, self.page_size)
                return PageRun(block, np.array([offset], np.uint64), pages, named=not continues)
            case 0x002:
                return ZeroRun(block, np.array([offset], np.uint64), named=not continues)
            case 0x040:
                return XbzrlePage(block, offset, bytes(data), named=not continues)
            case _:
                assert kind == COMPRESS_PAGE
                return CompressedPage(block, offset, bytes(data), named=not continues)

    def _block_of(self, buffer: Buffer, continues: bool) -> tuple[RamBlock, int] | None:
        """The record's block and how long its head is."""
        if continues:
            if self._block is None:
                self._refuse(buffer, "ram-continue", "a record continues a block, but there was none before")
            return self._block, 8
        length = buffer.peek(9)
        if length is None:
            return None
        head = buffer.peek(9 + length[8])
        if head is None:
            return None
        name = to_text(head[9:])
        block = self.blocks.get(name)
        if block is None:
            self._refuse(buffer, "ram-block", f"block {name!r} was not announced")
        return block, 9 + length[8]

    def _payload(self, buffer: Buffer, kind: int, head_bytes: int) -> tuple[int, int] | None:
        """What stands before a record's payload, and its length."""
        if kind == PAGE:
            return 0, self.page_size
        if kind == ZERO:
            head = buffer.peek(head_bytes + 1)
            if head is not None and head[-1] != 0:
                self._refuse(buffer, "ram-fill", "a page is filled with something else than zeros")
            return None if head is None else (1, 0)
        if kind == XBZRLE:
            head = buffer.peek(head_bytes + 3)
            if head is None:
                return None
            encoding, length = _XBZRLE_HEAD.unpack_from(head, head_bytes)
            if encoding != 1 or length > self.page_size:
                self._refuse(buffer, "ram-xbzrle", f"xbzrle encoding {encoding} with {length} bytes")
            return 3, length
        head = buffer.peek(head_bytes + 4)
        if head is None:
            return None
        (length,) = _LENGTH.unpack_from(head, head_bytes)
        if length > self.page_size + limits.COMPRESSED_PAGE_SLACK_BYTES:
            self._refuse(buffer, "ram-compressed", f"a compressed page of {length} bytes")
        return 4, length

    # --- the block list ---------------------------------------------------------------------------------------

    def _begin_blocks(self, buffer: Buffer, total: int) -> RamEvent:
        if not 0 < total <= limits.RAM_BYTES_MAX:
            self._refuse(buffer, "ram-size", f"{total} bytes of RAM")
        buffer.take(8)
        self._announced = True
        self._unlisted_bytes = total
        return MemorySize(total)

    def _next_block(self, buffer: Buffer) -> RamBlock | Pause:
        length = buffer.peek(1)
        if length is None:
            return NEED_DATA
        fixed = 1 + length[0] + 8
        # A page size is there if its first byte cannot begin a name and its low bits cannot begin a record.
        more = 8 if self.has_page_sizes else 0
        more += 8 if self.ignore_shared else 0
        more += mapped_ram.HEADER_BYTES if self.mapped else 0
        # Behind the last block there is at least the end mark of RAM, so 8 bytes more do come.
        entry = buffer.peek(fixed + more)
        if entry is None:
            return NEED_DATA
        name = to_text(entry[1 : 1 + length[0]])
        (used_length,) = _WORD.unpack_from(entry, fixed - 8)
        self._check_block(buffer, name, used_length)
        at = fixed
        page_size = address = header = None
        if self.has_page_sizes:
            (candidate,) = _WORD.unpack_from(entry, at)
            if entry[at] == 0 and candidate & 0xFFF == 0 and candidate:
                if candidate.bit_count() != 1:
                    self._refuse(buffer, "ram-page-size", f"page size {candidate} of block {name!r}")
                page_size = candidate
                at += 8
        if self.ignore_shared:
            (address,) = _WORD.unpack_from(entry, at)
            at += 8
        if self.mapped:
            start = self.file_offset + buffer.offset + at
            header = mapped_ram.decode_header(
                entry[at : at + mapped_ram.HEADER_BYTES],
                used_length=used_length,
                file_offset=start,
                page_size=self.page_size,
                offset=buffer.offset,
            )
            at += mapped_ram.HEADER_BYTES
        buffer.take(at)
        block = RamBlock(name, used_length, page_size, address, header)
        self.blocks[name] = block
        self._unlisted_bytes -= used_length
        return block

    def _check_block(self, buffer: Buffer, name: str, used_length: int) -> None:
        if not name or name in self.blocks or len(self.blocks) >= limits.RAM_BLOCKS_MAX:
            self._refuse(buffer, "ram-block", f"block {name!r} is announced twice, has no name, or is one too many")
        if used_length == 0 or used_length % self.page_size or used_length > self._unlisted_bytes:
            self._refuse(buffer, "ram-block-size", f"block {name!r} has {used_length} bytes")

    def _refuse(self, buffer: Buffer, reason: str, message: str) -> NoReturn:
        refuse(reason, message, offset=buffer.offset, section="preempt" if self.is_preempt else "ram")


# --- encode -------------------------------------------------------------------------------------------------


def encode(event: RamEvent) -> list[Encoded]:
    """The bytes of one event of RAM."""
    match event:
        case PageRun():
            return encode_pages(event)
        case ZeroRun():
            return encode_zeros(event)
        case XbzrlePage(block, offset, delta, named):
            return [_head(block, offset | XBZRLE, named), _XBZRLE_HEAD.pack(1, len(delta)), delta]
        case CompressedPage(block, offset, data, named):
            return [_head(block, offset | COMPRESS_PAGE, named), _LENGTH.pack(len(data)), data]
        case EndOfRam():
            return [_WORD.pack(EOS)]
        case MultifdFlush():
            return [_WORD.pack(MULTIFD_FLUSH)]
        case MemorySize(total):
            return [_WORD.pack(total | MEM_SIZE)]
        case RamBlock():
            return [_encode_block(event)]
        case MappedData():
            return [event.data]
        case _ as never:  # pragma: no cover
            assert_never(never)


def encode_pages(run: PageRun) -> list[Encoded]:
    """Heads and pages of a run, interleaved."""
    count, page_size = run.pages.shape
    first: list[Encoded] = []
    start = 0
    if run.named:
        first = [_head(run.block, int(run.offsets[0]) | PAGE, named=True), np.ascontiguousarray(run.pages[0])]
        start = 1
    out = np.empty((count - start, 8 + page_size), np.uint8)
    out[:, :8] = _heads(run.offsets[start:], PAGE | CONTINUE)
    out[:, 8:] = run.pages[start:]
    return [*first, out.reshape(-1)]


def encode_zeros(run: ZeroRun) -> list[Encoded]:
    """The records of zero pages."""
    count = len(run.offsets)
    first: list[Encoded] = []
    start = 0
    if run.named:
        first = [_head(run.block, int(run.offsets[0]) | ZERO, named=True), b"\0"]
        start = 1
    out = np.zeros((count - start, 9), np.uint8)
    out[:, :8] = _heads(run.offsets[start:], ZERO | CONTINUE)
    return [*first, out.reshape(-1)]


def page_heads(run: PageRun) -> npt.NDArray[np.uint8]:
    """The 8-byte heads of a run that goes on with its block, one per row, for senders that gather."""
    assert not run.named
    return _heads(run.offsets, PAGE | CONTINUE)


def _heads(offsets: npt.NDArray[np.uint64], flags: int) -> npt.NDArray[np.uint8]:
    return (offsets | np.uint64(flags)).astype(">u8").view(np.uint8).reshape(len(offsets), 8)


def _head(block: RamBlock, word: int, named: bool) -> bytes:
    if not named:
        return _WORD.pack(word | CONTINUE)
    name = to_raw(block.name)
    return _WORD.pack(word) + bytes([len(name)]) + name


def _encode_block(block: RamBlock) -> bytes:
    name = to_raw(block.name)
    parts = [bytes([len(name)]), name, _WORD.pack(block.used_length)]
    if block.page_size is not None:
        parts.append(_WORD.pack(block.page_size))
    if block.address is not None:
        parts.append(_WORD.pack(block.address))
    if block.mapped is not None:
        parts.append(mapped_ram.encode_header(block.mapped))
    return b"".join(parts)


# --- contents -------------------------------------------------------------------------------------------------


def inflate_page(event: CompressedPage, page_size: int) -> bytes:
    """The page of a compressed record. Raises `WireError`."""
    inflater = zlib.decompressobj()
    try:
        page = inflater.decompress(event.data, page_size)
    except zlib.error as error:
        refuse("ram-compressed", f"page {event.offset:#x}: {error}", offset=0, section="ram")
    if len(page) != page_size or not inflater.eof or inflater.unused_data:
        refuse("ram-compressed", f"page {event.offset:#x} does not inflate to a page", offset=0, section="ram")
    return page


def total_bytes(blocks: Mapping[str, RamBlock]) -> int:
    """What a `MemorySize` before these blocks says."""
    return sum(block.used_length for block in blocks.values())
