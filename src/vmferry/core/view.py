"""What a decision looks at: a handful of closed questions about one attempt, each with an answer UNKNOWN.

Theory of operation
-------------------
`SourceView` and `DestinationView` are computed from the fact log and from the newest readings of the QEMU and
of the other side (`Readings`). They are small on purpose: the product of their answers is walked completely
by the tests, so that the tables in `core.source_rows` and `core.destination_rows` are total.

Rule 1: no status string gets past this file; QEMU's words are translated by tables (`SOURCE_WORDS`).
Rule 2: a word that is in no table is UNKNOWN, which only ever leads to waiting or asking.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from vmferry.core.facts import Fact, FactLog, awaits_leave, open_round, wants_pause


class Want(Enum):
    """Where the guest shall be in the end."""

    GO = "go"
    BACK = "back"
    """A cancel was accepted, or an error makes the destination impossible."""


class Step(Enum):
    """How far vmferry's own set-up got."""

    NEW = "new"
    PLANNED = "planned"
    PREPARED = "prepared"
    CONFIGURED = "configured"
    STARTED = "started"


class Source(Enum):
    """What the source's QEMU itself says of this attempt."""

    IDLE = "idle"
    CONNECTING = "connecting"
    """Setting the stream up: both QEMUs shake hands."""
    UNPLUGGING = "unplugging"
    """Waiting for the guest to give failover devices back."""
    BUSY = "busy"
    """Sending memory; the guest runs."""
    WAITING = "waiting"
    """Stopped before the switchover until it is told to continue."""
    SWITCHING = "switching"
    """Device state is on its way; nobody holds the disks."""
    POSTCOPY = "postcopy"
    """The destination may run; missing pages are served."""
    BROKEN = "broken"
    """Postcopy without a channel, or on its way back to one."""
    DONE = "done"
    ENDING = "ending"
    BACK = "back"
    """The attempt is over inside QEMU and the guest is the source's again."""
    GONE = "gone"
    """The process is gone and had not completed."""
    RETIRED = "retired"
    """The process is gone and had given everything away before."""
    SILENT = "silent"
    """The process is there and does not answer."""
    UNKNOWN = "unknown"
    """It said a word that nobody here has heard of."""


class Cpus(Enum):
    """The source's CPUs, against what the guest's owner wanted before the attempt."""

    AS_BEFORE = "as-before"
    """Running, or paused by its owner before the attempt and still so."""
    RESTING = "resting"
    """Paused by its owner before the attempt; QEMU had given it away and nobody took it. Its owner may start it."""
    STOPPED = "stopped"
    STUCK = "stuck"
    """Stopped in QEMU's finish-migrate, where `cont` is refused."""
    UNLOCKED = "unlocked"
    """Running without its disks' locks: they were refused when QEMU went back, and it began all the same (7.2 does)."""
    UNKNOWN = "unknown"


class Target(Enum):
    """What is known of the destination."""

    ABSENT = "absent"
    """Never asked for anything."""
    PREPARED = "prepared"
    READY = "ready"
    """Answered during the pause before the switchover."""
    LOADED = "loaded"
    """Holds the device state, paused; it never ran."""
    REFUSED = "refused"
    """Was told to start and could not; it never ran."""
    RAN = "ran"
    GONE = "gone"
    """Proved: it never ran and never will."""
    DIED = "died"
    """It ran, and its QEMU is gone."""
    UNKNOWN = "unknown"


class Grant(Enum):
    """The right to run the guest on the destination."""

    NONE = "none"
    HELD = "held"
    """Durable in the source's journal, provably not sent."""
    SENT = "sent"
    """It may have arrived."""


class Change(Enum):
    """What was asked for while the attempt runs and is not done yet."""

    NONE = "none"
    POSTCOPY = "postcopy"
    PACE = "pace"
    """The pages that were held back may go: the destination runs the guest."""
    PAUSE = "pause"
    """No page shall move until a person says so. It stays so when it is done: it holds until then."""


class Leave(Enum):
    """Whether the source may leave its pause before the switchover, as far as people have a say."""

    GIVEN = "given"
    """Nobody wanted a say, or leave was given."""
    AWAITED = "awaited"


