"""How far a migration is: numbers that never run backwards, and how long it may still take.

Theory of operation
-------------------
`Sample` is one reading of QEMU's counters. `Progress` folds samples into what a person sees. In precopy the
guest makes new work, so the total may move both ways while the current only grows; from the switchover to
postcopy on no new work can appear, so the total stays.

Rule 1: `current_bytes` and `percent` never decrease, whatever QEMU says.
Rule 2: 100 % is shown only by `finished`, never by arithmetic.
Rule 3: a percentage comes with its error: by how much the newest totals differ. In postcopy that is none.
Rule 4: the earliest end that was told is not taken back (`Forecast`), unless what it was told from was changed by hand.
Rule 5: an estimate without a known upper bound says so: None, not a large number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

ETA_SAMPLES: Final = 8
"""How many of the newest samples an estimate looks at: enough to see both a good and a bad moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One reading. Rates are bytes per second; `passes` is QEMU's dirty-sync-count."""

    elapsed_ms: float
    sent_bytes: int
    remaining_bytes: int
    throughput_bytes_per_s: float = 0.0
    dirty_rate_bytes_per_s: float = 0.0
    passes: int = 1
    throttle_percent: int = 0
    in_postcopy: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """What is shown. `total_bytes` = sent + remaining; `fixed` = postcopy has fixed the total."""

    current_bytes: int = 0
    total_bytes: int = 0
    percent: int = 0
    fixed: bool = False
    newest_totals: tuple[int, ...] = ()
    """The last ETA_SAMPLES of them."""

    @property
    def percent_error(self) -> int:
        """By how many points the percentage may be wrong: what the newest totals would have made of it, rounded up."""
        totals = [total for total in self.newest_totals if total]
        if not totals or self.fixed:
            return 0
        best, worst = self.current_bytes / min(totals), self.current_bytes / max(totals)
        return min(100, math.ceil(100 * (best - worst)))

    def advance(self, sample: Sample) -> Progress:
        """The progress after one more sample."""
        remaining = max(0, sample.remaining_bytes)
        if self.fixed:
            current = min(self.total_bytes, max(self.current_bytes, self.total_bytes - remaining))
            total = self.total_bytes
        else:
            current = max(self.current_bytes, sample.sent_bytes)
            total = current + remaining
        share = 100 * current // total if total else 0
        percent = max(self.percent, min(99, share))
        totals = (*self.newest_totals, total)[-ETA_SAMPLES:]
        return Progress(current, total, percent, self.fixed or sample.in_postcopy, totals)

    def finished(self) -> Progress:
        """The migration is proven to be over: everything, 100 %."""
        return replace(self, current_bytes=self.total_bytes, percent=100, newest_totals=())


@dataclass(frozen=True, slots=True)
class Whole:
    """Memory and the local disks that go with it, as one. Without disks: exactly the memory's numbers."""

    current_bytes: int = 0
    total_bytes: int = 0
    percent: int = 0
    percent_error: int = 0
    disks: tuple[int, int] = field(default=(0, 0), compare=False)
    """(sent, all) in bytes, as it was said last: while no job of a disk is there nothing is said (a total of 0)."""

    def advance(self, memory: Progress, *, disks_current: int, disks_total: int, guest_bytes: int) -> Whole:
        """The numbers after one more reading of either. `guest_bytes`: the guest's memory, which counts as what is to
        be sent until QEMU has said more: disks go first."""
        disks = (disks_current, disks_total) if disks_total else self.disks
        if not disks[1]:
            return Whole(memory.current_bytes, memory.total_bytes, memory.percent, memory.percent_error)
        total = disks[1] + (memory.total_bytes or guest_bytes)
        current = max(self.current_bytes, memory.current_bytes + disks[0])
        total = max(total, current)
        if memory.percent == 100:  # the memory goes last
            return Whole(total, total, 100, 0, disks)
        percent = max(self.percent, min(99, 100 * current // total))
        return Whole(current, total, percent, math.ceil(memory.percent_error * memory.total_bytes / total), disks)


@dataclass(frozen=True, slots=True)
class Eta:
    """Time left in ms between two bounds; `high_ms` None = at this pace it may never end."""

    low_ms: float
    high_ms: float | None


def eta(samples: Sequence[Sample]) -> Eta | None:
    """Bounds from the newest samples; None = nothing has been measured yet.

    low: the best speed seen and no new dirty memory; high: the worst speed minus the highest dirty rate.
    """
    recent = [s for s in samples[-ETA_SAMPLES:] if s.throughput_bytes_per_s > 0]
    if not recent:
        return None
    last = samples[-1]
    remaining = max(0, last.remaining_bytes)
    best = max(s.throughput_bytes_per_s for s in recent)
    dirtied = 0.0 if last.in_postcopy else max(s.dirty_rate_bytes_per_s for s in recent)
    worst = min(s.throughput_bytes_per_s for s in recent) - dirtied
    high = remaining / worst * 1000 if worst > 0 else None
    return Eta(remaining / best * 1000, high)


@dataclass(frozen=True, slots=True)
class Forecast:
    """When it ends, in ms since its begin: not before `earliest_ms`, and by `latest_ms` if nothing changes."""

    earliest_ms: float | None = None
    latest_ms: float | None = None

    def advance(self, samples: Sequence[Sample]) -> Forecast:
        """The forecast after one more sample, the last of `samples`. The earliest end never moves back."""
        found = eta(samples)
        if found is None:
            return self
        now_ms = samples[-1].elapsed_ms
        earliest = max(now_ms + found.low_ms, self.earliest_ms or 0.0)
        latest = None if found.high_ms is None else max(earliest, now_ms + found.high_ms)
        return Forecast(earliest, latest)

    def left_ms(self, now_ms: float) -> tuple[float | None, float | None]:
        """(at least, at most) from this moment on; None: not known, or without bound."""
        low = None if self.earliest_ms is None else max(0.0, self.earliest_ms - now_ms)
        return low, None if self.latest_ms is None else max(0.0, self.latest_ms - now_ms)
