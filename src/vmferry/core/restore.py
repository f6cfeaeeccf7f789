"""A restore: what happened to it, how it stands, what is done next. Pure.

Theory of operation
-------------------
As with a migration, facts are recorded and everything else follows: the state of the job, the word for people, the next
step. `STEPS` is tried from the top; the first row whose condition holds decides, and the last one always holds.

    wanted ─ read ─ launched ─ loading ┬ lazy: loaded ─ kept ─ ran ─ whole ─ ended
                                       └ full: whole  ─ kept ─ ran ─────────  ended

The line of no return is STARTING: until then nothing is lost by giving up, and giving up leaves nothing behind. From
then on the guest may have run, and the only copy of what it did since is its QEMU and its overlays; so nothing but the
guest's own end ends the restore. A repository or an agent that is gone is waited for; a guest that was told to run and
does not stands (STANDS) until somebody acts.

Rule 1: KEPT and STARTING are durable before the order to run is sent; so an agent that finds a restore without STARTING
        in its journal knows that the guest never ran, and one that finds STARTING never takes anything away.
Rule 2: a guest whose device state was loaded and that lacks pages is never given up while its QEMU lives, once it may
        have run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from vmferry.core.job import JobStatus


class RestoreFact(StrEnum):
    """What was seen or asked for. Those with rounds may happen again."""

    WANTED = "wanted"
    CANCEL = "cancel"
    READ = "read"
    """The snapshot was read and checked as far as it can be before a page is: description, device state, indexes."""
    LAUNCHED = "launched"
    """A QEMU waits, paused, and is the one that the snapshot describes."""
    LOADING = "loading"
    """Its memory or its device state is on the way."""
    LOADED = "loaded"
    """It has the device state."""
    KEPT = "kept"
    """The journal says that this host keeps the guest."""
    STARTING = "starting"
    """The order to start it is about to be sent, or it is about to be given to people: from here on it may have run."""
    STANDS = "stands"
    """It was told to run and does not; with rounds. It waits for somebody who acts."""
    AGAIN = "again"
    """Its start is tried again, as somebody wished or QEMU's own events show; of the same round."""
    RAN = "ran"
    """It runs its first instruction, or was to stay paused and is whole without."""
    WHOLE = "whole"
    """It has every page."""
    TROUBLE = "trouble"
    """Pages do not come; with rounds."""
    MENDED = "mended"
    """They do again; of the same round."""
    LOST = "lost"
    """The channel to its QEMU broke while it lacks pages; with rounds."""
    REJOINED = "rejoined"
    FAILED = "failed"
    GONE = "gone"
    """Its QEMU ended."""
    UNDONE = "undone"
    """Nothing of it is left here."""
    ENDED = "ended"


F = RestoreFact

ROUNDS_KEPT: Final = 50
"""Rounds of one fact that a log keeps, besides the first."""


@dataclass(frozen=True, slots=True)
class Noted:
    """One fact, when it was recorded (seconds of the wall clock), and a text for people."""

    fact: RestoreFact
    round: int = 0
    text: str = ""
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RestoreLog:
    """Facts in the order in which they became true."""

    entries: tuple[Noted, ...] = ()

    def __contains__(self, fact: object) -> bool:
        return any(entry.fact is fact for entry in self.entries)

    def with_fact(self, fact: RestoreFact, *, round_no: int = 0, text: str = "", at_s: float = 0.0) -> RestoreLog:
        """The log with this fact; the same log if it is there already. Of a fact with rounds the first and the newest
        `ROUNDS_KEPT` stay: trouble of a whole night is no log of a gigabyte."""
        mine = [entry for entry in self.entries if entry.fact is fact]
        if any(entry.round == round_no for entry in mine):
            return self
        kept = self.entries
        if len(mine) > ROUNDS_KEPT:
            kept = tuple(entry for entry in kept if entry is not mine[1])
        return replace(self, entries=(*kept, Noted(fact, round_no, text, at_s)))

    def rounds(self, fact: RestoreFact) -> int:
        """The highest round of a fact, 0 without any."""
        return max((entry.round for entry in self.entries if entry.fact is fact), default=0)

    def text(self, fact: RestoreFact) -> str:
        """The newest text of a fact."""
        return next((entry.text for entry in reversed(self.entries) if entry.fact is fact), "")

    def at_s(self, fact: RestoreFact) -> float | None:
        """When the fact was first recorded."""
        return next((entry.at_s for entry in self.entries if entry.fact is fact), None)

    @property
    def has_trouble(self) -> bool:
        """Pages do not come."""
        return self.rounds(F.TROUBLE) > self.rounds(F.MENDED)

    @property
    def is_lost(self) -> bool:
        """The channel is broken and was not joined again."""
        return self.rounds(F.LOST) > self.rounds(F.REJOINED)

    @property
    def is_given_up(self) -> bool:
        """It ends without a guest, which has not run: the order to run was never on its way."""
        may_have_run = F.STARTING in self or F.RAN in self
        return not may_have_run and (F.CANCEL in self or F.FAILED in self or F.GONE in self)

    @property
    def stands(self) -> bool:
        """It was told to run, does not, and nobody has said since that it should be tried again."""
        return F.RAN not in self and self.rounds(F.STANDS) > self.rounds(F.AGAIN)


