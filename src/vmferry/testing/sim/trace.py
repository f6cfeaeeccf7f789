"""What happened in a run: one line per event, the same in every run of the same seed."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vmferry.testing.sim.loop import OWNER, START_S, VirtualLoop


class Trace:
    """Lines of (milliseconds since the start, actor, event), and what every run must keep."""

    def __init__(self, loop: VirtualLoop, *, hide: str = "") -> None:
        """`hide`: the run's own directory, which differs from run to run."""
        self.lines: list[str] = []
        self.violations: list[str] = []
        self.on_line: Callable[[str, str], None] | None = None
        self._loop, self._hide = loop, hide

    @property
    def now_ms(self) -> float:
        """Since the start."""
        return (self._loop.time() - START_S) * 1000

    def tell(self, actor: str, event: str) -> None:
        """One more line."""
        if self._hide:
            event = event.replace(self._hide, "")
        self.lines.append(f"{self.now_ms:12.3f} {actor:8} {event}")
        if self.on_line is not None:
            self.on_line(actor, event)

    def violate(self, what: str) -> None:
        """Something happened that never may."""
        if what not in self.violations:
            self.violations.append(what)
            self.tell("ORACLE", f"VIOLATION {what}")


class LogTrace(logging.Handler):
    """The agents' own log lines are events of the trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(logging.INFO)
        self._trace = trace

    def emit(self, record: logging.LogRecord) -> None:
        owner = OWNER.get()
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" exception={record.exc_info[1]!r}"
        self._trace.tell(getattr(owner, "host", "-"), text)
        if record.exc_info:
            self._trace.violate(f"{getattr(owner, 'host', '-')}: a mistake was logged: {text}")
