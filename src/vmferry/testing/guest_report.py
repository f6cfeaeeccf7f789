"""What the Linux guest of the tests said on its serial console, on both sides of a migration: pure functions.

Theory of operation
-------------------
A reader records *chunks*: bytes and the moment when they arrived on the host. The guest's own clock stands
still while it is moved, so only the host's clock shows the pause. The switch may fall in the middle of a
line: its first bytes are then in the source's log and the rest in the destination's. So the logs are joined
as streams of bytes before they are cut into lines.

Rule 1: a line counts only if its sum is right; the protocol is described in guest/watcher.h.
Rule 2: "ran twice" is decided by the numbers of ticks, never by times of arrival: a busy host may deliver
one log later than the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

AROUND_SWITCH_S = 1.0
MAX_KEPT_LINES = 40
_SUM = re.compile(rb"^(.*) ([0-9a-f]{2})$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes and the host's monotonic time of their arrival, in seconds."""

    arrived_s: float
    data: bytes


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end; `words` is empty if there is no right sum; `side` is the index of the log."""

    arrived_s: float
    raw: bytes
    words: tuple[str, ...]
    side: int = 0

    @property
    def kind(self) -> str:
        """READY, T, W, S or E; "" for a line that the watcher did not write whole."""
        return self.words[0] if self.words else ""

    @property
    def text(self) -> str:
        return self.raw.decode("ascii", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Tick:
    """`guest_us` is the guest's monotonic clock, `errors` what the guest has found wrong so far."""

    seq: int
    guest_us: int
    errors: int
    arrived_s: float
    side: int


@dataclass(frozen=True, slots=True)
class GuestReport:
    """How the guest lived through one migration, or several in a row. Gaps are between arrivals of ticks.

    `guest_gap_ms` is the largest gap within AROUND_SWITCH_S of a switch, `switch_gap_ms` the one across the
    switch itself (None if no tick arrived on the far side), `max_gap_elsewhere_ms` the largest other one:
    what this host does to a guest that nobody moves. Each includes one normal tick time. `walks_after` and
    `disk_walks_after` count full checks reported by the last side; two of them mean that at least one both
    began and ended there.
    """

    ticks: int
    ticks_per_side: tuple[int, ...]
    ticks_lost: int
    ticks_duplicated: int
    overlap: bool
    guest_gap_ms: float
    switch_gap_ms: float | None
    max_gap_elsewhere_ms: float
    guest_clock_went_back: bool
    memory_errors: int
    disk_errors: int
    other_errors: int
    errors_counted_by_guest: int
    walks_after: int
    disk_walks_after: int
    boots: int
    panicked: bool
    strange_lines: tuple[str, ...] = ()
    error_lines: tuple[str, ...] = ()

    def complaints(self) -> list[str]:
        """What is wrong, in words; empty means that the guest noticed nothing but a pause."""
        found = {
            "no tick at all": self.ticks == 0,
            f"{self.ticks_lost} ticks were lost": self.ticks_lost > 0,
            f"{self.ticks_duplicated} ticks came twice": self.ticks_duplicated > 0,
            "the guest ran on both sides": self.overlap,
            "the guest's clock went back": self.guest_clock_went_back,
            f"{self.memory_errors} memory errors": self.memory_errors > 0,
            f"{self.disk_errors} disk errors": self.disk_errors > 0,
            f"{self.other_errors} other errors": self.other_errors > 0,
            f"the guest counted {self.errors_counted_by_guest} errors": self.errors_counted_by_guest > 0,
            f"the guest booted {self.boots} times": self.boots > 1,
            "the guest's kernel panicked": self.panicked,
            f"unreadable lines: {self.strange_lines}": bool(self.strange_lines),
        }
        return [words for words, wrong in found.items() if wrong]


@dataclass(slots=True)
class LineCutter:
    """Cuts chunks into lines. A line's time is that of the chunk which held its end."""

    side: int = 0
    rest: bytes = b""

    def feed(self, chunk: Chunk) -> list[Line]:
        *whole, self.rest = (self.rest + chunk.data).split(b"\n")
        return [read_line(raw, chunk.arrived_s, self.side) for raw in whole]


def read_line(raw: bytes, arrived_s: float, side: int = 0) -> Line:
    """Checks the sum. Kernel and firmware text comes out as a Line without words."""
    raw = raw.rstrip(b"\r")
    found = _SUM.match(raw)
    good = found is not None and sum(found[1]) % 256 == int(found[2], 16)
    words = tuple(found[1].decode("ascii", "replace").split()) if good and found is not None else ()
    return Line(arrived_s, raw, words, side)


def tick_of(line: Line) -> Tick | None:
    """The tick that the line reports, or None if it is another kind of line."""
    if line.kind != "T" or len(line.words) != 4:
        return None
    seq, guest_us, errors = (int(word) for word in line.words[1:])
    return Tick(seq, guest_us, errors, line.arrived_s, line.side)


def analyse(source: Iterable[Chunk], destination: Iterable[Chunk]) -> GuestReport:
    """Judges one migration from the logs of both sides; the destination's may be empty (it never ran)."""
    return analyse_chain([source, destination])


