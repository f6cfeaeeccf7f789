"""Prune: what goes, what stays, what is refused, and that the deed is the plan's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from tests.unit.store.conftest import RAM, SMALL, ManualClock, Store, memory, new_store, touched
from vmferry.limits import STORE_LOCK_STALE_S, STORE_PRUNE_GRACE_S
from vmferry.store import pins
from vmferry.store import prune as prune_module
from vmferry.store import writer as writer_module
from vmferry.store.backend import Backend
from vmferry.store.config import PassPhrase
from vmferry.store.errors import Damaged, LockLost, PlanOutdated, RepositoryBusy, StorePermanent
from vmferry.store.index import index_name
from vmferry.store.known import KnownPages
from vmferry.store.local import LocalFolder
from vmferry.store.manifest import Block
from vmferry.store.page_ids import PAGE_BYTES
from vmferry.store.prune import PrunePlan, execute, plan_prune
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository, Shape
from vmferry.store.verify import verify
from vmferry.store.writer import SnapshotWriter
from vmferry.testing.failing_store import Call, FailingStore, Fault


def prune(store: Store, empty_below: float = 0.5) -> PrunePlan:
    store.clock.at_s += STORE_PRUNE_GRACE_S + 1
    plan = plan_prune(store.repository, empty_below=empty_below)
    execute(store.repository, plan)
    return plan


def forget(store: Store, snapshot: str) -> None:
    store.repository.forget(snapshot)
    del store.saved[snapshot]


def total(store: Store) -> int:
    return sum(entry.size_bytes for entry in store.backend.list(""))


def test_what_only_forgotten_snapshots_need_goes(store: Store) -> None:
    keep = store.save(memory(200))
    before = total(store)
    gone = store.save(memory(300, seed=5))
    assert prune(store).is_empty
    forget(store, gone)
    plan = prune(store)
    assert plan.remove_packs
    assert total(store) == before
    assert plan.freed_bytes > 0
    store.check(keep)
    assert verify(store.repository).problems == ()


@pytest.mark.parametrize("key", [None, PassPhrase("x")], ids=["open", "encrypted"])
def test_packs_that_are_little_used_are_emptied_and_their_pages_found_again(
    clock: ManualClock, key: PassPhrase | None
) -> None:
    store = new_store(clock, key)
    first = store.save(memory(400))
    half = memory(400).copy()
    half[::2] = memory(400, seed=6)[::2]
    second = store.save(half)
    forget(store, first)
    before = total(store)
    plan = prune(store, empty_below=1.0)
    assert plan.empty_packs
    saved = before - total(store)
    assert 0.7 * plan.freed_bytes < saved < 1.4 * plan.freed_bytes, "the plan's number is about right"
    store.check(second)
    assert verify(store.repository).problems == ()
    store.clock.at_s += STORE_PRUNE_GRACE_S + 1
    assert plan_prune(store.repository, empty_below=1.0).is_empty
    # Pages that were put elsewhere are known to later saves, and are bases of later differences.
    third = store.later(second, touched(half, 30))
    counts = store.repository.manifest(third).head.counts
    assert counts.differences > 10
    assert counts.known > 300
    store.check()


def test_differences_keep_their_bases_and_outlive_them_only_unused(store: Store) -> None:
    """Pages, their differences, and differences that nobody needs any more while others of the same pack are needed."""
    pages = memory(300)
    first = store.save(pages)
    second = store.later(first, touched(pages, 100))
    third = store.later(second, touched(store.saved[second], 20, seed=8))
    forget(store, first)
    prune(store, empty_below=1.0)
    store.check(second, third)
    forget(store, second)
    prune(store, empty_below=1.0)
    store.check(third)
    assert verify(store.repository).problems == ()


def test_a_difference_without_its_base_is_not_counted_as_known(store: Store) -> None:
    """A pack stays for one of its differences, the others' bases are gone; a later save must not rely on those."""
    pages = memory(64)
    pages[pages.any(axis=1) == 0] = 7
    pages[:] = np.arange(64, dtype=np.uint8)[:, None] ^ pages
    first = store.save(pages)
    both = touched(pages, 64)
    second = store.later(first, both)
    one = pages.copy()
    one[:] = 0
    one[0] = both[0]
    with SnapshotReader(store.repository, second) as base:
        third = store.save(one, base)
    forget(store, first)
    forget(store, second)
    prune(store, empty_below=1.0)
    store.check(third)
    again = store.save(both)
    store.check(third, again)
    assert verify(store.repository).problems == ()


