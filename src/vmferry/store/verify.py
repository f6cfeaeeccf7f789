"""Reads everything and names what is damaged, and which snapshots suffer from it. Changes nothing.

Theory of operation
-------------------
Every index is read, every pack whole: its directory must say what the index says, every page must have its id, every
difference its base. Then every manifest: its indexes must be there, and each of its pages in a pack that is there and
was found right. What belongs to no snapshot is read as well: the next save would count on it.

Rule 1: a problem never ends the search; only a store that cannot be reached does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmferry.limits import STORE_PACK_BYTES_MAX
from vmferry.store.errors import Damaged, UnknownSnapshot
from vmferry.store.index import index_name
from vmferry.store.known import UNKNOWN
from vmferry.store.manifest import ZERO, manifest_name
from vmferry.store.pack import pack_name, proof_of, read_whole
from vmferry.store.repository import Repository
from vmferry.store.source import PageSource


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    name: str
    """The object's."""
    what: str
    snapshots: tuple[str, ...] = ()
    """Those that cannot be restored whole because of it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found."""

    problems: tuple[Problem, ...]
    snapshots: int
    packs: int
    pages: int
    read_bytes: int
    orphans: int
    """Packs that no index names: no damage; `prune` takes them away."""

    @property
    def damaged_snapshots(self) -> frozenset[str]:
        """Every snapshot that some problem touches."""
        return frozenset(snapshot for problem in self.problems for snapshot in problem.snapshots)


def verify(repository: Repository, on_bytes: Callable[[int, int], None] = lambda done, of: None) -> Verdict:
    """Reads everything. `on_bytes` is told before each object how many bytes of packs are done, of how many (0 of 0
    while indexes are read); what it raises ends the search. Raises RepositoryBusy."""
    lock = repository.shared("verify")
    try:
        return _Search(repository, on_bytes, lock.renew_if_due).run()
    finally:
        lock.release()


class _Search:
    """The state of one search."""

    def __init__(self, repository: Repository, on_bytes: Callable[[int, int], None], renew: Callable[[], None]) -> None:
        self._repository, self._on_bytes, self._renew = repository, on_bytes, renew
        self._packs = repository.packs()
        self._source = PageSource(repository)
        self._position: dict[bytes, int] = {}
        self._bad: list[npt.NDArray[np.bool_]] = []
        """For each index, the rows that are not what they should be, or not there."""
        self._found: dict[str, tuple[str, set[str]]] = {}
        self._pages = self._bytes = 0

    def run(self) -> Verdict:
        self._read_indexes()
        named: set[bytes] = set()
        work = [
            (k, number, pack_id)
            for k, index in enumerate(self._source.indexes)
            for number, pack_id in enumerate(index.pack_ids)
            if pack_id in self._packs
        ]
        done, whole = 0, sum(self._packs[pack_id].size_bytes for _, _, pack_id in work)
        for k, number, pack_id in work:
            self._renew()
            self._on_bytes(done, whole)
            named.add(pack_id)
            self._read_pack(k, number, pack_id)
            done += self._packs[pack_id].size_bytes
        snapshots = self._repository.snapshot_ids()
        for snapshot in snapshots:
            self._renew()
            self._on_bytes(done, whole)
            self._read_snapshot(snapshot)
        problems = [Problem(name, what, tuple(sorted(whose))) for name, (what, whose) in sorted(self._found.items())]
        return Verdict(
            tuple(problems), len(snapshots), len(named), self._pages, self._bytes, len(self._packs.keys() - named)
        )

    def _blame(self, name: str, what: str, snapshot: str = "") -> None:
        """The first thing that is wrong with an object is what is told."""
        _, whose = self._found.setdefault(name, (what, set()))
        if snapshot:
            whose.add(snapshot)

    def _read_indexes(self) -> None:
        for index_id in self._repository.indexes():
            self._renew()
            self._on_bytes(0, 0)
            try:
                index = self._repository.index(index_id)
            except Damaged as error:
                self._blame(error.name, error.what)
                continue
            self._position[index_id] = len(self._source.indexes)
            self._source.add(index)
            self._bad.append(np.zeros(index.rows, np.bool_))

    def _read_pack(self, k: int, number: int, pack_id: bytes) -> None:
        index, name = self._source.indexes[k], pack_name(pack_id)
        frames = slice(int(index.first_frames[number]), int(index.first_frames[number + 1]))
        try:
            data = self._repository.whole(name, STORE_PACK_BYTES_MAX)
            self._bytes += len(data)
            if len(data) != int(index.pack_sizes[number]):
                raise Damaged(name, f"it has {len(data)} bytes, and its index says {int(index.pack_sizes[number])}")
            directory = read_whole(self._repository.seal, name, data)
            if directory.frames.to_bytes() != index.frames_between(frames).to_bytes():
                raise Damaged(name, "its directory is not the one that its index has")
            first, end = index.pack_rows()[number : number + 2].tolist()
            if directory.proof != proof_of(index.ids[first:end]):
                raise Damaged(name, "its pages are not those that its index has")
        except Damaged as error:
            # Its pages may still be right, so they are looked at below.
            self._blame(error.name, error.what)
        for frame in range(frames.start, frames.stop):
            self._read_frame(k, frame)

    def _read_frame(self, k: int, frame: int) -> None:
        index = self._source.indexes[k]
        rows = np.arange(int(index.first_rows[frame]), int(index.first_rows[frame + 1]))
        if index.are_differences(rows[:1])[0]:
            # A base that is gone is no damage unless a snapshot needs the page, which `_judge` finds out.
            has_base = self._source.find_bases(k, rows) != UNKNOWN
            self._bad[k][rows[~has_base]] = True
            rows = rows[has_base]
        try:
            self._source.read((rows + self._source.starts[k]).astype(np.uint32))
            self._pages += len(rows)
        except Damaged as error:
            self._blame(error.name, error.what)
            self._bad[k][rows] = True

    def _read_snapshot(self, snapshot: str) -> None:
        try:
            manifest = self._repository.manifest(snapshot)
        except UnknownSnapshot:
            return  # forgotten meanwhile
        except Damaged as error:
            self._blame(manifest_name(snapshot), error.what, snapshot)
            return
        start = 0
        numbers = [table[table != ZERO].astype(np.int64) for table in manifest.tables]
        used = np.unique(np.concatenate([*numbers, np.zeros(0, np.int64)]))
        for use in manifest.head.indexes:
            rows = used[(used >= start) & (used < start + use.rows)] - start
            start += use.rows
            k = self._position.get(bytes.fromhex(use.index))
            if k is None or self._source.indexes[k].rows != use.rows:
                name = index_name(bytes.fromhex(use.index))
                self._blame(name, "it is missing, or has another number of rows than a snapshot counts on", snapshot)
                continue
            self._judge(snapshot, k, rows)

    def _judge(self, snapshot: str, k: int, rows: npt.NDArray[np.int64]) -> None:
        """Blames the packs in which a snapshot's pages are wrong or missing."""
        source = self._source
        numbers = source.moved((rows + source.starts[k]).astype(np.uint32))
        for row in rows[numbers == UNKNOWN].tolist():
            self._blame(source.pack_of(source.starts[k] + row), "it is missing", snapshot)
        for where, at, found in source.split(numbers):
            bad = self._bad[where][found]
            for number in np.unique(numbers[at][bad]).tolist():
                self._blame(source.pack_of(number), "a page in it is not what was saved", snapshot)
