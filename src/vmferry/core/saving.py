"""A save: what is recorded of one, what its job's state is, and how its guest is given back to itself. Pure.

Theory of operation
-------------------
A save is a migration to nobody: the guest's QEMU sends its state to its own agent, which keeps it, and the guest never
leaves. Two ways:

    precopy      memory while the guest runs; a last stop, as short as a migration's, for what is left and the devices
    background   a stop of milliseconds, then the memory of that instant, each page before the guest changes it

Whatever happens on the way, the guest goes on here: it is nowhere else, and never was. So the only decision about a
guest is the way back, and it is a table (`ROWS`), the same at the end of a save that went well, of one that failed or
was cancelled, and of one whose agent died: the next agent finds the job in its journal and walks the same rows.

    1. the save is journalled, with whether the guest ran   2. `migrate`   3. QEMU has completed; the guest stands
    4. `cont`                                               5. the job's end is journalled

An agent that dies between 1 and 2 or after 4 has nothing to heal. Between 2 and 3 QEMU loses its connection and goes
back by itself, except in its pause before the switchover, where row B-cancel ends its migration. Between 3 and 4 the
guest stands, and row B-cont starts it: nobody but the save has stopped it (people's `stop` waits meanwhile).

`cont` in a QEMU whose guest runs elsewhere by now would run it twice, and `migrate_cancel` may end the move of another:

    1. the end of a save cannot be written down   2. the VM migrates and runs on another host, its QEMU here stands
    3. the next agent finds the save unfinished   4. `cont`: the guest runs on both hosts
So a save acts only on the very process that it began with, while nobody else has a job for the VM, and only as far as
its journal proves that it has acted itself (`Did`): that is written down before `stop` and `migrate` are sent.

Nor does it start a guest that something else has stopped meanwhile. QEMU's run state hides that in the end:

    1. the guest panics (or shuts down, or its disk is full): `guest-panicked`   2. QEMU sends what is left of it
    3. `postmigrate`, as of any guest that was sent
So what is heard on the way is a fact (HALTED), and what the stream says of the instant that is kept another (INSTANT).

Rule 1: a fact is recorded once, and says what was seen or asked; the job's state is computed from facts.
Rule 2: exactly one row matches; tests walk every combination.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any, Final

from vmferry.core.job import JobStatus as J
from vmferry.core.once import OnceLog
from vmferry.core.table import Pattern, find, pattern


class SaveFact(StrEnum):
    """Everything that can be recorded of a save."""

    WANTED = "wanted"
    """It was asked for, checked and journalled."""
    CANCEL = "cancel"
    HOLD = "hold"
    """The last stop waits until a person gives leave (auto-finalize is off)."""
    FINALIZE = "finalize"
    """A person gave it."""
    CONFIGURED = "configured"
    """QEMU's options are those of a save (text: the way)."""
    COPYING = "copying"
    """QEMU is about to be told to copy the guest's disks while it runs (text: which)."""
    COPIES_READY = "copies-ready"
    """Every copy has all that its disk has but for what the guest is just writing, and follows that."""
    ACTS = "acts"
    """QEMU is about to be told to send its guest; in the journal before it is told."""
    REFUSED = "refused"
    """QEMU refused to begin: whatever it sends is not the save's."""
    STOPPED = "stopped"
    """The guest was stopped before its memory was sent, or in the middle of that, or is about to be (text: why)."""
    STARTED = "started"
    """QEMU was told to send its state to this agent."""
    STANDS = "stands"
    """The guest stopped for what is left; its disks are quiet."""
    HALTED = "halted"
    """Something else than the save stopped the guest: a panic, a shutdown, a disk (text: QEMU's run state)."""
    INSTANT = "instant"
    """What QEMU's run state was at the instant that is kept, as its stream has it (text; '': it does not say)."""
    DISKS = "disks"
    """The images of that instant are not written to any more: the guest goes on in new files (text: which)."""
    COPIED = "copied"
    """The copies are what the disks were at that instant, and nobody writes to them any more (text: which)."""
    WHOLE = "whole"
    """All memory and all device state of one instant are here."""
    RESUMED = "resumed"
    """The guest runs, or stands as it stood before; QEMU has nothing more to do with the save."""
    HELD = "held"
    """The guest stands although it ran before, and QEMU does not start it (text: why). A person is told."""
    LEFT = "left"
    """The guest was not given back: it is gone, or it is not the save's any more (text: why)."""
    COMMITS = "commits"
    """The commit is about to be tried; in the journal before, where copies of disks would hang on it."""
    KEPT = "kept"
    """The snapshot is in the repository, for good (text: its id)."""
    UNKNOWN = "unknown"
    """The commit's answer was lost, or is not awaited any more: nobody knows whether the snapshot is there."""
    ABSENT = "absent"
    """The repository refused the commit, and has no such snapshot."""
    ERROR = "error"
    RESTARTED = "restarted"
    """The agent that had begun it is gone, and with it what had come."""
    CLEANUP = "cleanup"


