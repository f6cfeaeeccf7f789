"""What an attempt may use of its agent. The agent is the only implementation beside the simulator's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vmferry.agent.config import AgentConfig
from vmferry.agent.host import Host
from vmferry.agent.images import Stamp
from vmferry.agent.peers import Peers
from vmferry.agent.wants import PlacedDisk
from vmferry.clock import Clock
from vmferry.core.table import Outcome
from vmferry.jobs.journal import JournalStore
from vmferry.vm.runtime import RuntimePaths

if TYPE_CHECKING:
    from vmferry.agent.blockers import Blockers
    from vmferry.agent.destination import DestinationAttempt
    from vmferry.agent.plan import Plan
    from vmferry.agent.source import SourceAttempt
    from vmferry.core.effects import DestinationEffect, Effect


class Context(Protocol):
    """The agent as its attempts see it."""

    config: AgentConfig
    clock: Clock
    journal: JournalStore
    host: Host
    peers: Peers
    job_directory: Path
    """Where credentials of jobs lie."""
    blockers: Blockers
    source_hands: Callable[[SourceAttempt, Effect], Awaitable[None]]
    destination_hands: Callable[[DestinationAttempt, DestinationEffect], Awaitable[None]]

    def utc_now(self) -> datetime:
        """The date, for certificates."""

    def publish(self, name: str, data: dict[str, Any]) -> None:
        """An event for every client of the control socket and every agent that listens."""

    def clock_offset_s(self, host: str) -> float:
        """The peer's wall clock minus ours; 0.0 if it was never measured."""

    async def make_plan(self, attempt: SourceAttempt) -> Plan:
        """Asks both hosts; changes nothing."""

    async def remember_memory(self, attempt: SourceAttempt) -> None:
        """Keeps what of the source's memory would outlive its QEMU. Never raises for trouble of the world's."""

    def converge(self, attempt: SourceAttempt, info: dict[str, Any]) -> None:
        """New counters of QEMU: progress, and the policy that may ask for postcopy."""

    async def keep_left_images(self, attempt: SourceAttempt) -> None:
        """The guest went with its disks, and its QEMU here has just been ended: what is left here is written down."""

    async def keep_tried_image(self, attempt: DestinationAttempt, disk: PlacedDisk, stamp: Stamp) -> bool:
        """An image that had all of a disk, of a place that failed: it is on the disk and written down, or False."""

    def is_left_image(self, path: str, job: str) -> bool:
        """The image is what that job left here, and nobody has touched it."""

    async def make_room_for_image(self, path: str, vm: str) -> None:
        """A copy of an earlier try of that guest, with which nobody goes on, is taken away. Raises Unfit, OSError."""

    async def renew_left_image(self, path: str, stamp: Stamp | None) -> None:
        """A place's QEMU has written to it, and it looked so when that ended."""

    def keep_task(self, task: asyncio.Task[Any]) -> None:
        """Holds a task of an attempt until it is over; the agent's close awaits it."""

    def tail_log(self, runtime: RuntimePaths) -> str:
        """The last words of a QEMU."""

    def attempt_ended(self, attempt: SourceAttempt) -> None:
        """The source's side is over and journalled."""

    async def adopt_arrived(self, attempt: DestinationAttempt) -> None:
        """The guest runs here: keep it as this host's own, durably."""

    async def tend_door(self, attempt: DestinationAttempt) -> None:
        """A place that needs its source listens for it beside the agents' link, and no other does."""

    async def place_ended(self, attempt: DestinationAttempt, outcome: Outcome) -> None:
        """The destination's side is over and journalled."""
