"""Chores: jobs about a repository of snapshots (verify, prune, export, import); facts and what they mean. Pure.

Theory of operation
-------------------
No guest is touched, so nothing has to be decided: a chore goes its straight way in a thread of its own, and what is
recorded here is for people. Two instants matter:

    PLANNED   what will be changed is known, and nothing was changed yet (`prune`). From here on the job is pending;
              with HOLD it waits for a person's FINALIZE, and what is done then is what was shown
    WHOLE     everything has been read, and what makes it a snapshot is about to be written (`import`): no way back

A restart of the agent ends a chore: what it had read is gone with the agent, and beginning anew is as good.

Rule 1: a fact is recorded once; the job's state and the word for people are computed.
Rule 2: what was done counts: a cancel that came as the last step was being done does not hide it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from vmferry.core.job import JobStatus as J
from vmferry.core.once import OnceLog


class ChoreFact(StrEnum):
    """Everything that can be recorded of a chore."""

    WANTED = "wanted"
    """It was asked for, checked and journalled."""
    HOLD = "hold"
    """Nothing is changed before a person has seen the plan (auto-finalize is off)."""
    BEGUN = "begun"
    """Its thread is at work."""
    PLANNED = "planned"
    """What it will change is known and can be read (text: in short)."""
    FINALIZE = "finalize"
    """A person gave leave."""
    WHOLE = "whole"
    """All has been read; it is being kept now."""
    CANCEL = "cancel"
    DONE = "done"
    ERROR = "error"
    RESTARTED = "restarted"
    """The agent that had begun it is gone."""
    CLEANUP = "cleanup"


ChoreLog = OnceLog[ChoreFact]

_F: Final = ChoreFact
_STATES: Final[tuple[tuple[ChoreFact, J], ...]] = (
    (_F.CLEANUP, J.CONCLUDED),
    (_F.CANCEL, J.ABORTING),
    (_F.ERROR, J.ABORTING),
    (_F.RESTARTED, J.ABORTING),
    (_F.DONE, J.PENDING),
    (_F.WHOLE, J.PENDING),
    (_F.PLANNED, J.PENDING),
    (_F.BEGUN, J.RUNNING),
    (_F.WANTED, J.CREATED),
)
"""The first fact that is there decides."""

_WORDS: Final[tuple[tuple[ChoreFact, str], ...]] = (
    (_F.DONE, "completed"),
    (_F.CANCEL, "cancelled"),
    (_F.ERROR, "failed"),
    (_F.RESTARTED, "failed"),
)
_UNDERWAY: Final = {"completed": "active", "cancelled": "cancelling", "failed": "failing"}


def chore_job(log: ChoreLog) -> J:
    """The state of a chore's job."""
    return next((state for fact, state in _STATES if fact in log), J.UNDEFINED)


def awaits_leave(log: ChoreLog) -> bool:
    """Whether its plan waits for a person's word."""
    return (
        _F.HOLD in log
        and _F.PLANNED in log
        and not any(fact in log for fact in (_F.FINALIZE, _F.DONE, _F.CANCEL, _F.ERROR, _F.CLEANUP))
    )


def chore_status(log: ChoreLog) -> str:
    """A word for people: one of those that a migration ends with, or what it is doing."""
    if awaits_leave(log):
        return "planned"
    end = next((word for fact, word in _WORDS if fact in log), "")
    if _F.CLEANUP in log:
        return end or "failed"
    return _UNDERWAY.get(end, "active" if _F.BEGUN in log else "setup")
