"""What was seen from outside -> what it means for the guest. Pure.

Rule 1: a run counts only if the fault was proved to have been done in its phase.
Rule 2: what the product says decides nothing here but whether it told the truth, and what to do next.
Rule 3: a guest that is gone is `lost` unless no complete copy can have existed (`physics`); then it is listed with
        the reason, and still has to be told honestly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vmferry.chaos.cells import Cell
from vmferry.core import hazards


class Verdict(StrEnum):
    """How a run ended, the worst first."""

    DOUBLE = "double"
    """It ran on both sides at once, or two QEMUs could write one disk."""
    LOST = "lost"
    """It is gone, and need not be."""
    STUCK = "stuck"
    """It stands still, and no action was named, or the named one did not help."""
    SURPRISE = "surprise"
    """It runs, but something else is wrong: memory, a false word, something left behind."""
    PHYSICS = "lost-by-physics"
    """It is gone because the only complete copy died; the product says so."""
    ACTED = "good-after-action"
    """It runs, after the action that was named."""
    GOOD = "good"
    NOT_INJECTED = "not-injected"


@dataclass(slots=True)
class Seen:
    """Everything about one run. Times in milliseconds; None where there is nothing to measure."""

    cell: str
    injected: bool = False
    why_not: str = ""
    proof: str = ""
    overlap_ms: float = 0.0
    two_writers: str = ""
    complete_there: bool = False
    """The destination's QEMU had loaded all of the guest, every page among it."""
    lock_samples: int = 0
    running_on: list[str] = field(default_factory=list)
    makes_progress: bool = False
    wrong_pages: int | None = None
    letters: str = ""
    """What is wrong with the guest's output over both sides; "" for nothing."""
    unlocked: list[str] = field(default_factory=list)
    """Disks of which the QEMU that runs it has no lock to write."""
    over: bool = False
    ended_first: bool = False
    """The job was over before the kernel told its agent that the source's QEMU has ended."""
    outcome: str = ""
    row: str = ""
    status: str = ""
    """The public status at the end."""
    cancels: list[str] = field(default_factory=list)
    """What was answered to each cancel: accepted, or refused with the reason."""
    action: str = ""
    taken: list[str] = field(default_factory=list)
    """Commands that were named and taken."""
    left: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    qemus_left: int = 0
    to_running_ms: float | None = None
    pause_ms: float | None = None
    heal_ms: float | None = None
    waited_for_link: bool = False
    """A postcopy whose memory could move stood still until the agents could talk."""
    reattach_ms: float | None = None
    resumed_ms: float | None = None
    """From the refused start on the target to running on the source."""
    wall_s: float = 0.0
    through: list[str] = field(default_factory=list)
    """The pairs of states that the two sides went through (`model.pairs`)."""


UNMOVED = ("setup", "active", "pre-switchover", "device", "postcopy-device", "cancelling", "cancelled", "failing",
           "failed")  # fmt: skip
RAN_THERE = ("started", "granted", "postcopy-active", "last", "postcopy-paused", "postcopy-recover", "completed")


def physics(cell: Cell, *, complete_there: bool) -> str:
    """Why this fault may cost the guest whatever anybody does; "" where it must not. `complete_there`: the destination
    had everything that there is, before or after the fault."""
    breaks_stream = cell.fault.kind in ("cut", "reset") and cell.fault.what in ("stream", "both")
    if breaks_stream and cell.phase == "postcopy-recover" and hazards.dies_of_broken_recovery(cell.versions[1]):
        return "the destination's QEMU, which ran the guest, dies of a recovery that breaks off (QEMU before 8.2)"
    if cell.fault.kind != "kill":
        return ""
    if cell.fault.what == "source-qemu" and not complete_there:
        if cell.phase in UNMOVED:
            return "the source's QEMU died with the only complete copy, as in any crash of it"
        if cell.mode == "postcopy":
            return "the source's QEMU died with pages that the destination had not got yet"
    if cell.fault.what == "target-qemu" and cell.phase in RAN_THERE:
        return "the destination's QEMU died after it had run the guest: no current copy exists"
    if cell.fault.what == "target-qemu" and cell.phase == "starting":
        return "the destination's QEMU died with the order to start in it: nobody can know whether it ran the guest"
    return ""


