"""The journal of one agent: wants and the commit, never phases. Durable before the effect that depends on it.

Theory of operation
-------------------
One SQLite database, one connection, one thread ("journal"), exclusive lock, WAL with synchronous=FULL: an
entry is on the disk when `append` returns. Entries are only ever added; what holds now is what replaying them
gives (`replay`). After a restart the agent reads the journal once and then runs its ordinary loop: there is no
second recovery code, so nothing here says how far anything got.

Rule 1: entries are past tense facts of agreement (`KEPT`, `WANTED`, `COMMITTED` …), never steps.
Rule 2: a second process cannot open the journal of a live agent (`journal_mode` exclusive).

Source for the SQLite settings: https://www.sqlite.org/wal.html and /pragma.html#pragma_synchronous;
docs/decisions/0005-journal.md has the measurements.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

from vmferry.errors import Unfit


class Entry(StrEnum):
    """The kinds of entries."""

    KEPT = "kept"
    """This host keeps the VM: its definition, its QEMU, its generation."""
    FORGOTTEN = "forgotten"
    """This host does not keep the VM any more."""
    BLOCKED = "blocked"
    """Somebody holds a blocker on the VM; the newest of its name counts."""
    UNBLOCKED = "unblocked"
    """They do not any more."""
    WANTED = "wanted"
    """Source: a migration was asked for."""
    CANCEL_WANTED = "cancel-wanted"
    """Source, restore, save: its cancel was asked for, and could be accepted when this was written."""
    CANCEL_REFUSED = "cancel-refused"
    """Of the same: it was too late when that had been written. The person hears so; the cancel never acts."""
    POSTCOPY_WANTED = "postcopy-wanted"
    """Source: the switch to postcopy was asked for by hand."""
    FINALIZE_WANTED = "finalize-wanted"
    """Source: a person gave the leave to hand the guest over, for which the job was to wait."""
    PAUSED = "paused"
    """Source: whether a person wants the pages of the postcopy paused; the newest holds."""
    OPTIONS_BEFORE = "options-before"
    """Source: what its QEMU had under names of options that are changed for the job; the first value counts."""
    MIRRORS = "mirrors"
    """Source: its QEMU is about to be told to mirror these disks."""
    IMAGE_MADE = "image-made"
    """Destination: a file (device and inode) that is this job's, before it gets its name."""
    LEFT = "left"
    """An image that a guest left on this host when it went with its disks, and what it looked like then."""
    LET_GO = "let-go"
    """It was taken away, or is something else now."""
    IMAGES_GONE = "images-gone"
    """Of a restore or a save that is over: no file that it made is there any more."""
    RECOVERY_WAY = "recovery-way"
    """Source: how the destination is reached without the agents' link, should the postcopy break; the newest counts."""
    COMMITTED = "committed"
    """The newer generation belongs to the destination: on the source before it is told, there before it runs."""
    RESTORE_WANTED = "restore-wanted"
    """A guest was wanted back from a snapshot; what is made for it."""
    STARTING = "starting"
    """A restored guest is about to be told to run, or given to people who may: from here on nothing of it is taken away
    unless RENOUNCED follows, which an agent writes that knows that it did not send the order."""
    HOST_PAGES = "host-pages"
    """A restored guest's QEMU has memory in pages that are larger than 4 KiB: bytes of one, by block."""
    RAN = "ran"
    """A restored guest was seen running, or given to people paused: whether it runs is not the restore's any more."""
    SAVE_WANTED = "save-wanted"
    """A snapshot of a VM of this host was asked for."""
    SAVE_ACTS = "save-acts"
    """What the VM's QEMU is about to be told for a snapshot (`saving.Did`), or the run state into which something else
    brought its guest meanwhile; the newest of each holds."""
    CHORE_WANTED = "chore-wanted"
    """A job about the repository was asked for: verify, prune, export, import."""
    PLACE_WANTED = "place-wanted"
    """Destination: a place for the guest was asked for."""
    TURNED_BACK = "turned-back"
    """Source: the commit had been written and not been sent, and the guest is about to go on here: it never will be."""
    FENCED = "fenced"
    """Source: a silent destination was fenced off; the generation is the source's again."""
    OPTIONS = "options"
    """Source: options of QEMU that were changed while the job ran."""
    POLICY = "policy"
    """Source and destination: the job's policies were changed while it ran."""
    RENOUNCED = "renounced"
    """Destination, or a restore: the guest never ran here in this job and never will."""
    ENDED = "ended"
    """The job is over: its result."""
    DISMISSED = "dismissed"
    """The result of the job was read and is not shown any more. What it proves to other agents stays until the job is
    old: a place that was not released asks whether it is still wanted."""


