"""Two QEMUs, or two fakes, that a check of `contract` drives: a side with its QMP client, and the pair of both."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from vmferry.qmp import client as qmp_client
from vmferry.qmp.client import QmpClient
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected

DEADLINE_S = 30.0
SLOW_BYTES_PER_S = 20_000
FAST_BYTES_PER_S = 1 << 33
ROUNDS_WAITED = 10
"""The guest changes next to nothing, so without a reason to wait the switchover comes after two or three."""
MACHINE = "pc-q35-7.2"
"""Known to every version, so that any two can be a pair."""


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Asks until it is so: for the few things that QEMU has no event for."""
    async with asyncio.timeout(DEADLINE_S):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class End(Protocol):
    """One end of a connection that can be given to a QEMU: a socket, or the simulator's idea of one."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class Side:
    """One QEMU and the session with it. `RealSide` is a process; the simulator has another one."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        """Status words, and STOP, RESUME, SHUTDOWN, in their order."""
        self._client: QmpClient | None = None
        self._moved = asyncio.Event()

    @property
    def client(self) -> QmpClient:
        """The session."""
        assert self._client is not None, "attach first"
        return self._client

    @property
    def has_proof(self) -> bool:
        """The newer behaviour: postcopy-device, failing."""
        return self.client.version >= (10, 2, 0)

    def use(self, client: QmpClient) -> None:
        """The session is there."""
        self._client = client

    async def execute(self, name: str, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        """One command."""
        return await self.client.execute(name, arguments, **more)

    async def refused(self, name: str, arguments: dict[str, Any] | None = None) -> str:
        """The words with which QEMU refuses the command. Raises AssertionError if it does not."""
        try:
            await self.execute(name, arguments)
        except QmpCommandError as error:
            return error.desc
        raise AssertionError(f"{name} was not refused")

    async def until(self, word: str, *, times: int = 1) -> None:
        """Waits for an event (a status word, STOP, RESUME)."""
        async with asyncio.timeout(DEADLINE_S):
            while self.seen.count(word) < times:
                self._moved.clear()
                await self._moved.wait()

    async def until_run_state(self, state: str) -> None:
        """Waits for a run state, for which there may be no event."""

        async def holds() -> bool:
            return await self.run_state() == state

        await until(holds)

    async def run_state(self) -> str:
        """QEMU's run state."""
        return str((await self.execute("query-status"))["status"])

    async def word(self) -> str | None:
        """The migration's status."""
        return (await self.execute("query-migrate")).get("status")  # type: ignore[no-any-return]

    async def job(self, name: str) -> dict[str, Any]:
        """What query-jobs has of it. Raises StopIteration when there is no such job."""
        return dict(next(job for job in await self.execute("query-jobs") if job["id"] == name))

    async def until_job(self, name: str, *statuses: str) -> dict[str, Any]:
        """Waits until the job is in one of these; how it stands then."""
        found: dict[str, Any] = {}

        async def holds() -> bool:
            found.update(await self.job(name))
            return found["status"] in statuses

        await until(holds)
        return found

    async def can_yank(self) -> bool:
        """Is there a migration channel that `yank` could cut?"""
        return {"type": "migration"} in await self.execute("query-yank")

    async def kill(self) -> None:
        """A crash."""
        raise NotImplementedError

    async def ended(self) -> int:
        """The exit status, once the process has ended by itself."""
        raise NotImplementedError

    def forget(self) -> None:
        """What was seen so far does not count any more."""
        self.seen.clear()

    def on_event(self, event: Event) -> None:
        """For whoever makes the session."""
        if event.name == "MIGRATION":
            self.seen.append(str(event.data["status"]))
        elif event.name in ("STOP", "RESUME", "SHUTDOWN"):
            self.seen.append(event.name)
        self._moved.set()


class RealSide(Side):
    """A program that runs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__()
        self.process = process

    async def attach(self, path: Path) -> None:
        """Connects as soon as the process listens."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    self.use(await qmp_client.connect_unix(str(path), on_event=self.on_event))
                except QmpDisconnected:
                    assert self.process.poll() is None, "QEMU ended at its start"
                    await asyncio.sleep(0.005)  # a socket file has no event
                else:
                    return

    async def kill(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, DEADLINE_S)


