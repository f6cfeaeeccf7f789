"""Index objects: which pages are in which packs. Pure: bytes and arrays.

Theory of operation
-------------------
An index describes packs that were written one after the other; a *row* is a page's number in it: packs in order, frames
in order, slots in order. Page tables of snapshots say index and row, never where a page is: a row keeps its meaning
(its id) for good, also when `prune` has put the page into another pack, which then another index describes.

In memory all packs of an index are one set of arrays, about 19 bytes per page: 16 of id, the rest frames. A million
pages (4 GiB of unique memory) take 19 MB.

Rule 1: an index is never changed. Packs that it names and that are gone have been emptied by `prune`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vmferry.limits import STORE_INDEX_PAGES_MAX
from vmferry.store.envelope import INDEX, PREFIX, Opened, seal_object
from vmferry.store.errors import Damaged
from vmferry.store.pack import DIFFERENCES, Frames, frames_bytes, read_frames
from vmferry.store.page_ids import ID_BYTES, Ids
from vmferry.store.seal import Seal

_PACK_BYTES: Final = 32
_PACK: Final = np.dtype([("id", "V16"), ("size", "<u8"), ("frames", "<u4"), ("bases", "<u4")])
_PACKS, _FRAMES, _IDS, _SECTIONS = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class PackFacts:
    """One pack as an index knows it."""

    pack_id: bytes
    size_bytes: int
    frames: Frames
    ids: Ids


class Place(NamedTuple):
    """Where a frame is."""

    pack: int
    """The pack's number in the index."""
    number: int
    """The frame's number in the pack."""
    offset: int
    length: int
    kind: int
    first_row: int
    pages: int