def test_a_page_that_an_index_has_twice_is_found_wherever_it_is_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer remembers some million pages and stores others again; when their pack has been emptied, both rows are
    looked for by one id."""
    monkeypatch.setattr(writer_module, "KnownPages", lambda: KnownPages(0))
    store.repository.shape = Shape(pack_bytes=40 * PAGE_BYTES, level=1)
    rng = np.random.default_rng(2)
    pages = rng.integers(0, 256, (36, PAGE_BYTES), dtype=np.uint8)
    pages[20] = pages[0]
    with SnapshotWriter(store.repository, [Block(RAM, len(pages) * PAGE_BYTES)]) as writer:
        for first in (0, 18):
            writer.put(RAM, first, pages[first : first + 18])
        for first, stop in ((1, 16), (22, 36)):  # sent again, as in a precopy: most of the pack is not needed
            pages[first:stop] = rng.integers(0, 256, (stop - first, PAGE_BYTES), dtype=np.uint8)
            writer.put(RAM, first, pages[first:stop])
        writer.commit("vm")
    store.saved[writer.snapshot] = pages
    assert prune(store).empty_packs
    store.check()
    assert verify(store.repository).problems == ()
    assert prune(store).is_empty, "not refused for a page that is said to be missing"


def test_a_snapshot_of_which_pages_were_moved_does_not_hold_what_others_have(store: Store) -> None:
    """Its reader looks through the other indexes, one at a time, and keeps those with pages of it."""
    pages = memory(300)
    first = store.save(pages)
    fewer = touched(pages, 150)
    fewer[::3] = 0
    second = store.later(first, fewer)
    others = [store.save(memory(100, seed=20 + number)) for number in range(10)]
    with SnapshotReader(store.repository, second) as reader:
        needed = len(reader.source.indexes)
    forget(store, first)
    before = set(store.names("index/"))
    assert prune(store, empty_below=1.0).empty_packs
    written = set(store.names("index/")) - before
    reads = FailingStore(store.backend, lambda call: None)
    store.repository.backend = reads
    with SnapshotReader(store.repository, second) as reader:
        assert np.array_equal(reader.read(RAM, 0, len(pages)), store.saved[second])
        held = len(reader.source.indexes)
    store.repository.backend = store.backend
    assert held <= needed + len(written), "those that prune wrote, and none of the others'"
    assert len(store.names("index/")) >= held + len(others)
    looked = [call.name for call in reads.calls if call.method == "get" and call.name.startswith("index/")]
    assert max(looked.count(name) for name in looked) <= 3, "once for pages, and once for the bases of an index's"
    store.check(second, *others)


class FullStore(FailingStore):
    """A disk with so many bytes, and some more for locks: as one whose last blocks are the administrator's."""

    def __init__(self, inner: Backend, bytes_max: int) -> None:
        super().__init__(inner, self._fault)
        self.bytes_max = bytes_max

    def put(self, name: str, data: bytes) -> None:
        self._is_small = name.startswith("locks/")
        self._size = len(data)
        super().put(name, data)

    def _fault(self, call: Call) -> Fault | None:
        if call.method != "put" or self._is_small:
            return None
        used = sum(entry.size_bytes for entry in self.inner.list(""))
        return Fault.FULL if used + self._size > self.bytes_max else None


