"""What an agent uses of the host that it runs on: processes, connections, disk. Its one door to the operating system.

`LocalHost` is the machine that the agent runs on; the simulator (`testing.sim`) brings hosts of its own, so that the
agent itself, its attempts, loops and commands are the same code there and here.

Rule 1: nothing here decides: every method does one thing that the kernel, or another program, does for us.
Rule 2: files of runtime directories and of credentials are used directly; a directory is a directory everywhere.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from vmferry.agent import channel as channels
from vmferry.agent import images, knock, rescue
from vmferry.agent import machine as machines
from vmferry.agent.channel import Address, ChannelDoor, ChannelEnd, ChannelListener, Ticket
from vmferry.agent.images import Identity, Stamp
from vmferry.agent.knock import KnockDoor, OnCaller
from vmferry.agent.machine import Machine
from vmferry.agent.processes import find_qemu
from vmferry.agent.relayed import RelayedChannel
from vmferry.agent.wants import PlacedDisk, RecoveryWay
from vmferry.clock import Clock
from vmferry.core.disk_reports import RoomReport
from vmferry.core.rescue import NeverRan
from vmferry.jobs.journal import Journal, JournalStore
from vmferry.qmp.server import QmpServer
from vmferry.vm import image_locks, probe_host, probe_qemu
from vmferry.vm import spawn as vm_spawn
from vmferry.vm.freeze import Freezer
from vmferry.vm.probe_qemu import QemuFacts
from vmferry.vm.runtime import RuntimePaths
from vmferry.vm.spawn import ProcessIdentity

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
OnConnection = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Listening(Protocol):
    """Somebody accepts connections until `close`."""

    def close(self) -> None: ...


class Freezes(Protocol):
    """Threads of one process, stopped from outside. See `vm.freeze`."""

    async def freeze(self, threads: Iterable[int]) -> None: ...

    async def thaw(self) -> None: ...

    async def close(self) -> None: ...


class RescueTools(Protocol):
    """The tools that lead a QEMU out of where it stands still. Raise RescueRefused, GuestHeld, QemuError."""

    async def bring_back(
        self, machine: Machine, proof: NeverRan, *, then_run: bool, tell: rescue.OnProgress
    ) -> rescue.RescueReport: ...

    async def throw_away(
        self, machine: Machine, proof: NeverRan, *, then_run: bool, tell: rescue.OnProgress
    ) -> rescue.RescueReport: ...


class Host(Protocol):
    """A host as its agent uses it."""

    rescue: RescueTools

    # --- disk ---

    def open_journal(self, path: Path) -> JournalStore:
        """The agent's journal. Raises Unfit when another agent has it or it is damaged."""

    def image_room(self, path: str, qemu: str) -> RoomReport:
        """What is there now, and how much room for an image."""

    async def make_image(self, disk: PlacedDisk, job: str, qemu: str) -> Identity:
        """An empty image under a name that only this job uses. Raises Unfit; nothing is left then."""

    async def image_digest(self, path: str) -> str:
        """A checksum of the bytes of a raw image. Raises OSError."""

    def publish_image(self, path: str, job: str) -> None:
        """It gets its own name. Raises Unfit where that is taken."""

    def remove_image(self, path: str, identity: Identity | None, job: str) -> bool:
        """Takes away what the job made; False when a file of that name is another one. Raises OSError."""

    async def sync_image(self, path: str) -> None:
        """What was written to it is on the disk. Raises OSError."""

    def image_stamp(self, path: str) -> Stamp | None:
        """What the file looks like now: equal as long as nobody touches it."""

    def remove_left_image(self, path: str, looks: Stamp) -> bool:
        """Takes away an image that still looks so; False when it does not. Raises OSError."""

    # --- connections ---

    async def listen_for_people(self, server: QmpServer, path: Path) -> None:
        """Serves the control socket. Raises Busy or Unfit."""

    async def listen_for_agents(
        self, serve: OnConnection, host: str, port: int, context: ssl.SSLContext | None
    ) -> Listening:
        """Serves other agents. Raises OSError when the address cannot be bound."""

    async def connect(self, host: str, port: int, context: ssl.SSLContext | None) -> Streams:
        """A connection to another agent. Raises OSError."""

    async def open_channels(self, job: str, hosts: Sequence[str], ports: Iterable[int]) -> ChannelDoor:
        """Where the sources of a job's channels may come. Raises Unfit."""

    async def dial_channel(self, addresses: Sequence[Address], ticket: Ticket, *, deadline_s: float) -> ChannelEnd:
        """A channel to another host. Raises HostUnreachable or NotTrusted."""

    async def open_door(
        self, job: str, token: str, hosts: Sequence[str], ports: Sequence[int], on_caller: OnCaller
    ) -> KnockDoor:
        """Where the source of a broken postcopy may call. Raises Unfit."""

    async def call_door(self, job: str, way: RecoveryWay) -> tuple[ChannelEnd, dict[str, Any]]:
        """Calls at another host's: the channel, and the word. Raises HostUnreachable or NotTrusted."""

    def relay(self, channel: ChannelEnd, path: str) -> ChannelEnd:
        """The same channel, its bytes passed on to and from a process that listens at `path`. Takes `channel` over."""

    # --- processes ---

    async def launch(self, vm: str, argv: list[str], runtime: RuntimePaths, *, clock: Clock) -> Machine:
        """A new QEMU. Raises SpecError with its words or QemuError; no process is left then."""

    def attach(self, vm: str, identity: ProcessIdentity, qmp_path: str, *, clock: Clock) -> Machine | None:
        """The machine of exactly this process, or None if it is gone."""

    def find_qemu(self, directory: str) -> ProcessIdentity | None:
        """The QEMU that was started with this runtime directory, or None."""

    def kill(self, identity: ProcessIdentity) -> bool:
        """SIGKILL to exactly this process; False when it was gone already."""

    async def write_locks(self, pid: int, paths: Collection[str]) -> frozenset[str]:
        """Those of the images that this process holds QEMU's write lock on; none that cannot be looked at."""

    def freezer(self, pid: int) -> Freezes:
        """What stops threads of this process from outside."""

    # --- what the host can do ---

    async def qemu_facts(self, qemu: str, state_directory: Path) -> QemuFacts:
        """What the program can do. Raises QemuError when there is none."""

    def memory_available_bytes(self) -> int:
        """Room for guests."""

    def cpu(self) -> str | None:
        """Which CPU it has: equal on two hosts if a guest sees no difference. None: not known."""

    def has_userfaultfd(self) -> bool | None:
        """Whether the kernel lets a guest run before its memory is here; None: not known."""

    def free_port(self, first: int, last: int, address: str) -> int | None:
        """A port on which nobody listens, or None."""