class Pair:
    """A running source and a waiting destination."""

    def __init__(self, source: Side, destination: Side) -> None:
        self.source, self.destination = source, destination
        self.channel: End | None = None
        """The source's end. The other end is the destination's alone, so that its death is seen as it is."""
        self.may_answer = asyncio.Event()
        """With `holds_answers`: from now on the source hears what the destination says."""

    def connected(self) -> tuple[End, End]:
        """A connection: the source's end and the destination's."""
        raise NotImplementedError

    def nbd_address(self) -> tuple[str, int]:
        """Where the destination may listen for the source's mirror."""
        raise NotImplementedError

    async def target(self) -> None:
        """The destination serves its disk, and the source has a node for it, as vmferry asks for it."""
        host, port = self.nbd_address()
        address = {"host": host, "port": str(port)}
        await self.destination.execute("nbd-server-start", {"addr": {"type": "inet", "data": address}})
        export = {"type": "nbd", "id": "disk", "name": "disk", "node-name": "disk0", "writable": True}
        await self.destination.execute("block-export-add", export)
        target = {"driver": "nbd", "node-name": "target", "server": {"type": "inet", **address}, "export": "disk"}
        await self.source.execute("blockdev-add", {**target, "discard": "unmap", "detect-zeroes": "unmap"})

    async def mirror(self, *, job: str = "mirror-0") -> None:
        """And the source mirrors its own disk to it."""
        await self.target()
        wanted = {
            "job-id": job, "device": "disk0", "target": "target", "sync": "full", "filter-node-name": "filter",
            "copy-mode": "write-blocking", "auto-finalize": False, "auto-dismiss": False,
        }  # fmt: skip
        await self.source.execute("blockdev-mirror", wanted)

    def held_back(self, far: End) -> End:
        """The destination's end of a channel whose answers wait for `may_answer`."""
        raise NotImplementedError

    async def begin(
        self,
        *,
        postcopy: bool = False,
        slow: bool = False,
        pause: bool = True,
        switchover_ack: bool = False,
        holds_answers: bool = False,
        switch: bool = False,
        background: bool = False,
    ) -> None:
        """Options as vmferry sets them, the channel by descriptor, `migrate`, and with `switch` in the same breath the
        order to go over to postcopy."""
        common = {"events": True, "return-path": True, "postcopy-ram": postcopy}
        common |= {"switchover-ack": True} if switchover_ack else {}
        await self._set(self.destination, {**common, "late-block-activate": True})
        if background:  # compatible with next to nothing
            await self._set(self.source, {"events": True, "return-path": False, "background-snapshot": True})
        else:
            await self._set(self.source, {**common, "pause-before-switchover": pause})
        rate = SLOW_BYTES_PER_S if slow else FAST_BYTES_PER_S
        await self.source.execute("migrate-set-parameters", {"max-bandwidth": rate})
        left, right = self.connected()
        self.channel = left
        if holds_answers:
            right = self.held_back(right)
        await self._give(self.destination, right)
        right.close()
        arguments: dict[str, Any] = {"uri": "fd:channel"}
        if self.destination.client.version >= (9, 1, 0):
            arguments["exit-on-error"] = False
        await self.destination.execute("migrate-incoming", arguments)
        await self._give(self.source, left)
        orders = [self.source.execute("migrate", {"uri": "fd:channel"})]
        orders += [self.source.execute("migrate-start-postcopy")] if switch else []
        await asyncio.gather(*orders)

    async def faster(self) -> None:
        """Ends `slow`."""
        await self.source.execute("migrate-set-parameters", {"max-bandwidth": FAST_BYTES_PER_S})

    async def go_on(self) -> None:
        """Past the pause before the switchover."""
        await self.source.until("pre-switchover")
        await self.source.execute("migrate-continue", {"state": "pre-switchover"})

    async def again(self) -> None:
        """A second channel for a broken postcopy."""
        left, right = self.connected()
        assert self.channel is not None, "begin first"
        self.channel.close()
        self.channel = left
        await self._give(self.destination, right)
        right.close()
        await self.destination.execute("migrate-recover", {"uri": "fd:channel"}, oob=True)
        await self._give(self.source, left)
        await self.source.execute("migrate", {"uri": "fd:channel", "resume": True})

    def cut(self) -> None:
        """Ends the channel for both."""
        raise NotImplementedError

    async def close(self) -> None:
        """Ends both processes."""
        if self.channel is not None:
            self.channel.close()
        for side in (self.source, self.destination):
            await side.client.close()
            await side.kill()

    async def _set(self, side: Side, wanted: dict[str, bool]) -> None:
        states = [{"capability": name, "state": state} for name, state in wanted.items()]
        await side.execute("migrate-set-capabilities", {"capabilities": states})

    async def _give(self, side: Side, connection: End) -> None:
        await side.execute("getfd", {"fdname": "channel"}, fds=(connection.fileno(),))


