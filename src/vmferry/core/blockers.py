"""What keeps an operation from being done to a VM: who says so, why, since when and until when. Pure.

Theory of operation
-------------------
A blocker is held by name: by a person or a tool (until they remove it), by a migration (until its job is over), or by
the VM's QEMU (until it lifts it itself). `vmferry status` lists all of them in one form, and a refusal cites one.

Rule 1: a migration's own blockers follow from its facts and are stored nowhere; those of people are in the journal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Operation(StrEnum):
    """What can be blocked."""

    MIGRATE = "migrate"
    """To send the VM to another host."""
    SET = "set"
    """To change options of its migration."""
    STOP = "stop"
    """To power it down or to end it."""
    SNAPSHOT = "snapshot"
    """To save its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocker:
    """One reason against one operation."""

    operation: Operation
    name: str
    """By which it is removed, for those that people hold; else who holds it."""
    reason: str
    """A clause about the VM, for people."""
    since_s: float | None = None
    """Wall time; None: not known."""
    until: str = ""
    """What ends it, for people."""
    by_people: bool = False

    def to_wire(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "operation": self.operation.value,
            "name": self.name,
            "reason": self.reason,
            "since_s": self.since_s,
            "until": self.until,
            "by_people": self.by_people,
        }


def held(operation: Operation, name: str, reason: str, since_s: float) -> Blocker:
    """One that a person or a tool holds."""
    return Blocker(
        operation=operation,
        name=name,
        reason=reason,
        since_s=since_s,
        until="it is removed by its name",
        by_people=True,
    )


def of_migration(destination: str, job: str, since_s: float) -> tuple[Blocker, ...]:
    """What a migration that runs holds on its source."""
    return _of_job(
        f"it is on its way to {destination} already (job {job})",
        f"an option that is in use by job {job} is locked; docs/options.md has each one's window",
        job,
        since_s,
    )


def of_arrival(source: str, job: str, since_s: float) -> tuple[Blocker, ...]:
    """What a place holds that is not settled."""
    reason = f"it is still arriving from {source} (job {job})"
    return _of_job(reason, f"options on this side are fixed since job {job} was prepared", job, since_s)


def of_restore(name: str, job: str, since_s: float) -> tuple[Blocker, ...]:
    """What a restore holds: until the guest has all of its memory its QEMU can neither send nor save it."""
    reason = f"it is being restored from {name} (job {job}) and lacks some of its memory"
    return tuple(
        each
        for each in _of_job(reason, f"its options are those of the restore {job}", job, since_s)
        if each.operation is not Operation.STOP
    )


def of_save(name: str, job: str, since_s: float) -> tuple[Blocker, ...]:
    """What a save holds."""
    return _of_job(f"it is being saved as {name} (job {job})", f"its options are those of the save {job}", job, since_s)


def _of_job(reason: str, why_locked: str, job: str, since_s: float) -> tuple[Blocker, ...]:
    until = f"the job {job} is concluded"
    reasons = {
        Operation.MIGRATE: reason,
        Operation.SET: why_locked,
        Operation.STOP: reason,
        Operation.SNAPSHOT: reason,
    }
    return tuple(
        Blocker(operation=operation, name=f"job {job}", reason=text, since_s=since_s, until=until)
        for operation, text in reasons.items()
    )


def of_qemu(reasons: Iterable[str]) -> tuple[Blocker, ...]:
    """QEMU's own reasons against a migration (`blocked-reasons`)."""
    return tuple(
        Blocker(operation=Operation.MIGRATE, name="QEMU", reason=reason, until="the guest's QEMU lifts it")
        for reason in reasons
    )


def first(blockers: Iterable[Blocker], operation: Operation) -> Blocker | None:
    """The one that a refusal of the operation cites, or None: nothing speaks against it."""
    return next((blocker for blocker in blockers if blocker.operation is operation), None)
