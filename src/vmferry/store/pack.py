"""Packs: frames of pages, and a directory of them. Pure: bytes and arrays.

    prefix (16 bytes, `envelope`), frames, sealed directory,
    tail (16 bytes: length of the sealed directory, 0, "VMFSPACK")

A frame is up to `frame_pages` pages that are compressed together, so that one of them can be had without the others'
neighbours; a *slot* is a page's place in it. Two bits say how it is stored: compressed or as it is, and whole
pages or differences. A difference is the exclusive-or of a page and another one, its *base*, which is stored whole
somewhere; the directory has the base's id. Chains are one link long.

The directory holds what an index object holds of the pack, ids excepted: those follow from the pages. So an index that
was lost is made again from packs alone (`index`, `first_row`: which index, and which rows of it). Its `proof` is a hash
of all ids, so that a page that was damaged meanwhile does not get an id that fits the damage.

Rule 1: the tail finds the directory, the directory's lengths must add up to the pack's size, before a frame is read.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.limits import STORE_FRAME_PAGES_MAX, STORE_PACK_BYTES_MAX
from vmferry.store.compression import inflate
from vmferry.store.envelope import PACK, PREFIX, prefix, read_prefix
from vmferry.store.errors import Damaged
from vmferry.store.page_ids import ID_BYTES, PAGE_BYTES, Ids, Pages
from vmferry.store.seal import SEAL_BYTES, Seal

_TAIL: Final = struct.Struct("<II8s")
_TAIL_MAGIC: Final = b"VMFSPACK"
_DIRECTORY: Final = struct.Struct("<16sQII16s")
TAIL_BYTES: Final = _TAIL.size


PLAIN: Final = 0
COMPRESSED: Final = 1
DIFFERENCES: Final = 2
"""How a frame is stored: bits. Numbers and no enumeration: reading an enumeration's member takes a microsecond."""


@dataclass(frozen=True, slots=True)
class Frames:
    """What is known of a run of frames, one per element."""

    lengths: npt.NDArray[np.uint32]
    """Stored bytes, the seal's included."""
    kinds: npt.NDArray[np.uint8]
    counts: npt.NDArray[np.uint8]
    """Pages."""
    bases: Ids
    """The bases of all pages in frames of differences, in order."""

    @property
    def pages(self) -> int:
        """How many pages there are in all frames."""
        return int(self.counts.sum(dtype=np.int64))

    def to_bytes(self) -> bytes:
        """As it stands in directories and indexes."""
        arrays = (self.lengths.astype("<u4"), self.kinds, self.counts, self.bases)
        return b"".join(array.tobytes() for array in arrays)


def frames_bytes(frames: int, bases: int) -> int:
    """The length of `Frames.to_bytes`."""
    return frames * 6 + bases * ID_BYTES


def read_frames(name: str, data: bytes, frames: int, bases: int) -> Frames:
    """The reverse of `Frames.to_bytes`. Raises Damaged."""
    if len(data) != frames_bytes(frames, bases):
        raise Damaged(name, f"{frames} frames and {bases} bases do not take {len(data)} bytes")
    lengths = np.frombuffer(data, "<u4", frames)
    kinds = np.frombuffer(data, np.uint8, frames, frames * 4)
    counts = np.frombuffer(data, np.uint8, frames, frames * 5)
    found = Frames(lengths, kinds, counts, np.frombuffer(data, np.uint8, offset=frames * 6).reshape(-1, ID_BYTES))
    if np.any(kinds > 3) or np.any(counts == 0) or np.any(counts > STORE_FRAME_PAGES_MAX):
        raise Damaged(name, "a frame is of no possible kind")
    # The largest that a frame can be: pages that could not be compressed, and a seal.
    if np.any(lengths == 0) or np.any(lengths > counts.astype(np.uint32) * PAGE_BYTES + SEAL_BYTES):
        raise Damaged(name, "a frame has no possible length")
    if int(counts[kinds & DIFFERENCES != 0].sum(dtype=np.int64)) != bases:
        raise Damaged(name, "there is not one base for each difference")
    return found