def test_a_full_store_can_be_pruned(store: Store) -> None:
    """Unused packs go before anything is written, and packs are emptied a few at a time."""
    big = np.random.default_rng(3).integers(0, 256, (400, PAGE_BYTES), dtype=np.uint8)
    gone = store.save(big)
    few = np.random.default_rng(4).integers(0, 256, (200, PAGE_BYTES), dtype=np.uint8)
    few[::2] = big[::4]  # a quarter of each of the first one's packs
    with SnapshotReader(store.repository, gone) as base:
        kept = store.save(few, base)
    lost = store.save(np.random.default_rng(5).integers(0, 256, (100, PAGE_BYTES), dtype=np.uint8))
    forget(store, gone)
    forget(store, lost)
    store.clock.at_s += STORE_PRUNE_GRACE_S + 1
    plan = plan_prune(store.repository)
    assert plan.remove_packs
    rewritten = sum(len(work.rows) for work in plan.empty_packs) * PAGE_BYTES
    room = sum(entry.size_bytes for entry in plan.remove_packs)
    full = FullStore(store.backend, total(store) - room + rewritten // 2)
    store.repository.backend = full
    done = execute(store.repository, plan)
    store.repository.backend = store.backend
    order = [(call.method, call.name.split("/")[0]) for call in full.calls if call.method in ("put", "delete")]
    order = [each for each in order if each[1] != "locks"]
    assert order.index(("put", "packs")) > order.index(("delete", "packs")), "room first"
    assert len({call.name for call in full.calls if (call.method, call.name[:5]) == ("put", "index")}) > 1, "in steps"
    assert done.written_bytes > rewritten // 2
    store.check(kept)
    assert verify(store.repository).problems == ()
    assert prune(store).is_empty


def test_pages_and_their_bases_that_move_in_different_steps_are_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_module, "STORE_PRUNE_BATCH_PACKS", 1)
    pages = memory(300)
    first = store.save(pages)
    second = store.later(first, touched(pages, 150))
    fewer = touched(store.saved[second], 40, seed=8)
    fewer[::3] = 0  # of each pack something is not needed any more
    third = store.later(second, fewer)
    forget(store, first)
    forget(store, second)
    before = len(store.names("packs/"))
    assert len(prune(store, empty_below=1.0).empty_packs) > 2
    assert before > 4
    store.check(third)
    assert verify(store.repository).problems == ()
    assert prune(store, empty_below=1.0).is_empty


def test_young_objects_stay(store: Store) -> None:
    forget(store, store.save(memory(100)))
    plan = plan_prune(store.repository)
    assert plan.is_empty
    assert plan.too_young > 1
    store.clock.at_s += STORE_PRUNE_GRACE_S
    assert not plan_prune(store.repository).is_empty


def test_young_packs_are_not_emptied_either(store: Store) -> None:
    first = store.save(memory(300))
    fewer = memory(300)
    fewer[::3] = 0
    second = store.save(fewer)
    forget(store, first)
    plan = plan_prune(store.repository, empty_below=1.0)
    assert plan.is_empty
    assert plan.too_young > 1
    assert plan.freed_bytes == 0
    store.clock.at_s += STORE_PRUNE_GRACE_S
    assert len(plan_prune(store.repository, empty_below=1.0).empty_packs) == plan.too_young
    store.check(second)


def test_a_plan_for_another_repository_is_not_carried_out(store: Store) -> None:
    forget(store, store.save(memory(100)))
    store.clock.at_s += STORE_PRUNE_GRACE_S
    plan = plan_prune(store.repository)
    snapshot = store.save(memory(100))  # of the very pages that the plan would take away
    with pytest.raises(PlanOutdated):
        execute(store.repository, plan)
    store.check(snapshot)
    assert store.names("locks/") == []


def test_prune_waits_for_whoever_saves_or_reads(store: Store) -> None:
    snapshot = store.save(memory(50))
    plan = plan_prune(store.repository)
    with SnapshotReader(store.repository, snapshot), pytest.raises(RepositoryBusy, match=f"read {snapshot}"):
        execute(store.repository, plan)
    with SnapshotWriter(store.repository, [Block(RAM, PAGE_BYTES)]), pytest.raises(RepositoryBusy, match="save"):
        execute(store.repository, plan)
    execute(store.repository, plan)


def test_a_saver_who_was_taken_for_dead_commits_nothing(store: Store) -> None:
    """The schedule of `lock`: old pages are looked up, the saver stops, prune takes them away, the saver wakes up."""
    pages = memory(100)
    gone = store.save(pages)
    writer = SnapshotWriter(store.repository, [Block(RAM, 100 * PAGE_BYTES)])
    writer.put(RAM, 0, pages)
    store.repository.forget(gone)
    renewed_s = store.clock.at_s
    store.clock.at_s += STORE_LOCK_STALE_S + STORE_PRUNE_GRACE_S + 1
    execute(store.repository, plan_prune(store.repository))
    assert store.names("packs/") == []
    with pytest.raises(LockLost):
        writer.put(RAM, 0, pages)
    store.clock.at_s = renewed_s  # even if he does not notice how late it is
    with pytest.raises(LockLost):
        writer.commit("vm")
    assert store.repository.snapshots() == []
    assert store.names("locks/") == []