SaveLog = OnceLog[SaveFact]


def awaits_leave(log: SaveLog) -> bool:
    """Whether the guest stands, and a person has still to say that it may go on."""
    return SaveFact.HOLD in log and SaveFact.STANDS in log and SaveFact.FINALIZE not in log


_STATES: Final[tuple[tuple[SaveFact, J], ...]] = (
    (SaveFact.CLEANUP, J.CONCLUDED),
    (SaveFact.CANCEL, J.ABORTING),
    (SaveFact.ERROR, J.ABORTING),
    (SaveFact.RESTARTED, J.ABORTING),
    (SaveFact.WHOLE, J.PENDING),
    (SaveFact.STARTED, J.RUNNING),
    (SaveFact.COPYING, J.RUNNING),
    (SaveFact.WANTED, J.CREATED),
)
"""The first fact that is there decides."""


def save_job(log: SaveLog) -> J:
    """The state of a save's job: pending once everything is here and only the snapshot is to be committed, or from the
    moment in which a person's leave is awaited."""
    state = next((state for fact, state in _STATES if fact in log), J.UNDEFINED)
    waited = SaveFact.HOLD in log and SaveFact.STANDS in log
    return J.PENDING if state is J.RUNNING and waited else state


_ENDS: Final = ((SaveFact.KEPT, "completed"), (SaveFact.CANCEL, "cancelled"), (SaveFact.ERROR, "failed"))


def save_status(log: SaveLog) -> str:
    """One of QEMU's words for a migration: what a save is to those who know these."""
    end = next((word for fact, word in _ENDS if fact in log), None)
    if SaveFact.CLEANUP in log:
        return end or "failed"
    if SaveFact.CANCEL in log and SaveFact.KEPT not in log:
        return "cancelling"
    if SaveFact.ERROR in log or SaveFact.RESTARTED in log:
        return "failing"
    if awaits_leave(log):
        return "pre-switchover"
    if SaveFact.WHOLE in log or SaveFact.STANDS in log:
        return "device"
    return "active" if SaveFact.STARTED in log or SaveFact.COPYING in log else "setup"


def may_name_copies(log: SaveLog) -> bool:
    """Whether a snapshot names the copies of the disks, or may: then nobody takes them away. A refused commit counts
    until it was looked whether the snapshot is there."""
    return SaveFact.KEPT in log or SaveFact.UNKNOWN in log or (SaveFact.COMMITS in log and SaveFact.ABSENT not in log)


def may_cancel(log: SaveLog, *, is_committing: bool, stands: bool = False) -> str | None:
    """Why a cancel is too late, or None. A guest that stands for the commit may always be taken back."""
    if SaveFact.KEPT in log or (is_committing and not stands):
        return "the snapshot is being committed, or is there already; it can be forgotten ('vmferry forget')"
    return None


# --- what a QEMU says -----------------------------------------------------------------------------------------


class Word(Enum):
    """What QEMU's migration is doing."""

    IDLE = "idle"
    """Nothing of the save: none, or an end that is over."""
    GOING = "going"
    WAITS = "waits"
    """In its pause before the switchover; the guest stands."""
    ENDING = "ending"
    """On its way back by itself."""
    DONE = "done"
    """It has sent everything."""


_WORDS: Final = {
    "none": Word.IDLE,
    "failed": Word.IDLE,
    "cancelled": Word.IDLE,
    "cancelling": Word.ENDING,
    "failing": Word.ENDING,
    "pre-switchover": Word.WAITS,
    "completed": Word.DONE,
}


