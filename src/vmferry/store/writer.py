"""Saves one snapshot. Nothing of it is there until `commit` returns; then all of it is.

Theory of operation
-------------------
Pages come in runs, in any order, from whoever reads them; a page that comes again replaces what it was. Zeros are
marked; the others are known by their ids: of this snapshot, of the repository, or new. A new page whose predecessor
is in the *base* snapshot goes in as the difference to it if few bytes differ; all others are stored whole.

Page tables hold numbers while the snapshot grows: rows of the indexes that were there, counted through, and behind
those the ordinals of new pages. `commit` translates them into what a manifest has.

Rule 1: the order of `repository`: packs, indexes, manifest, each durable before the next; a look for the lock at last.
Rule 2: `abort`, or any error, leaves objects that `prune` takes away, and never a manifest. Of an error in `commit`:
        LockLost means that nothing was committed. After StoreTransient the same `commit` can be called again, which
        does what is left. After any other nothing was committed, unless `may_be_there`: then the manifest's put may
        have been carried out, and nobody knows.
Rule 3: one thread. Memory: 20 bytes per page that the repository knows (up to `STORE_KNOWN_PAGES_MAX`: 84 MB), 4 per
        page of the guest and per new page, one pack.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import RepositoryError
from vmferry.limits import STORE_CREATED_S_MAX, STORE_DIFFERENT_BYTES_MAX, STORE_LOCK_STALE_S
from vmferry.store.backend import again
from vmferry.store.errors import Damaged, LockLost, StorePermanent
from vmferry.store.index import Index
from vmferry.store.known import UNKNOWN, KnownPages, Numbers, first_of_each
from vmferry.store.manifest import (
    UNSET,
    ZERO,
    Block,
    Counts,
    Head,
    IndexUse,
    Table,
    manifest_name,
    write_manifest,
)
from vmferry.store.packer import Packer
from vmferry.store.page_ids import PAGE_BYTES, Ids, Pages
from vmferry.store.reader import SnapshotReader, all_indexes
from vmferry.store.repository import Repository

log = logging.getLogger("vmferry.store")

_CHUNK: Final = 1 << 16


class SnapshotWriter:
    """A snapshot that is being saved.

    `base` is the snapshot that the guest had before, if there is one: an open reader, which stays the caller's.
    Raises RepositoryBusy while somebody prunes.
    """

    def __init__(
        self,
        repository: Repository,
        blocks: Sequence[Block],
        *,
        base: SnapshotReader | None = None,
        stale_s: float = STORE_LOCK_STALE_S,
    ) -> None:
        self._repository, self._base = repository, base
        self.snapshot = repository.random(16).hex()
        self.blocks = list(blocks)
        self._by_name = {block.name: number for number, block in enumerate(self.blocks)}
        assert len(self._by_name) == len(self.blocks), "names of blocks are different"
        self._tables: list[Table] = [np.full(block.pages, UNSET, np.uint32) for block in self.blocks]
        self._lock = repository.shared(f"save {self.snapshot}", stale_s=stale_s)
        try:
            self._known = KnownPages()
            self._indexes: list[tuple[bytes, int]] = []
            self._learn()
        except BaseException:
            self._lock.release()
            raise
        self._old_rows = sum(rows for _, rows in self._indexes)
        self._base_indexes: set[bytes] = set()
        self._sealed: tuple[bytes, Head] | None = None
        self.may_be_there = False
        """After a `commit` that failed: whether the snapshot may be in the repository all the same."""
        self._is_there = False
        """The manifest was put, and the lock was still there afterwards: nothing can take that back."""
        self.base_damage = ""
        """What of the base could not be read; pages that changed there were stored whole."""
        self._differences = 0
        self._packer = Packer(repository, self._lock.renew_if_due)

    def put(self, block: str, first: int, pages: Pages) -> None:
        """Pages from `first` on, one per row. They may be used again when this returns.

        Raises StoreTransient, StorePermanent, LockLost: abort; nothing was committed.
        """
        self.put_some(block, np.arange(first, first + len(pages)), pages)

    def put_some(self, block: str, numbers: npt.NDArray[np.int64], pages: Pages) -> None:
        """Pages with these numbers, one per row; of a number that is there twice the last one counts. As `put`."""
        assert pages.shape == (len(numbers), PAGE_BYTES)
        table = self._tables[self._by_name[block]]
        self._lock.renew_if_due()
        is_zero = ~pages.view(np.uint64).any(axis=1) if pages.flags.c_contiguous else ~pages.any(axis=1)
        rows = np.flatnonzero(~is_zero)
        ids = self._repository.ids.of_some(pages, rows.tolist())
        found = self._known.find(ids)
        is_new = found == UNKNOWN
        if is_new.any():
            found[is_new] = self._add(block, numbers, pages, rows[is_new], ids[is_new])
        values = np.full(len(numbers), ZERO, np.uint32)
        values[rows] = found
        # One assignment in the order of the pages, zeros among them: with a page twice numpy leaves the last one.
        table[numbers] = values

    def put_zeros(self, block: str, numbers: npt.NDArray[np.int64]) -> None:
        """These pages are zero: nothing has to be looked at. As `put`."""
        self._lock.renew_if_due()
        self._tables[self._by_name[block]][numbers] = ZERO

    def keep(self, block: str, numbers: npt.NDArray[np.int64]) -> None:
        """These pages are what they are in the base snapshot: the caller knows it, and nothing is read."""
        assert self._base is not None, "there is a base"
        theirs = self._base.table(block)[numbers]
        ours = theirs.copy()
        starts = dict(zip((each for each, _ in self._indexes), self._index_starts(), strict=True))
        for k, at, rows in self._base.source.split(theirs):
            ours[at] = rows + starts[self._base.source.indexes[k].index_id]
        self._tables[self._by_name[block]][numbers] = ours

    def missing(self, block: str) -> npt.NDArray[np.intp]:
        """The pages of a block that have not come yet."""
        return np.flatnonzero(self._tables[self._by_name[block]] == UNSET)

    def commit(
        self,
        name: str,
        *,
        device_state: bytes = b"",
        disks: Sequence[dict[str, Any]] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Head:
        """The snapshot is there, for good, when this returns; its id is `snapshot`. Every page must have come.

        Raises: see rule 2.
        """
        assert not any(len(self.missing(block.name)) for block in self.blocks), "every page has come"
        self._packer.finish()
        uses, tables = self._translated()
        counts = Counts(
            pages=sum(len(table) for table in tables),
            zero=sum(int(np.count_nonzero(table == ZERO)) for table in tables),
            known=sum(int(np.count_nonzero(table != ZERO)) for table in tables) - self._packer.ordinals,
            differences=self._differences,
            stored_bytes=self._packer.stored_bytes,
        )
        created_s = self._repository.clock.wall_s()
        if not 0 <= created_s <= STORE_CREATED_S_MAX:
            raise RepositoryError(f"this host's clock says {created_s:g} s since 1970: set it, and save again")
        head = Head(
            name, created_s, self.blocks, uses, counts, list(disks), dict(metadata or {})
        )  # fmt: skip
        if self._sealed is None:  # called again it must be the same bytes: they may be there already
            self._sealed = write_manifest(self._repository.seal, self.snapshot, head, device_state, tables), head
        data, head = self._sealed
        if not self._is_there:
            self._put_manifest(data)
        with contextlib.suppress(RepositoryError):  # a lock that stays gets stale by itself; the snapshot is there
            self._lock.release()
        return head

    def _put_manifest(self, data: bytes) -> None:
        """It is there, and was put under our lock, when this returns. Else `may_be_there` says what is known."""
        name, before = manifest_name(self.snapshot), self.may_be_there
        try:
            self._lock.check()  # most of those who were taken for dead learn it before they commit
            self.may_be_there = True
            try:
                self._repository.put_new(name, data)
            except StorePermanent as error:
                self.may_be_there = before or error.may_have_happened
                raise
            self._lock.check()
        except LockLost:
            if self.may_be_there:
                again(lambda: self._repository.backend.delete(name))
                self.may_be_there = False
            raise
        self._is_there = True

    def abort(self) -> None:
        """Gives the lock back; what was stored so far goes with the next prune. Again, or after commit, is fine.

        What it knew of the repository's pages is let go at once, whoever still holds it: 20 bytes for each."""
        self._known, self._base = KnownPages(), None
        self._lock.release()

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, *what: object) -> None:
        self.abort()

    # --- inside -------------------------------------------------------------------------------------------

    def _learn(self) -> None:
        """What the repository has. Only pages in packs that are there, whole by their sizes, count as known."""
        packs = self._repository.packs()
        base_rows = {} if self._base is None else self._base.rows_used()
        number = 0
        for index in self._all_indexes():
            if number + index.rows >= UNSET // 2:
                break  # half of all numbers are for what is new; what is not known is stored again
            sizes = [packs[each].size_bytes if each in packs else -1 for each in index.pack_ids]
            is_here = np.array(sizes, np.int64) == index.pack_sizes
            rows = np.flatnonzero(np.repeat(is_here, np.diff(index.pack_rows())))
            # A difference may have outlived its base, except one that the base snapshot uses.
            is_sure = ~index.are_differences(rows)
            is_sure |= np.isin(rows, base_rows.get(index.index_id, rows[:0]))
            rows = rows[is_sure]
            self._known.add(index.ids[rows], (rows + number).astype(np.uint32))
            self._indexes.append((index.index_id, index.rows))
            number += index.rows

    def _all_indexes(self) -> Iterator[Index]:
        """The base's first: if not all pages can be known, those are the ones that will come again."""
        first = [] if self._base is None else list(self._base.source.indexes)
        yield from first
        yield from all_indexes(self._repository, {index.index_id for index in first})

    def _add(
        self, block: str, numbers: npt.NDArray[np.int64], pages: Pages, rows: npt.NDArray[np.intp], ids: Ids
    ) -> Numbers:
        """Stores those rows of `pages`, which are not known; equal ones once. Their numbers."""
        leaders, positions = first_of_each(ids)
        rows, ids = rows[leaders], ids[leaders]
        given = np.full(len(ids), UNKNOWN, np.uint32)
        if self._base is not None and block in {each.name for each in self._base.head.blocks}:
            self._add_differences(self._base, block, numbers[rows], pages[rows], ids, given)
        whole = np.flatnonzero(given == UNKNOWN)
        given[whole] = self._next(len(whole))
        rows = rows[whole]
        is_all = len(rows) == len(pages)  # then the order is the same, too
        self._packer.add(pages if is_all else pages[rows], ids[whole])
        self._known.add(ids, given)
        return np.asarray(given[positions])

    def _add_differences(
        self, base: SnapshotReader, block: str, numbers: npt.NDArray[np.int64], pages: Pages, ids: Ids, given: Numbers
    ) -> None:
        """Stores those pages as differences for which that is worth it, and writes their numbers into `given`."""
        inside = np.flatnonzero(numbers < len(base.table(block)))
        try:
            has, base_ids, base_pages, base_numbers = base.bases_for(block, numbers[inside])
        except Damaged as error:  # of an old snapshot: these pages are stored whole, and need nothing of it
            if not self.base_damage:
                log.warning("snapshot=%s effect=read-base result=%s", base.snapshot, error)
            self.base_damage = self.base_damage or str(error)
            return
        which = inside[has]
        different = pages[which] ^ base_pages
        few = np.count_nonzero(different, axis=1) <= STORE_DIFFERENT_BYTES_MAX
        which = which[few]
        given[which] = self._next(len(which))
        self._packer.add_differences(different[few], ids[which], base_ids[few])
        self._differences += len(which)
        self._base_indexes |= {base.source.indexes[k].index_id for k, _, _ in base.source.split(base_numbers[few])}

    def _next(self, count: int) -> Numbers:
        """Numbers of the next new pages."""
        first = self._old_rows + self._packer.ordinals
        if first + count >= UNSET:
            raise RepositoryError("the repository has as many pages as one can number", retry="no")
        return np.arange(first, first + count, dtype=np.uint32)

    def _index_starts(self) -> list[int]:
        """The first number of each index that was there."""
        starts = np.zeros(len(self._indexes) + 1, np.int64)
        np.cumsum([rows for _, rows in self._indexes], out=starts[1:])
        return [int(each) for each in starts[:-1]]

    def _translated(self) -> tuple[list[IndexUse], list[Table]]:
        """What the manifest says: the indexes that are needed, and the tables in their numbers."""
        indexes = [*self._indexes, *self._packer.written]
        starts = np.zeros(len(indexes) + 1, np.int64)
        np.cumsum([rows for _, rows in indexes], out=starts[1:])
        rows = self._packer.rows
        needed = np.array([index_id in self._base_indexes for index_id, _ in indexes], np.bool_)
        plain: list[Table] = []
        for table in self._tables:
            out = table.copy()
            for begin in range(0, len(out), _CHUNK):
                part = out[begin : begin + _CHUNK]
                new = (part >= self._old_rows) & (part != ZERO)
                part[new] = rows[part[new] - np.uint32(self._old_rows)] + np.uint32(self._old_rows)
                here = part[part != ZERO].astype(np.int64)
                needed[np.unique(np.searchsorted(starts, here, side="right") - 1)] = True
            plain.append(out)
        lengths = np.where(needed, np.diff(starts), 0)
        shifts = (np.cumsum(lengths) - lengths) - starts[:-1]
        for out in plain:
            for begin in range(0, len(out), _CHUNK):
                part = out[begin : begin + _CHUNK]
                here = np.flatnonzero(part != ZERO)
                numbers = part[here].astype(np.int64)
                part[here] = numbers + shifts[np.searchsorted(starts, numbers, side="right") - 1]
        uses = [IndexUse(each.hex(), count) for (each, count), used in zip(indexes, needed, strict=True) if used]
        return uses, plain
