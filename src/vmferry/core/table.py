"""What a row of a decision table is, and how one is found.

Theory of operation
-------------------
A row has a label, a pattern over the questions of a view, one effect (or none: wait), and what people are
told. Exactly one row matches any view: `tests/table` walks every combination of answers and fails on a gap,
an overlap, or a row that nothing reaches. There is no order and no default row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

from vmferry.core.effects import DestinationEffect, Effect
from vmferry.core.view import DestinationView, SourceView


class Outcome(Enum):
    """What can be said now of where the guest runs, or will run by itself."""

    PENDING = "pending"
    """On its way; the guest runs, or is paused for the switchover only."""
    SOURCE = "source"
    """The guest is the source's again."""
    DESTINATION = "destination"
    UNCERTAIN = "uncertain"
    """The destination may run it: both QEMUs are kept, the source stays paused."""
    HELD = "held"
    """Whole, paused, and one named action away from running."""
    DEGRADED = "degraded"
    """Runs on the destination, and some of its memory is still on the source without a channel."""
    LOST = "lost"
    """No complete current copy exists."""


class Remedy(Enum):
    """The named action of a row, as `vmferry recover` takes it."""

    TRY_AGAIN = "try-again"
    """What was refused, or tried for as long as the policy says, is tried again."""
    FEED = "feed"
    """The destination gets the pages that it lacks out of the source's memory."""


E = TypeVar("E", Effect, DestinationEffect)
Pattern = Mapping[str, frozenset[Enum]]


@dataclass(frozen=True, slots=True, eq=False)
class Row(Generic[E]):
    """One decision. `then` replaces `do` when the row has lasted longer than `limit_ms`."""

    label: str
    when: Pattern
    do: E | None
    why: str
    outcome: Outcome = Outcome.PENDING
    limit_ms: int | None = None
    then: E | None = None
    action: str = ""
    """For people: the one safe thing to do now, if this is not going on by itself."""
    remedy: Remedy | None = None
    """The same for `vmferry recover`; None: there is nothing that it could take (see `action`)."""

    def matches(self, view: SourceView | DestinationView) -> bool:
        """True if every question in the pattern has one of its answers."""
        return fits(self.when, view)


def pattern(**answers: Enum | tuple[Enum, ...]) -> Pattern:
    """`want=Want.GO, source=(Source.BUSY, Source.IDLE)` -> a pattern."""
    return {k: frozenset(v if isinstance(v, tuple) else (v,)) for k, v in answers.items()}


def fits(when: Pattern, view: object) -> bool:
    """Whether every question in the pattern has one of its answers."""
    return all(getattr(view, name) in answers for name, answers in when.items())


class Labelled(Protocol):
    """A row of any table."""

    @property
    def label(self) -> str: ...

    @property
    def when(self) -> Pattern: ...


R = TypeVar("R", bound=Labelled)


def find(rows: tuple[R, ...], view: object) -> R:
    """The one row that matches. More or fewer than one is our mistake, and the tests prove there is none."""
    return _find(rows, view)  # type: ignore[no-any-return]


@lru_cache(maxsize=1 << 16)
def _find(rows, view):  # type: ignore[no-untyped-def]
    matching = [row for row in rows if fits(row.when, view)]
    assert len(matching) == 1, f"{view}: {[row.label for row in matching]}"
    return matching[0]
