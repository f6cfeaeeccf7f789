"""Snapshots that restores hold open: one lock, one owner of it, and a new one as soon as it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit.store.conftest import RAM, ManualClock, Store, memory, new_store
from vmferry import limits
from vmferry.agent.open_snapshots import HeldSnapshot, Opened
from vmferry.agent.restores import Restores
from vmferry.errors import RepositoryError
from vmferry.limits import STORE_LOCK_STALE_S, STORE_PRUNE_GRACE_S
from vmferry.store import lock
from vmferry.store.errors import Damaged, RepositoryBusy, StoreTransient
from vmferry.store.page_ids import Pages
from vmferry.store.prune import execute, plan_prune


class FakeReader:
    """Its lock is renewed by one at a time, or the test fails."""

    snapshot = "5" * 32

    def __init__(self) -> None:
        self.renewals = 0
        self.answers: list[Exception | bool] = []
        self.is_renewed = self.is_closed = False

    def keep_lock(self) -> bool:
        assert not self.is_renewed, "two at a time"
        self.is_renewed = True
        self.renewals += 1
        try:
            answer = self.answers.pop(0) if self.answers else False
            if isinstance(answer, Exception):
                raise answer
            return answer
        finally:
            self.is_renewed = False

    def close(self) -> None:
        self.is_closed = True


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_one_owner_renews_the_lock_of_all_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FakeReader()
    reader.answers = [StoreTransient("no answer"), OSError(12, "Cannot allocate memory"), KeyError("a defect"), True]
    tasks: set[asyncio.Task[Any]] = set()

    async def run(work: Any, *arguments: Any) -> Any:
        return await asyncio.to_thread(work, *arguments)

    async def with_repository(work: Any) -> Opened:
        return Opened(reader, None, None)  # type: ignore[arg-type]

    agent = SimpleNamespace(
        config=SimpleNamespace(state_dir=tmp_path),
        keep_task=tasks.add,
        snapshot_store=SimpleNamespace(run=run, with_repository=with_repository),
    )
    monkeypatch.setattr(limits, "RESTORE_RENEW_S", 0.001)
    restores = Restores(agent)  # type: ignore[arg-type]
    retried: list[str] = []
    for vm, snapshot in (("web1", reader.snapshot), ("web2", "6" * 32)):
        source = SimpleNamespace(retry=lambda vm=vm: retried.append(vm))
        restores._jobs[vm] = SimpleNamespace(  # type: ignore[assignment]
            ended=asyncio.Event(), wanted=SimpleNamespace(snapshot=snapshot), feed=SimpleNamespace(source=source)
        )
    held = restores.snapshots
    first, second = await asyncio.gather(held.open(reader.snapshot), held.open(reader.snapshot))
    assert first is second
    await until(lambda: reader.renewals > 5)
    assert retried == ["web1"], "what could not be read of it is read again at once"
    assert len([task for task in tasks if task.get_name().startswith("renew")]) == 1
    held.release(reader.snapshot)
    assert not reader.is_closed
    held.release(reader.snapshot)
    await until(lambda: reader.is_closed)
    await asyncio.wait_for(asyncio.gather(*tasks), 10)


@pytest.fixture
def store() -> Store:
    return new_store(ManualClock(), None)


def half_used(store: Store) -> tuple[str, Pages]:
    """A snapshot whose packs have pages that nobody needs: a prune puts the others elsewhere."""
    first = store.save(memory(400))
    half = memory(400).copy()
    half[::2] = memory(400, seed=6)[::2]
    second = store.save(half)
    store.repository.forget(first)
    return second, half


def prune(store: Store) -> None:
    """Of another host, to which this one's lock is stale."""
    store.clock.at_s += max(STORE_PRUNE_GRACE_S, STORE_LOCK_STALE_S) + 1
    assert execute(store.repository, plan_prune(store.repository, empty_below=1.0)).removed


def test_a_snapshot_whose_lock_was_lost_is_read_where_its_pages_are_now(store: Store) -> None:
    snapshot, half = half_used(store)
    held = HeldSnapshot(store.repository, snapshot)
    assert not held.keep_lock()
    prune(store)
    numbers = np.arange(400)
    with pytest.raises(Damaged):
        held.read_some(RAM, numbers)
    assert held.keep_lock(), "opened anew"
    assert np.array_equal(held.read_some(RAM, numbers), half)
    assert np.array_equal(held.page(RAM, 7), half[7])
    assert np.array_equal(held.is_zero(RAM), ~half.any(axis=1))
    assert not held.keep_lock()
    with pytest.raises(RepositoryBusy):
        lock.take(store.backend, store.clock, os.urandom, lock.Kind.EXCLUSIVE, "prune")
    held.close()
    lock.take(store.backend, store.clock, os.urandom, lock.Kind.EXCLUSIVE, "prune").release()


def test_one_that_lost_pages_for_good_has_a_lock_all_the_same(store: Store) -> None:
    snapshot, _ = half_used(store)
    held = HeldSnapshot(store.repository, snapshot)
    prune(store)
    for entry in store.backend.list("packs/"):
        store.backend.delete(entry.name)
    for _ in range(2):
        with contextlib.suppress(Damaged):
            held.keep_lock()
    with pytest.raises(RepositoryBusy):
        lock.take(store.backend, store.clock, os.urandom, lock.Kind.EXCLUSIVE, "prune")


def test_one_that_is_closed_lets_its_tables_go_at_once(store: Store) -> None:
    """Whoever read from it may be one of a circle of objects, which stays until somebody looks for those."""
    pages = memory(50)
    held = HeldSnapshot(store.repository, store.save(pages))
    circle: list[Any] = [held]
    circle.append(circle)
    tables = weakref.ref(held._reader)
    gc.disable()
    try:
        del circle
        held.close()
        assert tables() is None
    finally:
        gc.enable()
    held.close()
    with pytest.raises(RepositoryError, match="not open"):
        held.page(RAM, 0)
