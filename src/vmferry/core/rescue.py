"""When a rescue tool may be used: asked before it begins, and again when it acts.

Theory of operation
-------------------
A rescue tool speaks the other side's part of a migration to a QEMU that waits for it in vain. Each fits exactly one
kind of trouble; used elsewhere it would break a migration that is well. So a tool looks at QEMU's own words for its
migration and for its guest, and is refused unless they are those of its trouble.

Rule 1: a word that nobody here has heard of refuses.
Rule 2: what the words cannot tell, whether the other side ran the guest, is a proof of its own (`NeverRan`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Tool(Enum):
    """The rescue tools."""

    BRING_BACK = "bring-back"
    """Stand-in receiver: a source in postcopy-paused, its destination never ran the guest and never will."""
    THROW_AWAY = "throw-away"
    """Throw-away migration: a source that failed and stands still in finish-migrate."""
    FEED = "feed"
    """Stand-in sender: a destination in postcopy-paused whose source cannot serve pages any more."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether a tool may be used. `refusal`: why not, '' if it may; `pause_first`: after QEMU's migrate-pause."""

    refusal: str = ""
    pause_first: bool = False


_READY = {
    Tool.BRING_BACK: frozenset({"postcopy-paused"}),
    Tool.THROW_AWAY: frozenset({"failed", "cancelled"}),
    Tool.FEED: frozenset({"postcopy-paused"}),
}
_PAUSE_FIRST = {
    Tool.BRING_BACK: frozenset({"postcopy-active", "postcopy-recover", "postcopy-recover-setup"}),
    Tool.THROW_AWAY: frozenset[str](),
    # Not postcopy-active: that one has a source which serves it, as far as QEMU knows.
    Tool.FEED: frozenset({"postcopy-recover"}),
}
_MEANT_FOR = {
    Tool.BRING_BACK: "a source that waits in postcopy for a destination that is gone",
    Tool.THROW_AWAY: "a source whose migration failed or was cancelled and whose guest sticks in finish-migrate",
    Tool.FEED: "a destination that waits in postcopy-paused for a source that is gone",
}


def may_use(tool: Tool, word: str | None, run_state: str) -> Answer:
    """For QEMU's status word (None: it has no migration) and its run state."""
    said = word or "none"
    if said in _READY[tool]:
        answer = Answer()
    elif said in _PAUSE_FIRST[tool]:
        answer = Answer(pause_first=True)
    else:
        return Answer(f"its migration is in {said}; this tool is for {_MEANT_FOR[tool]}")
    if tool is Tool.THROW_AWAY and run_state != "finish-migrate":
        return Answer(f"its guest is in {run_state}, not stuck in finish-migrate; this tool is for {_MEANT_FOR[tool]}")
    if tool is Tool.BRING_BACK and run_state == "running":
        return Answer("its guest runs, and must not be led back while it does")
    return answer


def has_settled(word: str | None) -> bool:
    """QEMU's migration is no step on the way any more: it ended, or waits for somebody."""
    return word is None or word in {"none", "completed", "failed", "cancelled", "postcopy-paused"}


def ended_well(word: str | None) -> bool:
    """The tool led QEMU's migration to its end."""
    return word == "completed"


class Evidence(Enum):
    """What proves that the other side never ran the guest and never will."""

    RENOUNCED = "renounced"
    """Its agent made durable that it never will, after it had ended a QEMU that never ran."""
    PROCESS_GONE = "process-gone"
    """Its QEMU was started paused, never told to run, never seen running, and the kernel says that it is gone."""
    NEVER_GRANTED = "never-granted"
    """The right to run it there is this host's to give, and its journal says that it was not given."""
    FENCED = "fenced"
    """It is silent, and a fence keeps it from running the guest (`agent.fences`)."""
    PERSON = "person"
    """A person looked and says so, and nothing that is known here speaks against it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeverRan:
    """The proof that a source may have its guest back.

    `stands` is asked at the moment of acting: does the evidence hold now? `was_started_paused`, `was_told_to_run` and
    `has_run` are what is known of the other side's QEMU; None: not known, which is never taken for the better answer.
    """

    evidence: Evidence
    text: str
    stands: Callable[[], bool]
    was_started_paused: bool | None = None
    was_told_to_run: bool | None = None
    has_run: bool | None = None

    def objection(self) -> str:
        """Why this proves nothing now; '' if it does."""
        if self.has_run:
            return f"{self.text}: the guest has run there"
        if not self.stands():
            return f"{self.text}: that is not so"
        if self.evidence is Evidence.PROCESS_GONE:
            if self.was_started_paused is not True:
                return f"{self.text}: it was not started paused (-S), so it may have run before it ended"
            if self.was_told_to_run is not False:
                return f"{self.text}: it may have been told to run before it ended"
            if self.has_run is not False:
                return f"{self.text}: nobody knows whether it ran before it ended"
        return ""