def test_a_saver_who_is_stopped_within_his_commit_takes_it_back(store: Store) -> None:
    """As above, but he is stopped after his first look for the lock: his manifest comes when the pages are gone."""
    pages = memory(100)
    gone = store.save(pages)
    plain = store.backend

    def stop(call: Call) -> Fault | None:
        if call.method == "put" and call.name.startswith("snapshots/"):
            store.clock.at_s += STORE_LOCK_STALE_S + STORE_PRUNE_GRACE_S + 1
            execute(store.repository, plan_prune(store.repository))
        return None

    late = Repository.open(
        FailingStore(plain, stop), clock=store.clock, random=lambda length: b"\x77" * length, shape=SMALL
    )
    with SnapshotWriter(late, [Block(RAM, 100 * PAGE_BYTES)]) as writer:
        writer.put(RAM, 0, pages)
        store.repository.forget(gone)
        with pytest.raises(LockLost):
            writer.commit("vm")
    assert store.repository.snapshots() == []


def test_a_pruner_who_was_taken_for_dead_deletes_no_more(store: Store) -> None:
    forget(store, store.save(memory(200)))
    store.clock.at_s += STORE_PRUNE_GRACE_S
    plan = plan_prune(store.repository)
    victims = [*plan.remove_indexes, *plan.remove_packs]
    deleted: list[str] = []

    def interfere(call: Call) -> Fault | None:
        if call.method == "delete" and not call.name.startswith("locks/"):
            deleted.append(call.name)
            if len(deleted) == 2:
                for entry in store.backend.list("locks/"):
                    store.backend.delete(entry.name)
        return None

    inner, store.repository.backend = store.repository.backend, FailingStore(store.backend, interfere)
    with pytest.raises(LockLost):
        execute(store.repository, plan)
    store.repository.backend = inner
    assert len(deleted) == 2 < len(victims)


def test_there_is_no_plan_over_damage(store: Store) -> None:
    first = store.save(memory(100))
    second = store.save(memory(100, seed=2))
    needed = store.repository.manifest(first).head.indexes[0].index
    name = index_name(bytes.fromhex(needed))
    data = store.backend.get(name)
    store.backend.delete(name)
    with pytest.raises(Damaged, match=needed):
        plan_prune(store.repository)
    store.backend.put(name, data[:-1])
    with pytest.raises(Damaged, match=needed):
        plan_prune(store.repository)
    forget(store, first)
    plan = prune(store)
    assert name in {entry.name for entry in plan.remove_indexes}, "unreadable and needed by nobody"
    store.check(second)
    pack = store.names("packs/")[0]
    store.backend.delete(pack)
    with pytest.raises(Damaged, match=pack):
        plan_prune(store.repository)


@pytest.mark.parametrize("folder", ["snapshots", "pins"])
def test_nothing_is_planned_or_done_where_a_folder_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """Without its snapshots every pack looks like one that nobody needs; without its pins no guest seems to."""
    repository = Repository.create(LocalFolder(tmp_path / "store"))
    with SnapshotWriter(repository, [Block(RAM, PAGE_BYTES)]) as writer:
        writer.put(RAM, 0, memory(1, seed=9))
        writer.commit("vm")
    pins.put(repository, pins.Pin("1f" * 16, writer.snapshot, "host-a", "web1"))
    pins.remove(repository, "1f" * 16)
    plan = plan_prune(repository, grace_s=-1e9)
    before = repository.backend.list("")
    real = os.scandir

    def scandir(path: Path | str) -> object:
        if Path(path).name == folder:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StorePermanent, match="Permission denied"):
        execute(repository, plan if folder == "pins" else plan_prune(repository, grace_s=-1e9))
    monkeypatch.undo()
    assert repository.backend.list("") == before


def test_leftovers_of_broken_puts_go_when_they_are_old(store: Store) -> None:
    store.backend.put("tmp/1234", b"half of something")
    assert plan_prune(store.repository).is_empty
    plan = prune(store)
    assert [entry.name for entry in plan.remove_leftovers] == ["tmp/1234"]
    assert store.names("tmp/") == []