def word_of(status: str | None) -> Word:
    """QEMU's status -> the answer. What nobody has heard of goes on: then it is cancelled on the way back."""
    return _WORDS.get(status or "none", Word.GOING)


class Guest(Enum):
    """What QEMU's CPUs do."""

    RUNS = "runs"
    STANDS = "stands"
    """Stopped, and here."""
    SENT = "sent"
    """Stopped because QEMU has sent its state, to whomever."""
    OTHER = "other"
    """In a state that the save did not lead to, as after a disk error or a panic: it is not ours to leave."""


_RUN_STATES: Final = {
    "running": Guest.RUNS,
    "paused": Guest.STANDS,
    "finish-migrate": Guest.SENT,
    "postmigrate": Guest.SENT,
}


def guest_of(run_state: str) -> Guest:
    """QEMU's run state -> the answer."""
    return _RUN_STATES.get(run_state, Guest.OTHER)


_HALTS: Final = {
    "GUEST_PANICKED": ("guest-panicked", ("pause", "poweroff")),
    "BLOCK_IO_ERROR": ("io-error", ("stop",)),
    "WATCHDOG": ("watchdog", ("pause",)),
}
"""Event -> the run state that follows, and the actions with which it does."""


def halt_of(event: str, data: Mapping[str, Any]) -> str:
    """The run state into which the guest falls with this event of its QEMU; '' for any other event."""
    if event == "SHUTDOWN":  # QEMU ends then, unless it was told not to (-no-shutdown)
        return "shutdown"
    state, actions = _HALTS.get(event, ("", ()))
    return state if data.get("action") in actions else ""


def _said(log: SaveLog, fact: SaveFact) -> str:
    entry = log.entry(fact)
    return "" if entry is None else entry.text


def halted(log: SaveLog) -> str:
    """The run state into which something else than the save has brought the guest; '' if nothing has. The stream is
    right where it speaks of the guest's last instant; a background save's speaks of an earlier one."""
    instant = _said(log, SaveFact.INSTANT)
    if instant and _said(log, SaveFact.CONFIGURED) != "background":
        return instant if guest_of(instant) is Guest.OTHER else ""
    return _said(log, SaveFact.HALTED)


def ran_at_instant(log: SaveLog, *, before: bool) -> bool:
    """Whether the guest ran at the instant that is kept, or would have but for the save. `before`: it did as that
    began."""
    instant = _said(log, SaveFact.INSTANT)
    return before and (guest_of(instant) is not Guest.OTHER if instant else not halted(log))


# --- the way back ---------------------------------------------------------------------------------------------


class Qemu(Enum):
    """Whether the process can be asked."""

    ANSWERS = "answers"
    SILENT = "silent"
    GONE = "gone"
    NOT_OURS = "not-ours"
    """It is another process than the save began with, or somebody else has a job for the VM now."""


class Did(Enum):
    """What the save is proved to have told its QEMU."""

    NOTHING = "nothing"
    STOP = "stop"
    """Only to stop its guest: QEMU refused to send it."""
    SEND = "send"
    """To send it, or it was about to."""


def did(log: SaveLog) -> Did:
    """What the facts prove. What was about to be done counts as done, unless QEMU refused it."""
    if SaveFact.STARTED in log or (SaveFact.ACTS in log and SaveFact.REFUSED not in log):
        return Did.SEND
    return Did.STOP if SaveFact.STOPPED in log else Did.NOTHING


class Owed(Enum):
    """Whether the guest ran when the save began: then it shall run again."""

    YES = "yes"
    NO = "no"


class Halted(Enum):
    """Whether something else than the save has stopped the guest."""

    YES = "yes"
    NO = "no"


class Back(Enum):
    """What is done for the guest."""

    CANCEL = "cancel"
    """`migrate_cancel`."""
    CONT = "cont"
    """`cont`."""
    WAIT = "wait"
    DONE = "done"
    """Nothing: the guest is its own again."""
    LEAVE = "leave"
    """Nothing: the guest is gone, or whether it goes on is not the save's to say."""


@dataclass(frozen=True, slots=True)
class BackView:
    """The questions of `ROWS`."""

    qemu: Qemu
    word: Word
    guest: Guest
    owed: Owed
    did: Did
    halted: Halted = Halted.NO