class Disks(Enum):
    """How it stands with the local disks that are to be copied."""

    SETTLED = "settled"
    """Nothing of them is mirrored: none is wanted, or both sides are equal, or it was given up."""
    TODO = "todo"
    COPYING = "copying"
    READY = "ready"
    """All were copied once and are kept equal."""
    FAILED = "failed"
    """One cannot be copied any more."""


class Retry(Enum):
    """What the user's policy says of the trouble at hand: a start that was refused, or a channel that is broken."""

    AGAIN = "again"
    """Try again, also for ever. The answer where there is no trouble, too."""
    BACK = "back"
    """Give it up: the guest goes back while that is possible."""
    ASK = "ask"
    """Keep everything as it is; a person says what next."""


@dataclass(frozen=True, slots=True)
class SourceView:
    """The questions that the source's table asks."""

    want: Want
    step: Step
    source: Source
    cpus: Cpus
    target: Target
    grant: Grant
    change: Change
    retry: Retry
    leave: Leave = Leave.GIVEN
    disks: Disks = Disks.SETTLED


class Wish(Enum):
    """What the source's agent wants of the destination."""

    KEEP = "keep"
    DROP = "drop"


class Incoming(Enum):
    """What the destination's QEMU says."""

    NONE = "none"
    """Not started yet."""
    LOADING = "loading"
    """Waiting for the stream or reading it; CPUs never started."""
    LOADED = "loaded"
    """Everything needed to start is there; paused."""
    RUNNING = "running"
    FAILED = "failed"
    GONE = "gone"
    UNKNOWN = "unknown"


class Ran(Enum):
    """Whether the destination's CPUs ever ran in this attempt."""

    NO = "no"
    YES = "yes"
    UNKNOWN = "unknown"
    """`cont` was written and neither RESUME nor a refusal was seen."""


class Held(Enum):
    """Whether this destination holds an order to start that it has not tried yet.

    YES implies that the newer generation is durable here. An order that QEMU refused is used up; the source
    decides whether to send another one or to take the guest back."""

    NO = "no"
    YES = "yes"


class Halt(Enum):
    """Whether the guest's CPUs are stopped from outside of QEMU because pages are missing and nobody serves them."""

    NONE = "none"
    """Neither wanted nor so."""
    WANTED = "wanted"
    KEPT = "kept"
    """Wanted and so."""
    OVER = "over"
    """So, and not wanted any more."""


class Served(Enum):
    """Whether the guest's disks are written to over the network."""

    NO = "no"
    YES = "yes"


@dataclass(frozen=True, slots=True)
class DestinationView:
    """The questions that the destination's table asks."""

    wish: Wish
    held: Held
    incoming: Incoming
    ran: Ran
    halt: Halt
    served: Served = Served.NO


@dataclass(frozen=True, slots=True)
class Readings:
    """The newest observations that are no facts of the past: each may be stale or UNKNOWN."""

    source: Source = Source.IDLE
    cpus: Cpus = Cpus.UNKNOWN
    target_answers: bool = True
    """False while the destination's agent does not answer."""
    on_refused_start: Retry = Retry.BACK
    """The policy for a destination that cannot take its disks (`--on-storage-error`)."""
    target_is_cut_off: bool = False
    """The destination's agent says that its QEMU has lost the channel, which this side's has not noticed yet."""
    is_patient: bool = True
    """False once a broken channel was tried again for as long as the policy says."""


SOURCE_WORDS: dict[str, Source] = {
    "none": Source.IDLE,
    "setup": Source.CONNECTING,
    "wait-unplug": Source.UNPLUGGING,
    "active": Source.BUSY,
    "pre-switchover": Source.WAITING,
    "device": Source.SWITCHING,
    "postcopy-device": Source.SWITCHING,
    "postcopy-active": Source.POSTCOPY,
    "postcopy-paused": Source.BROKEN,
    "postcopy-recover-setup": Source.BROKEN,
    "postcopy-recover": Source.BROKEN,
    "completed": Source.DONE,
    "failing": Source.ENDING,
    "cancelling": Source.ENDING,
    "failed": Source.BACK,
    "cancelled": Source.BACK,
    "colo": Source.UNKNOWN,
}
"""QEMU's status words -> what they mean to a decision; any other word is UNKNOWN."""

