"""Jobs: one state map and one set of verbs for everything that runs long, whatever it moves. Pure.

Theory of operation
-------------------
States, their names and their order are those of QEMU's jobs (`JobStatus` of qapi/job.json; which change follows which
and which verb is taken where, from job.c). A *kind* of job goes its own way through the one map and leaves out what it
does not need; its fine status (the 17 values of `MigrationStatus`, say) is a detail beside the state.

The state is computed, as every status here: `SOURCE_STATES` and `DESTINATION_STATES` translate the public status of a
migration, and `path` names the states between two of them, which a job passes as QEMU's do (an event each).

Rule 1: a state is added to `MOVES`, or a verb to `VERBS`, only where QEMU has it; what is ours stands in `OURS`.
Rule 2: every kind answers every verb in every state: it does it, it need do nothing, or it says why not (`answer`).
Rule 3: nobody decides by a job's state; wants become facts, and the tables of `core` do the rest.

Sources: qapi/job.json and job.c of QEMU 11.1; docs/decisions/0020-jobs.md for what is ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final

from vmferry.core.facts import Fact, FactLog, open_round, wants_pause
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.core.status import destination_status, source_status
from vmferry.core.view import Disks, disks_of


class JobStatus(StrEnum):
    """QEMU's words for the state of a job."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


J = JobStatus

MEANINGS: Final[Mapping[J, str]] = {
    J.UNDEFINED: "nobody asked for it yet; never shown",
    J.CREATED: "asked for, and not begun",
    J.RUNNING: "at work",
    J.PAUSED: "stopped on the way; it goes on when it is resumed, or when what stopped it is mended",
    J.READY: "both sides are the same and are kept so; `complete` ends it (mirrors)",
    J.STANDBY: "the same, paused",
    J.WAITING: "done with its own work; it waits for the others of its group",
    J.PENDING: "all that is left is the change that everybody sees; `finalize` makes it",
    J.ABORTING: "cancelled or failed, and being cleaned up",
    J.CONCLUDED: "over; its result can be read until it is dismissed",
    J.NULL: "dismissed; never listed",
}


class Verb(StrEnum):
    """What may be asked of a job. QEMU's set-speed is a `change` here, as max-bandwidth is."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    CHANGE = "change"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


def _to(*states: J) -> frozenset[J]:
    return frozenset(states)


MOVES: Final[Mapping[J, frozenset[J]]] = {
    J.UNDEFINED: _to(J.CREATED),
    J.CREATED: _to(J.RUNNING, J.ABORTING, J.NULL),
    J.RUNNING: _to(J.PAUSED, J.READY, J.WAITING, J.ABORTING),
    J.PAUSED: _to(J.RUNNING),
    J.READY: _to(J.STANDBY, J.WAITING, J.ABORTING),
    J.STANDBY: _to(J.READY),
    J.WAITING: _to(J.PENDING, J.ABORTING),
    J.PENDING: _to(J.ABORTING, J.CONCLUDED),
    J.ABORTING: _to(J.ABORTING, J.CONCLUDED),
    J.CONCLUDED: _to(J.NULL),
    J.NULL: frozenset(),
}
"""What may follow what, as in QEMU."""

OURS: Final[Mapping[tuple[J, J], str]] = {
    (J.PENDING, J.RUNNING): "in postcopy the switchover is not the end: the rest of the memory follows it",
}
"""Changes that QEMU's jobs do not know, each with its reason."""

