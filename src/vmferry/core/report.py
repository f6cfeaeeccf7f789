"""What people and scripts are told of an attempt: status, outcome, timeline, one sentence. Pure.

The wire form is plain JSON values. `status` is one of QEMU's 17 values, `coarse` one of a handful, `outcome`
where the guest runs (`core.table.Outcome`). An error is the wire form of `vmferry.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmferry.core.facts import Fact, FactLog, visible_error
from vmferry.core.migration_status import MigrationStatus, coarse
from vmferry.core.status import Derived, derive_destination, derive_source
from vmferry.core.table import Outcome, Row
from vmferry.errors import (
    GuestHeld,
    GuestLost,
    MigrationCancelled,
    MigrationFailed,
    Uncertain,
    VmferryError,
    from_wire,
)
from vmferry.units import format_ms


@dataclass(slots=True)
class Measured:
    """Numbers of one attempt; None where nothing was measured. Times of different hosts are corrected by the
    measured offset of their clocks."""

    started_s: float = 0.0
    ended_s: float | None = None
    stop_s: float | None = None
    """The source's STOP, by QEMU's own event time (wall clock of the source's host)."""
    resume_s: float | None = None
    """The destination's RESUME, as above, on the source's clock."""
    transferred_bytes: int | None = None
    total_bytes: int | None = None
    remaining_bytes: int | None = None
    passes: int | None = None
    normal_pages: int | None = None
    zero_pages: int | None = None
    """Pages sent whole, and pages sent as 'all zero'."""
    mbps: float | None = None
    throttle_percent: int | None = None
    """How much auto-converge slows the guest's CPUs."""
    remaining_by_source: dict[str, int] = field(default_factory=dict)
    """Bytes still to go, by who has them: 'ram', 'disk', 'vfio' as far as QEMU tells."""
    setup_ms: float | None = None
    qemu_downtime_ms: float | None = None
    marks: list[tuple[float, str]] = field(default_factory=list)
    """(wall seconds, what) for the timeline, beside the facts."""

    def count(self, info: Mapping[str, Any]) -> None:
        """Takes QEMU's counters over: what query-migrate said."""
        ram = info.get("ram") or {}
        if ram:
            self.transferred_bytes = int(ram.get("transferred", 0))
            self.total_bytes = int(ram.get("total", 0))
            self.remaining_bytes = int(ram.get("remaining", 0))
            self.normal_pages = int(ram.get("normal", 0))
            self.zero_pages = int(ram.get("duplicate", 0))
            self.mbps = float(ram.get("mbps", 0.0))
            self.passes = int(ram.get("dirty-sync-count", self.passes or 0))
        self.throttle_percent = int(info.get("cpu-throttle-percentage", 0))
        self.remaining_by_source = {
            name: int(info[name]["remaining"])
            for name in ("ram", "disk", "vfio")
            if "remaining" in (info.get(name) or {})
        }
        if "setup-time" in info:
            self.setup_ms = float(info["setup-time"])
        if "downtime" in info:
            self.qemu_downtime_ms = float(info["downtime"])

    @property
    def downtime_ms(self) -> float | None:
        """STOP on the source to RESUME on the destination, milliseconds."""
        if self.stop_s is None or self.resume_s is None:
            return None
        return round((self.resume_s - self.stop_s) * 1000, 3)

    @property
    def total_ms(self) -> float | None:
        """From the want to the end, milliseconds."""
        return None if self.ended_s is None else round((self.ended_s - self.started_s) * 1000, 3)


def timeline(
    log: FactLog, measured: Measured, derive: Callable[[FactLog], Derived] = derive_source
) -> list[dict[str, Any]]:
    """Facts and marks in the order of time: `at_ms` since the want, `what`, `text`, and `status` where the
    public status of the side that `derive` is for changed with that fact."""
    rows: list[dict[str, Any]] = []
    status: MigrationStatus | None = None
    part = FactLog()
    for entry in log:
        part = part.with_fact(entry.fact, round_no=entry.round, at_s=entry.at_s)
        now = derive(part).status
        row: dict[str, Any] = {"at_ms": _since(entry.at_s, measured), "what": entry.fact.value}
        if entry.text:
            row["text"] = entry.text
        if entry.by:
            row["by"] = entry.by
        if now is not status:
            row["status"] = now.value
            status = now
        rows.append(row)
    rows += [{"at_ms": _since(at_s, measured), "what": what} for at_s, what in measured.marks]
    return sorted(rows, key=lambda row: float(row["at_ms"]))


def _since(at_s: float, measured: Measured) -> float:
    return round((at_s - measured.started_s) * 1000, 3)


def ending_error(log: FactLog, row_outcome: Outcome, *, cause: dict[str, Any] | None) -> VmferryError | None:
    """The error that describes how the attempt stands; None if the guest runs where it was asked to run.

    `cause` is the wire form of the error that made the attempt turn back, if there was one.
    """
    match row_outcome:
        case Outcome.DESTINATION:
            return None
        case Outcome.UNCERTAIN:
            return Uncertain("nobody can say yet whether the guest runs on the destination", cause=cause)
        case Outcome.HELD:
            return GuestHeld("the guest is whole and paused", cause=cause)
        case Outcome.DEGRADED:
            return GuestHeld(
                "the guest runs on the destination without some of its memory",
                guest="running-on-destination",
                cause=cause,
            )
        case Outcome.LOST:
            return GuestLost("no complete current copy of the guest exists", cause=cause)
        case Outcome.SOURCE | Outcome.PENDING:  # pragma: no branch - mypy knows that no other is left
            pass
    seen = visible_error(log)
    if Fact.CANCEL in log:
        before = cause if seen is not None and seen[1] == "cause" else None
        return MigrationCancelled("the migration was cancelled; the guest runs on the source", cause=before)
    if cause is not None:
        first = from_wire(cause)
        return first if type(first) is not VmferryError else MigrationFailed(first.message, cause=cause)
    if seen is not None:
        return MigrationFailed(seen[0])
    return None


def job_wire(
    *,
    job: str,
    vm: str,
    source: str,
    destination: str,
    mode: str,
    log: FactLog,
    row: Row[Any] | None,
    outcome: Outcome,
    measured: Measured,
    cause: dict[str, Any] | None,
    over: bool,
    progress: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    trouble: str = "",
    fix: str = "",
) -> dict[str, Any]:
    """Everything about one attempt as one JSON object; the same while it runs and after it ended."""
    derived: Derived = derive_source(log)
    error = None if not over and outcome is Outcome.PENDING else ending_error(log, outcome, cause=cause)
    if error is not None and row is not None and not error.hint:
        error.hint = row.action
    wire: dict[str, Any] = {
        "job": job,
        "vm": vm,
        "source": source,
        "destination": destination,
        "mode": mode,
        "status": derived.status.value,
        "coarse": coarse(derived.status),
        "because": [fact.value for fact in derived.because],
        "outcome": outcome.value,
        "row": row.label if row else None,
        "why": row.why if row else "",
        "action": fix or (row.action if row else ""),
        "over": over,
        "downtime_ms": measured.downtime_ms,
        "total_ms": measured.total_ms,
        "setup_ms": measured.setup_ms,
        "transferred_bytes": measured.transferred_bytes,
        "total_bytes": measured.total_bytes,
        "remaining_bytes": measured.remaining_bytes,
        "normal_pages": measured.normal_pages,
        "zero_pages": measured.zero_pages,
        "remaining_by_source": measured.remaining_by_source,
        "throttle_percent": measured.throttle_percent,
        "passes": measured.passes,
        "waits_for_devices": waits_for_devices(log) and not over,
        "progress": progress,
        "notes": list(notes),
        "error": error.to_wire() if error else None,
        "timeline": timeline(log, measured),
    }
    if trouble:
        wire["trouble"] = trouble
    wire["sentence"] = sentence(wire)
    return wire


def waits_for_devices(log: FactLog) -> bool:
    """Memory is on its way, and the switchover has to wait for the destination's devices to be ready."""
    return Fact.SWITCHOVER_ACK in log and Fact.SETUP_DONE in log and Fact.DEVICES_READY not in log


_ONLY_THE_SOURCE_MEASURES = (
    "mode", "downtime_ms", "total_ms", "setup_ms", "transferred_bytes", "total_bytes", "remaining_bytes",
    "normal_pages", "zero_pages", "throttle_percent", "passes", "waits_for_devices", "progress",
)  # fmt: skip


def place_wire(
    *,
    job: str,
    vm: str,
    source: str,
    destination: str,
    log: FactLog,
    row: Row[Any],
    error: dict[str, Any] | None,
    over: bool,
) -> dict[str, Any]:
    """What the destination alone knows of an attempt, in the names of `job_wire`: for as long as the source's agent,
    which conducts it, does not answer. Times count from the moment at which the place was asked for."""
    derived = derive_destination(log)
    began_s = log.entries[0].at_s if log.entries else 0.0
    action = row.action or f"bring the agent of {source} back: it conducts the migration"
    lead = f"{vm} runs on {destination}" if row.outcome is Outcome.DESTINATION else f"{destination} awaits {vm}"
    silence = f"the agent of {source} does not answer"
    return {
        "job": job,
        "vm": vm,
        "source": source,
        "destination": destination,
        "status": derived.status.value,
        "coarse": coarse(derived.status),
        "because": [fact.value for fact in derived.because],
        "outcome": row.outcome.value,
        "row": row.label,
        "why": row.why,
        "action": action,
        "over": over,
        **dict.fromkeys(_ONLY_THE_SOURCE_MEASURES),
        "remaining_by_source": {},
        "notes": [f"told by {destination}: {silence}"],
        "error": error,
        "timeline": timeline(log, Measured(started_s=began_s), derive_destination),
        "sentence": f"{lead}; {silence} ({derived.status.value}). {row.why} Next: {action}.",
    }


def sentence(wire: dict[str, Any]) -> str:
    """One sentence for people, from the wire form."""
    vm, source, destination = wire["vm"], wire["source"], wire["destination"]
    total = "" if wire["total_ms"] is None else f", {format_ms(wire['total_ms'])} in all"
    pause = "" if wire["downtime_ms"] is None else f", paused for {format_ms(wire['downtime_ms'])}"
    match Outcome(wire["outcome"]):
        case Outcome.DESTINATION:
            return f"{vm} runs on {destination} ({wire['mode']}{pause}{total})."
        case Outcome.SOURCE:
            error = wire["error"]
            return f"{vm} runs on {source} as before" + (f": {error['message']}." if error else ".")
        case Outcome.PENDING:
            devices = (
                f"; it waits until its devices on {destination} are ready" if wire.get("waits_for_devices") else ""
            )
            return f"{vm} moves from {source} to {destination}: {wire['status']}{devices}."
        case Outcome.UNCERTAIN:
            return (
                f"UNCERTAIN: {destination} may run {vm}; both QEMUs are kept and {source} stays paused. "
                f"Next: {wire['action']}."
            )
        case Outcome.HELD:
            return f"{vm} is whole and paused: {wire['why']} Next: {wire['action']}."
        case Outcome.DEGRADED:
            return f"{vm} runs on {destination} without some of its memory. Next: {wire['action']}."
        case Outcome.LOST:  # pragma: no branch - mypy knows that no other is left
            return f"{vm} is lost: {wire['why']} Next: {wire['action'] or 'restart it from its disks'}."
