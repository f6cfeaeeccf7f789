"""A socket per VM that behaves as the QMP monitor of its QEMU, for scripts and tools that were written for QEMU.

Theory of operation
-------------------
`core.monitor_fates` says what becomes of a command: most go to QEMU, over the agent's own session, and come back as
they are, errors too; those that would move the guest are vmferry's, and what would change it on its way waits until it
is over. Events are QEMU's own, with their times, but for `MIGRATION`: while vmferry moves the guest its status is
vmferry's.

    client -> monitor socket -> [passed on]  -> QEMU
                             -> [ours]       -> the agent's commands (`control`)
                             -> [held, never] -> an error in words

Rule 1: at most one command of all clients of a VM is on its way to QEMU at a time. QEMU carries the commands of one
        session out one by one, so what the agent itself has to say waits behind one client's command at most, and for
        as long as that takes: a snapshot of a minute holds it up for a minute. Only what is said out of band does not.
Rule 2: a monitor lives as long as its host keeps the VM. A place where a guest is awaited has none: all that could be
        said to it is vmferry's to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.agent import control, mirror_jobs
from vmferry.agent.source import SourceAttempt
from vmferry.agent.vms import KeptVm
from vmferry.core import monitor as core_monitor
from vmferry.core import monitor_fates
from vmferry.core.monitor import Setup
from vmferry.core.monitor_fates import Fate
from vmferry.core.option_table import Kind
from vmferry.core.options import Mode
from vmferry.core.restore import RestoreFact
from vmferry.errors import Busy, UsageError, VmferryError
from vmferry.qmp.codec import Command, Event
from vmferry.qmp.errors import QmpCommandError
from vmferry.qmp.server import QmpServer, Session, Verbatim

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")


class Monitors:
    """The monitor sockets of the VMs that this host keeps."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._directory = agent.config.runtime_dir / "monitors"
        self._open: dict[str, Monitor] = {}
        self._turn = asyncio.Lock()

    def path_of(self, vm: str) -> Path:
        """Where the VM's monitor listens, or will."""
        return self._directory / f"{vm}.sock"

    def changed(self) -> None:
        """The VMs that this host keeps, or those of them that live, are others than before."""
        self._agent.keep_task(asyncio.create_task(self.settle(), name="monitors"))

    async def settle(self) -> None:
        """Returns when each VM that is kept has its monitor, and no other has one."""
        async with self._turn:
            kept = {n: vm for n, vm in self._agent.vms.items() if vm.machine is not None and not vm.machine.is_gone}
            for name, monitor in list(self._open.items()):
                if kept.get(name) is not monitor.kept:
                    del self._open[name]
                    await monitor.close()
            for name, vm in kept.items():
                if name not in self._open:
                    await self._begin(name, vm)

    async def _begin(self, name: str, vm: KeptVm) -> None:
        monitor = Monitor(self._agent, vm)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            await monitor.listen(self.path_of(name))
        except (VmferryError, OSError) as error:
            # The VM is none the worse for it, and is moved as well without.
            log.warning("vm=%s monitor=%s result=%s", name, self.path_of(name), error)
            await monitor.close()
            return
        self._open[name] = monitor

    def tell(self, name: str, data: Mapping[str, Any]) -> None:
        """An event of vmferry's, for the clients of the VM that it is about."""
        monitor = self._open.get(str(data.get("vm")))
        if monitor is not None:
            monitor.tell(name, data)

    async def close(self) -> None:
        """Ends every session."""
        async with self._turn:
            for monitor in self._open.values():
                await monitor.close()
            self._open.clear()


