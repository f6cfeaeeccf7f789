"""What decides in the model: the functions of production, and a kit that asks them once for each question.

Rule 1: `Rules` without changes has the very functions that the agents call. A mutant replaces one of them, or breaks
        one promise of the environment's contract (`broken`), and nothing else.
Rule 2: every fact goes through `Kit.note_source` or `Kit.note_destination`, which check the edge of the public status
        that it makes (I12) and publish what production publishes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmferry.core import decide, status, transitions, view
from vmferry.core.effects import DestinationEffect, Effect
from vmferry.core.facts import Fact, FactLog
from vmferry.core.migration_status import MigrationStatus
from vmferry.core.table import Row
from vmferry.core.view import Cpus, DestinationView, Incoming, Readings, Source, SourceView
from vmferry.model import logs
from vmferry.model.logs import Mask
from vmferry.model.world import DOWN, Setting, World

Finding = tuple[Fact, int, str]
SourceFindings = Callable[..., tuple[Finding, ...]]
DestinationFindings = Callable[[str | None, str | None, FactLog], tuple[Finding, ...]]


@dataclass(frozen=True)
class Rules:
    """Everything that decides. The findings and `arrival` are those of `agent.observe`, which this
    room does not import: whoever starts a model hands them in."""

    source_findings: SourceFindings
    destination_findings: DestinationFindings
    arrival: Callable[[FactLog], tuple[Finding, ...]]
    decide_source: Callable[[FactLog, Readings], Row[Effect]] = decide.decide_source
    decide_destination: Callable[[FactLog, Incoming], Row[DestinationEffect]] = decide.decide_destination
    source_view: Callable[[FactLog, Readings], SourceView] = view.source_view
    destination_view: Callable[[FactLog, Incoming], DestinationView] = view.destination_view
    source_allows: Callable[[Effect, SourceView], bool] = decide.source_allows
    destination_allows: Callable[[DestinationEffect, DestinationView], bool] = decide.destination_allows
    effect_now: Callable[[Row[Any], float], Any] = decide.effect_now
    cancel_refusal: Callable[..., str | None] = status.cancel_refusal
    source_status: Callable[[FactLog], MigrationStatus] = status.source_status
    destination_status: Callable[[FactLog], MigrationStatus] = status.destination_status
    broken: frozenset[str] = frozenset()
    """Promises of the environment's contract that this mutant breaks."""


NEVER_READ = frozenset({Fact.SOURCE_RETIRED, Fact.BROUGHT_BACK})
"""Facts for the reader of a timeline: no view, no rule and no finding asks for them."""
TIMELESS_MS = 1e12
"""Longer than any limit: the row lasted too long."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A decided view of one side: the row, and the effects that may be due, each if its guard allows it."""

    view: Any
    row: Row[Any]
    due: tuple[str, ...]
    late: tuple[str, ...]
    """What is due once the row has lasted too long."""


