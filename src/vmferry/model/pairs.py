"""The pairs P1 to P30 in the words of the tables: for each the questions that they ask, and how they are answered.

The rows are looked up, never written down: a table that changes changes what is said of a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

from vmferry.core.effects import Effect
from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Row, find
from vmferry.core.view import Change, Cpus, Grant, Leave, Retry, Source, SourceView, Step, Target, Want

BOTH: Final = (Want.GO, Want.BACK)
STARTED: Final = (Step.STARTED,)
NOT_SENT: Final = (Grant.NONE, Grant.HELD)
SENT: Final = (Grant.SENT,)


@dataclass(frozen=True)
class Pair:
    """One pair of states of the two sides."""

    name: str
    text: str
    source: tuple[Source, ...]
    target: tuple[Target, ...]
    grant: tuple[Grant, ...]
    cpus: tuple[Cpus, ...] = (Cpus.STOPPED,)
    want: tuple[Want, ...] = BOTH
    step: tuple[Step, ...] = STARTED
    in_postcopy: bool | None = None
    is_cancelled: bool | None = None
    unreachable: str = ""
    """Why the rules keep the two sides out of it; what is found then is answered all the same."""

    def holds(self, view: SourceView, *, in_postcopy: bool, is_cancelled: bool) -> bool:
        """Whether a view belongs to it; some pairs differ only in the mode, and in whether a cancel was asked for."""
        if self.in_postcopy not in (None, in_postcopy) or self.is_cancelled not in (None, is_cancelled):
            return False
        if view.source is Source.BACK and view.cpus not in self.cpus:
            return False  # nobody asks for the CPUs in other states
        asked = (
            (view.want, self.want), (view.step, self.step), (view.source, self.source),
            (view.target, self.target), (view.grant, self.grant),
        )  # fmt: skip
        return all(answer in answers for answer, answers in asked)

    def rows(self) -> list[Row[Effect]]:
        """The rows that decide in it, in the table's order."""
        found = {find(SOURCE_ROWS, view).label for view in self._views()}
        return [row for row in SOURCE_ROWS if row.label in found]

    def _views(self) -> Iterator[SourceView]:
        for want, step, source, cpus, target, grant, retry, leave in product(
            self.want, self.step, self.source, self.cpus, self.target, self.grant, Retry, Leave
        ):
            yield SourceView(want, step, source, cpus, target, grant, Change.NONE, retry, leave)