@dataclass(frozen=True, slots=True)
class Written:
    """One entry as read back."""

    seq: int
    kind: Entry
    subject: str
    """A VM's name for KEPT, FORGOTTEN, BLOCKED and UNBLOCKED, a path for LEFT and LET_GO, else a job's id."""
    body: dict[str, Any]


@dataclass
class JobState:
    """What the journal says of one job."""

    job: str
    role: str
    body: dict[str, Any]
    cancel_wanted: bool = False
    postcopy_wanted: bool = False
    finalize_wanted: bool = False
    paused: bool = False
    options_before: dict[str, Any] = field(default_factory=dict)
    mirrors: dict[str, Any] = field(default_factory=dict)
    """What goes on without an agent: the mirrors, and what the plan was."""
    images: dict[str, Any] = field(default_factory=dict)
    """Files that the job made: path to [device, inode]."""
    recovery_way: dict[str, Any] | None = None
    committed_generation: int | None = None
    host_pages: dict[str, Any] = field(default_factory=dict)
    """A restore: the pages of its QEMU's memory, in bytes by block; empty: of 4 KiB."""
    starting: bool = False
    ran: bool = False
    renounced: bool = False
    turned_back: bool = False
    did: str = "nothing"
    """A save: what it may have told its QEMU (`saving.Did`)."""
    halted: str = ""
    """A save: the run state into which something else brought its guest."""
    commits: bool = False
    """A save: its commit may have been tried."""
    fenced: str = ""
    """Why the destination counts as fenced; empty: it does not."""
    policy: dict[str, Any] = field(default_factory=dict)
    ended: dict[str, Any] | None = None
    dismissed: bool = False


