"""Takes away what no snapshot needs: first a plan, which is a value that can be shown, then the deed.

Theory of operation
-------------------
A plan looks at every manifest and every index, and marks the rows that are used: by page tables, and as bases of
differences. Packs without a used row go; packs with few are emptied: their used pages are put into new packs, under a
new index, and then they go as well. Manifests are never touched: page tables say index and row, and whoever finds that
a row's pack is gone looks the page up by its id.

The deed holds the exclusive lock (so nobody saves or reads), looks whether the repository is still the one that was
planned for, and then, each step durable before the next; a crash leaves:

    1. delete leftovers of broken puts
    2. delete indexes          packs that no index names: the next prune deletes them
    3. delete unused packs     packs that no index names, and indexes that name packs which are gone, as they may
    4. for a few of the packs that are to be emptied, and then for the next ones:
       a. new packs            packs that no index names
       b. new index            pages that are there twice: the next prune deletes one of them
       c. delete the emptied   indexes that name packs which are gone
    5. delete the indexes that only emptied packs needed

So a store that is full gets room before anything is written to it, and never needs more than for those few.

Rule 1: what is damaged is no reason to delete. If a manifest, or an index or pack that one needs, is missing or cannot
        be read, there is no plan, but `Damaged`: heal it, or forget that snapshot, first.
Rule 2: nothing that is younger than `grace_s` goes. Young packs without an index are somebody's save.
Rule 3: nothing goes, and nothing is moved, while a guest that runs has memory in the repository (`pins`).
Rule 4: before each single delete the deed looks whether its lock is still there (see `lock` for the schedule).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmferry.limits import STORE_LOCK_STALE_S, STORE_PRUNE_BATCH_PACKS, STORE_PRUNE_GRACE_S
from vmferry.store import pins
from vmferry.store.backend import LEFTOVERS, Entry
from vmferry.store.errors import Damaged, PlanOutdated
from vmferry.store.index import Index, index_name
from vmferry.store.known import UNKNOWN
from vmferry.store.lock import Lock
from vmferry.store.manifest import ZERO
from vmferry.store.packer import Packer
from vmferry.store.repository import Repository
from vmferry.store.source import PageSource

_PAGES_AT_A_TIME = 4096
OnBytes = Callable[[int, int], None]
"""(done, of how many bytes); what it raises ends the work between two steps."""


def _nobody(done: int, whole: int) -> None:
    """Nobody looks on."""


@dataclass(frozen=True, slots=True)
class PackWork:
    """One pack that is emptied: which rows of which index are needed."""

    entry: Entry
    index_id: bytes
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What would be done. `seen` is what the plan was made for; on anything else it is not carried out."""

    seen: frozenset[str]
    remove_packs: tuple[Entry, ...]
    """Those that are emptied are not among them."""
    empty_packs: tuple[PackWork, ...]
    remove_indexes: tuple[Entry, ...]
    remove_leftovers: tuple[Entry, ...]
    kept_packs: int
    too_young: int
    """Objects of which nobody needs all, and that are not old enough."""
    freed_bytes: int
    """About: what is removed, less what emptied packs still hold."""

    @property
    def is_empty(self) -> bool:
        """There is nothing to do."""
        return not (self.remove_packs or self.empty_packs or self.remove_indexes or self.remove_leftovers)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was done."""

    removed: int
    removed_bytes: int
    written_bytes: int


def plan_prune(
    repository: Repository,
    *,
    grace_s: float = STORE_PRUNE_GRACE_S,
    empty_below: float = 0.5,
    stale_s: float = STORE_LOCK_STALE_S,
    on_bytes: OnBytes = _nobody,
) -> PrunePlan:
    """Looks, and changes nothing. Packs of which less than `empty_below` (0 to 1) is used are to be emptied.
    `on_bytes` counts the manifests.

    Raises Damaged (rule 1), RepositoryBusy.
    """
    lock = repository.shared("plan a prune", stale_s=stale_s)
    try:
        return _Planner(repository, lock, grace_s, empty_below).plan(on_bytes)
    finally:
        lock.release()


class _Planner:
    """The state of one plan in the making."""

    def __init__(self, repository: Repository, lock: Lock, grace_s: float, empty_below: float) -> None:
        self._repository, self._lock = repository, lock
        self._grace_s, self._empty_below = grace_s, empty_below
        self._snapshots = repository.snapshot_ids()
        self._index_entries = repository.indexes()
        self._packs = repository.packs()
        self._source = PageSource(repository)
        self._position: dict[bytes, int] = {}
        for index_id in self._index_entries:
            lock.renew_if_due()
            try:
                index = repository.index(index_id)
            except Damaged:
                continue  # harmless unless a manifest needs it, which `_mark` finds out
            self._position[index_id] = len(self._source.indexes)
            self._source.add(index)
        self._used = [np.zeros(index.rows, np.bool_) for index in self._source.indexes]
        self._needed: set[bytes] = set()

    def plan(self, on_bytes: OnBytes) -> PrunePlan:
        done, whole = 0, sum(entry.size_bytes for entry in self._snapshots.values())
        for snapshot, manifest in self._snapshots.items():
            self._lock.renew_if_due()
            on_bytes(done, whole)
            self._mark(snapshot)
            done += manifest.size_bytes
        self._mark_bases()
        remove: list[Entry] = []
        works: list[PackWork] = []
        kept: set[bytes] = set()
        indexed: set[bytes] = set()
        for index, used in zip(self._source.indexes, self._used, strict=True):
            starts = index.pack_rows()
            for number, pack_id in enumerate(index.pack_ids):
                entry = self._packs.get(pack_id)
                if entry is None:
                    continue
                indexed.add(pack_id)
                rows = np.flatnonzero(used[starts[number] : starts[number + 1]]) + starts[number]
                share = len(rows) / max(1, int(starts[number + 1] - starts[number]))
                if not len(rows):
                    remove.append(entry)
                elif share < self._empty_below:
                    works.append(PackWork(entry, index.index_id, rows))
                else:
                    kept.add(pack_id)
        remove += [entry for pack_id, entry in self._packs.items() if pack_id not in indexed]
        leftovers = self._repository.backend.list(LEFTOVERS)
        old_packs, young = self._old(remove)
        young += self._old(work.entry for work in works)[1]
        are_young = frozenset(young)
        empty = [work for work in works if work.entry not in are_young]
        kept |= {pack_id for pack_id, entry in self._packs.items() if entry in are_young}
        indexes, young_indexes = self._old(self._useless_indexes(kept))
        old_leftovers, young_leftovers = self._old(leftovers)
        going = [*old_packs, *indexes, *old_leftovers]
        freed = sum(entry.size_bytes for entry in going) + sum(self._freed_by(work) for work in empty)
        return PrunePlan(
            seen=_seen(self._snapshots.values(), self._index_entries.values(), self._packs.values()),
            remove_packs=tuple(old_packs),
            empty_packs=tuple(empty),
            remove_indexes=tuple(indexes),
            remove_leftovers=tuple(old_leftovers),
            kept_packs=len(kept),
            too_young=len(young) + len(young_indexes) + len(young_leftovers),
            freed_bytes=freed,
        )

    def _mark(self, snapshot: str) -> None:
        """What one snapshot uses."""
        manifest = self._repository.manifest(snapshot)
        places = []
        for use in manifest.head.indexes:
            index_id = bytes.fromhex(use.index)
            position = self._position.get(index_id)
            if position is None or self._source.indexes[position].rows != use.rows:
                raise Damaged(index_name(index_id), f"snapshot {snapshot} needs it, and it is missing or damaged")
            self._needed.add(index_id)
            places.append(position)
        ends = np.cumsum([use.rows for use in manifest.head.indexes])
        for table in manifest.tables:
            here = table[table != ZERO].astype(np.int64)
            which = np.searchsorted(ends, here, side="right")
            for number, position in enumerate(places):
                rows = here[which == number] - (int(ends[number]) - manifest.head.indexes[number].rows)
                self._mark_rows(snapshot, position, np.unique(rows))

    def _mark_rows(self, snapshot: str, k: int, rows: npt.NDArray[np.int64]) -> None:
        live = self._source.is_live(k, rows)
        self._used[k][rows[live]] = True
        if live.all():
            return
        gone = rows[~live]
        found = self._source.find(self._source.indexes[k].ids[gone], is_whole=False)
        lost = np.flatnonzero(found == UNKNOWN)
        if len(lost):
            name = self._source.pack_of(self._source.starts[k] + int(gone[lost[0]]))
            raise Damaged(name, f"it is missing, and snapshot {snapshot} has pages in it")
        for where, _, moved in self._source.split(found):
            self._used[where][moved] = True

    def _mark_bases(self) -> None:
        for k, index in enumerate(self._source.indexes):
            rows = np.flatnonzero(self._used[k])
            rows = rows[index.are_differences(rows)]
            if len(rows):
                for where, _, bases in self._source.split(self._source.bases_of(k, rows)):
                    self._used[where][bases] = True

    def _useless_indexes(self, kept: set[bytes]) -> list[Entry]:
        """Those that no manifest needs and that describe no pack that stays; also those that cannot be read."""
        useless = []
        for index_id, entry in self._index_entries.items():
            position = self._position.get(index_id)
            packs = () if position is None else self._source.indexes[position].pack_ids
            if index_id not in self._needed and not any(pack_id in kept for pack_id in packs):
                useless.append(entry)
        return useless

    def _old(self, entries: Iterable[Entry]) -> tuple[list[Entry], list[Entry]]:
        old: list[Entry] = []
        young: list[Entry] = []
        for entry in entries:
            (old if self._lock.taken_s - entry.modified_s >= self._grace_s else young).append(entry)
        return old, young

    def _freed_by(self, work: PackWork) -> int:
        index = self._source.indexes[self._position[work.index_id]]
        starts = index.pack_rows()
        pack = index.place(index.frame_of(int(work.rows[0]))).pack
        rows = int(starts[pack + 1] - starts[pack])
        return work.entry.size_bytes * (rows - len(work.rows)) // rows


def execute(
    repository: Repository,
    plan: PrunePlan,
    *,
    stale_s: float = STORE_LOCK_STALE_S,
    on_bytes: OnBytes = _nobody,
    but_pins: frozenset[str] = frozenset(),
) -> Pruned:
    """Does what the plan says. Raises PlanOutdated or RepositoryBusy: nothing was done, and `on_bytes` was not called.

    `but_pins`: jobs whose pins hold nothing up; the caller takes them away in the first `on_bytes`, which comes before
    anything is done.

    After any other error, also of `on_bytes`, a part was done (see the module's text), and another plan does the rest.
    """
    lock = repository.exclusive("prune", stale_s=stale_s)
    try:
        pins.require_free(repository, but_jobs=but_pins)
        packs = repository.packs()
        now = _seen(repository.snapshot_ids().values(), repository.indexes().values(), packs.values())
        if now != plan.seen:
            raise PlanOutdated("the repository is not any more what the plan was made for")
        return _Deed(repository, plan, lock, on_bytes).do()
    finally:
        lock.release()


class _Deed:
    """The state of one prune that is carried out."""

    def __init__(self, repository: Repository, plan: PrunePlan, lock: Lock, on_bytes: OnBytes) -> None:
        self._repository, self._plan, self._lock, self._on_bytes = repository, plan, lock, on_bytes
        going = (*plan.remove_leftovers, *plan.remove_indexes, *plan.remove_packs)
        self._count = len(going) + len(plan.empty_packs)
        self._emptied = sum(work.entry.size_bytes for work in plan.empty_packs)
        self._removed = sum(entry.size_bytes for entry in going) + self._emptied
        self._done = 0
        self._written = 0

    def do(self) -> Pruned:
        plan = self._plan
        needed = {work.index_id for work in plan.empty_packs}
        names = {index_name(index_id) for index_id in needed}
        for entry in plan.remove_leftovers:
            self._delete(entry)
        for entry in plan.remove_indexes:
            if entry.name not in names:
                self._delete(entry)
        for entry in plan.remove_packs:
            self._delete(entry)
        if plan.empty_packs:
            self._empty_all(needed)
        for entry in plan.remove_indexes:
            if entry.name in names:
                self._delete(entry)
        return Pruned(self._count, self._removed, self._written)

    def _delete(self, entry: Entry) -> None:
        self._lock.renew_if_due()
        self._tell(0)
        self._lock.check()
        self._repository.backend.delete(entry.name)
        self._done += entry.size_bytes

    def _tell(self, more: int) -> None:
        """An emptied pack counts twice: it is read, and it is deleted."""
        self._on_bytes(self._done + more, self._removed + self._emptied)

    def _empty_all(self, needed: set[bytes]) -> None:
        """Some packs at a time, those first of which least has to be written anew."""
        indexes = {}
        for index_id in self._repository.indexes():
            try:
                indexes[index_id] = self._repository.index(index_id)
            except Damaged:
                continue  # the plan does not need it
        works_in_order = sorted(self._plan.empty_packs, key=lambda work: len(work.rows))
        for works in _batches(works_in_order, STORE_PRUNE_BATCH_PACKS * self._repository.shape.pack_bytes):
            packer = self._empty(works, indexes)
            for index_id, _ in packer.written:  # what the next ones need may be there now
                indexes[index_id] = self._repository.index(index_id)
            for work in works:
                self._delete(work.entry)

    def _empty(self, works: Sequence[PackWork], indexes: Mapping[bytes, Index]) -> Packer:
        """Writes the used pages of these packs into new ones; they are durable and known when this returns. If it ends
        before, new packs that no index names are left."""
        source = PageSource(self._repository)
        for index in indexes.values():
            source.add(index)
        position = {index_id: k for k, index_id in enumerate(indexes)}
        packer = Packer(self._repository, self._lock.renew_if_due)
        for work in works:
            self._tell(0)
            k = position[work.index_id]
            index = source.indexes[k]
            for begin in range(0, len(work.rows), _PAGES_AT_A_TIME):
                rows = work.rows[begin : begin + _PAGES_AT_A_TIME]
                pages = source.read((rows + source.starts[k]).astype(np.uint32))
                ids = index.ids[rows]
                different = index.are_differences(rows)
                packer.add(pages[~different], ids[~different])
                if different.any():
                    bases = source.read(source.bases_of(k, rows[different]))
                    packer.add_differences(pages[different] ^ bases, ids[different], index.bases_of(rows[different]))
                self._lock.renew_if_due()
            self._done += work.entry.size_bytes
        packer.finish()
        self._written += packer.stored_bytes
        return packer


def _batches(works: Iterable[PackWork], bytes_max: int) -> Iterator[list[PackWork]]:
    """As many packs at a time as have so many bytes, and one at least: what is written anew of them is less."""
    batch: list[PackWork] = []
    size = 0
    for work in works:
        if batch and size + work.entry.size_bytes > bytes_max:
            yield batch
            batch, size = [], 0
        batch.append(work)
        size += work.entry.size_bytes
    if batch:
        yield batch


def _seen(*entries: Iterable[Entry]) -> frozenset[str]:
    return frozenset(entry.name for some in entries for entry in some)
