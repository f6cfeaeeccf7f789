"""Makes indexes again that were lost or damaged, from the packs that they described.

Theory of operation
-------------------
A pack's directory says which index describes it and from which row on, and holds everything else that the index has
but the ids, which follow from the pages. So the index comes out as it was, under its own name, and manifests that speak
of its rows are right again. A page that was damaged meanwhile is found by the directory's proof of all ids.

Rule 1: all rows up to the last pack that is there must be found. If a pack in between is missing, its rows' ids are
        lost, so the index is not made (and its packs are named): half an index would say what nobody knows.
Rule 2: under the exclusive lock. What is in the way under the index's name is an index that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vmferry.limits import STORE_LOCK_STALE_S, STORE_PACK_BYTES_MAX
from vmferry.store.envelope import PREFIX
from vmferry.store.errors import Damaged
from vmferry.store.index import Index, PackFacts, index_name, of_packs, write_index
from vmferry.store.lock import Lock
from vmferry.store.pack import DIFFERENCES, Directory, inflate_frame, pack_name, proof_of, read_whole
from vmferry.store.page_ids import ID_BYTES, Ids
from vmferry.store.repository import Repository
from vmferry.store.source import PageSource


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was done."""

    indexes: tuple[bytes, ...]
    """Those that are there again."""
    failed: tuple[Damaged, ...]
    """Packs because of which an index could not be made."""


def rebuild_indexes(
    repository: Repository,
    on_bytes: Callable[[int, int], None] = lambda done, of: None,
    *,
    stale_s: float = STORE_LOCK_STALE_S,
) -> Rebuilt:
    """Makes every index that packs speak of and that cannot be read. `on_bytes` is told before each pack that no index
    names how many bytes of those are done, and 0 of 0 while indexes are read; what it raises ends the work, and nothing
    was done. Raises RepositoryBusy."""
    lock = repository.exclusive("rebuild indexes", stale_s=stale_s)
    try:
        return _rebuild(repository, lock, on_bytes)
    finally:
        lock.release()


def _rebuild(repository: Repository, lock: Lock, on_bytes: Callable[[int, int], None]) -> Rebuilt:
    source = PageSource(repository)
    named: set[bytes] = set()
    for index_id in repository.indexes():
        lock.renew_if_due()
        on_bytes(0, 0)
        try:
            index = repository.index(index_id)
        except Damaged:
            continue  # one of those that are made again, if packs speak of it
        source.add(index)
        named |= set(index.pack_ids)
    parts: dict[bytes, list[tuple[bytes, Directory, PackFacts]]] = {}
    proofs: dict[bytes, bytes] = {}
    failed: list[Damaged] = []
    lost = {pack_id: entry for pack_id, entry in repository.packs().items() if pack_id not in named}
    done_bytes, whole_bytes = 0, sum(entry.size_bytes for entry in lost.values())
    for pack_id, entry in lost.items():
        lock.renew_if_due()
        on_bytes(done_bytes, whole_bytes)
        done_bytes += entry.size_bytes
        try:
            directory, facts = _look(repository, pack_id, entry.size_bytes)
        except Damaged as error:
            failed.append(error)
            continue
        proofs[pack_id] = directory.proof
        parts.setdefault(directory.index, []).append((pack_id, directory, facts))
    made: list[Index] = []
    for index_id, packs in parts.items():
        try:
            made.append(_joined(index_id, packs))
        except Damaged as error:
            failed.append(error)
    for index in made:  # before any difference is looked at: its base may be in another of them
        source.add(index)
    done = []
    for index in made:
        lock.renew_if_due()
        try:
            whole = _with_differences(source, index, repository)
            _compare(whole, proofs)
        except Damaged as error:
            failed.append(error)
            continue
        lock.check()
        name = index_name(index.index_id)
        repository.backend.delete(name)
        repository.put_new(name, write_index(repository.seal, whole))
        done.append(index.index_id)
    return Rebuilt(tuple(done), tuple(failed))


def _look(repository: Repository, pack_id: bytes, size_bytes: int) -> tuple[Directory, PackFacts]:
    """A pack's directory, and the ids of its whole pages; zeros in the place of the others. Raises Damaged."""
    name = pack_name(pack_id)
    data = repository.whole(name, STORE_PACK_BYTES_MAX)
    directory = read_whole(repository.seal, name, data)
    frames = directory.frames
    ids: list[Ids] = []
    offset = PREFIX.size
    for number, (length, kind, count) in enumerate(
        zip(frames.lengths.tolist(), frames.kinds.tolist(), frames.counts.tolist(), strict=True)
    ):
        stored = data[offset : offset + length]
        offset += length
        pages = inflate_frame(repository.seal, name, number, stored, kind, count)
        is_whole = not kind & DIFFERENCES
        ids.append(repository.ids.of(pages) if is_whole else np.zeros((count, ID_BYTES), np.uint8))
    return directory, PackFacts(pack_id, len(data), frames, np.concatenate([*ids, np.zeros((0, ID_BYTES), np.uint8)]))


def _joined(index_id: bytes, packs: list[tuple[bytes, Directory, PackFacts]]) -> Index:
    """Packs in the order of their rows, without a gap. Raises Damaged."""
    packs.sort(key=lambda each: each[1].first_row)
    row = 0
    for pack_id, directory, facts in packs:
        if directory.first_row != row:
            gap = f"rows {row} to {directory.first_row - 1} were in packs that are missing"
            raise Damaged(index_name(index_id), f"{gap}; {pack_name(pack_id)} follows them")
        row += len(facts.ids)
    return of_packs(index_id, [facts for _, _, facts in packs])


def _with_differences(source: PageSource, index: Index, repository: Repository) -> Index:
    """The index with the ids of pages that are differences. Raises Damaged when a base is missing."""
    k = source.indexes.index(index)
    ids = index.ids.copy()
    rows = np.flatnonzero(index.are_differences(np.arange(index.rows)))
    for frame in np.unique(index.frames_of(rows)).tolist():
        place = index.place(frame)
        name = pack_name(index.pack_ids[place.pack])
        stored = repository.part(name, place.offset, place.length)
        differences = inflate_frame(repository.seal, name, place.number, stored, place.kind, place.pages)
        here = np.arange(place.first_row, place.first_row + place.pages)
        ids[here] = repository.ids.of(differences ^ source.read(source.bases_of(k, here)))
    return index.with_ids(ids)


def _compare(index: Index, proofs: dict[bytes, bytes]) -> None:
    """Raises Damaged when a pack's pages are not those that were put into it."""
    starts = index.pack_rows().tolist()
    for pack_id, first, end in zip(index.pack_ids, starts[:-1], starts[1:], strict=True):
        if proof_of(index.ids[first:end]) != proofs[pack_id]:
            raise Damaged(pack_name(pack_id), "a page in it is not what was saved")