STUCK_RUN_STATES = frozenset({"finish-migrate"})
"""Run states in which QEMU refuses `cont` after an attempt ended (issue seen when a lock is refused)."""


def source_word(word: str | None) -> Source:
    """QEMU's own status string -> `Source`; None (no migration yet) is IDLE, an unheard-of word UNKNOWN."""
    return Source.IDLE if word is None else SOURCE_WORDS.get(word, Source.UNKNOWN)


def cpus_from(run_state: str | None, *, running_before: bool, source: Source, has_locks: bool = True) -> Cpus:
    """QEMU's run state -> `Cpus`. `finish-migrate` is STUCK only once QEMU has ended the attempt. `has_locks`: of the
    disks that it could write to before."""
    if run_state is None:
        return Cpus.UNKNOWN
    if run_state == "running":
        return Cpus.AS_BEFORE if has_locks else Cpus.UNLOCKED
    if run_state in STUCK_RUN_STATES:
        return Cpus.STUCK if source is Source.BACK else Cpus.STOPPED
    if not running_before and run_state in {"paused", "prelaunch"}:
        return Cpus.AS_BEFORE
    return Cpus.RESTING if not running_before and run_state == "postmigrate" else Cpus.STOPPED


def _step(log: FactLog) -> Step:
    for fact, step in (
        (Fact.STARTED, Step.STARTED),
        (Fact.CONFIGURED, Step.CONFIGURED),
        (Fact.PREPARED, Step.PREPARED),
        (Fact.PLANNED, Step.PLANNED),
    ):
        if fact in log:
            return step
    return Step.NEW


def is_fenced(log: FactLog) -> bool:
    """A fence was put up and is not known to be broken."""
    return log.last_round(Fact.FENCED) > log.last_round(Fact.FENCE_BROKEN)


def _target(log: FactLog, *, answers: bool) -> Target:
    """What the log proves of the destination. Proofs outlive silence; everything else does not.

    The fence comes first: from there on the guest is the source's, whatever is heard later."""
    if is_fenced(log):
        return Target.GONE
    if Fact.TARGET_DIED in log:
        return Target.DIED
    if Fact.TARGET_GONE in log:
        return Target.GONE
    if Fact.RUN_ACKED in log:
        return Target.RAN
    if Fact.PREPARE not in log and Fact.GRANT_SENT not in log:
        return Target.ABSENT
    if not answers:
        return Target.UNKNOWN
    if Fact.START_REFUSED in log:
        return Target.REFUSED
    if Fact.LOADED in log:
        return Target.LOADED
    return Target.READY if Fact.TARGET_READY in log else Target.PREPARED


def _grant(log: FactLog) -> Grant:
    if Fact.GRANT_SENT in log:
        return Grant.SENT
    return Grant.HELD if Fact.COMMITTED in log else Grant.NONE


def are_pages_held_back(log: FactLog) -> bool:
    """Whether a postcopy's pages go as slowly as they can until the destination has run (`hazards`), whatever pace is
    wanted."""
    return Fact.SLOWED in log and Fact.PACED not in log


def _change(log: FactLog) -> Change:
    asked = Fact.START_POSTCOPY in log and Fact.POSTCOPY_TOLD not in log
    if asked:
        return Change.POSTCOPY
    if are_pages_held_back(log) and Fact.RUN_ACKED in log:
        return Change.PACE
    return Change.PAUSE if wants_pause(log) else Change.NONE


def disks_of(log: FactLog) -> Disks:
    """How it stands with the disks. A commit is made only when they are equal, so it proves that they were."""
    if Fact.DISKS_WANTED not in log:
        return Disks.SETTLED
    if any(fact in log for fact in (Fact.DISKS_DRAINED, Fact.DISKS_DROPPED, Fact.COMMITTED)):
        return Disks.SETTLED
    if Fact.DISK_FAILED in log:
        return Disks.FAILED
    if Fact.DISKS_READY in log:
        return Disks.READY
    return Disks.COPYING if Fact.DISKS_STARTED in log else Disks.TODO


