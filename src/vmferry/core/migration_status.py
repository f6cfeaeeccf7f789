"""The public status of a migration: QEMU's 17 values, what each means, and what other people call them.

Theory of operation
-------------------
QEMU speaks 17 words; libvirt and most people need fewer. Each word has exactly one row below: its meaning,
the coarse word for people, and the job status that a libvirt client would show. Nothing here decides: who may
change an option when stands in `options`, who may cancel stands in `status`. A status that a newer QEMU adds
is not a member: `parse_status` returns None for it, which every caller has to treat as unknown.

Rule 1: every value has a row (checked at import), so a new member cannot slip through unnamed.
Rule 2: only these spellings go over the wire; they are QEMU's `MigrationStatus` as 11.1 reports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class MigrationStatus(StrEnum):
    """QEMU's own status words, in the spelling of its schema."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    FAILING = "failing"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"


class Coarse(StrEnum):
    """What a person wants to know; each of the 17 words maps to one of these nine."""

    IDLE = "idle"
    MOVING = "moving"
    SWITCHING = "switching"
    RUNNING_POSTCOPY = "running-postcopy"
    PAUSED = "paused"
    ENDING = "ending"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


COARSE_DOCS: Final[dict[Coarse, str]] = {
    Coarse.IDLE: "no migration was started",
    Coarse.MOVING: "the VM runs on the source while its memory is sent",
    Coarse.SWITCHING: "the VM is stopped for the hand-over; this is the pause that its users notice",
    Coarse.RUNNING_POSTCOPY: "the hand-over is made, the remaining memory follows; both hosts are needed",
    Coarse.PAUSED: "the channel broke in postcopy; both processes are kept until it is joined again",
    Coarse.ENDING: "an error or a cancel is being cleaned up; nothing new may start yet",
    Coarse.DONE: "the VM is on the destination",
    Coarse.FAILED: "the migration failed and is cleaned up",
    Coarse.CANCELLED: "the migration was cancelled and is cleaned up",
}


@dataclass(frozen=True, slots=True)
class _Row:
    coarse: Coarse
    libvirt: str
    meaning: str


_S = MigrationStatus
_C = Coarse
_ROWS: Final[dict[MigrationStatus, _Row]] = {
    _S.NONE: _Row(_C.IDLE, "none", "no migration was started in this QEMU"),
    _S.SETUP: _Row(_C.MOVING, "active", "the channels are being opened"),
    _S.WAIT_UNPLUG: _Row(_C.MOVING, "active", "waiting until the guest lets go of its failover devices"),
    _S.ACTIVE: _Row(_C.MOVING, "active", "memory is sent while the VM runs on the source"),
    _S.PRE_SWITCHOVER: _Row(_C.SWITCHING, "paused", "the VM is stopped; waiting for leave to hand it over"),
    _S.DEVICE: _Row(_C.SWITCHING, "migrating", "the VM is stopped, images are released, devices are sent"),
    _S.POSTCOPY_DEVICE: _Row(_C.SWITCHING, "postcopy", "the destination loads the devices; it has not run"),
    _S.POSTCOPY_ACTIVE: _Row(_C.RUNNING_POSTCOPY, "postcopy", "devices are loaded; pages follow on demand"),
    _S.POSTCOPY_PAUSED: _Row(_C.PAUSED, "postcopy-paused", "the channel broke in postcopy"),
    _S.POSTCOPY_RECOVER_SETUP: _Row(_C.PAUSED, "postcopy", "a new channel is being opened"),
    _S.POSTCOPY_RECOVER: _Row(_C.PAUSED, "postcopy", "both sides agree on which pages are missing"),
    _S.FAILING: _Row(_C.ENDING, "active", "an error was seen and its cleanup is not over"),
    _S.CANCELLING: _Row(_C.ENDING, "active", "a cancel was accepted and its cleanup is not over"),
    _S.COMPLETED: _Row(_C.DONE, "hypervisor-completed", "everything was sent and confirmed"),
    _S.FAILED: _Row(_C.FAILED, "failed", "the migration failed and its cleanup is over"),
    _S.CANCELLED: _Row(_C.CANCELLED, "canceled", "the migration was cancelled and its cleanup is over"),
    _S.COLO: _Row(_C.MOVING, "active", "continuous replication; vmferry refuses to start it"),
}
assert set(_ROWS) == set(MigrationStatus), "a migration status has no row"
assert set(COARSE_DOCS) == set(Coarse), "a coarse status has no text"

TERMINAL: Final = frozenset({_S.NONE, _S.COMPLETED, _S.FAILED, _S.CANCELLED})
"""The statuses in which QEMU itself has no migration at work. (Cleanup by vmferry may still be going on.)"""


def parse_status(word: str) -> MigrationStatus | None:
    """QEMU's word as a member; None = a word this version does not know, to be treated as unknown."""
    return next((status for status in MigrationStatus if status.value == word), None)


def coarse(status: MigrationStatus) -> Coarse:
    """The word for people. A total map: every member has one."""
    return _ROWS[status].coarse


def libvirt_job_status(status: MigrationStatus) -> str:
    """libvirt's own job status for it, for people who read its logs.

    Source: the switch in libvirt's qemu_migration.c. `active` = libvirt leaves the job as it was at its
    start (it has no case of its own for setup, wait-unplug, active, failing, cancelling and colo); it adds
    `completed` itself once the destination runs.
    """
    return _ROWS[status].libvirt


def meaning(status: MigrationStatus) -> str:
    """One clause that says what the status tells; for help texts and generated documents."""
    return _ROWS[status].meaning


def docs_markdown() -> str:
    """The table of all statuses for docs/migration-status.md."""
    lines = [
        "# Migration status",
        "",
        "<!-- made by tools/gen_docs.py from src/vmferry/core/migration_status.py; do not edit -->",
        "",
        "QEMU's word is shown in details and in `--json`; the coarse word is what people see first.",
        "",
        "| QEMU's word | coarse word | libvirt's job status | meaning |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{s}` | {row.coarse} | {row.libvirt} | {row.meaning} |" for s, row in _ROWS.items()]
    lines += ["", "| coarse word | meaning |", "|---|---|"]
    lines += [f"| {word} | {text} |" for word, text in COARSE_DOCS.items()]
    return "\n".join(lines) + "\n"
