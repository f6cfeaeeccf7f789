"""An agent's journal on a simulated disk: what was not yet synced may be lost with the agent, and the disk may be full.

Rule 1: entries go through JSON, as on a real disk.
Rule 2: an entry whose `append` has returned is never lost. One that was being written when the agent died is there
        or not, by chance.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.errors import Unfit
from vmferry.jobs.journal import Entry, Written
from vmferry.testing.sim.kernel import SimProcess
from vmferry.testing.sim.loop import pass_s

SYNC_S = (0.001, 0.02)


@dataclass(eq=False)
class Disk:
    """What is on a host's disk; it outlives agents."""

    chance: random.Random
    durable: list[tuple[str, str, str]] = field(default_factory=list)
    is_full: bool = False
    writing: list[tuple[str, str, str]] = field(default_factory=list)
    """Written and not synced."""

    def crash(self) -> None:
        """The agent died: of what was under way some part may have got there, in its order."""
        while self.writing and self.chance.random() < 0.5:
            self.durable.append(self.writing.pop(0))
        self.writing.clear()


class SimJournal:
    """The journal of one agent's life."""

    def __init__(self, disk: Disk, process: SimProcess, path: Path) -> None:
        self._disk, self._process, self.path = disk, process, path
        process.on_death.append(disk.crash)

    async def append(self, kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        """Raises Unfit when the disk is full."""
        entry = (kind.value, subject, json.dumps(body or {}, separators=(",", ":")))
        self._disk.writing.append(entry)
        # A real one writes in a thread and cannot be interrupted.
        written = self._process.spawn(self._sync(entry), "journal")
        await asyncio.shield(written)

    async def _sync(self, entry: tuple[str, str, str]) -> None:
        await pass_s(self._disk.chance.uniform(*SYNC_S))
        while self._disk.writing and self._disk.writing[0] is not entry:
            await pass_s(SYNC_S[0])  # one thread: in their order
        self._disk.writing.remove(entry)
        if self._disk.is_full:
            raise Unfit(
                f"the journal {self.path} cannot be written: database or disk is full",
                retry="yes",
                hint="make room on the disk; what waits for the journal is tried again",
            )
        self._disk.durable.append(entry)
        self._process.kernel.trace.tell(self._process.host, f"journal {entry[0]} {entry[1]}")

    def read(self) -> list[Written]:
        """All entries, oldest first."""
        return [
            Written(number, Entry(kind), subject, json.loads(body))
            for number, (kind, subject, body) in enumerate(self._disk.durable, 1)
        ]

    def close(self) -> None:
        """Nothing is held."""
