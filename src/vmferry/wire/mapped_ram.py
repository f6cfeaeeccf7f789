"""Files with RAM at fixed places (capability `mapped-ram`): where bitmaps and pages are.

A block's entry in the block list is followed by a head that tells absolute file offsets. The bitmap stands right
behind it, the pages at the next mebibyte; then the stream goes on. So a file is one stream with gaps, and the
stream decoder hands the gaps through as `MappedData` or is told that its caller jumped over one.

Rule 1: the offsets must point forward and not overlap; a reader may trust what `decode_header` let pass.
Rule 2: a set bit means that the page is in the file; a clear one that it is zero, whatever the file holds.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from vmferry.wire.buffer import Bytes
from vmferry.wire.errors import refuse
from vmferry.wire.events import MappedHeader, RamBlock

_HEADER = struct.Struct(">IQQQ")
HEADER_BYTES = _HEADER.size
VERSION = 1
PAGES_ALIGNMENT = 1 << 20


def bitmap_bytes(used_length: int, page_size: int) -> int:
    """The size of a block's bitmap: whole words of 64 bits."""
    pages = used_length // page_size
    return (pages + 63) // 64 * 8


def decode_header(raw: bytes, *, used_length: int, file_offset: int, page_size: int, offset: int) -> MappedHeader:
    """`file_offset` is where the head stands in the file. Raises `WireError`."""
    version, head_page_size, bitmap_offset, pages_offset = _HEADER.unpack(raw)
    if version != VERSION or head_page_size != page_size:
        refuse("mapped-version", f"version {version}, page size {head_page_size}", offset=offset, section="ram")
    bitmap_end = bitmap_offset + bitmap_bytes(used_length, page_size)
    if bitmap_offset != file_offset + HEADER_BYTES or pages_offset < bitmap_end or pages_offset % page_size:
        refuse(
            "mapped-offset",
            f"bitmap at {bitmap_offset:#x}, pages at {pages_offset:#x}",
            offset=offset,
            section="ram",
        )
    return MappedHeader(page_size, bitmap_offset, pages_offset)


def encode_header(header: MappedHeader) -> bytes:
    """The 28 bytes behind a block's entry."""
    return _HEADER.pack(VERSION, header.page_size, header.bitmap_offset, header.pages_offset)


def place(used_length: int, *, file_offset: int, page_size: int) -> MappedHeader:
    """Where a writer puts the bitmap and pages of a block whose head stands at `file_offset`."""
    bitmap_offset = file_offset + HEADER_BYTES
    bitmap_end = bitmap_offset + bitmap_bytes(used_length, page_size)
    return MappedHeader(page_size, bitmap_offset, -(-bitmap_end // PAGES_ALIGNMENT) * PAGES_ALIGNMENT)


def gap_end(block: RamBlock) -> int:
    """The file offset at which the stream goes on behind a block."""
    assert block.mapped is not None
    return block.mapped.pages_offset + block.used_length


def present_pages(bitmap: Bytes, block: RamBlock) -> npt.NDArray[np.intp]:
    """The numbers of the pages that the file holds, ascending."""
    assert block.mapped is not None
    count = block.used_length // block.mapped.page_size
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    return np.flatnonzero(bits[:count])


def make_bitmap(present: npt.NDArray[np.bool_]) -> bytes:
    """The bitmap for one truth value per page."""
    words = (len(present) + 63) // 64
    bits = np.zeros(words * 64, np.bool_)
    bits[: len(present)] = present
    return np.packbits(bits, bitorder="little").tobytes()