S, T = Source, Target
PAUSED_START: Final = "the destination starts with -S and runs only with a grant (G1)"
PAIRS: Final[tuple[Pair, ...]] = (
    Pair("P1", "none, setup / none, setup", (S.IDLE, S.CONNECTING), (T.PREPARED,), (Grant.NONE,), (Cpus.AS_BEFORE,),
         step=(Step.NEW, Step.PLANNED, Step.PREPARED, Step.CONFIGURED, Step.STARTED)),
    Pair("P2", "active / active", (S.BUSY,), (T.PREPARED,), (Grant.NONE,), (Cpus.AS_BEFORE,)),
    Pair("P3", "pre-switchover / active", (S.WAITING,), (T.PREPARED, T.READY), (Grant.NONE,)),
    Pair("P4", "device / active, or a hung peer", (S.SWITCHING, S.SILENT), (T.READY, T.UNKNOWN), NOT_SENT,
         in_postcopy=False),
    Pair("P5", "device / completed, never ran", (S.SWITCHING,), (T.LOADED,), NOT_SENT, in_postcopy=False),
    Pair("P6", "device / completed, runs", (S.SWITCHING,), (T.RAN,), NOT_SENT, in_postcopy=False,
         unreachable=PAUSED_START),
    Pair("P7", "completed / completed, never ran", (S.DONE,), (T.LOADED,), (Grant.HELD, Grant.SENT)),
    Pair("P8", "completed / completed, runs", (S.DONE,), (T.RAN,), SENT),
    Pair("P9", "completed / completed in inmigrate", (S.DONE,), (T.REFUSED,), SENT,
         unreachable=f"{PAUSED_START}; a cont without effect counts as refused"),
    Pair("P10", "completed / dead, never ran", (S.DONE,), (T.GONE,), (Grant.HELD, Grant.SENT)),
    Pair("P11", "completed / dead after it ran", (S.DONE,), (T.DIED,), SENT),
    Pair("P12", "postcopy-device / active", (S.SWITCHING,), (T.READY, T.UNKNOWN), NOT_SENT, in_postcopy=True),
    Pair("P13", "postcopy-device / postcopy-active, never ran", (S.SWITCHING,), (T.LOADED,), NOT_SENT,
         in_postcopy=True),
    Pair("P14", "postcopy-device / postcopy-active, runs", (S.SWITCHING,), (T.RAN,), NOT_SENT,
         unreachable=PAUSED_START, in_postcopy=True),
    Pair("P15", "postcopy-active / postcopy-active, never ran (cont refused)", (S.POSTCOPY,), (T.REFUSED,), SENT),
    Pair("P16", "postcopy-active / postcopy-active, runs", (S.POSTCOPY,), (T.RAN,), SENT),
    Pair("P17", "postcopy-paused / postcopy-paused, runs", (S.BROKEN,), (T.RAN,), SENT),
    Pair("P18", "postcopy-paused / postcopy-paused, never ran", (S.BROKEN,), (T.LOADED, T.REFUSED),
         (Grant.HELD, Grant.SENT)),
    Pair("P19", "postcopy-paused / its QMP hangs", (S.BROKEN,), (T.RAN, T.UNKNOWN), SENT),
    Pair("P20", "postcopy-paused / dead, never ran", (S.BROKEN,), (T.GONE,), (Grant.HELD, Grant.SENT)),
    Pair("P21", "postcopy-paused / dead after it ran", (S.BROKEN,), (T.DIED,), SENT),
    Pair("P22", "dead / postcopy-paused, ran", (S.GONE,), (T.RAN,), SENT, (Cpus.UNKNOWN,)),
    Pair("P23", "failed, runs / failed or dead", (S.BACK,), (T.PREPARED, T.GONE), NOT_SENT, (Cpus.AS_BEFORE,),
         (Want.BACK,), is_cancelled=False),
    Pair("P24", "failed, stuck / dead, never ran", (S.BACK,), (T.GONE,), (Grant.HELD, Grant.SENT), (Cpus.STUCK,),
         (Want.BACK,), is_cancelled=False),
    Pair("P25", "failed, runs / postcopy-paused or completed, never ran", (S.BACK,), (T.LOADED,),
         (Grant.HELD, Grant.SENT), (Cpus.AS_BEFORE,), (Want.BACK,), is_cancelled=False),
    Pair("P26", "failed / postcopy-paused, ran", (S.BACK,), (T.RAN,), SENT,
         (Cpus.STOPPED, Cpus.STUCK, Cpus.UNKNOWN), is_cancelled=False),
    Pair("P27", "cancelled, as P23 to P26", (S.BACK,), (T.PREPARED, T.LOADED, T.GONE), (Grant.HELD, Grant.SENT),
         (Cpus.AS_BEFORE, Cpus.STOPPED, Cpus.STUCK), (Want.BACK,), is_cancelled=True),
    Pair("P28", "dead / postcopy-device or earlier", (S.GONE,), (T.PREPARED, T.READY), NOT_SENT, (Cpus.UNKNOWN,)),
    Pair("P29", "dead / completed, never ran", (S.GONE, S.RETIRED), (T.LOADED,), (Grant.HELD, Grant.SENT),
         (Cpus.UNKNOWN,)),
    Pair("P30", "frozen / active or earlier", (S.SILENT,), (T.PREPARED,), (Grant.NONE,), (Cpus.UNKNOWN,)),
)  # fmt: skip
"""Semantics 3.3, in its order: source / destination, and the questions that the source's table asks then."""
