"""Small mistakes, each of which the model must show: in rows, in guards, in the views, in the environment's contract.

Rows are mutated in a systematic way: each of `IDLE_ROWS` does nothing, each of `TIMELESS` loses its limit. Guards,
swapped effects, views and broken promises are written by hand.

Rule 1: an equivalent mutant is not in the set; `LEFT_OUT` says why each candidate is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from vmferry.core.destination_rows import DESTINATION_ROWS
from vmferry.core.effects import DESTINATION_GUARDS, SOURCE_GUARDS, DestinationEffect, Effect
from vmferry.core.facts import Fact, FactLog
from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Row, find
from vmferry.core.view import (
    DestinationView,
    Disks,
    Grant,
    Held,
    Incoming,
    Leave,
    Ran,
    Readings,
    Served,
    SourceView,
    Target,
    Wish,
    destination_view,
    source_view,
)
from vmferry.model.rules import Rules
from vmferry.model.world import Setting

STRAIGHT: Final = Setting("precopy", locks=False, faults=0, cancels=0)
POSTCOPY: Final = Setting("postcopy", locks=False, faults=0, cancels=0)
LOCKED: Final = Setting("precopy", locks=True, faults=1, cancels=0, kinds=frozenset({"storage"}))
CRASH: Final = Setting("precopy", locks=False, faults=1, cancels=0, kinds=frozenset({"crash"}))
NETWORK: Final = Setting("precopy", locks=False, faults=1, cancels=0, kinds=frozenset({"network"}))
STREAM: Final = Setting("precopy", locks=False, faults=1, cancels=0, kinds=frozenset({"stream"}))
PAUSED: Final = Setting("precopy", locks=False, owner_paused=True, faults=0, cancels=0)
HANG: Final = Setting("precopy", locks=False, faults=1, cancels=0, kinds=frozenset({"hang"}))
DISKS: Final = Setting("precopy", locks=False, disks=True, faults=0, cancels=0)
DISKS_FAULT: Final = replace(DISKS, faults=1, kinds=frozenset({"stream"}))
CRASH_CANCEL: Final = replace(CRASH, cancels=1)
POSTCOPY_CANCEL: Final = Setting("postcopy", locks=False, faults=0, cancels=1)
HOLD: Final = Setting("precopy", locks=False, faults=0, cancels=0, holds=True)
CUT: Final = Setting("postcopy", locks=False, faults=1, cancels=0, kinds=frozenset({"stream"}))


@dataclass(frozen=True)
class Mutant:
    """One mistake. `of` makes the mistaken rules; `settings` are tried in order until one shows it."""

    name: str
    of: Callable[[Rules], Rules]
    settings: tuple[Setting, ...] = (STRAIGHT,)


@cache
def _rows(label: str, changes: tuple[tuple[str, Any], ...]) -> tuple[tuple[Row[Any], ...], bool]:
    """The table with one row changed, and whether it is the source's. The others stay the same objects."""
    for rows, is_source in ((SOURCE_ROWS, True), (DESTINATION_ROWS, False)):
        if any(row.label == label for row in rows):
            return tuple(replace(row, **dict(changes)) if row.label == label else row for row in rows), is_source
    raise AssertionError(f"no row {label}")


@dataclass(frozen=True)
class ChangedRow:
    """One row with other contents; its guard is left out where `unguarded` says so."""

    label: str
    changes: tuple[tuple[str, Any], ...]

    def __call__(self, rules: Rules) -> Rules:
        _, is_source = _rows(self.label, self.changes)
        if is_source:
            return replace(rules, decide_source=self._source)
        return replace(rules, decide_destination=self._destination)

    def _source(self, log: FactLog, readings: Readings) -> Row[Effect]:
        return find(_rows(self.label, self.changes)[0], source_view(log, readings))

    def _destination(self, log: FactLog, incoming: Incoming) -> Row[DestinationEffect]:
        return find(_rows(self.label, self.changes)[0], destination_view(log, incoming))


