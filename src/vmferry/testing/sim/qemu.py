"""A fake QEMU as a simulated process: the state machines of `fake_state`, `fake_commands`, `fake_outgoing` and
`fake_incoming`, behind a monitor and connections that are values.

Rule 1: a monitor serves one client at a time; the next one waits in its queue, as with QEMU.
Rule 2: what the fake tells its director is what the oracle sees: no agent is asked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmferry.clock import Clock
from vmferry.qmp import client as qmp_client
from vmferry.qmp.client import EventCallback, QmpClient
from vmferry.qmp.codec import Command
from vmferry.qmp.errors import QmpDisconnected
from vmferry.qmp.session import Peer, Session
from vmferry.testing.fake_commands import Commands
from vmferry.testing.fake_link import Link
from vmferry.testing.fake_outside import EXIT_S, Accept
from vmferry.testing.fake_profile import Profile
from vmferry.testing.fake_qemu import CommandLine, FakeSession
from vmferry.testing.fake_state import Director, State
from vmferry.testing.sim.kernel import Kernel, SimProcess, Socket
from vmferry.testing.sim.streams import ByteTransport

BOOT_S = 0.02
"""From the start of the process until its monitor listens."""

Told = Callable[["SimQemu", dict[str, Any]], None]


class SimLink(Link):
    """What two fakes say to each other, over a simulated connection."""

    def __init__(self, process: SimProcess, sock: Socket) -> None:
        super().__init__()
        self._process, self._sock = process, sock
        sock.read(process, self._inbox.put_nowait, self._ended)

    def send(self, kind: str, **more: Any) -> None:
        self._sock.send({"kind": kind, **more})

    def cut(self) -> None:
        self._sock.shut("cut")
        self.lost.set()

    def close(self) -> None:
        self._sock.let_go(self._process)
        self.lost.set()

    def _ended(self, reason: str) -> None:
        self.lost.set()


class SimDirector(Director):
    """The script of one fake, and the ear of the oracle."""

    def __init__(self, script: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.script, self._tell = script, tell

    def tell(self, message: dict[str, Any]) -> None:
        self._tell(message)


class SimOutside:
    """The fake's process, in the simulator."""

    def __init__(self, kernel: Kernel, process: SimProcess, directory: str) -> None:
        self._kernel, self._process, self._directory = kernel, process, directory

    def now_s(self) -> float:
        return self._kernel.loop.time()

    def die(self) -> None:
        self._process.die()

    def exit_soon(self, status: int) -> None:
        self._process.call(self._process.die, status, after_s=EXIT_S)

    def complain(self, text: str) -> None:
        with (Path(self._directory) / "qemu.log").open("a") as file:
            file.write(f"qemu-system-x86_64: {text}\n")

    async def open_link(self, descriptor: int) -> Link:
        return SimLink(self._process, self._kernel.take(descriptor))

    def close_descriptor(self, descriptor: int) -> None:
        self._kernel.close(descriptor)

    async def connect(self, host: str, port: int) -> Link:
        return SimLink(self._process, await self._kernel.connect(self._process, host, port, "stream"))

    async def listen(self, host: str, port: int) -> tuple[tuple[str, int], Accept]:
        arrived: asyncio.Queue[Socket] = asyncio.Queue()
        bound = self._kernel.listen(self._process, port, arrived.put_nowait, "stream")

        async def first() -> Link:
            sock = await arrived.get()
            self._kernel.unlisten((self._process.host, bound), self._process)
            return SimLink(self._process, sock)

        return (self._process.host, bound), first

    async def serve(self, host: str, port: int, met: Callable[[Link], None]) -> Callable[[], None]:
        bound = self._kernel.listen(self._process, port, lambda sock: met(SimLink(self._process, sock)), "stream")
        return lambda: self._kernel.unlisten((self._process.host, bound), self._process)

    async def listen_at(self, path: str) -> Accept:
        arrived: asyncio.Queue[Socket] = asyncio.Queue()
        self._kernel.listen_at(self._process, path, arrived.put_nowait, "recovery")

        async def first() -> Link:
            try:
                return SimLink(self._process, await arrived.get())
            finally:
                self._kernel.unlisten((self._process.host, path), self._process)

        return first


