"""The ids of jobs: 32 hexadecimal digits that one job has, whatever its kind.

Parts of an id become names of folders, of bitmaps in QEMU and of objects in a repository, and both hosts of a migration
know it by nothing else: a second job of the same id would be told the first one's facts, that its guest runs over there
among them. In the journal it would replace the first one, and a migration that was committed would be forgotten.
"""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Final

from vmferry.errors import UsageError

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

_ID: Final = re.compile(r"[0-9a-f]{32}")


def wanted(job: str) -> str:
    """The id that a client made up, or a new one where it did not. Raises UsageError for what is none."""
    if job and not _ID.fullmatch(job):
        raise UsageError(f"the job id {job!r} is none: 32 hexadecimal digits", hint="leave it out, to get one")
    return job or uuid.uuid4().hex


def require_new(agent: Agent, job: str) -> None:
    """Raises UsageError when a job has this id or had it, as far as that is still known here."""
    registers = (agent.saves, agent.chores, agent.restores)
    is_migration = (
        agent.outcome_of(job) is not None
        or job in agent.known_jobs
        or job in agent.places
        or any(attempt.job == job for attempt in agent.attempts.values())
    )
    if is_migration or job in agent.jobs.dismissed or any(register.has(job) for register in registers):
        raise UsageError(f"the job id {job!r} is that of another job", hint="take a new one, or none")