def analyse_chain(logs: Sequence[Iterable[Chunk]]) -> GuestReport:
    """Judges a guest that ran on `logs[0]`, then on `logs[1]` and so on; each side has its own log."""
    chunks = [list(log) for log in logs]
    return _report(_joined_lines(chunks), len(chunks))


def _joined_lines(logs: Sequence[list[Chunk]]) -> list[Line]:
    """All lines of all logs; a line that was cut by a switch is whole again and belongs to the later side."""
    lines: list[Line] = []
    open_end = b""
    end_arrived_s = 0.0
    for side, log in enumerate(logs):
        cutter = LineCutter(side)
        cut = [line for chunk in log for line in cutter.feed(chunk)]
        if open_end and cut:
            cut[:1] = _join(open_end, end_arrived_s, cut[0])
        elif open_end and cutter.rest:
            cutter.rest = open_end + cutter.rest  # this side never finished the line either
        if cut or cutter.rest:
            open_end = cutter.rest
            end_arrived_s = log[-1].arrived_s
        lines += cut
    return lines


def _join(open_end: bytes, end_arrived_s: float, head: Line) -> list[Line]:
    whole = read_line(open_end + head.raw, head.arrived_s, head.side)
    if whole.words or not head.words:
        return [whole]
    return [read_line(open_end, end_arrived_s, head.side - 1), head]  # the rest of the cut line is gone


@dataclass(slots=True)
class _Tally:
    """Counts of the lines that are not ticks."""

    boots: int = 0
    panicked: bool = False
    walks: dict[tuple[str, int], int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    error_lines: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)

    def add(self, line: Line) -> None:
        match line.words:
            case ("READY", *_):
                self.boots += 1
            case ("W", _, "0"):
                pass  # the regions have been filled, nothing has been checked
            case ("W", region, _):
                self.walks[region, line.side] = self.walks.get((region, line.side), 0) + 1
            case ("E", kind, *_):
                self.errors[kind] = self.errors.get(kind, 0) + 1
                self._keep(self.error_lines, line)
            case ("T" | "S", *_):
                pass
            case _:
                self.panicked = self.panicked or b"Kernel panic" in line.raw
                if self.boots and line.raw:  # before READY the firmware and the kernel may say what they like
                    self._keep(self.strange, line)

    @staticmethod
    def _keep(into: list[str], line: Line) -> None:
        if len(into) < MAX_KEPT_LINES:
            into.append(line.text)


def _report(lines: list[Line], sides: int) -> GuestReport:
    tally = _Tally()
    ticks: list[Tick] = []
    for line in lines:
        tick = tick_of(line)
        if tick is None:
            tally.add(line)
        else:
            ticks.append(tick)
    distinct = {tick.seq for tick in ticks}
    near_s, across_s, elsewhere_s = _gaps_s(ticks)
    last = max((tick.side for tick in ticks), default=0)
    memory_errors, disk_errors = tally.errors.pop("memory", 0), tally.errors.pop("disk", 0)
    return GuestReport(
        ticks=len(ticks),
        ticks_per_side=tuple(sum(tick.side == side for tick in ticks) for side in range(sides)),
        ticks_lost=max(distinct) - min(distinct) + 1 - len(distinct) if distinct else 0,
        ticks_duplicated=len(ticks) - len(distinct),
        overlap=_ran_twice(ticks),
        guest_gap_ms=near_s * 1000,
        switch_gap_ms=None if across_s is None else across_s * 1000,
        max_gap_elsewhere_ms=elsewhere_s * 1000,
        guest_clock_went_back=any(later.guest_us < tick.guest_us for tick, later in pairwise(ticks)),
        memory_errors=memory_errors,
        disk_errors=disk_errors,
        other_errors=sum(tally.errors.values()),
        errors_counted_by_guest=max((tick.errors for tick in ticks), default=0),
        walks_after=tally.walks.get(("memory", last), 0),
        disk_walks_after=tally.walks.get(("disk", last), 0),
        boots=tally.boots,
        panicked=tally.panicked,
        strange_lines=tuple(tally.strange),
        error_lines=tuple(tally.error_lines),
    )


def _ran_twice(ticks: list[Tick]) -> bool:
    """Ticks are in the order of logs: numbers that do not grow from side to side came from two lives."""
    return any(later.seq <= tick.seq for tick, later in pairwise(ticks) if later.side != tick.side)


def _gaps_s(ticks: list[Tick]) -> tuple[float, float | None, float]:
    """The largest gap near a switch, the largest one across a switch, the largest elsewhere."""
    switches_s = [
        moment_s
        for tick, later in pairwise(ticks)
        if tick.side != later.side
        for moment_s in (tick.arrived_s, later.arrived_s)
    ]
    near_s = elsewhere_s = 0.0
    across_s: float | None = None
    for tick, later in pairwise(ticks):
        gap_s = later.arrived_s - tick.arrived_s
        if tick.side != later.side:
            across_s = gap_s if across_s is None else max(across_s, gap_s)
            near_s = max(near_s, gap_s)
        elif any(
            tick.arrived_s - AROUND_SWITCH_S <= moment_s <= later.arrived_s + AROUND_SWITCH_S for moment_s in switches_s
        ):
            near_s = max(near_s, gap_s)
        else:
            elsewhere_s = max(elsewhere_s, gap_s)
    return near_s, across_s, elsewhere_s