VERBS: Final[Mapping[Verb, frozenset[J]]] = {
    Verb.CANCEL: _to(J.CREATED, J.RUNNING, J.PAUSED, J.READY, J.STANDBY, J.WAITING, J.PENDING),
    Verb.PAUSE: _to(J.CREATED, J.RUNNING, J.PAUSED, J.READY, J.STANDBY),
    Verb.RESUME: _to(J.CREATED, J.RUNNING, J.PAUSED, J.READY, J.STANDBY),
    Verb.CHANGE: _to(J.CREATED, J.RUNNING, J.PAUSED, J.READY, J.STANDBY),
    Verb.COMPLETE: _to(J.READY),
    Verb.FINALIZE: _to(J.PENDING),
    Verb.DISMISS: _to(J.CONCLUDED),
}
"""Where a verb is taken at all, as in QEMU; a kind takes fewer, or says in `Kind.cells` why it takes more."""


class Answer(Enum):
    """What a job answers to a verb."""

    DOES = "does it"
    NOTHING = "nothing is left to do"
    """Success: what is asked for is so already."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Cell:
    """One answer. `why` is for people: the reason of a refusal, else what follows."""

    answer: Answer
    why: str


def _does(why: str) -> Cell:
    return Cell(Answer.DOES, why)


def _nothing(why: str) -> Cell:
    return Cell(Answer.NOTHING, why)


def _refused(why: str) -> Cell:
    return Cell(Answer.REFUSED, why)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of job: the states that it uses, and where its answers differ from QEMU's table.

    `verbs` holds for a verb in every state that `cells` does not name; `cells` for one of them."""

    name: str
    what: str
    states: frozenset[J]
    verbs: Mapping[Verb, Cell] = field(default_factory=dict)
    cells: Mapping[tuple[Verb, J], Cell] = field(default_factory=dict)


_AT_WORK: Final = (J.CREATED, J.RUNNING, J.PAUSED, J.PENDING)
ELSEWHERE: Final = _refused("it does what its source's job of the same id says; ask the agent of the source")
_NO_PAUSE: Final = _refused("QEMU cannot pause a precopy; to slow it down change max-bandwidth")
_BY_ITSELF: Final = _refused("a migration completes by itself; to switch over sooner change downtime-limit or mode")
_BEFORE_THE_END: Final = _refused("its result is not there yet")
_OVER: Final = _nothing("it is over")

