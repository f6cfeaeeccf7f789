"""Pins: what a guest that runs still needs is not taken away, however old its pin is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.store.conftest import ManualClock, Numbered, Store, memory, new_store
from vmferry.errors import RepositoryError
from vmferry.limits import STORE_LOCK_RENEW_S, STORE_LOCK_STALE_S
from vmferry.store import pins
from vmferry.store.errors import LockLost, RepositoryBusy
from vmferry.store.lock import Kind, take
from vmferry.store.memory import MemoryStore
from vmferry.store.pins import Pin
from vmferry.store.prune import execute, plan_prune
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository
from vmferry.testing.failing_store import Call, FailingStore, Fault

JOB, SNAPSHOT = "1f" * 16, "5" * 32


@pytest.fixture
def repository(clock: ManualClock) -> Repository:
    made = Repository.create(MemoryStore(clock), clock=clock, random=Numbered(b"pins"))
    made.backend.put(f"snapshots/{SNAPSHOT}", b"not read here")
    return made


def pin(repository: Repository, job: str = JOB, host: str = "host-a") -> None:
    pins.put(repository, Pin(job, SNAPSHOT, host, "web1"))


def test_a_snapshot_that_a_guest_needs_is_not_forgotten_whatever_the_age(
    repository: Repository, clock: ManualClock
) -> None:
    pin(repository)
    pin(repository)
    clock.at_s += 1000 * STORE_LOCK_STALE_S
    with pytest.raises(RepositoryBusy, match="web1 on host-a") as caught:
        repository.forget(SNAPSHOT)
    assert "--drop-pins" in caught.value.hint
    assert SNAPSHOT in repository.snapshot_ids()
    pins.remove(repository, JOB)
    pins.remove(repository, JOB)
    repository.forget(SNAPSHOT)
    assert SNAPSHOT not in repository.snapshot_ids()


def test_nothing_is_pruned_while_a_guest_needs_something(store: Store, clock: ManualClock) -> None:
    repository, snapshot = store.repository, store.save(memory(8))
    needed = store.names("packs/")
    orphan = f"packs/aa/{'a' * 32}"
    repository.backend.put(orphan, b"nobody's")
    clock.at_s += 1000 * STORE_LOCK_STALE_S
    plan = plan_prune(repository)
    assert [entry.name for entry in plan.remove_packs] == [orphan]
    pins.put(repository, Pin(JOB, snapshot, "host-a", "web1"))
    clock.at_s += 1000 * STORE_LOCK_STALE_S
    with pytest.raises(RepositoryBusy, match="web1 on host-a"):
        execute(repository, plan)
    assert store.names("packs/") == sorted([orphan, *needed])
    assert [each.job for each in pins.drop(repository, "host-a")] == [JOB]
    assert execute(repository, plan).removed == 1


def test_pins_of_another_host_stay(repository: Repository) -> None:
    pin(repository, "a" * 32, "host-a")
    pin(repository, "b" * 32, "host-b")
    assert [each.job for each in pins.drop(repository, "host-a")] == ["a" * 32]
    assert pins.all_pins(repository) == [Pin("b" * 32, SNAPSHOT, "host-b", "web1")]


def test_a_pin_that_cannot_be_read_holds_everything(repository: Repository) -> None:
    repository.backend.put(f"{pins.PINS}{JOB}", b"{")
    repository.backend.put(f"{pins.PINS}strange", b"{")
    assert pins.all_pins(repository) == [Pin(JOB, "", "", "")]
    with pytest.raises(RepositoryBusy, match="unknown host"):
        repository.forget(SNAPSHOT)


def test_a_lock_that_was_lost_is_taken_anew(clock: ManualClock) -> None:
    backend = MemoryStore(clock)
    lock = take(backend, clock, Numbered(b"again"), Kind.SHARED, "read")
    backend.delete(backend.list("locks/")[0].name)
    clock.at_s += STORE_LOCK_RENEW_S
    with pytest.raises(LockLost):
        lock.renew_if_due()
    lock.take()
    lock.check()
    assert len(backend.list("locks/")) == 1


# --- a restore and a forget of the same snapshot at the same time -----------------------------------------


def restore(store: Store, snapshot: str, job: str = JOB) -> Exception | None:
    """What a lazy restore does before its guest may run; why it may not."""
    try:
        with SnapshotReader(store.repository, snapshot):
            pins.put(store.repository, Pin(job, snapshot, "host-a", "web1"))
    except RepositoryError as error:
        return error
    return None


def forget(store: Store, snapshot: str) -> Exception | None:
    try:
        store.repository.forget(snapshot)
    except RepositoryError as error:
        return error
    return None


Deed = Callable[[Store, str], Exception | None]


def meet(clock: ManualClock, outer: Deed, inner: Deed, number: int) -> tuple[Store, str, list[Exception | None], bool]:
    """`outer`, and all of `inner` before call `number` of it; the two outcomes, and whether there was such a call."""
    store = new_store(clock)
    snapshot = store.save(memory(8))
    met: list[Exception | None] = []

    def cut_in(call: Call) -> Fault | None:
        if call.number == number:
            met.append(inner(store, snapshot))
        return None

    other = Store(store.backend, clock, Repository.open(store.backend, clock=clock, random=Numbered(b"other")))
    failing = other.repository.backend = FailingStore(store.backend, cut_in)
    failed = outer(other, snapshot)
    if number >= len(failing.calls):
        return store, snapshot, [], False
    return store, snapshot, [failed, *met], True


@pytest.mark.parametrize(("outer", "inner"), [(restore, forget), (forget, restore)], ids=["restore", "forget"])
def test_a_guest_that_may_run_has_its_snapshot_whatever_forgets_it_meanwhile(
    clock: ManualClock, outer: Deed, inner: Deed
) -> None:
    number, outcomes = 0, set()
    while True:
        store, snapshot, failed, is_more = meet(clock, outer, inner, number)
        if not is_more:
            break
        failures = {outer: failed[0], inner: failed[1]}
        is_there = snapshot in store.repository.snapshot_ids()
        if failures[restore] is None:
            assert is_there, f"a guest runs and its snapshot is gone: call {number}"
            assert isinstance(failures[forget], RepositoryBusy)
        else:
            assert pins.all_pins(store.repository) == [], "no pin of a restore that was refused"
        assert (failures[forget] is None) is not is_there
        assert store.names("locks/") == []
        outcomes.add((failures[restore] is None, failures[forget] is None))
        number += 1
    assert {(True, False), (False, True)} <= outcomes, "either may come first"


def test_a_forget_that_died_is_in_no_restores_way_for_ever(clock: ManualClock) -> None:
    store = new_store(clock)
    snapshot = store.save(memory(8))
    stalled = store.repository.shared("forget", forgets=snapshot)
    assert isinstance(restore(store, snapshot), RepositoryBusy)
    clock.at_s += STORE_LOCK_STALE_S + 1
    assert restore(store, snapshot) is None
    with pytest.raises(LockLost):
        stalled.check()


def test_a_pin_that_is_there_is_not_taken_back(clock: ManualClock) -> None:
    """The next agent pins what an earlier one has pinned; somebody who tries to forget it in this moment is refused."""
    store = new_store(clock)
    snapshot = store.save(memory(8))
    assert restore(store, snapshot) is None
    lock = store.repository.shared("forget", forgets=snapshot)
    assert restore(store, snapshot) is None
    lock.release()
    assert isinstance(forget(store, snapshot), RepositoryBusy)


def test_a_pin_that_somebody_drops_as_it_is_put_is_none(clock: ManualClock) -> None:
    store = new_store(clock)
    snapshot = store.save(memory(8))

    def drop(call: Call) -> Fault | None:
        if call.method == "list" and call.name == pins.PINS:
            pins.drop(store.repository, "host-a")
        return None

    other = Store(store.backend, clock, Repository.open(store.backend, clock=clock, random=Numbered(b"other")))
    other.repository.backend = FailingStore(store.backend, drop)
    assert isinstance(restore(other, snapshot), RepositoryBusy)


def test_a_forget_that_was_taken_for_dead_takes_nothing_away(clock: ManualClock) -> None:
    """1. forget sees no pin, and is stopped  2. its lock gets stale, a restore deletes it and pins  3. it wakes up"""
    store = new_store(clock)
    snapshot = store.save(memory(8))
    seen: list[Call] = []

    def stop(call: Call) -> Fault | None:
        if seen and call.method == "size":
            clock.at_s += STORE_LOCK_STALE_S + 1
            assert restore(store, snapshot) is None
        if call.name == pins.PINS:
            seen.append(call)
        return None

    other = Store(store.backend, clock, Repository.open(store.backend, clock=clock, random=Numbered(b"other")))
    other.repository.backend = FailingStore(store.backend, stop)
    assert isinstance(forget(other, snapshot), LockLost)
    assert snapshot in store.repository.snapshot_ids()
