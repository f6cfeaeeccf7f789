"""The agent of one host: it introduces the rooms to each other and keeps the VMs of this host.

Theory of operation
-------------------
One event loop. The agent owns the journal, the VMs, the links to its peers and the attempts; each attempt has a
task that runs its loop. Commands come in over two QMP servers: the control socket (people, scripts) and the
listener for other agents (TLS); `control` and `peer_commands` have their handlers.

A start reads the journal once (`restore`): VMs are attached again, unfinished attempts are made anew with the
facts that the journal proves, and then the ordinary loop goes on.

Rule 1: the QEMUs are not the agent's children in any sense that matters: closing the agent leaves them alone.
Rule 2: one attempt per VM and role at a time; `attempts` and `places` are the only registers of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmferry import __version__, limits
from vmferry.agent import control, destination_act, peer_commands, rescue_commands, source_act, standing
from vmferry.agent.blockers import Blockers
from vmferry.agent.chores import Chores
from vmferry.agent.claims import Claims
from vmferry.agent.config import AgentConfig
from vmferry.agent.destination import DestinationAttempt
from vmferry.agent.directories import make_directory, remove_directory
from vmferry.agent.host import Host, Listening, LocalHost
from vmferry.agent.images import Stamp
from vmferry.agent.job_book import JobBook
from vmferry.agent.left_images import LeftImages
from vmferry.agent.machine import Machine
from vmferry.agent.monitor import Monitors
from vmferry.agent.peers import Peers, tune
from vmferry.agent.plan import Plan, Planner
from vmferry.agent.restore import restore
from vmferry.agent.restores import Restores
from vmferry.agent.saves import Saves
from vmferry.agent.snapshot_names import SnapshotNames
from vmferry.agent.snapshot_store import SnapshotStore
from vmferry.agent.source import SourceAttempt, run_attempt
from vmferry.agent.vms import KeptVm, VmDefinition
from vmferry.agent.wants import PlacedDisk
from vmferry.clock import Clock, SystemClock
from vmferry.core.effects import DestinationEffect, Effect
from vmferry.core.job import INCOMING, MIGRATE
from vmferry.core.table import Outcome
from vmferry.errors import NotTrusted
from vmferry.jobs import journal as journals
from vmferry.jobs.journal import Entry, JournalStore
from vmferry.pki import tls
from vmferry.qmp.codec import Event
from vmferry.qmp.server import QmpServer
from vmferry.vm import spawn as vm_spawn
from vmferry.vm.runtime import RuntimePaths

log = logging.getLogger("vmferry.agent")

VERSION = {"vmferry": __version__, "qemu": {"major": 0, "minor": 0, "micro": 0}, "package": f"vmferry {__version__}"}
"""The greeting's version member. QMP clients read `qemu`; an agent is no QEMU, so its numbers are 0."""

PROMPT_FOR_PEOPLE = frozenset({"MIGRATION", "JOB_ENDED", "RESTORE"})
PROMPT_FOR_AGENTS = frozenset({"TARGET", "JOB_ENDED"})
"""Events that somebody waits for; all others are news, which may leave a moment later and together."""
RELAYED = frozenset({"MIGRATION", "JOB_CHANGE", "JOB_PROGRESS", "JOB_ENDED", "RESCUE", "RESTORE"})
"""Events of other agents that people here may want to see."""
FOR_AGENTS = RELAYED | {"TARGET"}
"""All that another agent hears of this one; the rest is for who asks here."""


