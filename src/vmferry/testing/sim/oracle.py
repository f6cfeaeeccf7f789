"""What must hold in every run, seen from outside of the agents: by what the fake QEMUs themselves do.

Theory of operation
-------------------
The guest has a *version*: it changes whenever CPUs of one of its processes start, because from then on every other
copy is old. A process holds a copy of some version, and in postcopy *needs* another process for the pages that are
not there yet. The guest is recoverable while some living process holds the newest version and needs nobody that is
dead.

Rule 1: at no instant two processes run the guest; nobody starts an old copy.
Rule 2: no agent ends a process whose end makes the guest unrecoverable. (A fault may: that is a fault's work.)
Rule 3: what an agent tells people as the end of a job is so at that moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vmferry.core.migration_status import MigrationStatus
from vmferry.core.transitions import DESTINATION_EDGES, SOURCE_EDGES
from vmferry.testing.sim.kernel import SimProcess
from vmferry.testing.sim.qemu import SimQemu
from vmferry.testing.sim.trace import Trace

_ARRIVED = frozenset({MigrationStatus.COMPLETED, MigrationStatus.COLO})


@dataclass(eq=False)
class Copy:
    """What a process holds of the guest."""

    qemu: SimQemu
    version: int = 0
    """0: nothing."""
    needs: Copy | None = None
    """The process with the pages that are missing here."""
    ever_ran: bool = False
    killed_by_fault: bool = False

    @property
    def is_alive(self) -> bool:
        """The process lives."""
        return not self.qemu.process.is_dead

    @property
    def is_running(self) -> bool:
        """CPUs run at this instant."""
        return self.is_alive and not self.qemu.process.is_frozen and self.qemu.state.is_running


@dataclass(eq=False)
class Oracle:
    """Everything that was seen of one guest."""

    trace: Trace
    copies: dict[int, Copy] = field(default_factory=dict)
    """By process id."""
    version: int = 0
    ended_jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `JOB_ENDED` said of each."""
    _statuses: dict[tuple[int, str, str], MigrationStatus] = field(default_factory=dict)
    _by_agent: int | None = None

    # --- the fakes ---

    def born(self, qemu: SimQemu) -> None:
        """A new process."""
        copy = Copy(qemu)
        self.copies[qemu.process.pid] = copy
        qemu.process.on_death.append(lambda: self._died(copy))

    def told(self, qemu: SimQemu, message: dict[str, Any]) -> None:
        """What a fake tells its director."""
        copy = self.copies[qemu.process.pid]
        if "running" in message:
            if message["running"] and not qemu.process.is_dead:
                self._started(copy)
        elif message.get("step") == "in-loaded":
            self._loaded(copy, is_whole=message.get("word") == "active")
        elif message.get("step") == "in-pages":
            copy.needs = None
        if "step" in message:
            self.trace.tell(qemu.host, f"QEMU {qemu.process.pid} step {message['step']}")

    def thawed(self) -> None:
        """A process goes on: what it was doing it does again."""
        self._only_one()

    def _started(self, copy: Copy) -> None:
        self._only_one()
        if copy.version != self.version:
            self.trace.violate(f"an old copy was started on {copy.qemu.host}: version {copy.version} of {self.version}")
        if not copy.ever_ran:
            self._disks_are_its_own(copy)
        self.version += 1
        copy.version, copy.ever_ran = self.version, True

    def _disks_are_its_own(self, copy: Copy) -> None:
        """At its first start nobody but the guest writes to its disks, and every mirror to them had ended well."""
        if copy.qemu.commands.block.exports:
            self.trace.violate(f"the guest was started on {copy.qemu.host} with its disks open to the network")
        for other in self.copies.values():
            jobs = other.qemu.commands.block.jobs.values() if other is not copy and other.is_alive else ()
            if any(job.status != "concluded" or job.error for job in jobs):
                self.trace.violate(f"the guest was started on {copy.qemu.host} before its disks were equal")

    def _only_one(self) -> None:
        running = [c for c in self.copies.values() if c.is_running]
        if len(running) > 1:
            where = " and ".join(str(c.qemu.process) for c in running)
            self.trace.violate(f"the guest runs twice: {where}")

    def _loaded(self, copy: Copy, *, is_whole: bool) -> None:
        sources = [c for c in self.copies.values() if c is not copy and c.is_alive and c.version == self.version]
        copy.version = self.version
        copy.needs = None if is_whole or not sources else sources[0]

    def is_recoverable(self, *, without: Copy | None = None) -> bool:
        """Somebody can still run the newest version of the guest."""
        return any(
            c.is_alive
            and c is not without
            and c.version == self.version
            and (c.needs is None or (c.needs.is_alive and c.needs is not without))
            for c in self.copies.values()
        )

    def ends(self, process: SimProcess) -> None:
        """An agent is about to end this process."""
        copy = self.copies.get(process.pid)
        if copy is None or process.is_dead:
            return
        self._by_agent = process.pid
        copy_was_needed = self.version > 0 and self._alive_before(copy) and not self.is_recoverable(without=copy)
        if copy_was_needed:
            self.trace.violate(f"an agent ends the last complete copy of the guest: {process}")

    def _alive_before(self, copy: Copy) -> bool:
        return self.is_recoverable()

    def _died(self, copy: Copy) -> None:
        process = copy.qemu.process
        if process.status == 0 and self._by_agent != process.pid:  # it was asked to quit: only an agent does that
            whole_before = any(
                c.version == self.version and (c.needs is None or c.needs.is_alive or c.needs is copy)
                for c in self.copies.values()
                if c.is_alive or c is copy
            )
            if whole_before and not self.is_recoverable():
                self.trace.violate(f"an agent ended the last complete copy of the guest: {process}")

    # --- the agents' words ---

    def published(self, agent: SimProcess, name: str, data: dict[str, Any]) -> None:
        """An event that an agent sends to people."""
        if name == "MIGRATION":
            self._status(agent, data)
        elif name == "JOB_ENDED":
            self._ended(agent.host, data)
        elif name == "TARGET" and data.get("ran"):
            self._taken_over(agent.host)

    def _taken_over(self, host: str) -> None:
        """A guest that its owner had paused is the host's own now, without a start that anybody could see."""
        if any(c.is_alive and c.qemu.state.is_running for c in self.copies.values()):
            return
        for copy in self.copies.values():
            if copy.qemu.host == host and copy.is_alive and copy.version == self.version and not copy.ever_ran:
                self.version += 1
                copy.version, copy.ever_ran = self.version, True

    def _status(self, agent: SimProcess, data: dict[str, Any]) -> None:
        role = str(data.get("role", "source"))
        key = (agent.pid, str(data["job"]), role)
        new = MigrationStatus(data["status"])
        edges = SOURCE_EDGES if role == "source" else DESTINATION_EDGES
        # A restarted agent tells first how far its predecessor had got: there is no edge to that.
        old = self._statuses.get(key)
        if old is not None and new not in edges[old]:
            self.trace.violate(f"{role} status went from {old} to {new}")
        self._statuses[key] = new

    def _ended(self, host: str, wire: dict[str, Any]) -> None:
        job, outcome = str(wire["job"]), str(wire["outcome"])
        self.ended_jobs[job] = wire
        place = {"source": wire["source"], "destination": wire["destination"]}.get(outcome)
        if place is not None and not self._is_there(str(place)):
            self.trace.violate(f"job {job} ended with the guest at {place}, which is not so")
        if (outcome == "destination") is not (wire["status"] in _ARRIVED) and outcome != "lost":
            self.trace.violate(f"job {job} ended as {wire['status']} with the guest at its {outcome}")
        if outcome == "lost" and any(c.is_running for c in self.copies.values()):
            self.trace.violate(f"job {job} ended as lost while the guest runs")

    def _is_there(self, host: str) -> bool:
        """The newest version is there, or was there until a fault ended it."""
        return any(c.qemu.host == host and c.version == self.version for c in self.copies.values())