@dataclass(frozen=True)
class NoGuard:
    """An effect without its guard."""

    effect: Effect | DestinationEffect

    def __call__(self, rules: Rules) -> Rules:
        if isinstance(self.effect, Effect):
            return replace(rules, source_allows=self._source)
        return replace(rules, destination_allows=self._destination)

    def _source(self, effect: Effect, view: SourceView) -> bool:
        return effect is self.effect or any(guard.allows(view) for guard in SOURCE_GUARDS[effect])

    def _destination(self, effect: DestinationEffect, view: DestinationView) -> bool:
        return effect is self.effect or any(guard.allows(view) for guard in DESTINATION_GUARDS[effect])


@dataclass(frozen=True)
class OtherView:
    """A view that answers one question wrongly: `wrong` for `right`."""

    question: str
    right: Any
    wrong: Any

    def __call__(self, rules: Rules) -> Rules:
        if self.question in SourceView.__dataclass_fields__:
            return replace(rules, source_view=self._source, decide_source=self._decide_source)
        return replace(rules, destination_view=self._destination, decide_destination=self._decide_destination)

    def _changed(self, view: Any) -> Any:
        return replace(view, **{self.question: self.wrong}) if getattr(view, self.question) is self.right else view

    def _source(self, log: FactLog, readings: Readings) -> SourceView:
        changed: SourceView = self._changed(source_view(log, readings))
        return changed

    def _decide_source(self, log: FactLog, readings: Readings) -> Row[Effect]:
        return find(SOURCE_ROWS, self._source(log, readings))

    def _destination(self, log: FactLog, incoming: Incoming) -> DestinationView:
        changed: DestinationView = self._changed(destination_view(log, incoming))
        return changed

    def _decide_destination(self, log: FactLog, incoming: Incoming) -> Row[DestinationEffect]:
        return find(DESTINATION_ROWS, self._destination(log, incoming))


@dataclass(frozen=True)
class Breaks:
    """The mutant that does not keep one promise of the environment."""

    promise: str

    def __call__(self, rules: Rules) -> Rules:
        return replace(rules, broken=rules.broken | {self.promise})


@dataclass(frozen=True)
class AlwaysCancel:
    """A cancel is accepted at any time."""

    def __call__(self, rules: Rules) -> Rules:
        return replace(rules, cancel_refusal=self._never)

    def _never(self, log: FactLog, *, was_refused: bool = False) -> str | None:
        return None


@dataclass(frozen=True)
class Forgets:
    """QEMU's words do not prove one fact."""

    fact: Fact
    on_source: bool = True

    def __call__(self, rules: Rules) -> Rules:
        if self.on_source:
            inner = rules.source_findings
            return replace(rules, source_findings=_Without(inner, self.fact))
        return replace(rules, destination_findings=_Without(rules.destination_findings, self.fact))


@dataclass(frozen=True)
class _Without:
    inner: Callable[..., tuple[tuple[Fact, int, str], ...]]
    fact: Fact

    def __call__(self, *arguments: Any, **named: Any) -> tuple[tuple[Fact, int, str], ...]:
        return tuple(found for found in self.inner(*arguments, **named) if found[0] is not self.fact)


IDLE_ROWS: Final[tuple[tuple[str, Setting], ...]] = (
    ("P-plan", STRAIGHT), ("P-prepare", STRAIGHT), ("P-configure", STRAIGHT), ("P-start", STRAIGHT),
    ("P-back-clean", STRAIGHT), ("M-postcopy", POSTCOPY), ("M-sure", STRAIGHT), ("M-continue", STRAIGHT),
    ("M-qemu-ends", STREAM), ("C-commit", STRAIGHT), ("C-grant", STRAIGHT), ("B-cancel", STRAIGHT),
    ("B-resume", STRAIGHT), ("B-clean", STRAIGHT), ("G-ran-retire", STRAIGHT), ("G-ran-clean", STRAIGHT),
    ("G-ran-broken", CUT), ("G-again", NETWORK), ("G-start-refused", LOCKED),
    ("G-back-release", LOCKED), ("G-gone-resume", LOCKED), ("G-gone-clean", LOCKED), ("D-spawn", STRAIGHT),
    ("P-mirror", DISKS), ("M-drain", DISKS), ("D-close", DISKS),
    ("P-disk-failed", DISKS_FAULT), ("M-disk-failed", DISKS_FAULT),
    ("D-start", STRAIGHT), ("D-failed", STREAM), ("D-renounce", STRAIGHT), ("D-running", STRAIGHT),
)  # fmt: skip
"""Rows that must act, each with the smallest setting that needs it."""

