"""Leads one migration into a phase and holds it there, by messages and bytes that do not go on; then lets it go.

Rule 1: what holds is never the product: a proxy keeps a message, a relay keeps or brakes bytes, or the bandwidth of
        the migration is small. So the phase lasts until `go_on`, and the fault falls into it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Callable
from typing import Any

from vmferry.chaos.cells import ENDS, PHASES, Cell
from vmferry.chaos.ground import Ground
from vmferry.chaos.guest import GuestFiles
from vmferry.chaos.link import Rule
from vmferry.chaos.told import facts_of, now_s, status_at
from vmferry.core.facts import Fact, FactLog
from vmferry.errors import VmferryError
from vmferry.testing.hosts import AgentHost, process_state, processes_of

REACH_S = 15.0
POLL_S = 0.003
SLOW = "max-bandwidth=1M"
FAST = "max-bandwidth=10G"
SLOW_PAGES = "max-postcopy-bandwidth=1M"
FAST_PAGES = "max-postcopy-bandwidth=10G"
PAGES_BYTES_PER_S = 600_000
ASKED_S = 1.1
TURNED = ("cancelling", "cancelled", "failing", "failed")
PAGES_MISSING = ("grant", "starting", "started", "granted", "postcopy-active", "last", "postcopy-paused",
                 "postcopy-recover")  # fmt: skip
"""Phases in which a postcopy shall not be over by itself."""


class NotReached(Exception):
    """The migration did not come into the phase. The run does not count."""


class Stopped(Exception):
    """The campaign was told to end."""


def qemus(host: AgentHost, vm: str) -> list[int]:
    """The processes that have this guest on this host."""
    return [pid for pid, words in processes_of(host.runtime).items() if f"/{vm}-" in words]


class Stage:
    """One migration of one guest on one ground."""

    def __init__(self, ground: Ground, cell: Cell, guest: GuestFiles, stop: threading.Event) -> None:
        self.ground, self.cell, self.guest, self.stop = ground, cell, guest, stop
        self.job = uuid.uuid4().hex
        self.source, self.target = ground.logs["host-a"], ground.logs["host-b"]
        self._rules: list[Rule] = []
        self._stopped: list[int] = []
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
            case phase if PHASES[phase]:
                return self.status(at_s) == phase
            case phase:
                there = facts_of(self.target.read(), self.guest.name, before_s=at_s)
                return self._is_in_moment(phase, facts, there, at_s)

    def _is_in_moment(self, phase: str, here: FactLog, there: FactLog, at_s: float) -> bool:
        """The same for moments within a status, which take the facts of both sides."""
        is_sent = Fact.GRANT_SENT in here and Fact.RUN_ACKED not in here
        match phase:
            case "loaded":
                return Fact.LOADED in here and Fact.PEER_ACK not in here and Fact.GRANT_SENT not in here
            case "grant":
                return is_sent and Fact.GRANTED not in there
            case "starting":
                return is_sent and Fact.START_SENT in there and not self._has_run_there(at_s)
            case "started":
                return is_sent and Fact.TARGET_RAN not in there and self._has_run_there(at_s)
            case "granted":
                return is_sent and Fact.TARGET_RAN in there
            case "last":
                heard = Fact.ALL_SENT in here or Fact.TARGET_WHOLE in here
                return Fact.RUN_ACKED in here and Fact.ALL_SENT in there and not heard
            case _:
                raise AssertionError(phase)

    def _has_run_there(self, at_s: float) -> bool:
        """Whether the destination's QEMU has started the guest's CPUs by then, as its own events say."""
        assert self.ground.witness is not None
        lives = self.ground.witness.of_vm(self.guest.name)
        there = [life for life in lives if f"{self.ground.b.runtime}/" in life.words]
        return any(begin <= at_s for life in there for begin, _ in life.ran)

    # --- the way there ---

    def begin(self, arguments: dict[str, Any]) -> None:
        """Asks for the migration; it goes on by itself."""
        self.ground.a.execute("vm-migrate", **arguments)

    def wish(self) -> dict[str, Any]:
        """What is asked for, so that the phase can be held."""
        settings: list[str] = []
        wish: dict[str, Any] = {"vm": self.guest.name, "destination": "host-b", "mode": self.cell.mode, "job": self.job}
        if self.cell.phase in ("active", *TURNED):
            settings.append(SLOW)
            self._begun_slow = True
        if self.cell.mode == "postcopy":
            wish["postcopy_after_passes"] = 0
            if self._begun_slow:
                # Held before the switch, so the guest must not be stopped first; see `checks_memory`.
                wish["accept"] = ["tcg-loses-writes"]
                wish.pop("postcopy_after_passes")
                wish["postcopy_after_ms"] = 3_600_000
            if self.cell.phase in PAGES_MISSING:
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
                rule = self.fault_rule or self._hold("peer-prepare", "answer")
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
            case "loaded":
                barrier = self._to_barrier(begin)
                streams.hold_back()
                barrier.release()
                self.fact(Fact.LOADED)
            case "grant":
                self._to_grant(begin)
            case "starting":
                self._to_start(begin)
            case "started":
                qemu = self._to_start(begin)
                agent = self.ground.b.process
                assert agent is not None
                self._stop(agent.pid)
                self._let_run(qemu)
                self.wait(lambda: self._has_run_there(now_s()), why="the guest was not started")
            case "granted":
                if self.fault_rule is not None:  # a question that is asked when the order's answer was lost
                    self._brake_pages(begin)
                    self.wait(self.fault_rule.seen.is_set, why="nobody asked")
                    return
                rule = self._keep(Rule("peer-grant", "answer", "hold-all"))
                self._brake_pages(begin)
                self.wait(rule.seen.is_set, why="no grant was sent")
                self.fact(Fact.RUN_ACKED, log=self.target)
            case "postcopy-active" | "last" | "postcopy-paused" | "postcopy-recover":
                self._brake_pages(begin)
                self.fact(Fact.RUN_ACKED)
                self._among_pages()
            case "completed":
                begin(self.wish())
                self._until_status()
            case "cancelling" | "cancelled":
                self._turn(begin, lambda: self.ground.a.execute("vm-cancel", vm=self.guest.name))
            case "failing" | "failed":
                self._turn(begin, lambda: streams.cut(refusing=False))
            case phase:
                raise AssertionError(phase)

    def _among_pages(self) -> None:
        """From a guest that runs on the destination and lacks pages to the phase."""
        streams = self.ground.streams
        match self.cell.phase:
            case "last":
                self._hold_back()
                streams.hold_back()
                streams.throttle(None)
                self._try("vm-set", vm=self.guest.name, settings=[FAST_PAGES])
                self.fact(Fact.ALL_SENT, log=self.target)
            case "postcopy-paused":
                streams.cut(refusing=self.fault_rule is None)
                self.fact(Fact.LINK_LOST)
                if self.fault_rule is not None:
                    self.wait(self.fault_rule.seen.is_set, why="nobody reconnected")
            case "postcopy-recover":
                streams.hold_back_new()
                streams.cut(refusing=False)
                self._until_status()

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

    def _turn(self, begin: Callable[[dict[str, Any]], None], what: Callable[[], Any]) -> None:
        """The guest goes back: held while its agent does not hear that the destination gave up, or to the end."""
        self._slowly(begin)
        if self.cell.phase in ENDS:
            what()
            self._until_status()
            return
        self._hold_back()
        what()
        self.wait(lambda: "B-release" in self.source.rows(self.guest.name), why="no release was asked for")

    def _until_status(self) -> None:
        self.wait(lambda: self.status() == self.cell.phase, why=f"no {self.cell.phase}")

    def _hold_back(self) -> None:
        """The source's agent does not hear any more that its destination has given up: it has to ask for that."""
        rule = Rule("", "answer", "hold-all")
        self._rules.append(rule)
        self.ground.link.hold_back(rule)

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

    def _to_grant(self, begin: Callable[[dict[str, Any]], None]) -> Rule:
        """Until the order to start is on its way."""
        rule = self._hold("peer-grant", "request")
        self._brake_pages(begin)
        self.wait(rule.seen.is_set, why="no grant was sent")
        return rule

    def _to_start(self, begin: Callable[[dict[str, Any]], None]) -> int:
        """Until the order has been written to a QEMU that does nothing; its process."""
        rule = self._to_grant(begin)
        # A QEMU that its agent asks anything when the order comes is found to hang, and `cont` is not written to it. It
        # is asked once a second while it waits: this is just after that.
        asked_s = self.fact(Fact.LOADED, log=self.target) + ASKED_S
        self.wait(lambda: now_s() >= asked_s)
        mine = qemus(self.ground.b, self.guest.name)
        if len(mine) != 1:
            raise NotReached(f"{len(mine)} QEMUs are there")
        self._stop(mine[0])
        rule.release()
        self.fact(Fact.START_SENT, 3.0, log=self.target)
        return mine[0]

    def _stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self._stopped.append(pid)
        self.wait(lambda: process_state(pid) == "T", why=f"process {pid} is not stopped")

    def _let_run(self, pid: int) -> None:
        self._stopped.remove(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    # --- the way on ---

    def let_go(self) -> None:
        """Nothing of ours holds the migration any more; what the fault does is not touched."""
        for rule in self._rules:
            self.ground.link.let_back(rule)
        self.ground.streams.let_go()
        for pid in list(self._stopped):
            self._let_run(pid)
        if self.cell.phase == "postcopy-paused":
            self.ground.streams.refuse(refusing=False)

    def hurry(self) -> None:
        """Takes the brakes out of the migration itself, as far as that is possible now: it may be over, or its agent
        dead, or in a phase in which no option may change. Again later is harmless."""
        if self.cell.phase in TURNED:
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