class Agent:
    """A running agent. Made by `start`, ended by `close`."""

    def __init__(self, config: AgentConfig, *, clock: Clock | None = None, host: Host | None = None) -> None:
        self.config = config
        self.clock: Clock = clock or SystemClock()
        self.host: Host = host or LocalHost()
        self.journal: JournalStore = self.host.open_journal(config.journal_path)
        self.job_directory = config.runtime_dir / "jobs"
        self.vm_directory = config.runtime_dir / "vms"
        for directory in (config.runtime_dir, self.job_directory, self.vm_directory):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.vms: dict[str, KeptVm] = {}
        self.attempts: dict[str, SourceAttempt] = {}
        """By VM; the newest, also after it ended, until the VM's next one."""
        self.places: dict[str, DestinationAttempt] = {}
        """By job."""
        self.claims = Claims()
        """Names that a command is about to use."""
        self.known_jobs: dict[str, dict[str, Any]] = {}
        """Destination jobs that the journal knows to be over: the last `facts_wire`."""
        self.results: dict[str, dict[str, Any]] = {}
        """The newest ended source jobs, by id, and those that wait to be dismissed: what `status` shows."""
        self._outcomes: dict[str, str] = {}
        """How older ones ended: a place that was not released may ask for it as long as it is there."""
        context = None if self._is_clear else tls.client_context(self._pki)
        self.peers = Peers(
            config.peers, context, clock=self.clock, on_event=self.on_peer_event, connect=self.host.connect
        )
        self.control_server = QmpServer(
            self._on_control, version=VERSION, clock=self.clock, name="control", prompt=PROMPT_FOR_PEOPLE
        )
        self.peer_server = QmpServer(
            self._on_peer, version=VERSION, clock=self.clock, name="peer", prompt=PROMPT_FOR_AGENTS
        )
        self.planner = Planner(self)
        self.monitors = Monitors(self)
        self.jobs = JobBook(self)
        self.blockers = Blockers(self)
        self.snapshot_store = SnapshotStore(config)
        self.left_images = LeftImages(self)
        self.restores = Restores(self)
        self.saves = Saves(self)
        self.chores = Chores(self)
        self.snapshot_names = SnapshotNames(self)
        self.source_hands: Callable[[SourceAttempt, Effect], Awaitable[None]] = source_act.act
        self.destination_hands: Callable[[DestinationAttempt, DestinationEffect], Awaitable[None]] = destination_act.act
        self._is_restored = asyncio.Event()
        self._listener: Listening | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._places_by_vm: dict[str, str] = {}

    @property
    def _is_clear(self) -> bool:
        return self.config.clear_text or (self.config.listen is None and not self.config.peers)

    @property
    def _pki(self) -> Path:
        if self.config.pki_dir is None:
            raise NotTrusted(
                f"the agent {self.config.name} has no certificates",
                side="client",
                hint="make them with 'vmferry pki' and say --pki DIR, or ask for clear text by name: --clear-text",
            )
        return self.config.pki_dir

    # --- start and end ---

    async def start(self) -> None:
        """Restores what the journal says, then listens. Raises Unfit, Busy or NotTrusted; nothing is changed."""
        await self.host.listen_for_people(self.control_server, self.config.control_socket)
        try:
            await restore(self)
            self._is_restored.set()
            if self.config.listen is not None:
                context = None if self._is_clear else tls.server_context(self._pki)
                self._listener = await self.host.listen_for_agents(
                    self._on_connection, self.config.listen.host, self.config.listen.port, context
                )
        except BaseException:
            await self.control_server.close()
            raise
        self.planner.warm_up()
        self.restores.warm_up()
        log.info("agent=%s result=ready socket=%s", self.config.name, self.config.control_socket)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tune(writer.get_extra_info("socket"))
        await self.peer_server.serve(reader, writer)

    async def close(self) -> None:
        """Ends every session and task. VMs and their QEMUs are left as they are."""
        if self._listener is not None:
            self._listener.close()
        await self.control_server.close()
        await self.peer_server.close()
        await self.monitors.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.restores.close()
        await self.peers.close()
        for kept in self.vms.values():
            if kept.machine is not None:
                await kept.machine.close()
        for place in self.places.values():
            if place.machine is not None and not place.ended.is_set():
                await place.machine.close()
            if place.listener is not None:
                await place.listener.close()
            await standing.close(place)
        holders: list[SourceAttempt | DestinationAttempt] = [*self.attempts.values(), *self.places.values()]
        for holder in holders:
            for channel in holder.channels:
                channel.close()  # QEMU has its own descriptor of what was handed to it
        for attempt in self.attempts.values():
            attempt.forget_memory()
        self.snapshot_store.close()
        self.journal.close()

    # --- what attempts use (Context) ---

    def utc_now(self) -> datetime:
        return datetime.fromtimestamp(self.clock.wall_s(), UTC)

    def publish(self, name: str, data: dict[str, Any]) -> None:
        told = {"host": self.config.name, **data}
        self.control_server.broadcast(name, told)
        if name in FOR_AGENTS:
            self.peer_server.broadcast(name, told)
        self.monitors.tell(name, told)

    def clock_offset_s(self, host: str) -> float:
        link = self.peers.link(host)
        offset_s, trip_s = link.clock_offset_s or 0.0, link.round_trip_s or 0.0
        # Half a round trip is how wrong the measurement may be: a smaller offset cannot be told from none.
        return offset_s if abs(offset_s) > trip_s / 2 else 0.0

    async def make_plan(self, attempt: SourceAttempt) -> Plan:
        return await self.planner.plan(attempt.wanted, attempt.kept, running_job=True)

    async def remember_memory(self, attempt: SourceAttempt) -> None:
        await rescue_commands.remember(attempt)

    def converge(self, attempt: SourceAttempt, info: dict[str, Any]) -> None:
        self.planner.converge(attempt, info)

    async def keep_left_images(self, attempt: SourceAttempt) -> None:
        await self.left_images.keep(attempt)

    async def keep_tried_image(self, attempt: DestinationAttempt, disk: PlacedDisk, stamp: Stamp) -> bool:
        return await self.left_images.keep_tried(attempt, disk, stamp)

    def is_left_image(self, path: str, job: str) -> bool:
        return self.left_images.is_whole(path, job)

    async def make_room_for_image(self, path: str, vm: str) -> None:
        await self.left_images.make_room(path, vm)

    async def renew_left_image(self, path: str, stamp: Stamp | None) -> None:
        await self.left_images.renew(path, stamp)

    def keep_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def tail_log(self, runtime: RuntimePaths) -> str:
        return vm_spawn.tail_log(runtime.log_path)

    def attempt_ended(self, attempt: SourceAttempt) -> None:
        wire = attempt.wire()
        self.results[attempt.job] = wire
        self.planner.forget(attempt.job)
        attempt.forget_memory()
        kept = attempt.kept
        if kept.is_leaving or (kept.machine is not None and kept.machine.is_gone):
            if self.vms.get(attempt.vm) is kept:  # never another VM that has the name since
                del self.vms[attempt.vm]
                self.monitors.changed()
                self.blockers.forget(attempt.vm)
            if kept.machine is not None:
                self.keep_task(asyncio.create_task(kept.machine.close(), name=f"close-{attempt.vm}"))
            if kept.directory:
                remove_directory(Path(kept.directory), keep_logs=True)
        else:
            self.hold(kept)
        self.publish("JOB_ENDED", wire)
        self.jobs.ended(
            MIGRATE.name, attempt.job, wire, auto_dismiss=attempt.wanted.auto_dismiss,
            auto_finalize=attempt.wanted.auto_finalize,
        )  # fmt: skip
        self._outcomes |= {job: str(old["outcome"]) for job, old in self.jobs.forget_old(self.results).items()}
        for job in list(self._outcomes)[: -limits.JOBS_PROVEN_MAX]:
            del self._outcomes[job]

    def outcome_of(self, job: str) -> str | None:
        """How a migration away from here ended, as far as that is remembered."""
        result = self.results.get(job)
        return self._outcomes.get(job) if result is None else str(result["outcome"])

    async def adopt_arrived(self, attempt: DestinationAttempt) -> None:
        machine = attempt.machine
        assert machine is not None
        kept = KeptVm(
            definition=VmDefinition.from_wire(attempt.place.definition),
            generation=attempt.place.generation,
            identity=machine.identity,
            qmp_path=machine.qmp_path,
            directory=attempt.place.directory,
            machine=machine,
        )
        self.vms[attempt.vm] = kept  # at once: the source tells people now that it is here
        await self.left_images.forget(disk.path for disk in attempt.place.disks)
        await self.blockers.take_along(attempt.vm, attempt.place.blockers)
        await self.journal.append(Entry.KEPT, attempt.vm, kept.to_journal())

    async def tend_door(self, attempt: DestinationAttempt) -> None:
        await standing.tend(attempt)

    async def place_ended(self, attempt: DestinationAttempt, outcome: Outcome) -> None:
        self.known_jobs[attempt.job] = attempt.facts_wire()
        self._forget_old_places()
        self.publish("TARGET", attempt.facts_wire())
        self.jobs.ended(
            INCOMING.name, attempt.job, attempt.result_wire(outcome), auto_dismiss=attempt.place.auto_dismiss,
            auto_finalize=True,
        )  # fmt: skip
        if outcome is Outcome.DESTINATION:
            self.hold(self.vms[attempt.vm])
            return
        if attempt.machine is not None:
            await attempt.machine.close()
        remove_directory(Path(attempt.place.directory), keep_logs=False)

    def _forget_old_places(self) -> None:
        """Of the oldest that are over their last facts are kept, and of older ones nothing. Of a guest that is here the
        place stays that it came to."""
        here = {kept.directory for kept in self.vms.values()}
        over = [job for job, each in self.places.items() if job in self.known_jobs and each.place.directory not in here]
        for job in over[: -journals.KEEP_ENDED_JOBS]:
            del self.places[job]
        for job in list(self.known_jobs)[: -limits.PLACES_PROVEN_MAX]:
            del self.known_jobs[job]

    # --- VMs ---

    def hold(self, kept: KeptVm) -> None:
        """This VM has no attempt: its events and its end are the agent's to hear."""
        self.monitors.changed()
        if kept.machine is None:
            return
        kept.machine.on_event = None
        kept.machine.on_gone = lambda: self.vm_gone(kept)

    def vm_gone(self, kept: KeptVm) -> None:
        """The QEMU of a VM that is kept here has ended."""
        log.warning("vm=%s pid=%d result=gone", kept.name, kept.identity.pid)
        self.monitors.changed()
        self.publish("VM_GONE", {"vm": kept.name, "text": vm_spawn.tail_log(f"{kept.directory}/qemu.log")})

    def run_attempt(self, attempt: SourceAttempt) -> None:
        """Registers the attempt and runs its loop."""
        self.attempts[attempt.vm] = attempt
        self.keep_task(asyncio.create_task(run_attempt(attempt), name=f"source-{attempt.job}"))

    def run_place(self, place: DestinationAttempt) -> None:
        """Registers the place and runs its loop."""
        self.places[place.job] = place
        self._places_by_vm[place.vm] = place.job
        self.keep_task(asyncio.create_task(place.run(), name=f"destination-{place.job}"))

    def place_of(self, vm: str) -> DestinationAttempt | None:
        """The newest place made here for the VM, or None."""
        job = self._places_by_vm.get(vm)
        return self.places.get(job) if job else None

    async def launch(self, name: str, argv: list[str], runtime: RuntimePaths) -> Machine:
        """A new QEMU. Raises SpecError with QEMU's words; nothing is left then."""
        make_directory(runtime.directory)
        try:
            return await self.host.launch(name, argv, runtime, clock=self.clock)
        except BaseException:
            remove_directory(Path(runtime.directory), keep_logs=False)
            raise

    # --- commands and events ---

    async def _on_control(self, session: Any, command: Any) -> Any:
        return await self.to_the_end(control.handle(self, command.name, command.arguments), command.name)

    async def _on_peer(self, session: Any, command: Any) -> Any:
        body = peer_commands.handle(self, session, command.name, command.arguments)
        return await self.to_the_end(body, command.name)

    async def to_the_end(self, body: Coroutine[Any, Any, Any], name: str) -> Any:
        """A command that was begun is carried out although its client goes away in the middle."""
        task = asyncio.create_task(self._once_restored(body), name=f"command-{name}")
        self.keep_task(task)
        return await asyncio.shield(task)

    async def _once_restored(self, body: Coroutine[Any, Any, Any]) -> Any:
        """Nobody acts on half of what the journal says.

        1. an agent begins anew, knows one VM again and waits for another's QEMU  2. a command migrates the first
        3. the journal's unfinished job of that VM is taken up behind its back
        """
        try:
            await self._is_restored.wait()
        except asyncio.CancelledError:
            body.close()
            raise
        return await body

    def on_peer_event(self, host: str, event: Event) -> None:
        """Another agent pushed something: facts for an attempt, or news for people here."""
        if event.name == "TARGET":
            attempt = self.attempts.get(str(event.data.get("vm")))
            if (
                attempt is not None
                and attempt.job == event.data.get("job")
                and attempt.wanted.destination == host
                and not attempt.ended.is_set()
            ):
                attempt.hear_target(dict(event.data))
        elif event.name in RELAYED:
            self.control_server.broadcast(event.name, {**event.data, "host": host})
