"""Pins that an earlier agent of this host left behind: taken away where the journal proves that nobody needs them.

    1. a guest of a lazy restore is whole, or has ended   2. ENDED is in the journal   3. the agent dies
    4. its pin is still in the repository: nothing can be pruned, nor that snapshot forgotten, until a person drops it

The next agent reads in its journal that the restore has ended, so it does what is left: the pin goes. A pin whose
restore the journal does not have (another host's; an older journal) is nobody's to judge here.

Rule 1: only what the journal says has ended, and only in this host's name.
Rule 2: the agent's start waits for no repository; one that is away is asked again until the agent ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmferry import limits
from vmferry.errors import RepositoryError
from vmferry.jobs.journal import JobState

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.store.repository import Repository

log = logging.getLogger("vmferry.agent")


def ended_restores(jobs: Iterable[JobState]) -> frozenset[str]:
    """Ids of lazy restores that the journal says are over. Pure."""
    return frozenset(
        job.job for job in jobs if job.role == "restore" and job.ended is not None and job.body.get("lazy")
    )


def begin(agent: Agent, jobs: Iterable[JobState]) -> None:
    """Drops them, beside everything else. An agent that has ended no lazy restore asks no repository."""
    ended = ended_restores(jobs)
    if ended:
        agent.keep_task(asyncio.create_task(_drop(agent, ended), name="drop-stale-pins"))


async def _drop(agent: Agent, ended: frozenset[str]) -> None:
    pause_s = limits.RESTORE_RETRY_MIN_S
    while True:
        try:
            await agent.snapshot_store.with_repository(lambda found: _drop_from(found, agent.config.name, ended))
        except RepositoryError as error:
            log.warning("effect=drop-stale-pins result=%s", error)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, limits.RESTORE_UNPIN_MAX_S)
        else:
            return


def _drop_from(repository: Repository, host: str, ended: frozenset[str]) -> None:
    """In a thread of the store. Raises RepositoryError: some may be gone, and again is fine."""
    from vmferry.store import pins

    for pin in pins.all_pins(repository):
        if pin.host == host and pin.job in ended:
            pins.remove(repository, pin.job)
            log.warning("job=%s vm=%s effect=unpin result=done: its restore had ended", pin.job, pin.vm)
