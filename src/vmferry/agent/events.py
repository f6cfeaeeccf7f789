"""The events of an agent, as its schema tells them. The publishers send plain values; tests hold them against these.

Rule 1: what an event of this name ever carries is a member here; what it may lack has a default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vmferry.core.job import JobStatus
from vmferry.core.migration_status import MigrationStatus
from vmferry.core.table import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """MIGRATION: the public status changed, because of exactly one fact."""

    host: str
    vm: str
    job: str
    status: MigrationStatus
    cause: str
    because: list[str]
    seq: int
    role: str = "source"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatusChange:
    """JOB_STATUS_CHANGE: the job is in this state, if only for a moment; as QEMU's."""

    host: str
    id: str
    status: JobStatus
    type: str
    vm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFact:
    """JOB_FACT: one fact was recorded; its revision is the job's."""

    host: str
    id: str
    type: str
    vm: str
    fact: str
    round: int
    text: str
    by: str
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobBrief:
    """JOB_PROGRESS: the short form of a job, for a progress line."""

    host: str
    vm: str
    job: str
    status: MigrationStatus
    outcome: Outcome
    row: str
    over: bool
    action: str
    destination: str | None = None
    transferred_bytes: int | None = None
    remaining_bytes: int | None = None
    total_bytes: int | None = None
    mbps: float | None = None
    passes: int | None = None
    current_bytes: int | None = None
    whole_bytes: int | None = None
    percent: int | None = None
    percent_error: int | None = None
    left_ms_min: float | None = None
    left_ms_max: float | None = None
    disks: list[dict[str, Any]] = field(default_factory=list)
    """Each mirror of a local disk as a job of its own, in QEMU's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobChange(JobBrief):
    """JOB_CHANGE: something of the job is new; equal revisions, equal jobs. A destination's has a role and a source."""

    id: str
    revision: int
    role: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded:
    """JOB_ENDED: a job of the source is over; everything about it, as `job-status` tells it."""

    host: str
    job: str
    vm: str
    source: str
    destination: str
    mode: str
    status: MigrationStatus
    outcome: Outcome
    over: bool
    sentence: str
    coarse: str | None = None
    because: list[str] = field(default_factory=list)
    row: str | None = None
    why: str | None = None
    action: str | None = None
    downtime_ms: float | None = None
    total_ms: float | None = None
    setup_ms: float | None = None
    transferred_bytes: int | None = None
    total_bytes: int | None = None
    remaining_bytes: int | None = None
    normal_pages: int | None = None
    zero_pages: int | None = None
    remaining_by_source: dict[str, int] = field(default_factory=dict)
    throttle_percent: int | None = None
    passes: int | None = None
    waits_for_devices: bool | None = None
    progress: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    timeline: list[dict[str, Any]] = field(default_factory=list)
    trouble: str | None = None
    disks: list[dict[str, Any]] = field(default_factory=list)
    images_left: list[str] = field(default_factory=list)
    """On the source, of disks that went: nothing deletes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """TARGET: what the destination's agent knows of a place, whole each time; for other agents."""

    host: str
    job: str
    vm: str
    generation: int
    loaded: bool
    whole: bool
    committed: bool
    ran: bool
    in_doubt: bool
    refused: int
    refused_text: str
    gone: bool
    died: bool
    cut_off: int
    frozen: bool
    resume_s: float | None
    text: str
    status: MigrationStatus
    row: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VmGone:
    """VM_GONE: the QEMU of a VM without a migration ended; `text` is its last words."""

    host: str
    vm: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescue:
    """RESCUE: a rescue tool goes on."""

    host: str
    vm: str
    tool: str | None = None
    bytes: int | None = None
    pages: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """RESTORE: something of a restore is new, or it goes on; the short form."""

    host: str
    job: str
    vm: str
    detail: str
    state: JobStatus
    reason: str
    current_bytes: int
    whole_bytes: int
    over: bool


EVENTS: dict[str, type] = {
    "MIGRATION": Migration,
    "JOB_STATUS_CHANGE": JobStatusChange,
    "JOB_FACT": JobFact,
    "JOB_PROGRESS": JobBrief,
    "JOB_CHANGE": JobChange,
    "JOB_ENDED": JobEnded,
    "TARGET": Target,
    "VM_GONE": VmGone,
    "RESCUE": Rescue,
    "RESTORE": Restore,
}