class RealPair(Pair):
    """Over real sockets."""

    def __init__(self, source: Side, destination: Side) -> None:
        super().__init__(source, destination)
        self._pumps: list[asyncio.Task[None]] = []
        self._relay: tuple[socket.socket, ...] = ()

    def connected(self) -> tuple[socket.socket, socket.socket]:
        return _connected()

    def nbd_address(self) -> tuple[str, int]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return "127.0.0.1", int(server.getsockname()[1])

    def held_back(self, far: End) -> socket.socket:
        """Through this process, which keeps the answers for a while."""
        assert isinstance(far, socket.socket)
        near, right = _connected()
        self._relay = (far, near)
        for end in self._relay:
            end.setblocking(False)
        self._pumps = [asyncio.create_task(_pump(far, near)), asyncio.create_task(_pump(near, far, self.may_answer))]
        return right

    def cut(self) -> None:
        assert isinstance(self.channel, socket.socket), "begin first"
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for end in self._relay:
            end.close()
        await super().close()


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    return left, right


async def _pump(source: socket.socket, sink: socket.socket, gate: asyncio.Event | None = None) -> None:
    """Bytes of one direction, from the moment the gate opens to their end."""
    loop = asyncio.get_running_loop()
    if gate is not None:
        await gate.wait()
    with contextlib.suppress(OSError):
        while data := await loop.sock_recv(source, 1 << 16):
            await loop.sock_sendall(sink, data)
        sink.shutdown(socket.SHUT_WR)


def argv(program: Path, directory: Path, *, incoming: bool) -> list[str]:
    """A small guest that only its firmware runs."""
    path = f"{directory}/{'in' if incoming else 'out'}.sock"
    arguments = [str(program), "-name", "guest=contract", "-nodefaults", "-no-user-config", "-display", "none"]
    arguments += ["-machine", MACHINE, "-accel", "tcg", "-m", "size=65536K", "-S"]
    arguments += ["-blockdev", '{"driver": "null-co", "node-name": "disk0", "size": 1048576, "read-zeroes": true}']
    arguments += ["-device", "virtio-blk-pci,drive=disk0,id=disk0-dev"]
    arguments += ["-chardev", f"socket,id=vmferry-qmp,path={path},server=on,wait=off"]
    arguments += ["-mon", "chardev=vmferry-qmp,mode=control"]
    return [*arguments, "-incoming", "defer"] if incoming else arguments


def _start(program: Path, directory: Path, *, incoming: bool) -> RealSide:
    with (directory / f"{'in' if incoming else 'out'}.log").open("ab") as log:
        command = argv(program, directory, incoming=incoming)
        return RealSide(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))


@contextlib.asynccontextmanager
async def pair_of(source: Path, destination: Path, directory: Path) -> AsyncIterator[Pair]:
    """Two programs (real ones, or fakes by their wrappers) as a pair; the source runs."""
    sides = [_start(source, directory, incoming=False), _start(destination, directory, incoming=True)]
    try:
        await asyncio.gather(sides[0].attach(directory / "out.sock"), sides[1].attach(directory / "in.sock"))
        pair = RealPair(*sides)
    except BaseException:
        for side in sides:
            await side.kill()
        raise
    try:
        await pair.source.execute("cont")
        await pair.source.until("RESUME")
        pair.source.forget()
        yield pair
    finally:
        await pair.close()
