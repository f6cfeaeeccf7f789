"""A simulated host, as the agent's `Host`: its processes, its connections, its disk.

Rule 1: a `SimHost` belongs to one life of an agent; what outlives agents (disk, QEMUs, paths) is the site's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry import limits
from vmferry.agent import knock
from vmferry.agent.channel import Address, ChannelDoor, ChannelEnd, Ticket
from vmferry.agent.host import Listening, OnConnection, RescueTools, Streams
from vmferry.agent.images import Identity, Stamp
from vmferry.agent.knock import OnCaller
from vmferry.agent.machine import Machine
from vmferry.agent.wants import PlacedDisk, RecoveryWay
from vmferry.clock import Clock
from vmferry.core.disk_reports import RoomReport
from vmferry.errors import HostUnreachable, QemuError, SpecError, Unfit
from vmferry.jobs.journal import JournalStore
from vmferry.qmp.client import EventCallback, QmpClient
from vmferry.qmp.errors import QmpDisconnected
from vmferry.qmp.server import QmpServer
from vmferry.testing.fake_profile import Profile
from vmferry.testing.sim.channels import SimChannel, SimDoor, SimKnockDoor, SimRelay
from vmferry.testing.sim.disk import Disk, SimJournal
from vmferry.testing.sim.kernel import Kernel, SimProcess, Socket
from vmferry.testing.sim.loop import pass_s
from vmferry.testing.sim.qemu import SimQemu, connect_monitor
from vmferry.testing.sim.rescue import SimRescue
from vmferry.testing.sim.streams import ByteTransport
from vmferry.vm import spawn as vm_spawn
from vmferry.vm.probe_qemu import CpuModel, QemuFacts
from vmferry.vm.runtime import RuntimePaths
from vmferry.vm.spawn import ProcessIdentity

BOOT_ID = "simulated"
POLL_S = 0.005
LAUNCH_S = 20.0
MEMORY_BYTES = 64 << 30


class SimClock:
    """Virtual time. `ahead_s`: how wrong the host's date is."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.now_s = now_s
        self.ahead_s = 0.0

    def wall_s(self) -> float:
        """The date, as this host believes it."""
        return 1.8e9 + self.now_s() + self.ahead_s


class HeldProcess:
    """A QEMU as its agent holds it."""

    def __init__(self, process: SimProcess, by_agent: Callable[[SimProcess], None]) -> None:
        self._process, self._by_agent = process, by_agent
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = loop.create_future()
        owner = process.kernel.current()
        if process.is_dead:
            self._ended.set_result(None)
        else:
            process.on_death.append(lambda: owner.call(self._end))

    def has_ended(self) -> bool:
        return self._process.is_dead

    async def wait_exit(self) -> int | None:
        await asyncio.shield(self._ended)
        return self._process.status

    def kill(self) -> None:
        if self._process.is_dead:
            raise ProcessLookupError
        self._by_agent(self._process)
        self._process.die()

    def close(self) -> None:
        """There is no descriptor to give back."""

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


@dataclass(eq=False)
class Installed:
    """What a host has, whoever its agent is."""

    name: str
    profile: Profile
    disk: Disk
    clock: SimClock
    script: dict[str, object]
    """Of every QEMU of this host (see `fake_state`)."""
    qemus: list[SimQemu]
    images: dict[str, Identity] = field(default_factory=dict)
    """Files by name: which they are."""
    next_inode: int = 1
    next_port: int = 20_000


@dataclass(eq=False)
class Listens:
    """A listener to be closed."""

    kernel: Kernel
    process: SimProcess
    port: int

    def close(self) -> None:
        self.kernel.unlisten((self.process.host, self.port), self.process)


class SimFreezer:
    """On this host nobody may trace: a guest that cannot be frozen goes on, as the product must bear."""

    async def freeze(self, threads: Iterable[int]) -> None:
        raise QemuError("this host lets nobody trace", side="destination", guest="running-on-destination")

    async def thaw(self) -> None:
        """Nothing was stopped."""

    async def close(self) -> None:
        """Nothing was stopped."""