@dataclass(frozen=True, slots=True)
class Directory:
    """A pack's own description."""

    index: bytes
    """The id of the index object that describes the pack from the beginning."""
    first_row: int
    """Which row of that index the pack's first page is."""
    frames: Frames
    proof: bytes
    """`proof_of` the ids of its pages."""


def pack_name(pack_id: bytes) -> str:
    """The object's name. Two digits of it are a folder, so that no folder has too many files."""
    assert len(pack_id) == 16
    return f"packs/{pack_id.hex()[:2]}/{pack_id.hex()}"


def pack_end(seal: Seal, name: str, directory: Directory) -> bytes:
    """What follows the frames."""
    frames = directory.frames
    counts = len(frames.lengths), len(frames.bases)
    head = _DIRECTORY.pack(directory.index, directory.first_row, *counts, directory.proof)
    sealed = seal.close(name, 0, head + frames.to_bytes())
    return sealed + _TAIL.pack(len(sealed), 0, _TAIL_MAGIC)


def proof_of(ids: Ids) -> bytes:
    """16 bytes that fit these ids in this order and no others."""
    return hashlib.sha256(ids.tobytes()).digest()[:SEAL_BYTES]


def pack_begin() -> bytes:
    """What stands before the frames."""
    return prefix(PACK)


def read_tail(name: str, tail: bytes, size_bytes: int) -> int:
    """The last 16 bytes -> the length of the sealed directory before them. Raises Damaged."""
    if size_bytes > STORE_PACK_BYTES_MAX:
        raise Damaged(name, f"a pack of {size_bytes} bytes is none of ours")
    if len(tail) != TAIL_BYTES:
        raise Damaged(name, "it is too short for a pack")
    length, zero, magic = _TAIL.unpack(tail)
    if magic != _TAIL_MAGIC or zero or not SEAL_BYTES <= length <= size_bytes - TAIL_BYTES - PREFIX.size:
        raise Damaged(name, "it does not end like a pack")
    return int(length)


def read_directory(seal: Seal, name: str, sealed: bytes, size_bytes: int) -> Directory:
    """The sealed directory of a pack of `size_bytes`. Raises Damaged."""
    plain = seal.open(name, 0, sealed)
    if len(plain) < _DIRECTORY.size:
        raise Damaged(name, "its directory is too short")
    index, first_row, frames, bases, proof = _DIRECTORY.unpack_from(plain)
    found = read_frames(name, plain[_DIRECTORY.size :], frames, bases)
    if PREFIX.size + int(found.lengths.sum(dtype=np.int64)) + len(sealed) + TAIL_BYTES != size_bytes:
        raise Damaged(name, f"its directory does not speak of its {size_bytes} bytes")
    return Directory(index, first_row, found, proof)


def read_whole(seal: Seal, name: str, data: bytes) -> Directory:
    """The directory of a pack that is here as a whole. Raises Damaged."""
    if read_prefix(name, data, PACK):
        raise Damaged(name, "it begins with a head, and a pack has none")
    length = read_tail(name, data[-TAIL_BYTES:], len(data))
    return read_directory(seal, name, data[len(data) - TAIL_BYTES - length : len(data) - TAIL_BYTES], len(data))


def inflate_frame(seal: Seal, name: str, number: int, stored: bytes, kind: int, count: int) -> Pages:
    """Frame `number` (from 0) of a pack: its pages, or their differences to their bases. Raises Damaged.

    Unless the seal `proves_frames`, nothing proves yet that they are what they should be: compare them with their ids.
    """
    data = seal.open_frame(name, number + 1, stored)
    if kind & COMPRESSED:
        data = inflate(name, data, count * PAGE_BYTES)
    elif len(data) != count * PAGE_BYTES:
        raise Damaged(name, f"frame {number} is not {count} pages long")
    return np.frombuffer(data, np.uint8).reshape(count, PAGE_BYTES)
