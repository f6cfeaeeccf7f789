"""How far one migration is: the progress and the forecast that its counters give, and how both are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vmferry.clock import Clock
from vmferry.core.progress import ETA_SAMPLES, Forecast, Progress, Sample, Whole


@dataclass(slots=True)
class Tracking:
    """Owned by the source's attempt."""

    clock: Clock
    began_s: float
    progress: Progress = field(default_factory=Progress)
    """Of the memory."""
    forecast: Forecast = field(default_factory=Forecast)
    whole: Whole = field(default_factory=Whole)
    """What is shown: the local disks that go along are in it."""
    disks: tuple[int, int] = (0, 0)
    """(current, total) bytes of all their mirrors."""
    guest_bytes: int = 0
    """The guest's memory, where disks go before it."""

    def advance(self, samples: Sequence[Sample]) -> None:
        """One more reading, the last of them."""
        self.progress = self.progress.advance(samples[-1])
        # On the clock of the agent: QEMU's stands still in a postcopy that is broken.
        newest = replace(samples[-1], elapsed_ms=self._now_ms())
        self.forecast = self.forecast.advance([*samples[-ETA_SAMPLES:-1], newest])
        self._sum_up()

    def disks_are_at(self, current_bytes: int, total_bytes: int, *, guest_bytes: int) -> None:
        """What the mirrors have copied of what they have to, all of them together; and the guest's memory, which goes
        after them."""
        self.disks, self.guest_bytes = (current_bytes, total_bytes), guest_bytes
        self._sum_up()

    def changed_by_hand(self) -> None:
        """An option was changed: what was told of the end was told of something else."""
        self.forecast = Forecast()

    def finish(self) -> None:
        """The guest is there with everything."""
        self.progress = self.progress.finished()
        self.forecast = Forecast(0.0, 0.0)
        self._sum_up()

    def wire(self) -> dict[str, Any]:
        """Plain values; the times left are None where they are not known, or without bound."""
        low_ms, high_ms = self.forecast.left_ms(self._now_ms())
        return {
            "current_bytes": self.whole.current_bytes,
            "whole_bytes": self.whole.total_bytes,
            "percent": self.whole.percent,
            "percent_error": self.whole.percent_error,
            "left_ms_min": low_ms,
            "left_ms_max": high_ms,
        }

    def _sum_up(self) -> None:
        current, total = self.disks
        self.whole = self.whole.advance(
            self.progress, disks_current=current, disks_total=total, guest_bytes=self.guest_bytes
        )

    def _now_ms(self) -> float:
        return (self.clock.now_s() - self.began_s) * 1000