class LocalRescue:
    """The tools of `agent.rescue`."""

    async def bring_back(
        self, machine: Machine, proof: NeverRan, *, then_run: bool, tell: rescue.OnProgress
    ) -> rescue.RescueReport:
        return await rescue.bring_back(machine, proof, then_run=then_run, tell=tell)

    async def throw_away(
        self, machine: Machine, proof: NeverRan, *, then_run: bool, tell: rescue.OnProgress
    ) -> rescue.RescueReport:
        return await rescue.throw_away(machine, proof, then_run=then_run, tell=tell)


class LocalHost:
    """The machine that this program runs on."""

    def __init__(self) -> None:
        self.rescue: RescueTools = LocalRescue()

    def open_journal(self, path: Path) -> JournalStore:
        return Journal(path)

    def image_room(self, path: str, qemu: str) -> RoomReport:
        return images.room(path, qemu=qemu)

    async def make_image(self, disk: PlacedDisk, job: str, qemu: str) -> Identity:
        return await images.make(
            disk.path, job=job, size_bytes=disk.size_bytes, format=disk.format, options=disk.options, qemu=qemu
        )

    async def image_digest(self, path: str) -> str:
        stop = threading.Event()
        try:
            return await asyncio.to_thread(images.digest, path, stop)
        finally:
            stop.set()  # whoever waited for it may be cancelled; a thread cannot

    def publish_image(self, path: str, job: str) -> None:
        images.publish(path, job=job)

    def remove_image(self, path: str, identity: Identity | None, job: str) -> bool:
        return images.remove(path, identity, job=job)

    async def sync_image(self, path: str) -> None:
        await asyncio.to_thread(images.sync, path)

    def image_stamp(self, path: str) -> Stamp | None:
        return images.stamp(path)

    def remove_left_image(self, path: str, looks: Stamp) -> bool:
        return images.remove_left(path, looks)

    async def listen_for_people(self, server: QmpServer, path: Path) -> None:
        await server.listen_unix(str(path))

    async def listen_for_agents(
        self, serve: OnConnection, host: str, port: int, context: ssl.SSLContext | None
    ) -> Listening:
        return await asyncio.start_server(serve, host, port, ssl=context)

    async def connect(self, host: str, port: int, context: ssl.SSLContext | None) -> Streams:
        return await asyncio.open_connection(host, port, ssl=context)

    async def open_channels(self, job: str, hosts: Sequence[str], ports: Iterable[int]) -> ChannelDoor:
        return await ChannelListener.open(job, hosts, ports=ports)

    async def dial_channel(self, addresses: Sequence[Address], ticket: Ticket, *, deadline_s: float) -> ChannelEnd:
        return await channels.dial(addresses, ticket, deadline_s=deadline_s)

    async def open_door(
        self, job: str, token: str, hosts: Sequence[str], ports: Sequence[int], on_caller: OnCaller
    ) -> KnockDoor:
        return await knock.KnockListener.listen(job, token, hosts, ports, on_caller)

    async def call_door(self, job: str, way: RecoveryWay) -> tuple[ChannelEnd, dict[str, Any]]:
        return await knock.call(job, way)

    def relay(self, channel: ChannelEnd, path: str) -> ChannelEnd:
        return RelayedChannel(channel, path)

    async def launch(self, vm: str, argv: list[str], runtime: RuntimePaths, *, clock: Clock) -> Machine:
        return await machines.launch(vm, argv, runtime, clock=clock)

    def attach(self, vm: str, identity: ProcessIdentity, qmp_path: str, *, clock: Clock) -> Machine | None:
        return machines.attach_process(vm, identity, qmp_path, clock=clock)

    def find_qemu(self, directory: str) -> ProcessIdentity | None:
        return find_qemu(directory)

    async def write_locks(self, pid: int, paths: Collection[str]) -> frozenset[str]:
        return await asyncio.to_thread(image_locks.written_by, pid, paths)

    def freezer(self, pid: int) -> Freezes:
        return Freezer(pid)

    def kill(self, identity: ProcessIdentity) -> bool:
        return vm_spawn.kill(identity)

    async def qemu_facts(self, qemu: str, state_directory: Path) -> QemuFacts:
        return await probe_qemu.qemu_facts(qemu, state_directory=state_directory)

    def memory_available_bytes(self) -> int:
        return probe_host.memory().available_bytes

    def cpu(self) -> str | None:
        return probe_host.cpu()

    def has_userfaultfd(self) -> bool | None:
        return probe_host.userfaultfd().works

    def free_port(self, first: int, last: int, address: str) -> int | None:
        return probe_host.free_port(first, last, address=address)
