"""Facts: what somebody observed or asked for in one attempt to move one guest. Nothing else.

Theory of operation
-------------------
An attempt has one append-only `FactLog` per side. An entry is a `Fact` (with a round number where the
protocol can repeat it), the time, who saw it, and a free text. Its position in the log is its *stamp*;
rules compare stamps, never times. Everything that people see (`core.status`) and everything that is done
(`core.decide`) is a function of this log and of a few current readings, so replaying a log replays the run.

Rule 1: a fact is recorded once. The first recording counts; a repetition changes nothing.
Rule 2: a fact says what was seen, never what should happen next.
Rule 3: a status word of QEMU that nobody has heard of is the fact `UNKNOWN_STATUS`, never an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum


class Fact(StrEnum):
    """Everything that can be recorded in an attempt, on either side."""

    # Wants (triggers): somebody asked.
    MIGRATE = "migrate"
    """The migration was asked for, checked and journalled."""
    CANCEL = "cancel"
    """The cancel was asked for and accepted."""
    START_POSTCOPY = "start-postcopy"
    """The switch to postcopy was asked for, by hand or by policy."""
    SLOWED = "slowed"
    """The source sends no page but those that are asked for, until the destination runs the guest."""
    PACED = "paced"
    """It sends them as fast as it was allowed."""
    POSTCOPY_TOLD = "postcopy-told"
    """The source's QEMU took the order to switch to postcopy."""
    CONTINUE = "continue"
    """The source may leave its pause before the switchover."""
    HOLD = "hold"
    """The switchover waits until a person gives leave (auto-finalize is off)."""
    FINALIZE = "finalize"
    """A person gave it."""
    PAUSE = "pause"
    """No page of a postcopy shall move until a person says so (rounds count)."""
    PAUSE_OVER = "pause-over"
    """A person said so (rounds are those of PAUSE)."""
    SET_OPTION = "set-option"
    """An option was changed while the attempt ran (rounds count the changes)."""
    PREPARE = "prepare"
    """The source's agent asked the destination's for a place for the guest (both sides record it)."""
    RELEASE = "release"
    """Destination: the source's agent asked to give the place up."""

    # Steps of vmferry's own set-up, in this order.
    PLANNED = "planned"
    """Both hosts were asked and nothing blocks the move."""
    PREPARED = "prepared"
    """The destination's QEMU waits, paused, with the options read back."""
    CONFIGURED = "configured"
    """The source's options are applied, read back and compared."""
    STARTED = "started"
    """The source's QEMU was told to migrate into a channel of ours."""

    # Local disks that go with the guest.
    DISKS_WANTED = "disks-wanted"
    """Source: local disks are to be copied before the memory (text: which)."""
    DISKS_STARTED = "disks-started"
    """Source: its QEMU may have been told to mirror them."""
    DISK_READY = "disk-ready"
    """Source: one disk was copied once and is kept equal from here on (rounds are the disks' numbers)."""
    DISKS_READY = "disks-ready"
    """Source: all of them were."""
    DISK_FAILED = "disk-failed"
    """Source: a disk cannot be copied any more (text: which, and why)."""
    DISKS_DRAINED = "disks-drained"
    """Source: the guest is paused, both sides' disks are equal, and nothing is mirrored any more."""
    DISKS_DROPPED = "disks-dropped"
    """Source: the mirrors were given up, and nothing of them is left in its QEMU."""
    DISKS_SERVED = "disks-served"
    """Destination: its QEMU takes the disks' content over the network."""
    DISKS_CLOSED = "disks-closed"
    """Destination: it does not any more; nobody but its guest writes to them."""

    # What the QEMUs did.
    PAUSE_CAP = "pause-before-switchover"
    """The source stops before the switchover and waits for us."""
    SWITCHOVER_ACK = "switchover-ack"
    """Devices have a say: the source does not switch over before those on the destination are ready."""
    SETUP_DONE = "setup-done"
    UNPLUG_WAIT = "unplug-wait"
    UNPLUG_DONE = "unplug-done"
    DEVICES_READY = "devices-ready"
    """The source left that wait: they said that they are ready (a guest that stands still waits for nobody)."""
    SWITCHOVER = "switchover"
    """The source's CPUs stopped for the switchover."""
    PACKAGE_SENT = "package-sent"
    """Postcopy: the device state left the source."""
    PACKAGE_LOADED = "package-loaded"
    """Postcopy: proof that the destination loaded the device state."""
    POSTCOPY_ANNOUNCED = "postcopy-announced"
    """`postcopy-active` was told to the outside; completed may be told only after it."""
    ALL_SENT = "all-sent"
    PEER_ACK = "peer-ack"
    """The destination's QEMU reported success on the return path."""
    LINK_LOST = "link-lost"
    RESUME_WANTED = "resume-wanted"
    RECONNECTED = "reconnected"
    RESUME_ACK = "resume-ack"
    RECONNECT_FAILED = "reconnect-failed"
    ERROR = "error"
    COLO = "colo"
    UNKNOWN_STATUS = "unknown-status"
    CLEANUP = "cleanup"
    """The source's QEMU ended the attempt and the agents let go of everything that belonged to it."""

    # The destination's own steps.
    LISTENING = "listening"
    HEADER_SEEN = "header-seen"
    LOADED = "loaded"
    """The destination holds all device state, paused; it never ran."""

    # The commit.
    TARGET_READY = "target-ready"
    """The destination's agent answered during the pause before the switchover: it is there and loading."""
    COMMITTED = "committed"
    """The newer generation is durable in this side's journal."""
    GRANTED = "granted"
    """Destination: the order to start arrived (rounds count its repetitions)."""
    GRANT_SENT = "grant-sent"
    """The order to start may have reached the destination's agent."""
    START_SENT = "start-sent"
    """Destination: `cont` was written to QEMU (rounds count the tries); whether it took effect is not known
    until the same round is refused or the guest is seen running."""
    START_REFUSED = "start-refused"
    """QEMU refused `cont` (a lock, an I/O error): it never ran (rounds count the tries)."""
    TARGET_RAN = "target-ran"
    """RESUME was seen on the destination, or its run state was seen running."""
    RUN_ACKED = "run-acked"
    """The destination's agent told the source that the guest runs there."""
    TARGET_GONE = "target-gone"
    """The destination renounced: its QEMU is gone, it never ran and never will."""
    TARGET_WHOLE = "target-whole"
    """The destination's agent told the source that its QEMU holds every page: it needs nobody any more."""
    TRY_AGAIN = "try-again"
    """A person wants a refused start to be tried again (rounds are those of the refusals)."""
    FENCED = "fenced"
    """Nobody said that the destination gave up, and yet it does not run the guest and never will: its locks are
    held here, or a person says so. Durable before anything follows from it (rounds count the fences)."""
    FENCE_BROKEN = "fence-broken"
    """Between the fence and the source's start somebody took a disk: that fence proves nothing any more."""
    STAND_IN = "stand-in"
    """A stand-in for the destination takes what the source's QEMU sends: that it has sent all proves nothing from then
    on."""
    BROUGHT_BACK = "brought-back"
    """A stand-in led the source's QEMU to where its guest can be started again (text: which tool)."""
    FROZEN = "frozen"
    """Destination: the guest's CPUs were stopped from outside of QEMU, as the policy wants (rounds count)."""
    THAWED = "thawed"
    """Destination: they go on (rounds are those of FROZEN)."""
    TARGET_DIED = "target-died"
    """The destination's QEMU ran the guest and is gone."""
    SOURCE_GONE = "source-gone"
    """The source's QEMU process is gone."""
    SOURCE_RESUMED = "source-resumed"
    """The source's QEMU is told to run the guest again, or may have done so by itself: from here on what the
    destination has is a guest of the past, unless it ran it before."""
    SOURCE_RETIRED = "source-retired"