@dataclass(frozen=True, slots=True)
class RestoreWish:
    """What of the order decides."""

    lazy: bool
    runs: bool
    """The guest is started; else it stays paused."""


# --- what is done next ----------------------------------------------------------------------------------------


class Step(StrEnum):
    """What the agent does."""

    READ_AND_LAUNCH = "read the snapshot and start a QEMU"
    LOAD = "send it the guest"
    KEEP = "write down that the guest is kept here"
    RUN = "start the guest"
    REJOIN = "join the broken channel again"
    UNDO = "take away what was made"
    END = "write down how it ended"
    WAIT = "wait"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: when it holds, and what is done then."""

    label: str
    step: Step
    holds: Callable[[RestoreLog, RestoreWish], bool]
    why: str


def _ready(log: RestoreLog, wish: RestoreWish) -> bool:
    """The guest may be started."""
    return F.LOADED in log if wish.lazy else F.WHOLE in log


STEPS: Final[Sequence[Row]] = (
    Row("over", Step.NOTHING, lambda log, wish: F.ENDED in log, "it is over"),
    Row("undone", Step.END, lambda log, wish: F.UNDONE in log, "nothing of it is left, and its result is not written"),
    Row("given-up", Step.UNDO, lambda log, wish: log.is_given_up, "the guest has not run, so nothing is lost by it"),
    Row("died", Step.END, lambda log, wish: F.GONE in log, "the guest may have run here, and its QEMU has ended"),
    Row("done", Step.END, lambda log, wish: F.WHOLE in log and F.RAN in log, "the guest is here, whole"),
    Row("begin", Step.READ_AND_LAUNCH, lambda log, wish: F.READ not in log or F.LAUNCHED not in log,
        "there is no QEMU for it yet, or nobody knows yet that the snapshot is sound"),
    Row("load", Step.LOAD, lambda log, wish: F.LOADING not in log, "the QEMU waits for the guest"),
    Row("rejoin", Step.REJOIN, lambda log, wish: log.is_lost, "it lacks pages, and nobody sends them"),
    Row("keep", Step.KEEP, lambda log, wish: _ready(log, wish) and F.KEPT not in log,
        "before the guest runs it is known whose it is"),
    Row("stands", Step.WAIT, lambda log, wish: log.stands, "it was told to run and does not: a person decides"),
    Row("run", Step.RUN, lambda log, wish: _ready(log, wish) and F.RAN not in log, "all that it needs is there"),
    Row("wait", Step.WAIT, lambda log, wish: True, "pages are on their way"),
)  # fmt: skip
"""The first that holds decides. The last one always does."""


def next_row(log: RestoreLog, wish: RestoreWish) -> Row:
    """What is done next, and why."""
    return next(row for row in STEPS if row.holds(log, wish))


# --- how it stands --------------------------------------------------------------------------------------------


def restore_state(log: RestoreLog) -> JobStatus:
    """The state of the job."""
    if F.ENDED in log:
        return JobStatus.CONCLUDED
    if F.WANTED not in log:
        return JobStatus.UNDEFINED
    if log.is_given_up or F.GONE in log:
        return JobStatus.ABORTING
    if F.WHOLE in log and F.RAN in log:
        return JobStatus.PENDING
    if log.has_trouble or log.is_lost or log.stands:
        return JobStatus.PAUSED
    return JobStatus.RUNNING if F.LAUNCHED in log else JobStatus.CREATED


def detail(log: RestoreLog) -> str:
    """One word for people, finer than the job's state."""
    words: Sequence[tuple[str, bool]] = (
        ("completed", has_won(log)),
        ("cancelled", log.is_given_up and F.CANCEL in log),
        ("failed", log.is_given_up),
        ("lost", F.GONE in log),
        ("rejoining", log.is_lost),
        ("standing", log.stands),
        ("waiting", log.has_trouble),
        ("running-lazily", F.RAN in log),
        ("loaded", F.LOADED in log),
        ("loading", F.LOADING in log),
        ("starting", F.WANTED in log),
    )
    return next((word for word, is_so in words if is_so), "none")


def reason(log: RestoreLog) -> str:
    """Why the job is paused; '' if it is not."""
    if log.is_lost:
        return log.text(F.LOST)
    if log.stands:
        return log.text(F.STANDS)
    return log.text(F.TROUBLE) if log.has_trouble else ""


def has_won(log: RestoreLog) -> bool:
    """It ended with the guest here, which is so only while its QEMU is there."""
    return F.WHOLE in log and F.RAN in log and F.GONE not in log


def cancel_refusal(log: RestoreLog) -> str | None:
    """Why it cannot be cancelled any more; None if it can."""
    if F.RAN in log or F.STARTING in log:
        return (
            "the guest runs already, or may have run, and needs the rest of its memory; 'vmferry stop' ends the guest"
        )
    return None