def judge(cell: Cell, seen: Seen) -> tuple[Verdict, str]:
    """The verdict and why, in words."""
    if not seen.injected:
        return Verdict.NOT_INJECTED, seen.why_not
    if seen.overlap_ms > 0:
        return Verdict.DOUBLE, f"both QEMUs ran the guest for {seen.overlap_ms:.0f} ms"
    if seen.two_writers:
        return Verdict.DOUBLE, seen.two_writers
    if len(seen.running_on) > 1:
        return Verdict.DOUBLE, f"it runs on {' and '.join(seen.running_on)}"
    if not seen.running_on or not seen.makes_progress:
        return _stands_still(cell, seen)
    wrong = _wrong(seen)
    if wrong:
        return Verdict.SURPRISE, "; ".join(wrong)
    if seen.taken:
        return Verdict.ACTED, f"after: {'; '.join(seen.taken)}"
    return Verdict.GOOD, ""


def _stands_still(cell: Cell, seen: Seen) -> tuple[Verdict, str]:
    why = physics(cell, complete_there=seen.complete_there)
    still = "its CPUs wait for pages; " if seen.running_on else ""
    says = f"{still}outcome {seen.outcome or 'none'}, row {seen.row or 'none'}, action: {seen.action or 'none'}"
    if seen.taken:
        says += f"; taken: {'; '.join(seen.taken)}"
    if why:
        # Once it ran there, or here again, and the job was over, its end is that of any guest: the job went well.
        ended_well = seen.over and (cell.fault.what, seen.outcome) == ("target-qemu", "destination")
        ended_well |= seen.ended_first and (cell.fault.what, seen.outcome) == ("source-qemu", "source")
        if ended_well or seen.outcome in ("lost", "degraded", "held", "none"):
            return Verdict.PHYSICS, f"{why} ({says})"
        return Verdict.SURPRISE, f"{why}, and it is not told so ({says})"
    if seen.qemus_left == 0:
        return Verdict.LOST, f"no QEMU holds it any more ({says})"
    return Verdict.STUCK, says


def _wrong(seen: Seen) -> list[str]:
    is_cancelled = seen.status == "cancelled"
    where = {"host-a": "source", "host-b": "destination"}[seen.running_on[0]]
    found = {
        f"{seen.wrong_pages} pages are wrong": bool(seen.wrong_pages),
        f"its output is not that of one life: {seen.letters}": bool(seen.letters),
        f"it runs on the {where} and the job says {seen.outcome} ({seen.row})": seen.outcome != where,
        "the job does not end": not seen.over,
        "it waited for the agents' link, and its memory could have moved": seen.waited_for_link,
        f"it runs without a lock on {', '.join(seen.unlocked)}": bool(seen.unlocked),
        f"a cancel was accepted and it ended as {seen.status}": "accepted" in seen.cancels and not is_cancelled,
        f"every cancel was refused and it ended as {seen.status}": bool(seen.cancels)
        and "accepted" not in seen.cancels
        and is_cancelled,
        f"left behind: {', '.join(seen.left)}": bool(seen.left),
        f"an agent's log has {seen.troubles[:2]}": bool(seen.troubles),
    }
    return [words for words, is_so in found.items() if is_so]


def wire(cell: Cell, seen: Seen) -> dict[str, Any]:
    """One run as a JSON object."""
    verdict, why = judge(cell, seen)
    return {
        "cell": cell.name,
        "fault": cell.fault.name,
        "phase": cell.phase,
        "mode": cell.mode,
        "pair": "-".join(cell.pair),
        "verdict": verdict.value,
        "why": why,
        "injected": seen.injected,
        "proof": seen.proof,
        "outcome": seen.outcome,
        "row": seen.row,
        "action": seen.action,
        "taken": seen.taken,
        "to_running_ms": seen.to_running_ms,
        "pause_ms": seen.pause_ms,
        "heal_ms": seen.heal_ms,
        "reattach_ms": seen.reattach_ms,
        "resumed_ms": seen.resumed_ms,
        "wall_s": round(seen.wall_s, 2),
        "lock_samples": seen.lock_samples,
        "through": seen.through,
    }
