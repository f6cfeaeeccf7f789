"""What the control socket's clients are told of a job: its states, every fact, and that something changed.

    JOB_STATUS_CHANGE  {id, status}, as QEMU's: one for each state that the job is in, if only for a moment
    JOB_FACT           one for each fact, with the revision that it made
    JOB_CHANGE         something else is to be read now: the short form and its revision

Rule 1: a job's revision grows with every one of these events but the first kind; equal revisions, equal jobs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vmferry.agent.context import Context
from vmferry.core.facts import FactLog
from vmferry.core.job import JobStatus, Kind, way


def tell(context: Context, kind: Kind, *, job: str, vm: str, revision: int, before: FactLog, after: FactLog) -> None:
    """A fact of a migration was added: what it was, and each state that it led the job through."""
    entry = after.entries[-1]
    said = {"fact": entry.fact.value, "round": entry.round, "text": entry.text, "by": entry.by}
    tell_fact(context, kind.name, said, job=job, vm=vm, revision=revision, states=way(kind, before, after))


def tell_fact(
    context: Context,
    kind: str,
    said: dict[str, Any],
    *,
    job: str,
    vm: str,
    revision: int,
    states: Iterable[JobStatus],
) -> None:
    """A fact of a job of any kind was added: `said` (fact, round, text, by), and the states that it led through."""
    context.publish("JOB_FACT", {"id": job, "type": kind, "vm": vm, **said, "revision": revision})
    for state in states:
        tell_state(context, kind, job=job, vm=vm, state=state)


def tell_state(context: Context, kind: str, *, job: str, vm: str, state: JobStatus) -> None:
    """The job is in this state."""
    context.publish("JOB_STATUS_CHANGE", {"id": job, "status": state.value, "type": kind, "vm": vm})


def tell_change(context: Context, brief: dict[str, Any], *, revision: int) -> None:
    """Something of the job is new."""
    context.publish("JOB_CHANGE", {**brief, "id": brief["job"], "revision": revision})