class SimHost:
    """A host as one agent process uses it."""

    def __init__(
        self,
        kernel: Kernel,
        agent: SimProcess,
        installed: Installed,
        *,
        start_qemu: Callable[[str, list[str]], SimQemu],
        by_agent: Callable[[SimProcess], None],
    ) -> None:
        self._kernel, self._agent, self._installed = kernel, agent, installed
        self._start_qemu, self._by_agent = start_qemu, by_agent
        self.rescue: RescueTools = SimRescue(kernel, agent)

    # --- disk ---

    def open_journal(self, path: Path) -> JournalStore:
        return SimJournal(self._installed.disk, self._agent, path)

    def image_room(self, path: str, qemu: str) -> RoomReport:
        folder = path.rpartition("/")[0]
        images = self._installed.images
        return RoomReport(path=path, folder=folder, exists=path in images, folder_writable=True, free_bytes=1 << 40)

    async def make_image(self, disk: PlacedDisk, job: str, qemu: str) -> Identity:
        self._installed.images[f"{disk.path}.{job}"] = identity = (1, self._installed.next_inode)
        self._installed.next_inode += 1
        return identity

    async def image_digest(self, path: str) -> str:
        return "equal"  # no byte of a disk is simulated

    def publish_image(self, path: str, job: str) -> None:
        images = self._installed.images
        if path in images:
            raise Unfit(f"the image {path} cannot get its name: File exists", side="destination")
        images[path] = images.pop(f"{path}.{job}")

    def remove_image(self, path: str, identity: Identity | None, job: str) -> bool:
        images = self._installed.images
        images.pop(f"{path}.{job}", None)
        if path in images and images[path] != identity:
            return False
        images.pop(path, None)
        return True

    async def sync_image(self, path: str) -> None:
        """Nothing is written."""

    def image_stamp(self, path: str) -> Stamp | None:
        return None  # no byte of a disk is simulated, so nobody can say that none was changed

    def remove_left_image(self, path: str, looks: Stamp) -> bool:
        return False

    # --- connections ---

    async def listen_for_people(self, server: QmpServer, path: Path) -> None:
        """A person's orders are given to the agent itself (`site`)."""

    async def listen_for_agents(
        self, serve: OnConnection, host: str, port: int, context: ssl.SSLContext | None
    ) -> Listening:
        def accept(sock: Socket) -> None:
            transport = ByteTransport(self._agent, sock)
            work = serve(transport.reader, transport.writer)
            assert asyncio.iscoroutine(work)
            self._agent.spawn(work, "peer-session")

        self._kernel.listen(self._agent, port, accept, "agents")
        return Listens(self._kernel, self._agent, port)

    async def connect(self, host: str, port: int, context: ssl.SSLContext | None) -> Streams:
        transport = ByteTransport(self._agent, await self._kernel.connect(self._agent, host, port, "agents"))
        return transport.reader, transport.writer

    async def open_channels(self, job: str, hosts: Sequence[str], ports: Iterable[int]) -> ChannelDoor:
        try:
            return SimDoor(self._kernel, self._agent, job)
        except OSError as error:
            raise Unfit(f"the migration channel cannot listen: {error}", side="destination") from error

    async def dial_channel(self, addresses: Sequence[Address], ticket: Ticket, *, deadline_s: float) -> ChannelEnd:
        host, port = addresses[0]
        sock: Socket | None = None
        welcome: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def settle(is_welcome: bool) -> None:
            if not welcome.done():
                welcome.set_result(is_welcome)

        try:
            async with asyncio.timeout(deadline_s):
                sock = await self._kernel.connect(self._agent, host, port, "stream")
                sock.read(self._agent, lambda payload: settle(True), lambda reason: settle(False))
                sock.send(ticket)
                if not await welcome:
                    raise ConnectionResetError(104, "hung up on the greeting")
        except (OSError, TimeoutError) as error:
            if sock is not None:
                sock.let_go(self._agent)
            sentence = f"the {ticket.channel} channel cannot be opened: {error or 'no answer'}"
            raise HostUnreachable(
                sentence, hint="check that the migration ports are open at the destination"
            ) from error
        except BaseException:
            if sock is not None:
                sock.let_go(self._agent)
            raise
        sock.unread()
        return SimChannel(self._kernel, self._agent, ticket.channel, sock)

    async def open_door(
        self, job: str, token: str, hosts: Sequence[str], ports: Sequence[int], on_caller: OnCaller
    ) -> SimKnockDoor:
        return SimKnockDoor(self._kernel, self._agent, job, token, ports, on_caller)

    async def call_door(self, job: str, way: RecoveryWay) -> tuple[ChannelEnd, dict[str, Any]]:
        failures: list[str] = []
        for port in way.ports:
            try:
                return await self._call_one(way, way.hosts[0], port)
            except TimeoutError:
                failures.append(f"{port} did not answer")
                break
            except OSError as error:
                failures.append(f"{port}: {error.strerror}")
        raise HostUnreachable(f"the destination cannot be reached beside its agent's link: {'; '.join(failures)}")

    async def _call_one(self, way: RecoveryWay, host: str, port: int) -> tuple[ChannelEnd, dict[str, Any]]:
        sock: Socket | None = None
        word: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        def heard(payload: Any) -> None:
            if not word.done():
                word.set_result(payload)

        def ended(reason: str) -> None:
            if not word.done():
                word.set_exception(ConnectionResetError(104, reason))

        try:
            async with asyncio.timeout(limits.RECOVERY_CONNECT_S):
                sock = await self._kernel.connect(self._agent, host, port, "stream")
            sock.read(self._agent, heard, ended)
            sock.send(way.token)
            async with asyncio.timeout(limits.RECOVERY_WORD_S):
                said = await word
        except BaseException:
            if sock is not None:
                sock.let_go(self._agent)
            raise
        sock.unread()
        return SimChannel(self._kernel, self._agent, knock.NAME, sock), said

    def relay(self, channel: ChannelEnd, path: str) -> ChannelEnd:
        assert isinstance(channel, SimChannel)
        return SimRelay(self._kernel, self._agent, channel, path)

    async def write_locks(self, pid: int, paths: Collection[str]) -> frozenset[str]:
        return frozenset()  # its disks are names: whether they can be taken is said by the QEMU itself

    def freezer(self, pid: int) -> SimFreezer:
        return SimFreezer()

    # --- processes ---

    async def launch(self, vm: str, argv: list[str], runtime: RuntimePaths, *, clock: Clock) -> Machine:
        qemu = self._start_qemu(self._installed.name, argv)
        end_s = clock.now_s() + LAUNCH_S
        try:
            while True:
                if qemu.process.is_dead:
                    words = vm_spawn.tail_log(runtime.log_path) or f"no reason given, exit status {qemu.process.status}"
                    raise SpecError(f"QEMU refused to start: {words}")
                try:
                    client = await connect_monitor(
                        self._kernel, self._agent, qemu, name=f"the QEMU of {vm}", on_event=None, deadline_s=10.0
                    )
                    break
                except QmpDisconnected:
                    if clock.now_s() >= end_s:
                        raise
                    await pass_s(POLL_S)
        except BaseException:
            if not qemu.process.is_dead:
                self._by_agent(qemu.process)
                qemu.process.die()
            raise
        machine = self._machine(vm, qemu, clock)
        machine.client = client
        client.subscribe(machine.hear)
        return machine

    def attach(self, vm: str, identity: ProcessIdentity, qmp_path: str, *, clock: Clock) -> Machine | None:
        qemu = self._by_identity(identity)
        return None if qemu is None else self._machine(vm, qemu, clock)

    def find_qemu(self, directory: str) -> ProcessIdentity | None:
        found = [q for q in self._installed.qemus if q.directory == directory and not q.process.is_dead]
        return _identity(found[0]) if found else None

    def kill(self, identity: ProcessIdentity) -> bool:
        qemu = self._by_identity(identity)
        if qemu is None:
            return False
        self._by_agent(qemu.process)
        qemu.process.die()
        return True

    def _by_identity(self, identity: ProcessIdentity) -> SimQemu | None:
        found = [q for q in self._installed.qemus if q.process.pid == identity.pid and not q.process.is_dead]
        return found[0] if found else None

    def _machine(self, vm: str, qemu: SimQemu, clock: Clock) -> Machine:
        async def connect(
            path: str, *, name: str | None = None, on_event: EventCallback | None = None, deadline_s: float = 10.0
        ) -> QmpClient:
            return await connect_monitor(
                self._kernel, self._agent, qemu, name=name or path, on_event=on_event, deadline_s=deadline_s
            )

        return Machine(
            vm,
            _identity(qemu),
            qemu.line.qmp_path,
            process=HeldProcess(qemu.process, self._by_agent),
            clock=clock,
            connect=connect,
        )

    # --- what the host can do ---

    async def qemu_facts(self, qemu: str, state_directory: Path) -> QemuFacts:
        return facts_of(self._installed.profile)

    def memory_available_bytes(self) -> int:
        return MEMORY_BYTES

    def cpu(self) -> str | None:
        return "simulated"

    def has_userfaultfd(self) -> bool | None:
        return True

    def free_port(self, first: int, last: int, address: str) -> int | None:
        if not first:
            self._installed.next_port += 1
        return first or self._installed.next_port


def _identity(qemu: SimQemu) -> ProcessIdentity:
    return ProcessIdentity(qemu.process.pid, qemu.process.pid, BOOT_ID)


def facts_of(profile: Profile) -> QemuFacts:
    """What a probe of the fake gives (`tests/unit/testing/test_fake_qemu.py` asks the program itself)."""
    models = tuple(CpuModel(name, (), True) for name in ("max", "qemu64"))
    return QemuFacts(
        binary="qemu",
        version=profile.version,
        package=profile.package,
        machines=tuple(sorted(profile.machines)),
        deprecated_machines=(),
        aliases={"q35": profile.machines[0]},
        default_machine=profile.machines[0],
        capabilities=tuple(sorted(profile.capabilities())),
        parameters=tuple(sorted(profile.parameters())),
        cpus={"tcg": models},
        postcopy=True,
        postcopy_refusal="",
    )
