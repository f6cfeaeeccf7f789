"""Reads one snapshot: its description, its device state, its pages by run or one by one.

Theory of operation
-------------------
Opening reads the manifest and the indexes that it names. Page tables are brought up to date once: what `prune` has
moved is looked up where it is now. Then a page is two array look-ups, a read of some kilobytes, and one inflation.

Memory: 4 bytes per page of the guest, and 19 per page of the indexes that the snapshot names. 200 MB are enough for a
snapshot of 32 GiB whose pages are all different and not zero.

Rule 1: a reader holds a shared lock, so nothing is taken away under it; one owner calls `renew_if_due` now and then
        (never two threads at a time), `close` at the end. A reader of a store that nobody prunes (a copy, say) may go
        without (`is_locked=False`).
Rule 2: pages are right or `Damaged` is raised (`source`). `read` and `page` may be called from several threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

from vmferry.limits import STORE_LOCK_STALE_S
from vmferry.store.errors import Damaged
from vmferry.store.index import Index, index_name
from vmferry.store.known import UNKNOWN, Numbers
from vmferry.store.lock import Lock
from vmferry.store.manifest import ZERO, Head, Table
from vmferry.store.pack import pack_name
from vmferry.store.page_ids import PAGE_BYTES, Ids, Pages
from vmferry.store.repository import Repository
from vmferry.store.source import PageSource

_ZERO_PAGE = np.zeros(PAGE_BYTES, np.uint8)
_ZERO_PAGE.flags.writeable = False


class SnapshotReader:
    """An open snapshot.

    Raises UnknownSnapshot, Damaged (something that the snapshot needs is missing or wrong: nothing is handed out),
    RepositoryBusy (somebody prunes).
    """

    def __init__(
        self,
        repository: Repository,
        snapshot: str,
        *,
        is_locked: bool = True,
        stale_s: float = STORE_LOCK_STALE_S,
    ) -> None:
        self._repository, self.snapshot = repository, snapshot
        self._lock: Lock | None = repository.shared(f"read {snapshot}", stale_s=stale_s) if is_locked else None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        manifest = self._repository.manifest(self.snapshot)
        self.head: Head = manifest.head
        self.device_state = manifest.device_state
        repository = self._repository  # not through `self`: what goes round in a circle stays until somebody looks
        self.source = PageSource(repository, lambda known: all_indexes(repository, known), compares_ids=False)
        add_uses(self.source, self._repository, manifest.head)
        self._tables: list[Table] = []
        for block, table in zip(manifest.head.blocks, manifest.tables, strict=True):
            now = self.source.moved(table)
            lost = (now == UNKNOWN) & (table != ZERO)
            if lost.any():
                number = int(table[int(np.argmax(lost))])
                raise Damaged(self.source.pack_of(number), f"it is missing, and block {block.name} has pages in it")
            self._tables.append(now)
        self._by_name = {block.name: number for number, block in enumerate(manifest.head.blocks)}

    def table(self, block: str) -> Table:
        """The block's page table, in the numbers of `source`. Not to be written to."""
        return self._tables[self._by_name[block]]

    def read(self, block: str, first: int, count: int) -> Pages:
        """Pages `first` to `first + count - 1` of a block, one per row. Raises Damaged."""
        table = self.table(block)
        assert 0 <= first <= first + count <= len(table), "pages of the block"
        return self.source.read(table[first : first + count])

    def read_some(self, block: str, pages: npt.NDArray[np.int64]) -> Pages:
        """These pages of a block, in this order. Raises Damaged."""
        return self.source.read(self.table(block)[pages])

    def page(self, block: str, number: int) -> Pages:
        """One page; not to be written to. The quick way for one that a guest waits for. Raises Damaged."""
        found = int(self.table(block)[number])
        return _ZERO_PAGE if found == ZERO else self.source.page(found)

    def is_zero(self, block: str) -> npt.NDArray[np.bool_]:
        """Which pages of a block are zero: nothing has to be read for them."""
        return np.asarray(self.table(block) == ZERO)

    def require_sizes(self) -> None:
        """Looks whether the packs that have pages of this snapshot are as long as they should be, which costs nothing
        where they are. Raises Damaged; a pack that is missing was noticed before."""
        misfits = {k: found for k in range(len(self.source.indexes)) if (found := self.source.misfits(k))}
        if not misfits:
            return
        used = self.rows_used()
        for k, numbers in misfits.items():
            index = self.source.indexes[k]
            rows = used.get(index.index_id)
            packs = set() if rows is None else set(index.packs_of(index.frames_of(rows)).tolist())
            for number in numbers:
                if number in packs:
                    raise Damaged(pack_name(index.pack_ids[number]), "it has not the size that its index says")

    def renew_if_due(self) -> None:
        """Renews the lock. Raises LockLost: the snapshot's pages may be taken away from now on."""
        if self._lock is not None:
            self._lock.renew_if_due()

    def lock_again(self) -> None:
        """Takes a new lock for one that was lost. Raises RepositoryBusy while somebody prunes."""
        if self._lock is not None:
            self._lock.take()

    def bases_for(self, block: str, pages: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], Ids, Pages, Numbers]:
        """What differences to these pages can be taken from: a page that is stored whole, and is or was this page.

        Which have one (zeros have none); and for those the ids, contents and numbers (of `source`) of the bases.
        """
        numbers = self.table(block)[pages].copy()
        has = numbers != ZERO
        for k, at, rows in self.source.split(numbers):
            are = self.source.indexes[k].are_differences(rows)
            if are.any():
                numbers[at[are]] = self.source.bases_of(k, rows[are])
        numbers = numbers[has]
        ids = np.zeros((len(numbers), 16), np.uint8)
        for k, at, rows in self.source.split(numbers):
            ids[at] = self.source.indexes[k].ids[rows]
        return has, ids, self.source.read(numbers), numbers

    def rows_used(self) -> dict[bytes, npt.NDArray[np.int64]]:
        """For each index that this snapshot has pages in, the rows of them."""
        used: dict[bytes, list[npt.NDArray[np.int64]]] = {}
        for table in self._tables:
            for k, _, rows in self.source.split(table):
                used.setdefault(self.source.indexes[k].index_id, []).append(np.unique(rows))
        return {index_id: np.unique(np.concatenate(rows)) for index_id, rows in used.items()}

    def close(self) -> None:
        """Gives the lock back. Again is fine."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def __enter__(self) -> SnapshotReader:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()


def all_indexes(repository: Repository, known: Collection[bytes] = ()) -> Iterator[Index]:
    """Every index but those that are known that can be read, one after the other. Who needs one that cannot finds out
    by what is not in it."""
    for index_id in repository.indexes():
        if index_id not in known:
            with contextlib.suppress(Damaged):
                yield repository.index(index_id)


def add_uses(source: PageSource, repository: Repository, head: Head) -> None:
    """Adds the indexes of a manifest to a source that has none, so that its numbers are the manifest's."""
    for use in head.indexes:
        index_id = bytes.fromhex(use.index)
        index = repository.index(index_id)
        if index.rows != use.rows:
            raise Damaged(index_name(index_id), f"it has {index.rows} rows, and a snapshot counts on {use.rows}")
        source.add(index)