def _source(log: FactLog, said: Source) -> Source:
    """QEMU's own word, and what is known beside it of pages that the destination needs no more."""
    whole = Fact.ALL_SENT in log or Fact.TARGET_WHOLE in log
    if Fact.SOURCE_GONE in log:
        # 1. the destination loads  2. the guest goes back and runs here  3. this QEMU dies: that copy is an old one.
        is_old = Fact.SOURCE_RESUMED in log and Fact.RUN_ACKED not in log
        return Source.RETIRED if whole and not is_old else Source.GONE
    if not whole:
        return Source.BACK if said is Source.DONE and Fact.STAND_IN in log else said
    if said not in (Source.BACK, Source.BROKEN, Source.POSTCOPY):
        return said
    if Fact.RUN_ACKED in log:
        return Source.DONE  # fed by a stand-in, or its last page arrived before the channel broke, or it hangs after it
    # A source that went back may run its guest. One without a channel cannot by itself: it has given everything.
    return said if said is Source.BACK else Source.POSTCOPY


def _retry(log: FactLog, readings: Readings, source: Source, target: Target) -> Retry:
    if target is Target.REFUSED:
        asked = log.last_round(Fact.TRY_AGAIN) >= log.last_round(Fact.START_REFUSED)
        return Retry.AGAIN if readings.on_refused_start is Retry.ASK and asked else readings.on_refused_start
    if source is Source.BROKEN and (wants_pause(log) or not readings.is_patient):
        return Retry.ASK
    return Retry.AGAIN


def source_view(log: FactLog, readings: Readings) -> SourceView:
    """The source's questions answered from its facts and readings."""
    back = Fact.CANCEL in log or Fact.ERROR in log or is_fenced(log)
    said = readings.source
    if said is Source.POSTCOPY and readings.target_is_cut_off:
        said = Source.BROKEN
    source, target = _source(log, said), _target(log, answers=readings.target_answers)
    return SourceView(
        want=Want.BACK if back else Want.GO,
        step=_step(log),
        source=source,
        cpus=Cpus.UNKNOWN if Fact.SOURCE_GONE in log else readings.cpus,
        target=target,
        grant=_grant(log),
        change=_change(log),
        retry=_retry(log, readings, source, target),
        leave=Leave.AWAITED if awaits_leave(log) else Leave.GIVEN,
        disks=disks_of(log),
    )


def _has_order(log: FactLog) -> bool:
    orders, refused = log.last_round(Fact.GRANTED), log.last_round(Fact.START_REFUSED)
    return Fact.COMMITTED in log and orders > refused


def _halt(log: FactLog, *, pauses: bool, is_frozen: bool) -> Halt:
    is_wanted = pauses and open_round(log) > 0 and Fact.ALL_SENT not in log
    if is_frozen:
        return Halt.KEPT if is_wanted else Halt.OVER
    return Halt.WANTED if is_wanted else Halt.NONE


def destination_view(
    log: FactLog, incoming: Incoming, *, pauses: bool = False, is_frozen: bool = False
) -> DestinationView:
    """The destination's questions answered from its facts and the newest reading of its QEMU. `pauses`: the policy
    wants a guest without its pages stopped; `is_frozen`: it is, from outside of QEMU."""
    if Fact.TARGET_RAN in log:
        ran = Ran.YES
    elif log.last_round(Fact.START_SENT) > log.last_round(Fact.START_REFUSED):
        ran = Ran.UNKNOWN
    else:
        ran = Ran.NO
    return DestinationView(
        wish=Wish.DROP if Fact.RELEASE in log else Wish.KEEP,
        held=Held.YES if _has_order(log) else Held.NO,
        incoming=incoming,
        ran=ran,
        halt=_halt(log, pauses=pauses, is_frozen=is_frozen),
        served=Served.YES if Fact.DISKS_SERVED in log and Fact.DISKS_CLOSED not in log else Served.NO,
    )


def answers(view_type: type, field_name: str) -> tuple[Enum, ...]:
    """All possible answers to one question of a view, for walking the tables."""
    for field in fields(view_type):
        if field.name == field_name:
            enum_type = globals()[str(field.type)]
            assert issubclass(enum_type, Enum)
            return tuple(enum_type)
    raise AssertionError(f"{view_type.__name__} has no question {field_name}")
