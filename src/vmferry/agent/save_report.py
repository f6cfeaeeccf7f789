"""A save as people and tools see it: its numbers, its sentence, its timeline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmferry.agent import save_ways
from vmferry.core.job import SAVE
from vmferry.core.saving import SaveFact, awaits_leave, save_status

if TYPE_CHECKING:
    from vmferry.agent.save import SaveJob


@dataclass(slots=True)
class Counted:
    """QEMU's numbers of the save."""

    transferred_bytes: int = 0
    remaining_bytes: int = 0
    passes: int = 0
    disks_done_bytes: int = 0
    disks_whole_bytes: int = 0
    """Of disks that are copied: what was sent, and that with what is left; it grows while the guest writes."""
    guest_bytes: int = 0
    """The guest's memory: what is assumed to follow the disks as long as QEMU says nothing of it."""
    percent: int = 0
    stop_s: float | None = None
    resume_s: float | None = None

    def count(self, info: dict[str, Any]) -> None:
        """What query-migrate said."""
        ram = info.get("ram") or {}
        self.transferred_bytes = max(self.transferred_bytes, int(ram.get("transferred", 0)))
        self.remaining_bytes = int(ram.get("remaining", 0))
        self.passes = int(ram.get("dirty-sync-count", self.passes))

    def count_disks(self, jobs: Iterable[dict[str, Any]]) -> None:
        """What query-jobs said of the copies."""
        found = list(jobs)
        self.disks_done_bytes = sum(int(job["current-progress"]) for job in found)
        self.disks_whole_bytes = sum(int(job["total-progress"]) for job in found)

    @property
    def downtime_ms(self) -> float | None:
        """How long the guest stood, by QEMU's own event times."""
        if self.stop_s is None or self.resume_s is None:
            return None
        return round((self.resume_s - self.stop_s) * 1000, 3)

    def progress(self) -> dict[str, Any]:
        """As a migration's. What the guest writes meanwhile makes the whole larger, and never takes a percent back."""
        memory = self.transferred_bytes + self.remaining_bytes
        if self.disks_whole_bytes and not memory:
            memory = self.guest_bytes
        whole, done = self.disks_whole_bytes + memory, self.disks_done_bytes + self.transferred_bytes
        self.percent = max(self.percent, done * 100 // whole if whole else 0)
        return {"current_bytes": done, "whole_bytes": whole, "percent": self.percent}


def wire(job: SaveJob) -> dict[str, Any]:
    """Everything about it, as plain values."""
    status = save_status(job.facts)
    counts = None if job.head is None else job.head.counts
    return {
        "job": job.job,
        "kind": SAVE.name,
        "vm": job.vm,
        "name": job.wanted.name,
        "snapshot": job.snapshot if SaveFact.KEPT in job.facts else None,
        "host": job.agent.config.name,
        "repository": job.agent.snapshot_store.place,
        "way": job.way or job.wanted.way,
        "status": status,
        "coarse": status,
        "outcome": _outcome(job),
        "over": job.is_over,
        "sentence": sentence(job),
        "downtime_ms": job.counted.downtime_ms,
        "total_ms": None if job.ended_s is None else round((job.ended_s - job.started_s) * 1000, 3),
        "transferred_bytes": job.counted.transferred_bytes,
        "passes": job.counted.passes,
        "progress": job.counted.progress(),
        "copying": _copying(job),
        "pages": None if counts is None else counts.pages,
        "zero_pages": None if counts is None else counts.zero,
        "known_pages": None if counts is None else counts.known,
        "stored_bytes": None if counts is None else counts.stored_bytes,
        "disks": [disk.to_wire() for disk in job.disks],
        **save_ways.wire(job),
        "notes": list(job.notes),
        "error": None if job.error is None else job.error.to_wire(),
        "timeline": _timeline(job),
    }


def _copying(job: SaveJob) -> dict[str, int] | None:
    """How far the copies of the disks are, until the memory goes."""
    if SaveFact.COPYING not in job.facts or SaveFact.STARTED in job.facts:
        return None
    return {"done_bytes": job.counted.disks_done_bytes, "whole_bytes": job.counted.disks_whole_bytes}


def sentence(job: SaveJob) -> str:
    """One sentence for people."""
    text = _sentence(job)
    if SaveFact.HELD not in job.facts or job.error is None:
        return text
    return f"{text} It stands still: {job.error.message}; {job.error.hint}."


def _outcome(job: SaveJob) -> str:
    if SaveFact.KEPT in job.facts:
        return "saved"
    if not job.is_over:
        return "pending"
    return "unknown" if SaveFact.UNKNOWN in job.facts else "none"


def _sentence(job: SaveJob) -> str:
    name, vm = job.wanted.name, job.vm
    if SaveFact.KEPT in job.facts:
        stood = job.counted.downtime_ms
        text = "" if stood is None else f"; the guest stood still for {stood:.0f} ms"
        return f"{vm} is saved as {name}{text}."
    if job.is_over:
        if SaveFact.UNKNOWN in job.facts:
            return f"It is not known whether {vm} was saved as {name}; 'vmferry snapshots' will tell: {job.error}."
        why = "it was cancelled" if SaveFact.CANCEL in job.facts else str(job.error)
        return f"{vm} was not saved: {why}."
    if awaits_leave(job.facts):
        return f"{vm} stands still and waits for leave ('vmferry job finalize') to be saved as {name}."
    if _copying(job) is not None:
        return f"The disks of {vm} are being copied, to save it as {name}."
    return f"{vm} is being saved as {name}."


def _timeline(job: SaveJob) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry in job.facts.entries:
        row: dict[str, Any] = {"at_ms": round((entry.at_s - job.started_s) * 1000, 3), "what": entry.fact.value}
        row |= {name: text for name, text in (("text", entry.text), ("by", entry.by)) if text}
        rows.append(row)
    marks = (("STOP", job.counted.stop_s), ("RESUME", job.counted.resume_s))
    rows += [{"at_ms": round((at_s - job.started_s) * 1000, 3), "what": what} for what, at_s in marks if at_s]
    return sorted(rows, key=lambda row: float(row["at_ms"]))