class Monitor:
    """One VM's monitor."""

    def __init__(self, agent: Agent, kept: KeptVm) -> None:
        self.kept = kept
        self._agent = agent
        self._machine = kept.require_machine()
        self._setup = Setup()
        self._turn = asyncio.Lock()
        greeting = None if self._machine.client is None else self._machine.client.greeting
        version: Mapping[str, Any] = {} if greeting is None else greeting.version
        self._server = QmpServer(self._answer, version=version, clock=agent.clock, name=f"monitor-{kept.name}")

    async def listen(self, path: Path) -> None:
        """Begins. Raises Busy or Unfit."""
        await self._agent.host.listen_for_people(self._server, path)
        self._machine.listeners.add(self._on_event)

    async def close(self) -> None:
        """Ends every session."""
        self._machine.listeners.discard(self._on_event)
        await self._server.close()

    # --- events ---

    def _attempt(self) -> SourceAttempt | None:
        """The migration that is on its way, or None."""
        attempt = self._agent.attempts.get(self.kept.name)
        return None if attempt is None or attempt.ended.is_set() else attempt

    @property
    def _is_saved(self) -> bool:
        """Whether a save of it is at work: QEMU's migration is that one's."""
        return self._agent.saves.active(self.kept.name) is not None

    @property
    def _is_about_to_run(self) -> bool:
        """Whether a restore decides yet when the guest runs for the first time."""
        back = self._agent.restores.active(self.kept.name)
        return back is not None and RestoreFact.RAN not in back.log

    def _is_a_mirrors(self, job: Any) -> bool:
        """Whether this is QEMU's own name of a job that has another one here: a mirror's of the migration, or of a
        save."""
        attempt, save = self._attempt(), self._agent.saves.active(self.kept.name)
        if save is not None and any(job == each.job for each in save.wanted.copies):
            return True
        return attempt is not None and any(job in mirror_jobs.qemu_jobs(mirror) for mirror in attempt.mirrors)

    def _on_event(self, event: Event) -> None:
        if event.name == "JOB_STATUS_CHANGE" and self._is_a_mirrors(event.data.get("id")):
            return  # told under its own name (`mirror_jobs.tell`)
        if event.name != "MIGRATION" or (self._attempt() is None and not self._is_saved):
            self._server.broadcast(event.name, event.data, timestamp_us=event.timestamp_us)

    def tell(self, name: str, data: Mapping[str, Any]) -> None:
        """What vmferry has to say in QEMU's words."""
        members = _TOLD.get(name)
        if members is not None and data.get("role") != "destination":  # what comes to a host is told at the other one
            self._server.broadcast(name, {member: data[member] for member in members})

    # --- commands ---

    async def _answer(self, session: Session, command: Command) -> Any:
        fate, why = monitor_fates.fate(command.name, command.arguments)
        match fate:
            case Fate.OURS if command.name.startswith("job-"):
                return await self.job(command)
            case Fate.OURS:
                return await _OURS[command.name](self, dict(command.arguments))
            case Fate.NEVER:
                raise UsageError(f"{command.name}: {why}")
            case Fate.HELD:
                return await self._pass_unless_held(command)
            case Fate.PASSED:
                return await self._pass(command)

    async def _pass_unless_held(self, command: Command) -> Any:
        self._require_settled(command)
        return await self._pass(command, is_asked_again=True)

    def _require_settled(self, command: Command) -> None:
        """Raises Busy, with a reason, while the guest is not this command's to change, and Blocked while a person holds
        a blocker against what it would do; nothing was done."""
        attempt = self._attempt()
        if attempt is not None:
            raise self._busy(command, attempt)
        if self._is_about_to_run:
            raise Busy(
                f"{self.kept.name} is being restored, and is about to run; {command.name} may be said again then",
                hint="'vmferry jobs' shows how far it is; 'vmferry stop --force' ends it",
            )
        if self._is_saved:
            raise Busy(
                f"{self.kept.name} is being saved, and goes on by itself; {command.name} may be said again then",
                hint="'vmferry jobs' shows how far it is",
            )
        doing = self._agent.claims.doing(self.kept.name)
        if doing:  # a command has found the guest at rest, and is about to register what it does with it
            raise Busy(f"{self.kept.name} is being {doing} at this very moment; {command.name} may be said again then")
        operation = monitor_fates.operation(command.name, command.arguments)
        if operation is not None:
            self._agent.blockers.require(self.kept.name, operation)

    def _busy(self, command: Command, attempt: SourceAttempt) -> Busy:
        return Busy(
            f"{self.kept.name} is on its way to {attempt.wanted.destination}, which decides whether it runs here and"
            f" what becomes of its disks; {command.name} may be said again when that is over",
            hint="migrate_cancel ends the migration",
        )

    async def _pass(self, command: Command, *, is_asked_again: bool = False) -> Any:
        """`is_asked_again`: whether it may be done is asked once more when its turn has come.

        1. a client's command takes its time in QEMU  2. `quit` of another one waits for its turn  3. a third has the
        guest migrated  4. the turn comes: what was true at 2 ended the guest while it moves."""
        if command.oob:
            return await self._execute(command)
        async with self._turn:
            if is_asked_again:
                self._require_settled(command)
            return await self._execute(command)

    async def _execute(self, command: Command) -> Any:
        try:
            return await self._machine.execute(
                command.name, command.arguments, oob=command.oob, deadline_s=limits.MONITOR_COMMAND_S
            )
        except QmpCommandError as error:
            raise Verbatim(error.qmp_class, error.desc) from error

    async def _control(self, name: str, **arguments: Any) -> Any:
        """One of the agent's own commands, for this VM. A client that goes away in the middle changes nothing."""
        return await self._agent.to_the_end(control.handle(self._agent, name, arguments), name)

    # --- those that are ours ---

    async def migrate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Begins a migration, or, with `resume`, has a broken one joined again, which the agents do by themselves."""
        if arguments.get("resume"):
            return await self.recover(arguments)
        hosts = {
            name: tuple(address.host for address in peer.addresses) for name, peer in self._agent.config.peers.items()
        }
        destination = core_monitor.destination_of(arguments, hosts)
        wish = self._setup.wish()
        await self._control(
            "vm-migrate",
            vm=self.kept.name,
            destination=destination,
            mode=wish.mode.value,
            config=dict(wish.config),
            multifd=wish.multifd_channels,
            postcopy_by_hand=wish.mode is Mode.POSTCOPY,
            auto_finalize=not wish.waits,
        )
        return {}

    async def incoming(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """QEMU has its own word for a VM that runs already."""
        raise UsageError(
            f"{self.kept.name} runs here; where a guest is awaited, vmferry prepares everything by itself",
            hint="say migrate to the monitor of the VM on the host where it runs",
        )

    async def cancel(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """As QEMU does, without a migration nothing happens."""
        if self._attempt() is not None:
            await self._control("vm-cancel", vm=self.kept.name)
        return {}

    async def pause(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A postcopy that runs is paused until it is resumed."""
        return await self._verb("job-pause")

    async def recover(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A paused postcopy is joined again; the agents know where."""
        return await self._verb("job-resume")

    async def go_on(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The leave for the switchover."""
        return await self._verb("job-finalize")

    async def start_postcopy(self, arguments: dict[str, Any]) -> dict[str, Any]:
        await self._control("vm-start-postcopy", vm=self.kept.name)
        return {}

    async def _verb(self, name: str) -> dict[str, Any]:
        attempt = self._attempt()
        if attempt is None:
            raise UsageError(f"{self.kept.name} has no migration on its way")
        await self._control(name, id=attempt.job)
        return {}

    # --- jobs ---

    def _jobs(self) -> list[dict[str, Any]]:
        return [info.to_wire() for info in self._agent.jobs.infos() if info.vm == self.kept.name]

    async def query_jobs(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """QEMU's own, and vmferry's of this VM; mirrors of a migration are among the latter. Those of a save are
        part of its job."""
        theirs = await self._machine.execute("query-jobs")
        return [*(job for job in theirs if not self._is_a_mirrors(job["id"])), *self._jobs()]

    async def job(self, command: Command) -> Any:
        """A verb: vmferry's for its own jobs, QEMU's for all others but the mirrors of a migration."""
        name = command.arguments.get("id")
        if name in {job["id"] for job in self._jobs()}:
            await self._control(command.name, **command.arguments)
            return {}
        attempt = self._attempt()
        if attempt is not None and self._is_a_mirrors(name):
            raise self._busy(command, attempt)
        if isinstance(name, str) and name.startswith(monitor_fates.OWN):
            raise UsageError(f"{command.name}: {monitor_fates.not_yours(name)}")
        if command.name in monitor_fates.JOBS_PASS:
            return await self._pass(command)
        return await self._pass_unless_held(command)

    async def set_parameters(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self._set(self._setup.with_parameters(arguments), arguments)

    async def set_capabilities(self, arguments: dict[str, Any]) -> dict[str, Any]:
        changed = self._setup.with_capabilities(arguments)
        return await self._set(changed, {pair["capability"]: pair["state"] for pair in arguments["capabilities"]})

    async def _set(self, changed: Setup, values: Mapping[str, Any]) -> dict[str, Any]:
        """Of the migration that is on its way, where its windows allow it; of the next one in any case."""
        attempt = self._attempt()
        if attempt is not None:
            await self._control("job-change", id=attempt.job, config=dict(values))
        self._setup = changed
        return {}

    async def query(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """QEMU's numbers, and vmferry's status: the same that its events tell."""
        info = await self._machine.migration()
        attempt = self._agent.attempts.get(self.kept.name)
        if attempt is not None:
            wire = attempt.wire()
            info["status"] = wire["status"]
            info.pop("error-desc", None)
            if wire["error"]:
                info["error-desc"] = wire["error"]["message"]
        return info

    async def query_parameters(self, arguments: dict[str, Any]) -> dict[str, Any]:
        found = await self._machine.execute("query-migrate-parameters")
        return {**found, **self._setup.shown(Kind.PARAMETER)}

    async def query_capabilities(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        found = await self._machine.execute("query-migrate-capabilities")
        shown = self._setup.shown(Kind.CAPABILITY)
        return [{**each, "state": shown.get(each["capability"], each["state"])} for each in found]


_TOLD = {"MIGRATION": ("status",), "JOB_STATUS_CHANGE": ("id", "status")}
"""Events of vmferry's that QEMU has too, and their members there."""

_OURS: dict[str, Callable[[Monitor, dict[str, Any]], Awaitable[Any]]] = {
    "migrate": Monitor.migrate,
    "migrate-incoming": Monitor.incoming,
    "migrate_cancel": Monitor.cancel,
    "migrate-pause": Monitor.pause,
    "migrate-recover": Monitor.recover,
    "migrate-continue": Monitor.go_on,
    "migrate-start-postcopy": Monitor.start_postcopy,
    "migrate-set-parameters": Monitor.set_parameters,
    "migrate-set-capabilities": Monitor.set_capabilities,
    "query-migrate": Monitor.query,
    "query-migrate-parameters": Monitor.query_parameters,
    "query-migrate-capabilities": Monitor.query_capabilities,
    "query-jobs": Monitor.query_jobs,
}
