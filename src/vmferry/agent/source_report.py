"""What is told of a source's attempt: to whoever watches it, and to the journal when it is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmferry.agent import source_disks
from vmferry.core.report import job_wire
from vmferry.core.status import derive_source
from vmferry.core.table import Outcome

if TYPE_CHECKING:
    from vmferry.agent.source import SourceAttempt


def brief(attempt: SourceAttempt) -> dict[str, Any]:
    """The short form for events: what a progress line needs."""
    return {
        "vm": attempt.vm,
        "job": attempt.job,
        "destination": attempt.wanted.destination,
        "status": derive_source(attempt.facts).status.value,
        "outcome": attempt.outcome().value,
        "row": attempt.row().label,
        "over": attempt.ended.is_set(),
        "transferred_bytes": attempt.measured.transferred_bytes,
        "remaining_bytes": attempt.measured.remaining_bytes,
        "total_bytes": attempt.measured.total_bytes,
        "mbps": attempt.measured.mbps,
        "passes": attempt.measured.passes,
        **attempt.tracking.wire(),
        "disks": source_disks.wire(attempt),
        "action": attempt.fix or attempt.row().action,
    }


def wire(attempt: SourceAttempt) -> dict[str, Any]:
    """Everything about the attempt, for status and for the journal's ENDED entry."""
    wire = job_wire(
        job=attempt.job,
        vm=attempt.vm,
        source=attempt.context.config.name,
        destination=attempt.wanted.destination,
        mode=attempt.mode(),
        log=attempt.facts,
        row=attempt.row(),
        outcome=attempt.outcome(),
        measured=attempt.measured,
        cause=attempt.cause,
        over=attempt.ended.is_set(),
        progress=attempt.tracking.wire(),
        notes=attempt.plan.notes if attempt.plan else (),
        trouble=attempt.trouble,
        fix=attempt.fix,
    )
    wire["disks"] = source_disks.wire(attempt)
    # Nothing deletes them: whoever sees that the guest is well where it is may.
    wire["images_left"] = [m.path for m in attempt.mirrors] if attempt.outcome() is Outcome.DESTINATION else []
    return wire