ROUNDED: frozenset[Fact] = frozenset(
    {
        Fact.LINK_LOST,
        Fact.RESUME_WANTED,
        Fact.RECONNECTED,
        Fact.RESUME_ACK,
        Fact.RECONNECT_FAILED,
        Fact.PAUSE,
        Fact.PAUSE_OVER,
        Fact.SET_OPTION,
        Fact.GRANTED,
        Fact.START_SENT,
        Fact.START_REFUSED,
        Fact.TRY_AGAIN,
        Fact.FROZEN,
        Fact.THAWED,
        Fact.FENCED,
        Fact.FENCE_BROKEN,
        Fact.UNKNOWN_STATUS,
        Fact.DISK_READY,
    }
)
"""Facts that carry a round number above 0; all others happen once in an attempt."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One entry of the log."""

    fact: Fact
    round: int = 0
    text: str = ""
    at_s: float = 0.0
    """Wall time, for the reader of a timeline; rules never look at it."""
    by: str = ""


@dataclass(frozen=True, slots=True)
class FactLog:
    """An append-only log; `with_fact` gives a new one, so a decision's inputs cannot change under it."""

    entries: tuple[Recorded, ...] = ()
    _stamps: dict[tuple[Fact, int], int] = field(default_factory=dict, compare=False, repr=False)

    def with_fact(self, fact: Fact, *, round_no: int = 0, text: str = "", at_s: float = 0.0, by: str = "") -> FactLog:
        """The log with one more fact, or this very log if the fact of that round is recorded already."""
        assert (round_no > 0) == (fact in ROUNDED), f"{fact} with round {round_no}"
        if (fact, round_no) in self._stamps:
            return self
        stamps = dict(self._stamps)
        stamps[fact, round_no] = len(self.entries)
        return FactLog((*self.entries, Recorded(fact, round_no, text, at_s, by)), stamps)

    def __contains__(self, fact: Fact) -> bool:
        if fact in ROUNDED:
            return self.last_round(fact) > 0
        return (fact, 0) in self._stamps

    def stamp(self, fact: Fact, round_no: int = 0) -> int | None:
        """The position of the fact in the log, or None."""
        return self._stamps.get((fact, round_no))

    def entry(self, fact: Fact, round_no: int = 0) -> Recorded | None:
        """The recorded entry, or None."""
        stamp = self.stamp(fact, round_no)
        return None if stamp is None else self.entries[stamp]

    def last_round(self, fact: Fact) -> int:
        """The highest round recorded of a rounded fact, 0 for none."""
        return max((r for f, r in self._stamps if f is fact), default=0)

    def __iter__(self) -> Iterator[Recorded]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_round(log: FactLog) -> int:
    """The newest lost round of the channel that has no acknowledged resume, or 0."""
    lost = log.last_round(Fact.LINK_LOST)
    return lost if lost and log.stamp(Fact.RESUME_ACK, lost) is None else 0