MIGRATE: Final = Kind(
    "migrate",
    "moves a guest away from this host",
    _to(J.CREATED, J.RUNNING, J.PAUSED, J.WAITING, J.PENDING, J.ABORTING, J.CONCLUDED, J.NULL),
    verbs={
        Verb.COMPLETE: _BY_ITSELF,
        Verb.DISMISS: _BEFORE_THE_END,
        Verb.RESUME: _refused("it is not paused"),
        Verb.FINALIZE: _refused("it does not wait for leave to switch over"),
    },
    cells={
        **{(Verb.CANCEL, j): _does("the guest stays here, as long as nobody was told to run it there")
           for j in (*_AT_WORK, J.WAITING)},
        (Verb.CANCEL, J.ABORTING): _nothing("it is on its way back already"),
        (Verb.CANCEL, J.CONCLUDED): _OVER,
        **{(Verb.PAUSE, j): _NO_PAUSE for j in (J.CREATED, J.WAITING, J.PENDING)},
        (Verb.PAUSE, J.RUNNING): _does("in postcopy: no page moves until it is resumed"),
        (Verb.PAUSE, J.PAUSED): _does("it is paused; it is not resumed by itself any more"),
        (Verb.RESUME, J.PAUSED): _does("the two QEMUs are connected again, now"),
        **{(Verb.CHANGE, j): _does("each option within its window, policies at any time")
           for j in (*_AT_WORK, J.WAITING, J.ABORTING)},
        (Verb.FINALIZE, J.PENDING): _does("the guest is handed over"),
        (Verb.DISMISS, J.CONCLUDED): _does("its result is not shown any more"),
    },
)  # fmt: skip
INCOMING: Final = Kind(
    "migrate-incoming",
    "takes a guest in; the work of the job of the same id on the guest's source",
    _to(J.CREATED, J.RUNNING, J.PAUSED, J.WAITING, J.PENDING, J.ABORTING, J.CONCLUDED, J.NULL),
    verbs=dict.fromkeys(Verb, ELSEWHERE) | {Verb.DISMISS: _BEFORE_THE_END},
    cells={(Verb.DISMISS, J.CONCLUDED): _does("its result is not shown any more"), (Verb.CANCEL, J.CONCLUDED): _OVER},
)
_TOGETHER: Final = _refused("its migration ends it, with its other disks and its memory: all of them or none")
MIRROR: Final = Kind(
    "mirror",
    "copies a disk for a migration and keeps the copy up to date; its id is that one's with '-disk-0' and so on behind",
    frozenset(J) - {J.UNDEFINED},
    verbs={
        Verb.PAUSE: _refused("its disk is copied; from here on its migration needs it as it goes"),
        Verb.RESUME: _refused("it is not paused"),
        Verb.COMPLETE: _TOGETHER,
        Verb.FINALIZE: _TOGETHER,
        Verb.DISMISS: _BEFORE_THE_END,
    },
    cells={
        **{(Verb.CANCEL, j): _does("its whole migration is cancelled: disks and memory go together or not at all")
           for j in sorted(VERBS[Verb.CANCEL])},
        (Verb.CANCEL, J.ABORTING): _nothing("it is being given up already"),
        (Verb.CANCEL, J.CONCLUDED): _refused("it is over; what goes on is its migration, which can be cancelled"),
        (Verb.PAUSE, J.RUNNING): _does("nothing more of its disk is sent until it is resumed; its migration waits"),
        (Verb.PAUSE, J.PAUSED): _nothing("it is paused"),
        (Verb.RESUME, J.PAUSED): _does("its disk is sent on"),
        (Verb.RESUME, J.STANDBY): _does("its disk is kept up to date again"),
        **{(Verb.CHANGE, j): _does("max-bandwidth of this disk alone, until that of its migration changes")
           for j in sorted(VERBS[Verb.CHANGE])},
        (Verb.DISMISS, J.CONCLUDED): _does("it is not listed any more; its migration goes on"),
    },
)  # fmt: skip
MIRROR_REASONS: Final[Mapping[J, str]] = {
    J.PAUSED: "a person paused it",
    J.STANDBY: "a person paused it",
    J.READY: "its disk is copied and is kept up to date until all of the guest is there",
    J.PENDING: "it waits for the others of its migration",
}
"""Why a mirror is where it is, for people."""
RESTORE: Final = Kind(
    "restore",
    "brings a guest back from a snapshot",
    _to(J.CREATED, J.RUNNING, J.PAUSED, J.WAITING, J.PENDING, J.ABORTING, J.CONCLUDED, J.NULL),
    verbs={
        Verb.PAUSE: _refused("pages come as the guest needs them; to hold the guest pause the guest itself"),
        Verb.COMPLETE: _refused("a restore completes by itself"),
        Verb.FINALIZE: _refused("it does not wait for leave; for a guest that is not to run say --paused"),
        Verb.CHANGE: _refused("nothing of it can be changed"),
        Verb.RESUME: _refused("it is not paused"),
        Verb.DISMISS: _BEFORE_THE_END,
    },
    cells={
        **{(Verb.CANCEL, j): _does("as long as the guest has not run; nothing of it is left then")
           for j in (J.CREATED, J.RUNNING, J.PAUSED)},
        **{(Verb.CANCEL, j): _refused("the guest is here") for j in (J.WAITING, J.PENDING)},
        (Verb.CANCEL, J.ABORTING): _nothing("it is being taken away already"),
        (Verb.CANCEL, J.CONCLUDED): _OVER,
        (Verb.RESUME, J.PAUSED): _does("the repository is asked again, or the guest's start tried again, now"),
        (Verb.DISMISS, J.CONCLUDED): _does("its result is not shown any more"),
    },
)  # fmt: skip