@dataclass(frozen=True, slots=True, eq=False)
class BackRow:
    """One decision."""

    label: str
    when: Pattern
    do: Back
    why: str


_ENDED: Final = (Word.IDLE, Word.DONE)
_ACTED: Final = (Did.STOP, Did.SEND)
ROWS: Final[tuple[BackRow, ...]] = (
    BackRow("B-gone", pattern(qemu=Qemu.GONE), Back.LEAVE, "its QEMU is gone, and the guest with it"),
    BackRow("B-silent", pattern(qemu=Qemu.SILENT), Back.WAIT, "its QEMU does not answer"),
    BackRow("B-not-ours", pattern(qemu=Qemu.NOT_OURS), Back.LEAVE, "the guest is not the save's to touch any more"),
    BackRow("B-untouched", pattern(qemu=Qemu.ANSWERS, did=Did.NOTHING), Back.DONE, "the save never touched the guest"),
    BackRow(
        "B-foreign",
        pattern(qemu=Qemu.ANSWERS, did=Did.STOP, word=(Word.GOING, Word.WAITS, Word.ENDING)),
        Back.LEAVE,
        "somebody else sends the guest: whether it goes on is theirs to say",
    ),
    BackRow(
        "B-foreign-sent",
        pattern(qemu=Qemu.ANSWERS, did=Did.STOP, word=_ENDED, guest=Guest.SENT),
        Back.LEAVE,
        "somebody else has sent the guest, and it may run elsewhere",
    ),
    BackRow(
        "B-cancel",
        pattern(qemu=Qemu.ANSWERS, did=Did.SEND, word=(Word.GOING, Word.WAITS)),
        Back.CANCEL,
        "QEMU still sends, to nobody",
    ),
    BackRow(
        "B-ending",
        pattern(qemu=Qemu.ANSWERS, did=Did.SEND, word=Word.ENDING),
        Back.WAIT,
        "QEMU goes back by itself",
    ),
    BackRow(
        "B-cont",
        pattern(qemu=Qemu.ANSWERS, did=_ACTED, word=_ENDED, guest=Guest.STANDS, owed=Owed.YES, halted=Halted.NO),
        Back.CONT,
        "the guest stands although it ran before, and nobody but the save has stopped it",
    ),
    BackRow(
        "B-cont-sent",
        pattern(qemu=Qemu.ANSWERS, did=Did.SEND, word=_ENDED, guest=Guest.SENT, owed=Owed.YES, halted=Halted.NO),
        Back.CONT,
        "the guest was sent to this agent only, and it ran before",
    ),
    BackRow(
        "B-halted",
        pattern(qemu=Qemu.ANSWERS, did=_ACTED, word=_ENDED, guest=Guest.STANDS, owed=Owed.YES, halted=Halted.YES),
        Back.LEAVE,
        "something else than the save stopped the guest on the way, and it is not the save's to start it",
    ),
    BackRow(
        "B-halted-sent",
        pattern(qemu=Qemu.ANSWERS, did=Did.SEND, word=_ENDED, guest=Guest.SENT, owed=Owed.YES, halted=Halted.YES),
        Back.LEAVE,
        "something else than the save stopped the guest on the way, and it is not the save's to start it",
    ),
    BackRow(
        "B-as-before",
        pattern(qemu=Qemu.ANSWERS, did=_ACTED, word=_ENDED, guest=Guest.STANDS, owed=Owed.NO),
        Back.DONE,
        "the guest stands, as it did before",
    ),
    BackRow(
        "B-sent-as-before",
        pattern(qemu=Qemu.ANSWERS, did=Did.SEND, word=_ENDED, guest=Guest.SENT, owed=Owed.NO),
        Back.DONE,
        "the guest stands, as it did before",
    ),
    BackRow(
        "B-runs",
        pattern(qemu=Qemu.ANSWERS, did=_ACTED, word=_ENDED, guest=Guest.RUNS),
        Back.DONE,
        "the guest runs",
    ),
    BackRow(
        "B-other",
        pattern(qemu=Qemu.ANSWERS, did=_ACTED, word=_ENDED, guest=Guest.OTHER),
        Back.LEAVE,
        "something else than the save has stopped the guest, and it is not the save's to start it",
    ),
)


def row_of(view: BackView) -> BackRow:
    """The one row that matches."""
    return find(ROWS, view)