@dataclass
class Replayed:
    """What holds after all entries."""

    vms: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, JobState] = field(default_factory=dict)
    blockers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """By VM and name."""
    retired: list[dict[str, Any]] = field(default_factory=list)
    """Identities of QEMUs whose guests were given away for good: such a process is of no use any more."""
    left: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Images that guests left here, by path."""


ROLES: Final = {
    Entry.WANTED: "source",
    Entry.PLACE_WANTED: "destination",
    Entry.RESTORE_WANTED: "restore",
    Entry.SAVE_WANTED: "save",
    Entry.CHORE_WANTED: "chore",
}
"""What begins a job, and the role that its job has here."""


def replay(entries: Iterable[Written]) -> Replayed:
    """Entries in order -> what holds now. Pure."""
    state = Replayed()
    for entry in entries:
        job = state.jobs.get(entry.subject)
        match entry.kind:
            case Entry.KEPT:
                state.vms[entry.subject] = entry.body
            case Entry.FORGOTTEN:
                state.vms.pop(entry.subject, None)
                state.blockers.pop(entry.subject, None)
                if "identity" in entry.body:
                    state.retired.append(entry.body["identity"])
            case Entry.BLOCKED:
                state.blockers.setdefault(entry.subject, {})[str(entry.body.get("name"))] = entry.body
            case Entry.UNBLOCKED:
                state.blockers.get(entry.subject, {}).pop(str(entry.body.get("name")), None)
            case Entry.LEFT:
                state.left[entry.subject] = entry.body
            case Entry.LET_GO:
                state.left.pop(entry.subject, None)
            case kind if kind in ROLES:
                state.jobs[entry.subject] = JobState(entry.subject, ROLES[kind], entry.body)
            case _ if job is not None:
                _of_job(job, entry)
            case _:
                pass  # an entry of a job whose beginning is not there any more: nothing to say
    return state


def _of_job(job: JobState, entry: Written) -> None:
    """What one more entry says of a job that has begun."""
    match entry.kind:
        case Entry.SAVE_ACTS:
            job.did = str(entry.body.get("did", job.did))
            job.halted = str(entry.body.get("halted", job.halted))
            job.commits = bool(entry.body.get("commits", job.commits))
        case Entry.DISMISSED:
            job.dismissed = True
        case Entry.CANCEL_WANTED:
            job.cancel_wanted = True
        case Entry.CANCEL_REFUSED:
            job.cancel_wanted = False
        case Entry.POSTCOPY_WANTED:
            job.postcopy_wanted = True
        case Entry.FINALIZE_WANTED:
            job.finalize_wanted = True
        case Entry.PAUSED:
            job.paused = bool(entry.body.get("paused"))
        case Entry.OPTIONS_BEFORE:
            job.options_before = {**entry.body, **job.options_before}
        case Entry.MIRRORS:
            job.mirrors = entry.body
        case Entry.IMAGE_MADE:
            job.images.update(entry.body)
        case Entry.IMAGES_GONE:
            job.images = {}
        case Entry.RECOVERY_WAY:
            job.recovery_way = entry.body
        case Entry.COMMITTED:
            job.committed_generation = int(entry.body["generation"])
        case Entry.HOST_PAGES:
            job.host_pages = entry.body
        case Entry.STARTING:
            job.starting = True
        case Entry.RAN:
            job.ran = True
        case Entry.TURNED_BACK:
            job.turned_back = True
        case Entry.FENCED:
            job.fenced = str(entry.body.get("text", "no reason was written down"))
        case Entry.OPTIONS:
            job.body = {**job.body, "options": {**job.body.get("options", {}), **entry.body}}
        case Entry.POLICY:
            job.policy = {**job.policy, **entry.body}
        case Entry.RENOUNCED:
            job.renounced = True
        case Entry.ENDED:
            job.ended = entry.body
        case _:  # pragma: no cover
            pass  # every kind is there, above or in `replay`


KEEP_ENDED_JOBS = 200
"""Results of ended jobs that are kept over a restart, and as many of chores; older ones are forgotten with their
entries. Those that wait to be dismissed are not counted and not forgotten (`limits.JOBS_UNDISMISSED_MAX` bounds
them), nor are restores and saves of which disks are left: nobody else knows whose they are."""


class JournalStore(Protocol):
    """A journal as an agent uses it; `Journal` is the one on a disk."""

    async def append(self, kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        """Adds one entry; it is durable when this returns. Raises Unfit: then the entry is not there."""

    def read(self) -> list[Written]:
        """All entries, oldest first."""

    def close(self) -> None:
        """Gives the journal back."""


class Journal:
    """The open journal of a live agent.

    Raises:
        Unfit: another agent holds it, or the file is damaged. Nothing was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        try:
            self._db = self._thread.submit(_open, path).result()
        except sqlite3.DatabaseError as error:
            self._thread.shutdown()
            raise Unfit(
                f"the journal {path} cannot be used: {error}",
                hint="is another agent running with this state folder? Otherwise check the disk",
                cause=error,
            ) from error

    async def append(self, kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        """Adds one entry; it is on the disk when this returns.

        Raises Unfit (a full disk, say): the entry is not there and what depends on it must not be done.
        """
        text = json.dumps(body or {}, separators=(",", ":"))
        loop = asyncio.get_running_loop()
        # shield: an append that was begun ends by itself; a cancelled waiter must not leave it half known
        try:
            await asyncio.shield(loop.run_in_executor(self._thread, _append, self._db, kind, subject, text))
        except sqlite3.Error as error:
            raise Unfit(
                f"the journal {self.path} cannot be written: {error}",
                retry="yes",
                hint="make room on the disk; what waits for the journal is tried again",
                cause=error,
            ) from error

    def read(self) -> list[Written]:
        """All entries, oldest first."""
        return self._thread.submit(_read, self._db).result()

    def close(self) -> None:
        """Closes the database and joins the thread."""
        self._thread.submit(self._db.close).result()
        self._thread.shutdown()


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
    db.execute("PRAGMA locking_mode=EXCLUSIVE")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    verdict = db.execute("PRAGMA quick_check").fetchone()[0]
    if verdict != "ok":
        raise sqlite3.DatabaseError(f"quick_check says: {verdict}")
    db.execute(
        "CREATE TABLE IF NOT EXISTS entry (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL,"
        " subject TEXT NOT NULL, body TEXT NOT NULL) STRICT"
    )
    _forget_old(db)
    return db


def _forget_old(db: sqlite3.Connection) -> None:
    """Drops superseded KEPT entries and whole jobs that ended long ago. Only at start: nobody waits."""
    with db:
        db.execute(
            "DELETE FROM entry WHERE kind IN ('kept','forgotten') AND seq NOT IN"
            " (SELECT max(seq) FROM entry WHERE kind IN ('kept','forgotten') GROUP BY subject)"
        )
        db.execute(
            "DELETE FROM entry WHERE kind IN ('left','let-go') AND seq NOT IN"
            " (SELECT max(seq) FROM entry WHERE kind IN ('left','let-go') GROUP BY subject)"
        )
        db.execute("DELETE FROM entry WHERE kind='let-go'")
        old = []
        for among in ("IN", "NOT IN"):  # a verify each hour must not push out what migrations prove
            old += db.execute(
                f"SELECT subject FROM entry WHERE kind='ended' AND subject {among}"
                " (SELECT subject FROM entry WHERE kind='chore-wanted') AND subject NOT IN"
                " (SELECT subject FROM entry WHERE kind IN"
                "   ('wanted','place-wanted','save-wanted','restore-wanted','chore-wanted')"
                "  AND json_extract(body, '$.auto_dismiss') = 0"
                "  AND subject NOT IN (SELECT subject FROM entry WHERE kind='dismissed'))"
                " AND subject NOT IN (SELECT subject FROM entry WHERE kind='image-made'"
                "  AND subject IN (SELECT subject FROM entry WHERE kind='restore-wanted'"
                "   OR (kind='save-wanted' AND json_array_length(body, '$.copies') > 0))"
                "  AND subject NOT IN (SELECT subject FROM entry WHERE kind='images-gone'))"
                " ORDER BY seq DESC LIMIT -1 OFFSET ?",
                (KEEP_ENDED_JOBS,),
            ).fetchall()
        of_vms = "('kept','forgotten','blocked','unblocked','left')"
        db.executemany(f"DELETE FROM entry WHERE subject=? AND kind NOT IN {of_vms}", old)
        db.execute(
            "DELETE FROM entry WHERE kind='blocked' AND seq NOT IN"
            " (SELECT max(seq) FROM entry WHERE kind IN ('blocked','unblocked')"
            "  GROUP BY subject, json_extract(body, '$.name'))"
        )
        db.execute("DELETE FROM entry WHERE kind='unblocked'")


def _append(db: sqlite3.Connection, kind: Entry, subject: str, body: str) -> None:
    db.execute("INSERT INTO entry (kind, subject, body) VALUES (?,?,?)", (kind.value, subject, body))


def _read(db: sqlite3.Connection) -> list[Written]:
    rows = db.execute("SELECT seq, kind, subject, body FROM entry ORDER BY seq")
    return [Written(seq, Entry(kind), subject, json.loads(body)) for seq, kind, subject, body in rows]