@dataclass
class Kit:
    """The rules with a memory: each question is asked once. `problems` collects what a step broke."""

    rules: Rules
    setting: Setting
    problems: list[str] = field(default_factory=list)
    _source: dict[tuple[Any, ...], Choice] = field(default_factory=dict)
    _destination: dict[tuple[Any, ...], Choice] = field(default_factory=dict)
    _noted: dict[tuple[Any, ...], tuple[Mask, str]] = field(default_factory=dict)

    def breaks(self, promise: str) -> bool:
        """True if the mutant at hand does not keep this promise of the environment."""
        return promise in self.rules.broken

    def may_fail(self, w: World, kind: str) -> bool:
        """A fault of this kind may happen now."""
        return w.faults > 0 and self.setting.allows(kind)

    def source(self, w: World) -> Choice:
        """What the source's agent would decide now."""
        key = (w.s_log, w.s_source, w.s_cpus, w.s_answers)
        found = self._source.get(key)
        if found is None:
            log = logs.log_of(w.s_log)
            readings = Readings(Source[w.s_source], Cpus[w.s_cpus], w.s_answers)
            rules = self.rules
            seen, row = rules.source_view(log, readings), rules.decide_source(log, readings)
            found = self._source[key] = self._choice(seen, row, lambda e: rules.source_allows(e, seen))
        return found

    def destination(self, w: World) -> Choice:
        """What the destination's agent would decide now."""
        incoming = incoming_of(w)
        key = (w.d_log, incoming.name)
        found = self._destination.get(key)
        if found is None:
            log, rules = logs.log_of(w.d_log), self.rules
            seen, row = rules.destination_view(log, incoming), rules.decide_destination(log, incoming)
            found = self._destination[key] = self._choice(seen, row, lambda e: rules.destination_allows(e, seen))
        return found

    def _choice(self, seen: Any, row: Row[Any], allows: Callable[[Any], bool]) -> Choice:
        def due(lasted_ms: float) -> tuple[str, ...]:
            effect = self.rules.effect_now(row, lasted_ms)
            return (effect.name,) if effect is not None and allows(effect) else ()

        return Choice(seen, row, due(0.0), () if row.limit_ms is None else due(TIMELESS_MS))

    def source_may(self, effect: Effect, w: World) -> bool:
        """The guard, on the view of this moment."""
        return self.rules.source_allows(effect, self.source(w).view)

    def destination_may(self, effect: DestinationEffect, w: World) -> bool:
        """The guard, on the view of this moment."""
        return self.rules.destination_allows(effect, self.destination(w).view)

    def note_source(self, w: World, *facts: Fact | tuple[Fact, int]) -> World:
        """The source's agent records facts, in this order."""
        mask = w.s_log
        for fact in facts:
            mask = self._note("source", mask, fact)
        return w if mask == w.s_log else w._replace(s_log=mask)

    def note_destination(self, w: World, *facts: Fact | tuple[Fact, int]) -> World:
        """The destination's agent records facts, in this order."""
        mask = w.d_log
        for fact in facts:
            mask = self._note("destination", mask, fact)
        return w if mask == w.d_log else w._replace(d_log=mask)

    def _note(self, side: str, mask: Mask, what: Fact | tuple[Fact, int]) -> Mask:
        key = (side, mask, what)
        found = self._noted.get(key)
        if found is None:
            found = self._noted[key] = self._noted_anew(side, mask, what)
        if found[1]:
            self.problems.append(found[1])
        return found[0]

    def _noted_anew(self, side: str, mask: Mask, what: Fact | tuple[Fact, int]) -> tuple[Mask, str]:
        fact, round_no = what if isinstance(what, tuple) else (what, 0)
        if fact in NEVER_READ:
            return mask, ""
        after = logs.with_fact(mask, fact, round_no)
        if after == mask:
            return mask, ""
        status_of = self.rules.source_status if side == "source" else self.rules.destination_status
        edges: Mapping[MigrationStatus, frozenset[MigrationStatus]] = (
            transitions.SOURCE_EDGES if side == "source" else transitions.DESTINATION_EDGES
        )
        was, now = status_of(logs.log_of(mask)), status_of(logs.log_of(after))
        if was is now:
            return after, ""
        problem = "" if now in edges[was] else f"I12: the {side}'s status went from {was} to {now} by {fact}"
        if now is MigrationStatus.COMPLETED and side == "source":
            bare = logs.has(after, Fact.PACKAGE_SENT) and not logs.has(after, Fact.PACKAGE_LOADED)
            problem = problem or ("I9: completed without the proof of loading" if bare else "")
        if side == "source" and logs.has(after, Fact.PACKAGE_LOADED) and not logs.has(after, Fact.POSTCOPY_ANNOUNCED):
            after, more = self._noted_anew(side, after, Fact.POSTCOPY_ANNOUNCED)
            problem = problem or more
        return after, problem


def incoming_of(w: World) -> Incoming:
    """What the destination's agent takes its QEMU for: `DestinationAttempt.incoming`, from the same evidence."""
    log = w.d_log
    if not w.d_machine:
        if logs.has(log, Fact.START_SENT):
            return Incoming.GONE
        return Incoming.FAILED if logs.has(log, Fact.ERROR) else Incoming.NONE
    if w.d_machine == "gone":
        return Incoming.GONE
    if w.d_machine == "silent":
        return Incoming.UNKNOWN
    loaded = logs.has(log, Fact.LOADED)
    if logs.has(log, Fact.ERROR) and not loaded:
        return Incoming.FAILED
    if w.d_sees_running:
        return Incoming.RUNNING
    return Incoming.LOADED if loaded else Incoming.LOADING


def source_at_work(w: World) -> bool:
    """The source's agent is there and its attempt has not ended."""
    return w.s_log not in (DOWN, 0) and not logs.has(w.s_log, Fact.CLEANUP)


def place_at_work(w: World) -> bool:
    """The destination's agent is there and its place has not ended."""
    return w.d_log not in (DOWN, 0) and not logs.has(w.d_log, Fact.CLEANUP)
