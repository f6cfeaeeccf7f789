"""A log of facts each of which becomes true once: what a save and a chore are made of. Pure.

Facts of a migration and of a restore have rounds as well; their logs are their own (`core.facts`, `core.restore`).
Without slots: Python 3.11 makes no instance of a named kind (`OnceLog[F]()`) of a frozen dataclass with slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

F = TypeVar("F", bound=StrEnum)


@dataclass(frozen=True)
class OnceEntry(Generic[F]):
    """One fact."""

    fact: F
    text: str = ""
    at_s: float = 0.0
    """Wall time, for the reader of a timeline."""
    by: str = ""


@dataclass(frozen=True)
class OnceLog(Generic[F]):
    """An append-only log of facts."""

    entries: tuple[OnceEntry[F], ...] = ()
    _known: frozenset[F] = field(default_factory=frozenset, compare=False, repr=False)

    def with_fact(self, fact: F, *, text: str = "", at_s: float = 0.0, by: str = "") -> OnceLog[F]:
        """The log with one more fact, or this very log if it is recorded already."""
        if fact in self._known:
            return self
        return OnceLog((*self.entries, OnceEntry(fact, text, at_s, by)), self._known | {fact})

    def __contains__(self, fact: F) -> bool:
        return fact in self._known

    def entry(self, fact: F) -> OnceEntry[F] | None:
        """The entry, or None."""
        return next((entry for entry in self.entries if entry.fact is fact), None)
