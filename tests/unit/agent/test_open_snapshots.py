"""Snapshots that restores hold open: one lock, one owner of it, and a new one as soon as it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmferry import limits
from vmferry.agent import restores
from vmferry.agent.restores import Restores
from vmferry.agent.restoring import Opened
from vmferry.store.errors import LockLost, StoreTransient


class FakeReader:
    """Its lock is renewed by one at a time, or the test fails."""

    snapshot = "5" * 32

    def __init__(self) -> None:
        self.renewals = self.taken = 0
        self.errors: list[Exception] = []
        self.is_renewed = self.is_closed = False

    def renew_if_due(self) -> None:
        assert not self.is_renewed, "two at a time"
        self.is_renewed = True
        self.renewals += 1
        try:
            if self.errors:
                raise self.errors.pop(0)
        finally:
            self.is_renewed = False

    def lock_again(self) -> None:
        self.taken += 1

    def close(self) -> None:
        self.is_closed = True


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_one_owner_renews_the_lock_of_all_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FakeReader()
    reader.errors = [StoreTransient("no answer"), LockLost("gone")]
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
    held = Restores(agent)  # type: ignore[arg-type]
    first, second = await asyncio.gather(held.open(reader.snapshot), held.open(reader.snapshot))
    assert first is second
    await until(lambda: reader.taken == 1 and reader.renewals > 5)
    assert len([task for task in tasks if task.get_name().startswith("renew")]) == 1
    held.release(reader.snapshot)
    assert not reader.is_closed
    held.release(reader.snapshot)
    await until(lambda: reader.is_closed)
    await asyncio.wait_for(asyncio.gather(*tasks), 10)


def test_the_lock_is_not_taken_anew_for_other_trouble() -> None:
    reader = FakeReader()
    reader.errors = [StoreTransient("no answer")]
    with pytest.raises(StoreTransient):
        restores._keep_lock(reader)  # type: ignore[arg-type]
    assert reader.taken == 0
