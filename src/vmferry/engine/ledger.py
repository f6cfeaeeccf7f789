"""The facts of one endpoint: its threads post them, its owner waits for them, its status is computed from them.

Rule 1: an endpoint never says what state it is in. `status` derives that from the log, with the one function that
        agents use too (`core.status`).
Rule 2: facts are posted in the order in which they became true; the log never shrinks.
Rule 3: a listener is called outside of the lock, by the thread that posted, and must not block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmferry.clock import Clock, SystemClock
from vmferry.core.facts import Fact, FactLog
from vmferry.core.migration_status import MigrationStatus
from vmferry.core.status import derive_destination, derive_source

Listener = Callable[[Fact], None]


class Ledger:
    """An append-only log of facts, shared by the threads of one endpoint and its owner."""

    def __init__(self, *, is_source: bool, clock: Clock | None = None) -> None:
        self._is_source = is_source
        self._clock = clock or SystemClock()
        self._log = FactLog()
        self._changed = threading.Condition()
        self._listeners: list[Listener] = []

    @property
    def log(self) -> FactLog:
        """All facts so far; a value that does not change any more."""
        with self._changed:
            return self._log

    @property
    def status(self) -> MigrationStatus:
        """QEMU's word for what the facts add up to."""
        return (derive_source if self._is_source else derive_destination)(self.log).status

    def post(self, fact: Fact, *, round_no: int = 0, text: str = "") -> None:
        """Adds a fact, unless it is there already."""
        with self._changed:
            before = self._log
            self._log = before.with_fact(fact, round_no=round_no, text=text, at_s=self._clock.wall_s(), by="endpoint")
            is_new = self._log is not before
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        if is_new:
            for listen in listeners:
                listen(fact)

    def listen(self, listener: Listener) -> None:
        """Calls `listener` for each fact from now on."""
        with self._changed:
            self._listeners.append(listener)

    def wait(self, *facts: Fact, timeout_s: float, round_no: int = 0) -> Fact | None:
        """The first of these facts that is in the log (of that round, if it has rounds), or None in time."""

        def found() -> Fact | None:
            return next((fact for fact in facts if self._is_there(fact, round_no)), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None, timeout_s)
            return found()

    def _is_there(self, fact: Fact, round_no: int) -> bool:
        return self._log.stamp(fact, round_no) is not None if round_no else fact in self._log