E, D = Effect, DestinationEffect
SWAPPED: Final[tuple[tuple[str, Effect | DestinationEffect, Setting], ...]] = (
    ("G-uncertain", E.RESUME_SOURCE, STRAIGHT),
    ("G-ask", E.RETIRE_SOURCE, CRASH),
    ("G-again", E.CLEAN_UP, STRAIGHT),
    ("B-resume", E.CLEAN_UP, STRAIGHT),
    ("G-back-release", E.RESUME_SOURCE, LOCKED),
    ("C-commit", E.SEND_GRANT, STRAIGHT),
    ("C-wait-load", E.SEND_GRANT, STRAIGHT),
    ("M-memory", E.RETIRE_SOURCE, STRAIGHT),
    ("M-drain", E.CONTINUE, DISKS),
    ("D-load", D.START_CPUS, STRAIGHT),
    ("D-wait-grant", D.START_CPUS, STRAIGHT),
    ("D-in-doubt", D.RENOUNCE, HANG),
    ("D-running", D.RENOUNCE, STRAIGHT),
)
"""Rows that do something else, without the guard that would stop it."""


@dataclass(frozen=True)
class Both:
    """Two changes that are one mistake."""

    first: Callable[[Rules], Rules]
    second: Callable[[Rules], Rules]

    def __call__(self, rules: Rules) -> Rules:
        return self.second(self.first(rules))


def _made() -> tuple[Mutant, ...]:
    idle = (Mutant(f"{label} does nothing", ChangedRow(label, (("do", None),)), (s,)) for label, s in IDLE_ROWS)
    swapped = (
        Mutant(f"{label} does {effect.value}", Both(ChangedRow(label, (("do", effect),)), NoGuard(effect)), (setting,))
        for label, effect, setting in SWAPPED
    )
    return (*idle, *swapped)