def waits_for_channel(log: FactLog) -> bool:
    """Whether the channel is lost and nothing was seen since of a try to make it anew."""
    lost = open_round(log)
    return lost > 0 and log.stamp(Fact.RESUME_WANTED, lost) is None


def wants_pause(log: FactLog) -> bool:
    """A person paused the pages of a postcopy, and nobody has resumed them since."""
    return log.last_round(Fact.PAUSE) > log.last_round(Fact.PAUSE_OVER)


def awaits_leave(log: FactLog) -> bool:
    """Whether a person wanted to give the leave for the switchover, and has not given it yet."""
    return Fact.HOLD in log and Fact.FINALIZE not in log


def first_error(log: FactLog) -> Recorded | None:
    """The first fatal error: an ERROR, or a link lost before the destination proved that it had loaded."""
    loaded = log.stamp(Fact.PACKAGE_LOADED)
    candidates = [log.stamp(Fact.ERROR)]
    for round_no in range(1, log.last_round(Fact.LINK_LOST) + 1):
        stamp = log.stamp(Fact.LINK_LOST, round_no)
        if stamp is not None and (loaded is None or stamp < loaded):
            candidates.append(stamp)
    stamps = [stamp for stamp in candidates if stamp is not None]
    return log.entries[min(stamps)] if stamps else None


def error_stamp(log: FactLog) -> int | None:
    """The stamp of `first_error`, or None."""
    error = first_error(log)
    return None if error is None else log.stamp(error.fact, error.round)


def visible_error(log: FactLog) -> tuple[str, str] | None:
    """(text, 'cause' | 'consequence of the cancel') of the first error, or None.

    An error that came before the cancel is a cause and stays visible after `cancelled`; one that came after
    an accepted cancel is its consequence.
    """
    error = first_error(log)
    if error is None:
        return None
    cancel, stamp = log.stamp(Fact.CANCEL), log.stamp(error.fact, error.round)
    assert stamp is not None
    return error.text, "cause" if cancel is None or stamp < cancel else "consequence of the cancel"
