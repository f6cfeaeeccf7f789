"""Leads one migration into a phase and holds it there, by messages and bytes that do not go on; then lets it go.

Rule 1: what holds is never the product: a proxy keeps a message, a relay keeps or brakes bytes, or the bandwidth of
        the migration is small. So the phase lasts until `go_on`, and the fault falls into it.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable
from typing import Any

from vmferry.chaos.cells import PHASES, Cell
from vmferry.chaos.ground import Ground
from vmferry.chaos.guest import GuestFiles
from vmferry.chaos.link import Rule
from vmferry.chaos.told import facts_of, now_s, status_at
from vmferry.core.facts import Fact
from vmferry.errors import VmferryError

REACH_S = 15.0
POLL_S = 0.003
SLOW = "max-bandwidth=1M"
FAST = "max-bandwidth=10G"
SLOW_PAGES = "max-postcopy-bandwidth=1M"
FAST_PAGES = "max-postcopy-bandwidth=10G"
PAGES_BYTES_PER_S = 600_000


class NotReached(Exception):
    """The migration did not come into the phase. The run does not count."""


class Stopped(Exception):
    """The campaign was told to end."""


class Stage:
    """One migration of one guest on one ground."""

    def __init__(self, ground: Ground, cell: Cell, guest: GuestFiles, stop: threading.Event) -> None:
        self.ground, self.cell, self.guest, self.stop = ground, cell, guest, stop
        self.job = uuid.uuid4().hex
        self.source, self.target = ground.logs["host-a"], ground.logs["host-b"]
        self._rules: list[Rule] = []
        self._begun_slow = False
        self._pages_slow = False
        self._done: set[str] = set()
        self.fault_rule: Rule | None = None
        """Where the fault is done to a message: it need not be held, it is the fault that marks the moment."""

    # --- waiting ---

    def wait(self, what: Callable[[], Any], timeout_s: float = REACH_S, why: str = "") -> Any:
        """Looks until it is true. Raises NotReached at the deadline, Stopped when all is to end."""
        end_s = now_s() + timeout_s
        while True:
            found = what()
            if found:
                return found
            if now_s() > end_s:
                raise NotReached(why or f"not within {timeout_s:g} s")
            if self.stop.wait(POLL_S):
                raise Stopped

    def fact(self, fact: Fact, timeout_s: float = REACH_S, *, log: Any = None, since_s: float = 0.0) -> float:
        """Waits for a fact of the source (or of `log`); its moment."""
        tail = log or self.source
        found = self.wait(
            lambda: tail.has(self.guest.name, fact, since_s=since_s), timeout_s, f"no fact {fact.value} was seen"
        )
        return float(found.at_s)

    def status(self, at_s: float = float("inf")) -> str:
        """The source's public status, by its facts up to the moment."""
        return status_at(self.source.read(), self.guest.name, before_s=at_s)

    def is_in_phase(self, at_s: float = float("inf")) -> bool:
        """Whether the facts up to the moment are those of the cell's phase."""
        facts = facts_of(self.source.read(), self.guest.name, before_s=at_s)
        match self.cell.phase:
            case "grant" if self.fault_rule is not None:
                return Fact.GRANT_SENT in facts and Fact.RUN_ACKED not in facts
            case "grant":
                there = facts_of(self.target.read(), self.guest.name, before_s=at_s)
                return Fact.GRANT_SENT in facts and Fact.RUN_ACKED not in facts and Fact.GRANTED not in there
            case "granted":
                there = facts_of(self.target.read(), self.guest.name, before_s=at_s)
                return Fact.GRANT_SENT in facts and Fact.RUN_ACKED not in facts and Fact.TARGET_RAN in there
            case phase:
                return self.status(at_s) == PHASES[phase]

    # --- the way there ---

    def begin(self, arguments: dict[str, Any]) -> None:
        """Asks for the migration; it goes on by itself."""
        self.ground.a.execute("vm-migrate", **arguments)

    def wish(self) -> dict[str, Any]:
        """What is asked for, so that the phase can be held."""
        settings: list[str] = []
        wish: dict[str, Any] = {"vm": self.guest.name, "destination": "host-b", "mode": self.cell.mode, "job": self.job}
        if self.cell.phase in ("active", "cancelling", "failing"):
            settings.append(SLOW)
            self._begun_slow = True
        if self.cell.mode == "postcopy":
            wish["postcopy_after_passes"] = 0
            if self._begun_slow:
                # Held before the switch, so the guest must not be stopped first; see `checks_memory`.
                wish["accept"] = ["tcg-loses-writes"]
                wish.pop("postcopy_after_passes")
                wish["postcopy_after_ms"] = 3_600_000
            if self.cell.phase in ("postcopy-active", "postcopy-paused", "granted", "grant"):
                settings.append(SLOW_PAGES)
                self._pages_slow = True
        wish["settings"] = settings
        return wish

    @property
    def checks_memory(self) -> bool:
        """Whether QEMU itself keeps this guest's memory whole on this way (core.hazards)."""
        return not (self.cell.mode == "postcopy" and self._begun_slow)

    def reach(self, begin: Callable[[dict[str, Any]], None]) -> None:
        """Begins, and returns when the phase is there and held. Raises NotReached."""
        streams = self.ground.streams
        match self.cell.phase:
            case "setup":
                rule = self._hold("peer-prepare", "answer")
                begin(self.wish())
                self.wait(rule.seen.is_set, why="no place was offered")
            case "active":
                self._slowly(begin)
            case "pre-switchover":
                self._to_barrier(begin)
            case "device" | "postcopy-device":
                barrier = self._to_barrier(begin)
                streams.hold()
                barrier.release()
                self.fact(Fact.CONTINUE)
                self.wait(lambda: self.status() == self.cell.phase, why=f"no {self.cell.phase}")
            case "grant":
                rule = self._hold("peer-grant", "request")
                self._brake_pages(begin)
                self.wait(rule.seen.is_set, why="no grant was sent")
            case "granted":
                if self.fault_rule is not None:  # a question that is asked when the order's answer was lost
                    self._brake_pages(begin)
                    self.wait(self.fault_rule.seen.is_set, why="nobody asked")
                    return
                rule = self._keep(Rule("peer-grant", "answer", "hold-all"))
                self._brake_pages(begin)
                self.wait(rule.seen.is_set, why="no grant was sent")
                self.fact(Fact.RUN_ACKED, log=self.target)
            case "postcopy-active":
                self._brake_pages(begin)
                self.fact(Fact.RUN_ACKED)
            case "postcopy-paused":
                self._brake_pages(begin)
                self.fact(Fact.RUN_ACKED)
                streams.cut(refusing=self.fault_rule is None)
                self.fact(Fact.LINK_LOST)
                if self.fault_rule is not None:
                    self.wait(self.fault_rule.seen.is_set, why="nobody reconnected")
            case "completed":
                begin(self.wish())
                self.wait(lambda: self.status() == "completed", why="it was not completed")
            case "cancelling":
                self._slowly(begin)
                self._hold_back()
                self.ground.a.execute("vm-cancel", vm=self.guest.name)
                self._wait_release()
            case "failing":
                self._slowly(begin)
                self._hold_back()
                streams.cut(refusing=False)
                self._wait_release()
            case phase:
                raise AssertionError(phase)

    def _hold(self, command: str, side: str) -> Rule:
        if self.fault_rule is not None and self.fault_rule.command == command:
            return self.fault_rule
        return self._keep(Rule(command, side, "hold"))

    def _keep(self, rule: Rule) -> Rule:
        self._rules.append(rule)
        return self.ground.link.add(rule)

    def _slowly(self, begin: Callable[[dict[str, Any]], None]) -> None:
        """Until memory moves, which it does for long (`wish`)."""
        begin(self.wish())
        self.fact(Fact.SETUP_DONE)
        self.wait(lambda: self.ground.streams.passed() > 100_000, why="no memory moves")

    def _hold_back(self) -> None:
        """The source's agent does not hear any more that its destination has given up: it has to ask for that."""
        rule = Rule("", "answer", "hold-all")
        self._rules.append(rule)
        self.ground.link.hold_back(rule)

    def _wait_release(self) -> None:
        self.wait(lambda: "B-release" in self.source.rows(self.guest.name), why="no release was asked for")

    def _to_barrier(self, begin: Callable[[dict[str, Any]], None]) -> Rule:
        """Up to the pause before the switchover."""
        rule = self._hold("peer-ready", "answer")
        begin(self.wish())
        self.wait(rule.seen.is_set, why="nobody made sure of the destination")
        return rule

    def _brake_pages(self, begin: Callable[[dict[str, Any]], None]) -> None:
        """In postcopy: once the device state is over the stream is slow, so that pages are missing for long."""
        begin(self.wish())
        if self.cell.mode == "postcopy":
            self.fact(Fact.LOADED, log=self.target)
            self.ground.streams.throttle(PAGES_BYTES_PER_S)

    # --- the way on ---

    def let_go(self) -> None:
        """Nothing of ours holds the migration any more; what the fault does is not touched."""
        for rule in self._rules:
            self.ground.link.let_back(rule)
        self.ground.streams.let_go()
        if self.cell.phase == "postcopy-paused":
            self.ground.streams.refuse(refusing=False)

    def hurry(self) -> None:
        """Takes the brakes out of the migration itself, as far as that is possible now: it may be over, or its agent
        dead, or in a phase in which no option may change. Again later is harmless."""
        if self.cell.phase in ("cancelling", "failing"):
            return
        vm = self.guest.name
        if self._begun_slow:
            self._try("vm-set", vm=vm, settings=[FAST])
            if self.cell.mode == "postcopy":
                self._try("vm-start-postcopy", vm=vm)
        if self._pages_slow:
            self._try("vm-set", vm=vm, settings=[FAST_PAGES])

    def _try(self, command: str, **arguments: Any) -> None:
        """Once with success is enough."""
        key = f"{command} {arguments}"
        if key in self._done:
            return
        with contextlib.suppress(VmferryError, OSError):
            self.ground.a.execute(command, **arguments)
            self._done.add(key)