class Index:
    """One index object in memory. Make it with `of_packs` or `read_index`."""

    def __init__(self, index_id: bytes, packs: npt.NDArray[np.void], frames: Frames, ids: Ids) -> None:
        self.index_id = index_id
        self.ids = ids
        self.pack_ids: list[bytes] = [bytes(each) for each in packs["id"]]
        self.pack_sizes = packs["size"]
        self.frames = frames
        self.first_frames = _starts(packs["frames"])
        """The first frame of each pack, and the number of all frames."""
        self.first_rows = _starts(frames.counts)
        """The first row of each frame, and the number of all rows."""
        self._differences = frames.kinds & DIFFERENCES != 0
        self._first_bases = _starts(np.where(self._differences, frames.counts, 0))
        before = _starts(frames.lengths)
        packs_before = np.repeat(before[self.first_frames[:-1]], packs["frames"])
        self._offsets = before[:-1] - packs_before + PREFIX.size

    @property
    def rows(self) -> int:
        """How many pages it describes."""
        return len(self.ids)

    def frames_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The frame that each row is in."""
        return np.asarray(np.searchsorted(self.first_rows, rows, side="right") - 1)

    def frame_of(self, row: int) -> int:
        """The frame that one row is in."""
        return int(self.first_rows.searchsorted(row, side="right")) - 1

    def packs_of(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The pack that each frame is in."""
        return np.asarray(np.searchsorted(self.first_frames, frames, side="right") - 1)

    def place(self, frame: int) -> Place:
        """Where a frame is."""
        pack = int(self.first_frames.searchsorted(frame, side="right")) - 1
        return Place(
            pack=pack,
            number=frame - int(self.first_frames[pack]),
            offset=int(self._offsets[frame]),
            length=int(self.frames.lengths[frame]),
            kind=int(self.frames.kinds[frame]),
            first_row=int(self.first_rows[frame]),
            pages=int(self.frames.counts[frame]),
        )

    def places(self, frames: npt.NDArray[np.int64]) -> list[Place]:
        """Where frames are: `place` for many of them."""
        packs = self.packs_of(frames)
        known = self.frames
        columns = (
            packs, frames - self.first_frames[packs], self._offsets[frames], known.lengths[frames],
            known.kinds[frames], self.first_rows[frames], known.counts[frames],
        )  # fmt: skip
        return [Place(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def pack_rows(self) -> npt.NDArray[np.int64]:
        """The first row of each pack, and the number of all rows."""
        return np.asarray(self.first_rows[self.first_frames])

    def are_differences(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which rows are stored as differences."""
        return np.asarray(self._differences[self.frames_of(rows)])

    def with_ids(self, ids: Ids) -> Index:
        """The same with other ids."""
        assert ids.shape == self.ids.shape
        other = copy.copy(self)
        other.ids = ids
        return other

    def frames_between(self, frames: slice) -> Frames:
        """What is known of a run of frames."""
        bases = slice(int(self._first_bases[frames.start]), int(self._first_bases[frames.stop]))
        known = self.frames
        return Frames(known.lengths[frames], known.kinds[frames], known.counts[frames], known.bases[bases])

    def bases_of(self, rows: npt.NDArray[np.int64]) -> Ids:
        """The ids of the bases of rows that are differences."""
        frames = self.frames_of(rows)
        return np.asarray(self.frames.bases[self._first_bases[frames] + rows - self.first_rows[frames]])


def index_name(index_id: bytes) -> str:
    """The object's name."""
    assert len(index_id) == 16
    return f"index/{index_id.hex()}"


def of_packs(index_id: bytes, packs: Sequence[PackFacts]) -> Index:
    """The index of packs in this order."""
    table = np.zeros(len(packs), _PACK)
    for row, pack in zip(table, packs, strict=True):
        row["id"] = np.void(pack.pack_id)
        row["size"], row["frames"], row["bases"] = pack.size_bytes, len(pack.frames.lengths), len(pack.frames.bases)
    frames = Frames(
        np.concatenate([pack.frames.lengths for pack in packs] or [np.zeros(0, np.uint32)]),
        np.concatenate([pack.frames.kinds for pack in packs] or [np.zeros(0, np.uint8)]),
        np.concatenate([pack.frames.counts for pack in packs] or [np.zeros(0, np.uint8)]),
        np.concatenate([pack.frames.bases for pack in packs] or [np.zeros((0, ID_BYTES), np.uint8)]),
    )
    return Index(
        index_id, table, frames, np.concatenate([pack.ids for pack in packs] or [np.zeros((0, ID_BYTES), np.uint8)])
    )


def write_index(seal: Seal, index: Index) -> bytes:
    """The index as an object."""
    table = np.zeros(len(index.pack_ids), _PACK)
    table["id"] = np.array([np.void(each) for each in index.pack_ids], "V16")
    table["size"], table["frames"] = index.pack_sizes, np.diff(index.first_frames)
    table["bases"] = np.diff(index._first_bases[index.first_frames])
    head = {"packs": len(table), "frames": len(index.frames.lengths), "rows": index.rows,
            "bases": len(index.frames.bases)}  # fmt: skip
    sections = (table.tobytes(), index.frames.to_bytes(), index.ids.tobytes())
    return seal_object(seal, index_name(index.index_id), INDEX, head, sections)


def read_index(seal: Seal, index_id: bytes, data: bytes) -> Index:
    """The reverse of `write_index`. Raises Damaged."""
    name = index_name(index_id)
    opened = Opened(seal, name, INDEX, data, len(data))
    numbers = [opened.head.get(key) for key in ("packs", "frames", "rows", "bases")]
    if opened.count != _SECTIONS or not all(
        type(number) is int and 0 <= number <= STORE_INDEX_PAGES_MAX for number in numbers
    ):
        raise Damaged(name, "its head is not an index's")
    packs, frames, rows, bases = (int(number or 0) for number in numbers)
    expected = (packs * _PACK_BYTES, frames_bytes(frames, bases), rows * ID_BYTES)
    if tuple(opened.plain_bytes(number) for number in range(_SECTIONS)) != expected:
        raise Damaged(name, "its sections are not as long as its head says")
    table = np.frombuffer(opened.section(_PACKS, expected[_PACKS]), _PACK)
    found = read_frames(name, opened.section(_FRAMES, expected[_FRAMES]), frames, bases)
    ids = np.frombuffer(opened.section(_IDS, expected[_IDS]), np.uint8).reshape(-1, ID_BYTES)
    if int(table["frames"].sum(dtype=np.int64)) != frames or found.pages != rows:
        raise Damaged(name, "its numbers contradict each other")
    index = Index(index_id, table, found, ids)
    if np.any(np.diff(index._first_bases[index.first_frames]) != table["bases"]):
        raise Damaged(name, "its bases are not where its packs say")
    return index


def _starts(counts: npt.NDArray[np.unsignedinteger] | npt.NDArray[np.signedinteger]) -> npt.NDArray[np.int64]:
    """Where each of these runs begins, and where the last one ends."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, dtype=np.int64, out=starts[1:])
    return starts
