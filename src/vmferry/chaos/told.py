"""What the agents' logs say of one job: facts with their times, rows, restarts. Pure but for `LogTail`, which reads.

The facts up to a moment give the public status at that moment (`core.status`), whatever anybody was told then: that
is how a run proves in which phase its fault was done.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, get_type_hints

from vmferry.core.facts import ROUNDED, Fact, FactLog
from vmferry.core.status import destination_status, source_status
from vmferry.core.view import SourceView

_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) (\w+) \S+ (.*)$")
_FACT = re.compile(r"job=(\S+) vm=(\S+) fact=(\S+) round=(\d+) by=(.*?) text=(.*)$")
_VIEW = re.compile(r"job=(\S+) vm=(\S+) view=(.+)$")
_KINDS = get_type_hints(SourceView)
_ROW = re.compile(r"job=(\S+) vm=(\S+) row=(\S+) outcome=(\S+)$")


@dataclass(frozen=True, slots=True)
class Said:
    """One line of an agent: a fact (`what` is its name), a row, or what the table was asked about."""

    at_s: float
    kind: str
    job: str
    vm: str
    what: str
    round: int = 0
    text: str = ""


def read_line(line: str) -> Said | None:
    """None for everything that is no fact, row or view, nor the end of a start."""
    found = _LINE.match(line)
    if found is None:
        return None
    at_s = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(found[2]) / 1000
    fact = _FACT.search(found[4])
    if fact is not None:
        return Said(at_s, "fact", fact[1], fact[2], fact[3], int(fact[4]), fact[6])
    row = _ROW.search(found[4])
    if row is not None:
        return Said(at_s, "row", row[1], row[2], row[3], text=row[4])
    view = _VIEW.search(found[4])
    if view is not None:
        return Said(at_s, "view", view[1], view[2], view[3])
    return Said(at_s, "ready", "", "", "ready") if "result=ready" in found[4] else None


def facts_of(said: Iterable[Said], vm: str, *, before_s: float = float("inf")) -> FactLog:
    """The facts of this VM's newest job up to a moment; a restarted agent's begin anew, as its log does."""
    log = FactLog()
    for entry in said:
        if entry.at_s > before_s:
            break
        if entry.kind == "ready":
            log = FactLog()
        if entry.kind == "fact" and entry.vm == vm:
            fact = Fact(entry.what)
            log = log.with_fact(fact, round_no=entry.round if fact in ROUNDED else 0, text=entry.text, at_s=entry.at_s)
    return log


def status_at(said: Iterable[Said], vm: str, *, before_s: float = float("inf"), side: str = "source") -> str:
    """The public status that those facts give."""
    log = facts_of(said, vm, before_s=before_s)
    return (source_status(log) if side == "source" else destination_status(log)).value


def views_of(said: Iterable[Said], vm: str) -> list[tuple[SourceView, bool]]:
    """What the source's table was asked about, in order, each with whether a cancel had been asked for."""
    found, is_cancelled = [], False
    for entry in said:
        if entry.vm != vm:
            continue
        is_cancelled |= entry.kind == "fact" and entry.what == Fact.CANCEL.value
        if entry.kind == "view":
            found.append((SourceView(*_answers(entry.what)), is_cancelled))
    return found


def _answers(words: str) -> Iterator[Any]:
    for name, word in zip(SourceView.__slots__, words.split(" "), strict=True):
        yield _KINDS[name](word)


@dataclass(slots=True)
class LogTail:
    """Follows one agent's log file."""

    path: Path
    said: list[Said] = field(default_factory=list)
    offset: int = 0
    troubles: list[str] = field(default_factory=list)
    """Lines of tracebacks."""
    rest: str = ""

    def read(self) -> list[Said]:
        """Everything so far."""
        if not self.path.exists():
            return self.said
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        self.offset += len(data)
        *lines, self.rest = (self.rest + data.decode(errors="replace")).split("\n")
        for line in lines:
            entry = read_line(line)
            if entry is not None:
                self.said.append(entry)
            elif line.startswith(("Traceback", "AssertionError")) or "never retrieved" in line:
                self.troubles.append(line)
        return self.said

    def has(self, vm: str, fact: Fact, *, since_s: float = 0.0) -> Said | None:
        """The first such fact since the moment, or None."""
        for entry in self.read():
            if entry.kind == "fact" and entry.vm == vm and entry.what == fact.value and entry.at_s >= since_s - 0.001:
                return entry
        return None

    def rows(self, vm: str) -> list[str]:
        """The labels of the rows, in order."""
        return [entry.what for entry in self.read() if entry.kind == "row" and entry.vm == vm]

    def forget(self) -> None:
        """A new run begins; what an old one said is not looked at any more."""
        self.read()
        self.said.clear()
        self.troubles.clear()


def now_s() -> float:
    """The clock of all times here: the one of the agents' logs and of QEMU's events."""
    return time.time()
