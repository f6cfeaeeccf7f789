"""The pin of a lazy restore: it goes with the restore, whenever that ends."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.restore_beds import Bed, until_true, use_fakes
from vmferry.agent.restores import Restores
from vmferry.core.restore import RestoreFact as F
from vmferry.store import pins
from vmferry.store.memory import MemoryStore
from vmferry.store.repository import Repository


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch)


class SlowPins(MemoryStore):
    """Puts a pin when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_go = threading.Event(), threading.Event()

    def put(self, name: str, data: bytes) -> None:
        if name.startswith(pins.PINS):
            self.begun.set()
            assert self.may_go.wait(10)
        super().put(name, data)


async def test_a_pin_that_is_being_put_while_its_restore_is_cancelled_is_taken_away(tmp_path: Path) -> None:
    """1. the pin is on its way, in a thread  2. a cancel ends the restore  3. the pin lands: nothing could be pruned,
    nor the snapshot forgotten, until the agent restarts."""
    backend = SlowPins()
    repository = Repository.create(backend)
    bed = Bed(tmp_path, job="1f" * 16)

    async def with_repository(work: Any) -> Any:
        return await asyncio.to_thread(work, repository)

    bed.agent.config.state_dir = tmp_path
    bed.agent.snapshot_store.with_repository = with_repository
    restores: Any = Restores(bed.agent)  # type: ignore[arg-type]
    bed.agent.restores.pin = restores.pin
    bed.begin()
    await until_true(backend.begun.is_set)
    bed.attempt.note(F.CANCEL)
    await bed.end()
    unpinning = asyncio.create_task(restores.unpin(bed.attempt))
    await asyncio.sleep(0)
    backend.may_go.set()
    await unpinning
    await asyncio.wait(bed.agent.tasks)
    assert pins.all_pins(repository) == []