class SimQemu:
    """One process, its monitor and its guest."""

    def __init__(
        self,
        kernel: Kernel,
        host: str,
        argv: Sequence[str],
        profile: Profile,
        *,
        clock: Clock,
        script: dict[str, Any],
        told: Told,
    ) -> None:
        self.line = CommandLine(list(argv))
        kind = "qemu-in" if self.line.is_incoming else "qemu"
        self.kernel, self.host, self.vm = kernel, host, self.line.name
        self.process = kernel.start(host, f"{kind}:{self.vm}")
        self.directory = str(Path(self.line.qmp_path).parent)
        director = SimDirector(script, lambda message: told(self, message))
        outside = SimOutside(kernel, self.process, self.directory)
        self.state = State(profile, director, outside)
        self.commands = Commands(
            self.state,
            memory_bytes=self.line.memory_bytes,
            cpus=self.line.cpus,
            devices=self.line.devices,
            incoming=self.line.is_incoming,
            block=self.line.block(self.state),
        )
        self.state.emit = self._emit
        self._clock = clock
        self._session: Session | None = None
        self._clients: deque[Socket] = deque()
        self._has_client = asyncio.Event()
        self.is_listening = False
        self.process.spawn(self._serve(), "qemu")

    def connect(self, agent: SimProcess) -> Socket | None:
        """An agent's end of a new connection to the monitor; None while nobody listens."""
        if self.process.is_dead or not self.is_listening:
            return None
        near, far = self.kernel.pair("local", agent, self.process, f"qmp {self.process.pid}")
        self._clients.append(far)
        self._has_client.set()
        return near

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        self.process.call(ready.set_result, None, after_s=BOOT_S)
        await ready
        self.is_listening = True
        await self.state.step("in-start" if self.line.is_incoming else "start", lost=self.commands.over)
        serving = asyncio.create_task(self._serve_all(), name="monitor")
        await self.commands.over.wait()
        if self._session is not None:
            self._session.drop("QEMU ends")
        serving.cancel()
        await asyncio.wait({serving}, timeout=1.0)
        self.process.die(0)

    async def _serve_all(self) -> None:
        while True:
            while not self._clients:
                self._has_client.clear()
                await self._has_client.wait()
            await self._serve_one(self._clients.popleft())

    async def _serve_one(self, sock: Socket) -> None:
        transport = ByteTransport(self.process, sock, on_descriptors=self._receive)
        session = FakeSession(
            transport.reader,
            transport.writer,
            name=f"monitor {self.process.pid}",
            peer=Peer(),
            handle=self._handle,
            version=self.state.profile.version_info(),
            clock=self._clock,
        )
        self._session = session
        try:
            await session.run()
        finally:
            self._session = None

    def _receive(self, descriptors: tuple[int, ...]) -> None:
        self.commands.received = list(descriptors)

    async def _handle(self, session: Session, command: Command) -> Any:
        return await self.commands.run(command.name, dict(command.arguments), oob=command.oob)

    def _emit(self, name: str, data: Mapping[str, Any] | None) -> None:
        self.kernel.trace.tell(self.host, f"QEMU {self.process.pid} says {name} {data or ''}".rstrip())
        if self._session is not None:
            self._session.emit(name, data)


class MonitorTransport:
    """An agent's side of a monitor's connection, as `qmp.client` wants it."""

    def __init__(self, kernel: Kernel, agent: SimProcess, qemu: SimQemu, sock: Socket, client: QmpClient) -> None:
        self._kernel, self._agent, self._qemu, self._sock, self._client = kernel, agent, qemu, sock, client
        sock.read(agent, self._arrived, client.connection_lost)

    @property
    def peer_pid(self) -> int | None:
        return self._qemu.process.pid

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        passed = () if self._qemu.process.is_dead else tuple(self._kernel.pass_on(fd, self._qemu.process) for fd in fds)
        self._sock.send((data, passed))

    def abort(self) -> None:
        self._sock.let_go(self._agent)

    async def close(self) -> None:
        self.abort()

    def _arrived(self, payload: tuple[bytes, tuple[int, ...]]) -> None:
        self._client.data_received(payload[0])


async def connect_monitor(
    kernel: Kernel,
    agent: SimProcess,
    qemu: SimQemu | None,
    *,
    name: str,
    on_event: EventCallback | None,
    deadline_s: float,
) -> QmpClient:
    """A negotiated client. Raises QmpDisconnected when nobody listens, QmpTimeout when nobody greets."""
    sock = None if qemu is None else qemu.connect(agent)
    if qemu is None or sock is None:
        raise QmpDisconnected(f"cannot connect to {name}: Connection refused", guest="unharmed")
    client = qmp_client.QmpClient(name=name, on_event=on_event)
    client.attach(MonitorTransport(kernel, agent, qemu, sock, client))
    try:
        await client.negotiate(deadline_s=deadline_s)
    except BaseException:
        await client.close()
        raise
    return client
