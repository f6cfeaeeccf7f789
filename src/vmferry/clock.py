"""The one place that may ask the time; everything else is given a Clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings: `now_s` only ever grows (deadlines), `wall_s` is the host's idea of the date (reports)."""

    def now_s(self) -> float: ...

    def wall_s(self) -> float: ...


class SystemClock:
    """The real clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