BY_HAND: Final[tuple[Mutant, ...]] = (
    Mutant("an unknown target counts as gone", OtherView("target", Target.UNKNOWN, Target.GONE), (STRAIGHT, NETWORK)),
    Mutant("a refused target counts as gone", OtherView("target", Target.REFUSED, Target.GONE), (LOCKED,)),
    Mutant("a loaded target counts as running", OtherView("target", Target.LOADED, Target.RAN)),
    Mutant("a sent grant counts as held", OtherView("grant", Grant.SENT, Grant.HELD)),
    Mutant("an unknown run counts as none", OtherView("ran", Ran.UNKNOWN, Ran.NO), (CRASH,)),
    Mutant("a release is not heard", OtherView("wish", Wish.DROP, Wish.KEEP)),
    Mutant("disks that are ready count as equal", OtherView("disks", Disks.READY, Disks.SETTLED), (DISKS,)),
    Mutant("exports count as closed", OtherView("served", Served.YES, Served.NO), (DISKS,)),
    Mutant("an order is not needed", OtherView("held", Held.NO, Held.YES)),
    Mutant("the grant has no guard", NoGuard(E.SEND_GRANT), (CRASH_CANCEL,)),
    Mutant("a cancel is accepted at any time", AlwaysCancel(), (CRASH_CANCEL,)),
    Mutant("completed does not prove the result", Forgets(Fact.PEER_ACK), (POSTCOPY_CANCEL,)),
    Mutant("stopping is not heard", Forgets(Fact.SWITCHOVER)),
    Mutant("the package is not heard of", Forgets(Fact.PACKAGE_SENT), (POSTCOPY,)),
    Mutant("loading is not seen", Forgets(Fact.LOADED, on_source=False)),
    Mutant("the end of the load is not seen there", Forgets(Fact.ALL_SENT, on_source=False)),
    Mutant("the proof of loading is not heard", Forgets(Fact.PACKAGE_LOADED), (POSTCOPY,)),
    Mutant("the destination is not started paused", Breaks("started paused")),
    Mutant("a grant counts only when it is answered", Breaks("a grant counts before it is sent"), (STRAIGHT, NETWORK)),
    Mutant("the commit is not journalled", Breaks("committed before it is said"), (STRAIGHT,)),
    Mutant("the grant is not journalled there", Breaks("a grant is durable before it is used"), (STRAIGHT,)),
    Mutant("after a restart a commit does not count as sent", Breaks("a commit counts as sent after a restart"),
           (CRASH,)),
    Mutant("after a restart cont was never written", Breaks("cont may have been written before a restart"), (CRASH,)),
    Mutant("an order of an older attempt is taken", Breaks("an order carries its generation"), (CRASH,)),
    Mutant("the guest is not stopped before postcopy", Breaks("stopped before postcopy"), (CUT,)),
    Mutant("the source does not say that its QEMU is gone", Breaks("says that its QEMU is gone"), (CRASH,)),
    Mutant("an accepted cancel is not asked about again", Breaks("a cancel is asked about twice"), (CRASH_CANCEL,)),
    Mutant("a switchover waits for nobody's leave", OtherView("leave", Leave.AWAITED, Leave.GIVEN), (HOLD,)),
    Mutant("a cancel is not journalled", Breaks("a cancel is written before it counts"), (CRASH_CANCEL,)),
)  # fmt: skip

LEFT_OUT: Final[tuple[tuple[str, str], ...]] = (
    (
        "G-uncertain does nothing",
        "its limit asks for a fence, which asks the destination first: the same answer, later",
    ),
    ("C-ask does nothing", "the row's limit turns the guest back: it ends on the source, later than it need"),
    ("B-release does clean-up", "the place asks by itself and hears that it is not wanted: the same end"),
    ("disks on their way count as ready", "QEMU ends no mirror well that is not ready, so the guest only goes back"),
    ("loading counts as loaded", "an order comes only after this side said that it had loaded, so nothing differs"),
)
"""Candidates that are equivalent, and why."""

NOT_SHOWN: Final[tuple[tuple[Mutant, str], ...]] = (
    (Mutant("D-ran does nothing", ChangedRow("D-ran", (("do", None),)), (PAUSED,)),
     "its QEMU answers again in the end, and then D-running says the same"),
    (Mutant("completed does not prove that all was sent", Forgets(Fact.ALL_SENT)),
     "the destination says that it has all, which proves the same"),
    (Mutant("a doubt there is not told", Breaks("says that it is in doubt"), (STRAIGHT, NETWORK)),
     "the destination says what became of its order once its QEMU answers"),
    (Mutant("the arrived guest is not journalled", Breaks("kept before it is said"), (CRASH,)),
     "the next agent there finds the place and its running QEMU"),
    (Mutant("postcopy-device counts as the proof", Breaks("waits for the proof"), (POSTCOPY,)),
     "the destination's agent says that it has loaded, which proves the same"),
    (Mutant("turning back is not journalled", Breaks("turned back before the guest runs"), (CRASH_CANCEL,)),
     "the next agent sees that the guest runs here (G-runs-here)"),
    (Mutant("the renounced place is not journalled", Breaks("renounced before it is said"), (CRASH,)),
     "the next agent finds no QEMU and an order that was refused"),
)  # fmt: skip
"""Mistakes that precopies and postcopies with one fault and one cancel do not show, and what most likely stands beside
them; they are not known to be equivalent, and not counted."""

MUTANTS: Final[tuple[Mutant, ...]] = (*_made(), *BY_HAND)