SAVE: Final = Kind(
    "save",
    "keeps a guest's memory and devices in a repository of snapshots, while it runs",
    _to(J.CREATED, J.RUNNING, J.WAITING, J.PENDING, J.ABORTING, J.CONCLUDED, J.NULL),
    verbs={
        Verb.COMPLETE: _refused("a save completes by itself"),
        Verb.CHANGE: _refused("a save has no options that change on its way"),
        Verb.DISMISS: _BEFORE_THE_END,
        Verb.PAUSE: _NO_PAUSE,
        Verb.RESUME: _refused("it is not paused"),
        Verb.FINALIZE: _refused("it does not wait for leave to stop the guest"),
    },
    cells={
        **{(Verb.CANCEL, j): _does("the guest goes on, and nothing is kept")
           for j in (J.CREATED, J.RUNNING, J.WAITING, J.PENDING)},
        (Verb.CANCEL, J.ABORTING): _nothing("it is on its way back already"),
        (Verb.CANCEL, J.CONCLUDED): _OVER,
        (Verb.FINALIZE, J.PENDING): _does("the guest's last state is taken, and it goes on"),
        (Verb.DISMISS, J.CONCLUDED): _does("its result is not shown any more"),
    },
)  # fmt: skip

_CHORE_STATES: Final = _to(J.CREATED, J.RUNNING, J.WAITING, J.PENDING, J.ABORTING, J.CONCLUDED, J.NULL)


def _chore(name: str, what: str, cancelled: str, **cells: Cell) -> Kind:
    """A job about a repository: no guest is touched. `cells`: what it answers while it is pending, by verb."""
    return Kind(
        name,
        what,
        _CHORE_STATES,
        verbs={
            Verb.PAUSE: _refused("it cannot be paused; cancelled it can be begun anew"),
            Verb.RESUME: _refused("it is not paused"),
            Verb.COMPLETE: _refused("it completes by itself"),
            Verb.CHANGE: _refused("nothing of it can be changed"),
            Verb.FINALIZE: _refused("it does not wait for leave"),
            Verb.DISMISS: _BEFORE_THE_END,
        },
        cells={
            **{(Verb.CANCEL, j): _does(cancelled) for j in (J.CREATED, J.RUNNING, J.WAITING, J.PENDING)},
            (Verb.CANCEL, J.ABORTING): _nothing("it is ending already"),
            (Verb.CANCEL, J.CONCLUDED): _OVER,
            (Verb.DISMISS, J.CONCLUDED): _does("its result is not shown any more"),
            **{(Verb(verb), J.PENDING): cell for verb, cell in cells.items()},
        },
    )


VERIFY: Final = _chore("verify", "reads every snapshot and names what is damaged", "it reads no further")
PRUNE: Final = _chore(
    "prune",
    "plans which objects no snapshot needs, and takes them away",
    "nothing more is taken away; what was done stays done, and the next prune does the rest",
    finalize=_does("what the plan shows is taken away, if the repository is still what it was planned for"),
)
EXPORT: Final = _chore("export", "writes a snapshot as a plain stream file of QEMU's", "the file is not made")
IMPORT: Final = _chore(
    "import",
    "keeps a plain stream file of QEMU's as a snapshot",
    "nothing is kept",
    cancel=_refused("it is being kept; a snapshot can be forgotten ('vmferry forget')"),
)
CHORES: Final = (VERIFY, PRUNE, EXPORT, IMPORT)

KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in (MIGRATE, INCOMING, MIRROR, SAVE, RESTORE, *CHORES)}
"""By QEMU's word, where QEMU has one. A new kind is one more row."""

_QEMU_DOES: Final = _does("as in QEMU")


