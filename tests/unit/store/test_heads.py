"""Heads are read side by side for a listing: so many at a time, told in order, each with what was wrong with it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.unit.store.conftest import ManualClock, Store, memory, new_store
from vmferry.store import heads as heads_module
from vmferry.store.errors import StorePermanent, StoreTransient
from vmferry.store.heads import FirstReads
from vmferry.store.manifest import manifest_name
from vmferry.store.memory import MemoryStore
from vmferry.store.repository import Repository

WAIT_S = 10.0
AT_ONCE = 4


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_module, "STORE_HEADS_AT_ONCE", AT_ONCE)


class Watched(MemoryStore):
    """Tells `before` of each read of a head, and counts how many there are at the same time."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.before: Callable[[str], None] = lambda name: None
        self.now = self.most = self.reads = 0
        self._counting = threading.Lock()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if not name.startswith("snapshots/"):
            return super().get(name, offset, length)
        with self._counting:
            self.now, self.reads = self.now + 1, self.reads + 1
            self.most = max(self.most, self.now)
        try:
            self.before(name)
            return super().get(name, offset, length)
        finally:
            with self._counting:
                self.now -= 1


def saved(count: int) -> tuple[Store, Watched, list[str]]:
    """A repository that was just opened, and its snapshots in the order in which they were saved."""
    clock = ManualClock()
    backend = Watched(clock)
    store = new_store(clock, backend=backend)
    snapshots = []
    for number in range(count):
        clock.at_s += 1
        snapshots.append(store.save(memory(8, seed=number), name=f"vm{number}"))
    store.repository = Repository.open(backend, clock=clock)
    return store, backend, snapshots


def test_so_many_are_read_at_once_and_no_more() -> None:
    store, backend, snapshots = saved(3 * AT_ONCE)
    together = threading.Barrier(AT_ONCE)

    def wait(name: str) -> None:
        together.wait(WAIT_S)

    backend.before = wait
    assert [info.snapshot for info in store.repository.snapshots()] == snapshots
    assert (backend.most, backend.reads) == (AT_ONCE, 3 * AT_ONCE)
    assert [info.snapshot for info in store.repository.snapshots()] == snapshots
    assert backend.reads == 3 * AT_ONCE, "they are kept"
    assert not [each.name for each in threading.enumerate() if each.name.startswith("heads")]


def test_what_is_wrong_with_one_is_told_of_it_alone() -> None:
    store, backend, snapshots = saved(3 * AT_ONCE)
    store.backend.delete(manifest_name(snapshots[2]))
    store.backend.put(manifest_name(snapshots[2]), b"x" * 500)

    def changes(name: str) -> None:
        if name == manifest_name(snapshots[5]):  # forgotten since the listing
            store.backend.delete(name)
        if name == manifest_name(snapshots[7]):  # cut short since
            store.backend.delete(name)
            store.backend.put(name, b"x")

    backend.before = changes
    listed = store.repository.snapshots()
    right = [each for number, each in enumerate(snapshots) if number not in (2, 5, 7)]
    assert [info.snapshot for info in listed if info.head is not None] == right
    assert [info.snapshot for info in listed[len(right) :]] == sorted((snapshots[2], snapshots[7]))
    assert all(info.snapshot in info.damage for info in listed[len(right) :])


@pytest.mark.parametrize("error", [StoreTransient("away"), StorePermanent("denied")])
def test_a_store_that_fails_ends_the_listing_where_it_did(error: Exception) -> None:
    store, backend, _ = saved(3 * AT_ONCE)
    in_order = list(store.repository.snapshot_ids())

    def fails(name: str) -> None:
        if name == manifest_name(in_order[3]):
            raise error

    backend.before = fails
    told: list[str] = []
    with pytest.raises(type(error), match=str(error)):
        told.extend(info.snapshot for info in store.repository.each_snapshot())
    assert told == in_order[:3]
    assert backend.now == 0, "nothing is read any more"
    backend.before = lambda name: None
    assert len(store.repository.snapshots()) == 3 * AT_ONCE


def test_who_has_found_what_it_looks_for_has_no_more_read() -> None:
    store, backend, _ = saved(3 * AT_ONCE)
    next(found := store.repository.each_snapshot())
    found.close()  # type: ignore[attr-defined]
    assert backend.reads <= AT_ONCE + 1
    assert not [each.name for each in threading.enumerate() if each.name.startswith("heads")]


def test_one_alone_needs_no_thread() -> None:
    threads: list[str] = []

    def read(snapshot: str) -> bytes:
        threads.append(threading.current_thread().name)
        return snapshot.encode()

    for names in ([], ["a"], ["a", "b"]):
        with FirstReads(read, names) as reads:
            assert [reads.take(each) for each in names] == [each.encode() for each in names]
    assert threads[0] == threading.current_thread().name
    assert all(each.startswith("heads") for each in threads[1:])
