"""Locks: who excludes whom, who counts as dead, and that who was taken for dead learns it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.unit.store.conftest import ManualClock, Numbered
from vmferry.limits import STORE_LOCK_RENEW_S, STORE_LOCK_STALE_S
from vmferry.store import lock as module
from vmferry.store.errors import LockLost, RepositoryBusy, StorePermanent, StoreTransient
from vmferry.store.lock import Kind, Lock, require_not_forgotten, take
from vmferry.store.memory import MemoryStore
from vmferry.testing.failing_store import Call, FailingStore, Fault

RANDOM = Numbered(b"locks")


@pytest.fixture
def backend(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock)


def lock(backend: MemoryStore | FailingStore, clock: ManualClock, kind: Kind, what: str = "test") -> Lock:
    return take(backend, clock, RANDOM, kind, what)


def test_who_excludes_whom(backend: MemoryStore, clock: ManualClock) -> None:
    shared = lock(backend, clock, Kind.SHARED, "save web1")
    another = lock(backend, clock, Kind.SHARED)
    with pytest.raises(RepositoryBusy, match=f"by process {os.getpid()} on"):
        lock(backend, clock, Kind.EXCLUSIVE)
    shared.release()
    shared.release()
    another.release()
    exclusive = lock(backend, clock, Kind.EXCLUSIVE, "prune")
    for kind in Kind:
        with pytest.raises(RepositoryBusy, match="prune by process"):
            lock(backend, clock, kind)
    exclusive.release()
    assert backend.list("") == []


def test_a_lock_that_nobody_renewed_is_taken_away_and_its_owner_learns_it(
    backend: MemoryStore, clock: ManualClock
) -> None:
    old = lock(backend, clock, Kind.EXCLUSIVE)
    clock.at_s += STORE_LOCK_STALE_S
    with pytest.raises(RepositoryBusy):
        lock(backend, clock, Kind.SHARED)
    clock.at_s += 1
    new = lock(backend, clock, Kind.SHARED)
    with pytest.raises(LockLost):
        old.check()
    with pytest.raises(LockLost):
        old.renew_if_due()
    with pytest.raises(LockLost):
        old.check()
    with pytest.raises(LockLost):
        old.renew_if_due()
    new.check()
    assert len(backend.list("locks/")) == 1


def test_renewing_keeps_a_lock_alive(backend: MemoryStore, clock: ManualClock) -> None:
    mine = lock(backend, clock, Kind.SHARED)
    name = backend.list("locks/")[0].name
    mine.renew_if_due()
    assert backend.list("locks/")[0].name == name, "not due yet"
    for _ in range(30):
        clock.at_s += STORE_LOCK_RENEW_S
        mine.renew_if_due()
        mine.check()
    assert len(backend.list("locks/")) == 1
    with pytest.raises(RepositoryBusy):
        lock(backend, clock, Kind.EXCLUSIVE)
    mine.release()


@pytest.mark.parametrize("methods", [("size",), ("size", "delete"), ("delete",)])
@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.DENIED])
def test_who_was_taken_for_dead_learns_it_although_the_store_does_not_answer_at_first(
    backend: MemoryStore, clock: ManualClock, methods: tuple[str, ...], fault: Fault
) -> None:
    """1. it is stopped for an hour, and its lock is taken away  2. it renews it, and nobody says if it was there."""
    left = dict.fromkeys(methods, 3 if fault is Fault.REFUSED else 1)

    def choose(call: Call) -> Fault | None:
        if not is_away or not left.get(call.method):
            return None
        left[call.method] -= 1
        return fault

    is_away = False
    slow = lock(FailingStore(backend, choose), clock, Kind.SHARED)
    clock.at_s += STORE_LOCK_STALE_S + 1
    pruner = lock(backend, clock, Kind.EXCLUSIVE)
    pruner.release()
    is_away = True
    for _ in range(2):
        with pytest.raises((StoreTransient, StorePermanent, LockLost)):
            slow.renew_if_due()
    is_away = False
    with pytest.raises(LockLost):
        slow.check()
    with pytest.raises(LockLost):
        slow.renew_if_due()


def test_a_lock_that_could_not_be_renewed_is_the_one_that_it_was(backend: MemoryStore, clock: ManualClock) -> None:
    is_away = False
    failing = FailingStore(backend, lambda call: Fault.REFUSED if is_away and call.method == "size" else None)
    mine = lock(failing, clock, Kind.SHARED)
    names = [entry.name for entry in backend.list("locks/")]
    clock.at_s += STORE_LOCK_RENEW_S + 1
    is_away = True
    with pytest.raises(StoreTransient):
        mine.renew_if_due()
    assert [entry.name for entry in backend.list("locks/")] == names
    is_away = False
    mine.check()
    mine.renew_if_due()
    assert [entry.name for entry in backend.list("locks/")] != names, "it is due still"
    mine.release()
    assert backend.list("locks/") == []


def test_the_lock_of_a_process_of_this_host_that_is_gone_does_not_count(
    backend: MemoryStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(os, "getpid", lambda: gone.pid)
    lock(backend, clock, Kind.EXCLUSIVE)
    monkeypatch.setattr(os, "getpid", lambda: 0)
    lock(backend, clock, Kind.SHARED).release()
    assert backend.list("") == [], "it was deleted first"


def test_processes_of_other_hosts_and_other_users_count(
    backend: MemoryStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: gone.pid)
        patch.setattr(module, "_here", lambda: ("elsewhere", "boot"))
        other = lock(backend, clock, Kind.EXCLUSIVE)
    with pytest.raises(RepositoryBusy, match="on elsewhere"):
        lock(backend, clock, Kind.SHARED)
    other.release()

    def denied(pid: int, signal: int) -> None:
        raise PermissionError

    mine = lock(backend, clock, Kind.EXCLUSIVE)
    monkeypatch.setattr(os, "kill", denied)
    with pytest.raises(RepositoryBusy):
        lock(backend, clock, Kind.SHARED)
    mine.release()


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b"x" * 10_000])
def test_a_lock_that_cannot_be_read_counts(backend: MemoryStore, clock: ManualClock, content: bytes) -> None:
    backend.put("locks/exclusive-" + "0" * 32, content)
    with pytest.raises(RepositoryBusy, match="locks/exclusive-0000"):
        lock(backend, clock, Kind.SHARED)
    backend.put("locks/something-new", content)
    clock.at_s += STORE_LOCK_STALE_S + 1
    lock(backend, clock, Kind.SHARED).release()
    assert backend.list("") == []


def test_a_lock_that_goes_while_it_is_looked_at_does_not_hurt(clock: ManualClock) -> None:
    inner = MemoryStore(clock)
    inner.put("locks/exclusive-" + "0" * 32, b"")

    def vanish(call: Call) -> Fault | None:
        if call.method == "size":
            inner.delete("locks/exclusive-" + "0" * 32)
        return None

    with pytest.raises(RepositoryBusy):  # it was there when the others were listed; the next try succeeds
        lock(FailingStore(inner, vanish), clock, Kind.SHARED)
    lock(inner, clock, Kind.SHARED)


def test_one_whose_lock_is_deleted_at_once_has_none(clock: ManualClock) -> None:
    inner = MemoryStore(clock)

    def deleted(call: Call) -> Fault | None:
        if call.method == "list":
            for entry in inner.list("locks/"):
                inner.delete(entry.name)
        return None

    with pytest.raises(LockLost):
        lock(FailingStore(inner, deleted), clock, Kind.SHARED)


def test_a_lock_whose_answer_was_lost_is_taken_back(clock: ManualClock) -> None:
    inner = MemoryStore(clock)
    failing = FailingStore(inner, lambda call: Fault.ANSWER_LOST if call.method == "put" else None)
    with pytest.raises(StoreTransient):
        lock(failing, clock, Kind.EXCLUSIVE)
    assert inner.list("") == []


def test_a_snapshot_that_is_being_forgotten_is_not_to_be_used(backend: MemoryStore, clock: ManualClock) -> None:
    saving = lock(backend, clock, Kind.SHARED, "save web1")
    mine = take(backend, clock, RANDOM, Kind.SHARED, "forget monday", forgets="5" * 32)
    require_not_forgotten(backend, "6" * 32, clock.wall_s())
    with pytest.raises(RepositoryBusy, match="being taken away: forget monday by process"):
        require_not_forgotten(backend, "5" * 32, clock.wall_s())
    mine.check()
    clock.at_s += STORE_LOCK_STALE_S + 1
    require_not_forgotten(backend, "5" * 32, clock.wall_s())
    with pytest.raises(LockLost):
        mine.check()
    assert len(backend.list("locks/")) == 1, "that of the save is nobody's concern here"
    saving.release()