def answer(kind: Kind, verb: Verb, state: J) -> Cell:
    """What a job of this kind answers to the verb in this state. Total."""
    cell = kind.cells.get((verb, state))
    if cell is not None:
        return cell
    if verb in kind.verbs and state not in (J.UNDEFINED, J.ABORTING, J.CONCLUDED, J.NULL):
        return kind.verbs[verb]
    if verb not in kind.verbs and state in VERBS[verb]:
        return _QEMU_DOES
    return _refused(f"a job that is {state.value} does not take '{verb.value}'")


PAUSABLE: Final = frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER_SETUP, S.POSTCOPY_RECOVER})
"""Fine statuses of a source in which `pause` has an effect; in all others a running migration is a precopy."""


def pause_refusal(status: S) -> str | None:
    """Why a running migration cannot be paused in this fine status; None if it can."""
    return None if status in PAUSABLE else _NO_PAUSE.why


TURNED: Final = frozenset({S.FAILING, S.FAILED, S.CANCELLING, S.CANCELLED})
"""Fine statuses of a source whose attempt is no success."""

# --- the state of a migration -------------------------------------------------------------------------------

SOURCE_STATES: Final[Mapping[S, J]] = {
    S.NONE: J.UNDEFINED,
    S.SETUP: J.RUNNING,
    S.WAIT_UNPLUG: J.RUNNING,
    S.ACTIVE: J.RUNNING,
    S.PRE_SWITCHOVER: J.PENDING,
    S.DEVICE: J.PENDING,
    S.POSTCOPY_DEVICE: J.PENDING,
    S.POSTCOPY_ACTIVE: J.RUNNING,
    S.POSTCOPY_PAUSED: J.PAUSED,
    S.POSTCOPY_RECOVER_SETUP: J.PAUSED,
    S.POSTCOPY_RECOVER: J.PAUSED,
    S.FAILING: J.ABORTING,
    S.CANCELLING: J.ABORTING,
    S.COMPLETED: J.PENDING,
    S.FAILED: J.CONCLUDED,
    S.CANCELLED: J.CONCLUDED,
    S.COLO: J.RUNNING,
}
"""The source's public status -> the state of its job, while it is at work. Once it is cleaned up it is concluded: until
then a completed migration still has its old QEMU to end."""

DESTINATION_STATES: Final[Mapping[S, J]] = {
    **SOURCE_STATES,
    S.NONE: J.CREATED,
    S.SETUP: J.CREATED,
    S.POSTCOPY_DEVICE: J.RUNNING,
    S.FAILED: J.ABORTING,
    S.CANCELLED: J.ABORTING,
}
"""The same for the destination: created with the place, running from the first byte, pending once everything is there
and only the right to run is awaited, or the clean-up."""
assert set(SOURCE_STATES) == set(DESTINATION_STATES) == set(S), "a migration status has no job state"


def source_job(log: FactLog) -> J:
    """The state of the job of a migration's source."""
    return J.CONCLUDED if Fact.CLEANUP in log else SOURCE_STATES[source_status(log)]


def destination_job(log: FactLog) -> J:
    """The state of the job of a migration's destination."""
    if Fact.PREPARE not in log:
        return J.UNDEFINED
    return J.CONCLUDED if Fact.CLEANUP in log else DESTINATION_STATES[destination_status(log)]


def mirror_job(word: str | None, log: FactLog) -> J:
    """The state of the job of a disk's mirror. `word`: what QEMU said of it last, None before and after it was there. A
    word that nobody here knows is no state."""
    if word in set(J):
        return J(word)
    if word is not None or Fact.DISKS_STARTED not in log:
        return J.UNDEFINED
    if Fact.DISKS_DROPPED in log:
        return J.NULL
    return {Disks.SETTLED: J.CONCLUDED, Disks.FAILED: J.ABORTING}.get(disks_of(log), J.CREATED)


def pause_reason(log: FactLog) -> str:
    """Why a job that is paused is so, for people."""
    if wants_pause(log):
        return "a person paused it"
    lost = log.entry(Fact.LINK_LOST, open_round(log)) if open_round(log) else None
    return "the channel broke" + (f": {lost.text}" if lost is not None and lost.text else "")


