"""A fact log as one integer: a bit per fact and round, and two bits for the only orders that matter.

Theory of operation
-------------------
A state of the model must be small and canonical: two histories after which everybody decides the same are one state.
Rules compare stamps in three places only (`core.status`): whether the move was won before the first cancel or error,
whether a cancel came after the clean-up, and whether a lost link came before the proof of loading. The first two are
bits here; the third cannot be otherwise with a source that waits for the proof (`observe` notes the proof first), and
`with_fact` insists on it. `log_of` builds a `FactLog` in canonical order; the production functions read that one.
`tests/unit/model/test_logs.py` compares both on random histories.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

from vmferry.core.facts import ROUNDED, Fact, FactLog
from vmferry.core.migration_status import MigrationStatus
from vmferry.core.status import source_status

ROUNDS_MAX: Final = 5
"""Rounds of a fact that repeats; the bounds on faults keep every run below."""

_PLACES: Final = tuple(
    (fact, round_no) for fact in Fact for round_no in (range(1, ROUNDS_MAX + 1) if fact in ROUNDED else (0,))
)
_BIT: Final = {place: 1 << n for n, place in enumerate(_PLACES)}
_ANY: Final = {fact: sum(bit for (f, _), bit in _BIT.items() if f is fact) for fact in Fact}
WON_FIRST: Final = 1 << len(_PLACES)
"""The move was won before the first cancel or error."""
_TELLS_STATUS_ONLY: Final = sum(
    _BIT[fact, 0]
    for fact in (
        Fact.SETUP_DONE, Fact.DEVICES_READY, Fact.SWITCHOVER, Fact.PAUSE_CAP, Fact.POSTCOPY_ANNOUNCED,
    )
)  # fmt: skip
"""Facts that only the rules of the status read, and those not any more once the attempt has turned back."""
LATE_CANCEL: Final = WON_FIRST << 1
"""The cancel came after the clean-up."""
_TURNS: Final[tuple[tuple[Fact, int], ...]] = ((Fact.ERROR, 0), (Fact.CANCEL, 0))
_LAST: Final = (*_TURNS, (Fact.CLEANUP, 0))

Mask = int


class TooManyRounds(Exception):
    """A fact was repeated more often than the model has room for: the bounds are too small for this run."""


def bit(fact: Fact, round_no: int = 0) -> Mask:
    """The bit of a fact."""
    return _BIT[fact, round_no]


def has(mask: Mask, fact: Fact) -> bool:
    """True if the fact was recorded, in any round."""
    return bool(mask & _ANY[fact])


def last_round(mask: Mask, fact: Fact) -> int:
    """The highest round recorded, 0 for none."""
    return max((n for n in range(1, ROUNDS_MAX + 1) if mask & _BIT[fact, n]), default=0)


def with_fact(mask: Mask, fact: Fact, round_no: int = 0) -> Mask:
    """The log with one more fact, or the same. Raises TooManyRounds."""
    if round_no > ROUNDS_MAX:
        raise TooManyRounds(f"{fact} {round_no}")
    new = _BIT[fact, round_no]
    if mask & new:
        return mask
    if fact is Fact.CANCEL and has(mask, Fact.CLEANUP):
        new |= LATE_CANCEL
    elif fact is Fact.PACKAGE_SENT:
        mask &= ~WON_FIRST  # the proof of loading is still to come, and with it the end of a postcopy
    elif fact in (Fact.CANCEL, Fact.ERROR) and source_status(log_of(mask)) is MigrationStatus.COMPLETED:
        new |= WON_FIRST
    assert fact is not Fact.LINK_LOST or has(mask, Fact.PACKAGE_LOADED), "a link is lost after the proof of loading"
    return _without_what_is_past(mask | new)


def _without_what_is_past(mask: Mask) -> Mask:
    turned = has(mask, Fact.MIGRATE) and (has(mask, Fact.ERROR) or has(mask, Fact.CANCEL))
    return mask & ~_TELLS_STATUS_ONLY if turned and not mask & (WON_FIRST | LATE_CANCEL) else mask


def _in_order(mask: Mask) -> Iterator[tuple[Fact, int]]:
    late = bool(mask & LATE_CANCEL)
    turns = [place for place in _TURNS if mask & _BIT[place] and not (late and place == (Fact.CANCEL, 0))]
    others = [place for place in _PLACES if place not in _LAST and mask & _BIT[place]]
    yield from (*others, *turns) if mask & WON_FIRST else (*turns, *others)
    if has(mask, Fact.CLEANUP):
        yield Fact.CLEANUP, 0
    if late:
        yield Fact.CANCEL, 0


@cache
def log_of(mask: Mask) -> FactLog:
    """The log in canonical order."""
    log = FactLog()
    for fact, round_no in _in_order(mask):
        log = log.with_fact(fact, round_no=round_no)
    return log


def names(mask: Mask) -> list[str]:
    """The facts, for people."""
    return [f"{fact.value} {round_no}" if round_no else fact.value for fact, round_no in _in_order(mask)]
