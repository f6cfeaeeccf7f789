"""Walks decision tables completely: every combination of answers, and every small mistake in a row.

Theory of operation
-------------------
A view's questions have few answers each, so all views together fit into one bit set: bit n is the n-th
combination. A row's pattern becomes the set of views it matches, and gaps, overlaps, dead rows and the
mutations of a row become operations on such sets. Tens of thousands of views are checked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from itertools import product
from math import prod
from typing import Any, Generic, TypeVar, overload

from vmferry.core.effects import DestinationEffect, Effect, Guard
from vmferry.core.table import Pattern, Row
from vmferry.core.view import DestinationView, SourceView, answers

E = TypeVar("E", Effect, DestinationEffect)
V = TypeVar("V", SourceView, DestinationView)
Bits = int


class _Lazy(Sequence[V]):
    """Every combination, each made when it is asked for: there are close to a million."""

    def __init__(self, view_type: type[V], answers_of: tuple[tuple[Enum, ...], ...]) -> None:
        self._make: Any = view_type
        self._answers = answers_of
        self._length = prod(len(possible) for possible in answers_of)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[V]:
        make = self._make
        return (make(*combination) for combination in product(*self._answers))

    @overload
    def __getitem__(self, at: int) -> V: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[V]: ...
    def __getitem__(self, at: int | slice) -> V | Sequence[V]:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(self._length))]
        chosen: list[Enum] = []
        for possible in reversed(self._answers):
            at, rest = divmod(at, len(possible))
            chosen.append(possible[rest])
        return self._make(*reversed(chosen))  # type: ignore[no-any-return]


class Views(Generic[V]):
    """All views of one type, in a fixed order."""

    def __init__(self, view_type: type[V]) -> None:
        self.questions: dict[str, tuple[Enum, ...]] = {
            field.name: answers(view_type, field.name) for field in fields(view_type)
        }
        self.views: Sequence[V] = _Lazy(view_type, tuple(self.questions.values()))
        self.all: Bits = (1 << len(self.views)) - 1
        self._with_answer: dict[tuple[str, Enum], Bits] = {}
        run = len(self.views)
        for name, possible in self.questions.items():
            # In `product`'s order an answer holds for `run` views in a row, and again after all other answers.
            period, run = run, run // len(possible)
            times = len(self.views) // period
            for n, answer in enumerate(possible):
                one = "0" * (run * (len(possible) - 1 - n)) + "1" * run + "0" * (run * n)
                self._with_answer[name, answer] = int(one * times, 2)

    def where(self, pattern: Mapping[str, frozenset[Enum]]) -> Bits:
        """The views that a pattern matches; an empty pattern matches all."""
        matched = self.all
        for name, allowed in pattern.items():
            one = 0
            for answer in allowed:
                one |= self._with_answer[name, answer]
            matched &= one
        return matched

    def allowed(self, guards: Sequence[Guard]) -> Bits:
        """The views in which at least one of the guards allows its effect."""
        matched = 0
        for guard in guards:
            matched |= self.where(guard.allowed)
        return matched

    def pick(self, bits: Bits, most: int = 3) -> list[V]:
        """Some of the views in a set, for messages."""
        found: list[V] = []
        digits = f"{bits:b}"[::-1]  # a shift of so long a number would copy it once for each view
        n = digits.find("1")
        while n >= 0 and len(found) < most:
            found.append(self.views[n])
            n = digits.find("1", n + 1)
        return found


@dataclass(frozen=True)
class Check:
    """What is wrong with a table; nothing, if both are empty."""

    gaps: Bits
    overlaps: Bits

    @property
    def is_exact(self) -> bool:
        """Every view has exactly one row."""
        return not self.gaps and not self.overlaps


def check(views: Views[V], patterns: Sequence[Pattern]) -> Check:
    """Which views have no row and which have more than one."""
    once = twice = 0
    for pattern in patterns:
        bits = views.where(pattern)
        twice |= once & bits
        once |= bits
    return Check(views.all & ~once, twice)


def widened(views: Views[V], pattern: Pattern) -> Iterator[tuple[str, Enum, Pattern]]:
    """The pattern with one answer more: each question, each answer that it does not have."""
    for name, allowed in pattern.items():
        for answer in views.questions[name]:
            if answer not in allowed:
                yield name, answer, {**pattern, name: allowed | {answer}}


def narrowed(pattern: Pattern) -> Iterator[tuple[str, Enum, Pattern]]:
    """The pattern with one answer less."""
    for name, allowed in pattern.items():
        for answer in allowed:
            yield name, answer, {**pattern, name: allowed - {answer}}


def effects_of(row: Row[E]) -> tuple[E, ...]:
    """What a row may ask for: now and at its limit."""
    return tuple(effect for effect in (row.do, row.then) if effect is not None)


def views_with(views: Views[V], rows: Sequence[Row[E]], effect: E) -> list[V]:
    """Every view in which some row asks for the effect, now or at its limit."""
    bits = 0
    for row in rows:
        if effect in effects_of(row):
            bits |= views.where(row.when)
    return views.pick(bits, most=len(views.views))