def path(before: J, after: J, *, failed: bool = False) -> tuple[J, ...]:
    """The states from the one (left out) to the other, each of which the job is in, if only for a moment. `failed`: an
    end that is no success passes `aborting`. Raises ValueError where no way leads."""
    if before is after:
        return ()
    if failed and after is J.CONCLUDED and before is not J.ABORTING:
        return (*path(before, J.ABORTING), J.CONCLUDED)
    closed = {J.NULL, *(() if after is J.ABORTING or before is J.ABORTING else (J.ABORTING,))} - {after}
    ways: deque[tuple[J, ...]] = deque([()])
    seen = {before}
    while ways:
        way = ways.popleft()
        for state in JobStatus:
            if state in seen or state in closed or not may_follow(way[-1] if way else before, state):
                continue
            if state is after:
                return (*way, state)
            seen.add(state)
            ways.append((*way, state))
    raise ValueError(f"a job that is {before.value} never becomes {after.value}")


def way(kind: Kind, before: FactLog, after: FactLog) -> tuple[J, ...]:
    """The states that the facts of `after` led a migration's job through, from where it was with those of `before`."""
    state_of = source_job if kind is MIGRATE else destination_job
    won = (Fact.RUN_ACKED if kind is MIGRATE else Fact.TARGET_RAN) in after
    turned = Fact.TARGET_DIED in after or (kind is MIGRATE and source_status(after) in TURNED)
    return path(state_of(before), state_of(after), failed=turned or not won)


def may_follow(before: J, after: J) -> bool:
    """True if the one state may follow the other."""
    return after in MOVES[before] or (before, after) in OURS


# --- for people ---------------------------------------------------------------------------------------------


def docs_markdown() -> str:
    """The text of docs/jobs.md."""
    lines = [
        "# Jobs",
        "",
        "<!-- made by tools/gen_docs.py from src/vmferry/core/job.py; do not edit -->",
        "",
        "Everything that runs long is a job with QEMU's states and verbs: `vmferry jobs` lists them, `vmferry job VERB",
        "ID` and the QMP commands `query-jobs`, `job-VERB` act on one. The source and the destination of a migration",
        "have a job each, of the same id. Why: [decisions/0020-jobs.md](decisions/0020-jobs.md).",
        "",
        "## States",
        "",
        "| state | meaning | may become |",
        "|---|---|---|",
    ]
    for state in JobStatus:
        ends = [f"`{end}`" + (" (ours)" if (state, end) in OURS else "") for end in J if may_follow(state, end)]
        lines.append(f"| `{state}` | {MEANINGS[state]} | {', '.join(ends) or 'final'} |")
    lines += ["", *(f"Ours, not QEMU's: `{a}` to `{b}`, as {why}." for (a, b), why in OURS.items())]
    lines += ["", "## What a migration's status makes of its jobs", "", "| status | source's job | destination's job |"]
    lines += ["|---|---|---|"]
    lines += [f"| `{status}` | `{SOURCE_STATES[status]}` | `{DESTINATION_STATES[status]}` |" for status in S]
    lines += ["", "When the side has cleaned up its job is `concluded`, whatever the status was."]
    for kind in KINDS.values():
        lines += ["", f"## Verbs of `{kind.name}`", "", f"It {kind.what}.", "", "| verb | state | answer | |"]
        lines += ["|---|---|---|---|"]
        for verb in Verb:
            grouped: dict[Cell, list[J]] = {}
            for state in JobStatus:
                if state in kind.states and state is not J.NULL:
                    grouped.setdefault(answer(kind, verb, state), []).append(state)
            for cell, states in grouped.items():
                names = ", ".join(f"`{state}`" for state in states)
                lines.append(f"| `{verb}` | {names} | {cell.answer.value} | {cell.why} |")
    return "\n".join(lines) + "\n"
