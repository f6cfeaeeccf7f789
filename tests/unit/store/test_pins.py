"""Pins: what a guest that runs still needs is not taken away, however old its pin is."""

from __future__ import annotations

import pytest

from tests.unit.store.conftest import ManualClock, Numbered
from vmferry.limits import STORE_LOCK_RENEW_S, STORE_LOCK_STALE_S
from vmferry.store import pins
from vmferry.store.errors import LockLost, RepositoryBusy
from vmferry.store.lock import Kind, take
from vmferry.store.memory import MemoryStore
from vmferry.store.pins import Pin
from vmferry.store.prune import execute, plan_prune
from vmferry.store.repository import Repository

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


def test_nothing_is_pruned_while_a_guest_needs_something(repository: Repository, clock: ManualClock) -> None:
    repository.backend.delete(f"snapshots/{SNAPSHOT}")
    orphan = f"packs/aa/{'a' * 32}"
    repository.backend.put(orphan, b"nobody's")
    clock.at_s += 1000 * STORE_LOCK_STALE_S
    plan = plan_prune(repository)
    assert [entry.name for entry in plan.remove_packs] == [orphan]
    pin(repository)
    clock.at_s += 1000 * STORE_LOCK_STALE_S
    with pytest.raises(RepositoryBusy, match="web1 on host-a"):
        execute(repository, plan)
    assert [entry.name for entry in repository.backend.list("packs/")] == [orphan]
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
