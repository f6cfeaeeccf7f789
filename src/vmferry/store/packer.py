"""Fills packs with pages and writes them, and the indexes that describe them.

Theory of operation
-------------------
Pages come in, get an *ordinal* each (0, 1, …) and wait until a frame is full; whole pages and differences wait apart.
A full frame goes into the pack that is being filled, which fixes its pages' rows; a full pack is put into the store;
when enough pages are in packs, their index is. Rows are counted through all indexes of one packer (`rows`).

Rule 1: an index is put when all of its packs are durable, never before.
Rule 2: one pack is in memory, and at most one frame of each kind. One thread.
Rule 3: what could not be put is kept as it is, and is the first thing that the next call puts: the store may have it,
        and then with these very bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vmferry.store.compression import Compressor
from vmferry.store.index import PackFacts, index_name, of_packs, write_index
from vmferry.store.known import Numbers
from vmferry.store.pack import (
    COMPRESSED,
    DIFFERENCES,
    PLAIN,
    Directory,
    Frames,
    pack_begin,
    pack_end,
    pack_name,
    proof_of,
)
from vmferry.store.page_ids import ID_BYTES, PAGE_BYTES, Ids, Pages
from vmferry.store.repository import Repository


@dataclass(slots=True)
class _Waiting:
    """Pages that do not fill a frame yet."""

    pages: Pages
    ids: Ids
    bases: Ids
    ordinals: npt.NDArray[np.int64]
    count: int = 0


@dataclass(slots=True)
class _Pack:
    """The pack that is being filled."""

    pack_id: bytes
    first_row: int
    data: bytearray = field(default_factory=lambda: bytearray(pack_begin()))
    lengths: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ids: list[Ids] = field(default_factory=list)
    bases: list[Ids] = field(default_factory=list)


class Packer:
    """See the module's text. `on_object` is called before each object that is put: owners renew their locks there."""

    def __init__(self, repository: Repository, on_object: Callable[[], None]) -> None:
        self._repository, self._on_object = repository, on_object
        self._pack_bytes, self._index_pages = repository.shape.pack_bytes, repository.shape.index_pages
        self._frame_pages = repository.config.frame_pages
        self._compressor = Compressor(repository.shape.level)
        self._waiting = {PLAIN: self._empty(), DIFFERENCES: self._empty()}
        self._pack: _Pack | None = None
        self._closed: tuple[PackFacts, bytes] | None = None
        """A pack that is full, and its bytes: it is not in the store yet, as far as is known."""
        self._index_id = repository.random(16)
        self._facts: list[PackFacts] = []
        self._index_first = 0
        self._placed = 0
        self._rows = np.zeros(1024, np.uint32)
        self.ordinals = 0
        """How many pages have come."""
        self.stored_bytes = 0
        """Packs that were put."""
        self.written: list[tuple[bytes, int]] = []
        """Indexes that were put: id and rows."""

    @property
    def rows(self) -> Numbers:
        """After `finish`: each ordinal's row, counted through the indexes in `written`."""
        return self._rows[: self.ordinals]

    def add(self, pages: Pages, ids: Ids) -> None:
        """Whole pages, new ones. They are copied, or stored before this returns."""
        self._add(PLAIN, pages, ids, np.zeros((0, ID_BYTES), np.uint8))

    def add_differences(self, differences: Pages, ids: Ids, bases: Ids) -> None:
        """Pages as differences to pages that are stored whole; `ids` are those of the pages themselves."""
        assert len(bases) == len(ids)
        self._add(DIFFERENCES, differences, ids, bases)

    def finish(self) -> None:
        """Everything is durable when this returns, and described by indexes. After StoreTransient: again is fine."""
        self._put_closed()
        for kind, waiting in self._waiting.items():
            if waiting.count:
                self._flush_waiting(kind, waiting)
        self._close_pack()
        self._close_index()

    def _add(self, kind: int, pages: Pages, ids: Ids, bases: Ids) -> None:
        assert len(pages) == len(ids)
        self._put_closed()
        ordinals = np.arange(self.ordinals, self.ordinals + len(ids))
        self.ordinals += len(ids)
        while self.ordinals > len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        waiting, unit, at = self._waiting[kind], self._frame_pages, 0
        while at < len(ids):
            if not waiting.count and at + unit <= len(ids):
                part = slice(at, at + unit)
                self._store(kind, pages[part], ids[part], bases[part], ordinals[part])
                at += unit
                continue
            take = min(unit - waiting.count, len(ids) - at)
            into, part = slice(waiting.count, waiting.count + take), slice(at, at + take)
            waiting.pages[into], waiting.ids[into], waiting.ordinals[into] = pages[part], ids[part], ordinals[part]
            if kind is DIFFERENCES:
                waiting.bases[into] = bases[part]
            waiting.count += take
            at += take
            if waiting.count == unit:
                self._flush_waiting(kind, waiting)

    def _flush_waiting(self, kind: int, waiting: _Waiting) -> None:
        part = slice(0, waiting.count)
        waiting.count = 0
        self._store(kind, waiting.pages[part], waiting.ids[part], waiting.bases[part], waiting.ordinals[part])

    def _store(self, kind: int, pages: Pages, ids: Ids, bases: Ids, ordinals: npt.NDArray[np.int64]) -> None:
        """One frame into the pack."""
        if self._pack is None:
            self._pack = _Pack(self._repository.random(16), self._placed - self._index_first)
        pack = self._pack
        plain = np.ascontiguousarray(pages).reshape(-1).data
        frame = self._compressor.frame(plain)
        kind |= COMPRESSED
        if len(frame) >= len(plain):
            frame, kind = bytes(plain), kind & ~COMPRESSED
        number = len(pack.lengths) + 1
        sealed = self._repository.seal.close_frame(pack_name(pack.pack_id), number, frame)
        pack.data += sealed
        pack.lengths.append(len(sealed))
        pack.kinds.append(kind)
        pack.counts.append(len(ids))
        pack.ids.append(ids.copy())
        if kind & DIFFERENCES:
            pack.bases.append(bases.copy())
        self._rows[ordinals] = np.arange(self._placed, self._placed + len(ids))
        self._placed += len(ids)
        if len(pack.data) >= self._pack_bytes:
            self._close_pack()
            if self._placed - self._index_first >= self._index_pages:
                self._close_index()

    def _close_pack(self) -> None:
        pack, self._pack = self._pack, None
        if pack is None:
            return
        frames = Frames(
            np.array(pack.lengths, np.uint32),
            np.array(pack.kinds, np.uint8),
            np.array(pack.counts, np.uint8),
            np.concatenate([*pack.bases, np.zeros((0, ID_BYTES), np.uint8)]),
        )
        name = pack_name(pack.pack_id)
        ids = np.concatenate(pack.ids)
        directory = Directory(self._index_id, pack.first_row, frames, proof_of(ids))
        data = b"".join((pack.data, pack_end(self._repository.seal, name, directory)))
        self._closed = PackFacts(pack.pack_id, len(data), frames, ids), data
        self._put_closed()

    def _put_closed(self) -> None:
        if self._closed is None:
            return
        facts, data = self._closed
        self._on_object()
        self._repository.put_new(pack_name(facts.pack_id), data)
        self._closed = None
        self.stored_bytes += len(data)
        self._facts.append(facts)

    def _close_index(self) -> None:
        if not self._facts:
            return
        index = of_packs(self._index_id, self._facts)
        self._on_object()
        self._repository.put_new(index_name(self._index_id), write_index(self._repository.seal, index))
        self.written.append((self._index_id, index.rows))
        self._index_id, self._facts, self._index_first = self._repository.random(16), [], self._placed

    def _empty(self) -> _Waiting:
        unit = self._frame_pages
        return _Waiting(
            np.zeros((unit, PAGE_BYTES), np.uint8),
            np.zeros((unit, ID_BYTES), np.uint8),
            np.zeros((unit, ID_BYTES), np.uint8),
            np.zeros(unit, np.int64),
        )
