"""A program that behaves like QEMU where a migration can see it: `python -m vmferry.testing.fake_qemu ARGUMENTS`.

Theory of operation
-------------------
It takes QEMU's command line as `vm.argv` builds it, listens for QMP on the chardev's socket, takes descriptors by
SCM_RIGHTS, and migrates to another fake over whatever connection it was given, so that everything around it is
real: processes, pidfds, signals, sockets that can be cut. It needs no guest, no memory and no root, and starts in a
fraction of a second. `contract` proves that it and the real programs show the same sequences.

Environment: VMFERRY_FAKE_PROFILE is the version ("7.2", "11.1"); VMFERRY_FAKE_DIRECTOR is a JSON script or the
socket of a `fake_director.Director`; VMFERRY_FAKE_HOST is the name the director knows it by.

Rule 1: only the standard library and vmferry's own lean rooms: it starts without site-packages.
Rule 2: a fake whose director is gone ends, so no test leaves one behind.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vmferry.clock import SystemClock
from vmferry.qmp.codec import Command, encode_error, encode_greeting, encode_reply
from vmferry.qmp.session import Peer, Session
from vmferry.testing.fake_block import Block, nodes_of
from vmferry.testing.fake_commands import Commands
from vmferry.testing.fake_profile import PROFILES, Profile
from vmferry.testing.fake_state import Director, Refused, State

DESCRIPTORS_MAX = 16
_UNIT = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "B": 1}


class FakeSession(Session):
    """A session whose refusals look exactly like QEMU's: without vmferry's own error member."""

    async def _answer(self, command: Command) -> bytes:
        try:
            value = await self._handle(self, command)
        except Refused as error:
            return encode_error(error.qmp_class, error.desc, id=command.id)
        return encode_reply({} if value is None else value, id=command.id)


class CommandLine:
    """What of QEMU's command line matters here. Unknown options are passed over with their values."""

    def __init__(self, argv: list[str]) -> None:
        self.name, self.qmp_path, self.is_incoming = "unnamed", "", False
        self.is_paused = "-S" in argv
        self.memory_bytes, self.cpus = 128 << 20, 1
        self.devices: dict[str, str] = {}
        self._blockdevs: list[str] = []
        self._drives: list[tuple[str, str]] = []
        for option, value in zip(argv, [*argv[1:], ""], strict=True):
            fields = dict(part.partition("=")[::2] for part in value.split(","))
            match option:
                case "-name":
                    self.name = fields.get("guest", value.split(",")[0])
                case "-chardev" if fields.get("id") == "vmferry-qmp":
                    self.qmp_path = fields["path"]
                case "-incoming":
                    self.is_incoming = True
                case "-m":
                    self.memory_bytes = _size(fields.get("size", value))
                case "-smp":
                    self.cpus = int(fields.get("cpus", value))
                case "-device" if "id" in fields:
                    self.devices[fields["id"]] = value.split(",")[0].removeprefix("driver=")
                    if "drive" in fields:
                        self._drives.append((fields["id"], fields["drive"]))
                case "-blockdev":
                    self._blockdevs.append(value)

    def block(self, state: State) -> Block:
        """The disks."""
        return Block(state, nodes_of(self._blockdevs), tuple(self._drives))


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMGB]?)", text)
    assert found is not None, f"memory size {text!r}"
    return int(found[1]) * _UNIT[found[2]]


class FakeQemu:
    """The process: one monitor socket, one session at a time, as QEMU serves it."""

    def __init__(self, profile: Profile, line: CommandLine, director: Director) -> None:
        self.state = State(profile, director)
        self.commands = Commands(
            self.state,
            memory_bytes=line.memory_bytes,
            cpus=line.cpus,
            devices=line.devices,
            incoming=line.is_incoming,
            block=line.block(self.state),
        )
        self._line = line
        self._session: Session | None = None
        self.state.emit = self._emit

    async def serve(self) -> None:
        """Until it shall end."""
        director = self.state.director
        director.watch()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._line.qmp_path)
        listener.listen(1)
        listener.setblocking(False)
        if not self._line.is_paused and not self._line.is_incoming:
            self.state.set_run_state("running")
        await self.state.step("in-start" if self._line.is_incoming else "start", lost=self.commands.over)
        serving = asyncio.create_task(self._serve_all(listener), name="fake-monitor")
        await self.commands.over.wait()
        if self._session is not None:
            self._session.drop("QEMU ends")
        serving.cancel()
        await asyncio.wait({serving}, timeout=1.0)

    async def _serve_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            await self._serve_one(connection)

    async def _serve_one(self, connection: socket.socket) -> None:
        """Reads by itself, because asyncio's streams drop descriptors; writes through a stream."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, protocol = await loop.create_connection(_WriteOnly, sock=connection.dup())
        connection.setblocking(False)
        loop.add_reader(connection, self._read, connection, reader)
        session = FakeSession(
            reader,
            asyncio.StreamWriter(transport, protocol, None, loop),
            name="fake",
            peer=Peer(),
            handle=self._handle,
            version=self.state.profile.version_info(),
            clock=SystemClock(),
        )
        self._session = session
        try:
            await session.run()
        finally:
            self._session = None
            loop.remove_reader(connection)
            connection.close()

    def _read(self, connection: socket.socket, reader: asyncio.StreamReader) -> None:
        size = socket.CMSG_LEN(DESCRIPTORS_MAX * 4)
        try:
            data, ancillary, _, _ = connection.recvmsg(65536, size)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        found = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found.frombytes(payload)
        if found:
            self.commands.received = list(found)
        if data:
            reader.feed_data(data)
        else:
            asyncio.get_running_loop().remove_reader(connection)
            reader.feed_eof()

    async def _handle(self, session: Session, command: Command) -> Any:
        return await self.commands.run(command.name, dict(command.arguments), oob=command.oob)

    def _emit(self, name: str, data: Mapping[str, Any] | None) -> None:
        if self._session is not None:
            self._session.emit(name, data)


class _WriteOnly(asyncio.StreamReaderProtocol):
    """The writing half of a stream; the reading half never reads."""

    def __init__(self) -> None:
        super().__init__(asyncio.StreamReader())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        super().connection_made(transport)


def answer_probe(profile: Profile, argv: list[str]) -> int:
    """`-qmp stdio`: a throw-away QEMU that is asked what it can do. Answers until `quit` or the end of input."""
    commands = Commands(
        State(profile, Director()), memory_bytes=128 << 20, cpus=1, devices={}, incoming="-incoming" in argv
    )
    sys.stdout.buffer.write(encode_greeting(profile.version_info(), ("oob",)))
    for text in sys.stdin:
        request = json.loads(text)
        if request["execute"] in ("qmp_capabilities", "quit"):
            line = encode_reply({})
        else:
            try:
                value = asyncio.run(commands.run(request["execute"], request.get("arguments", {}), oob=False))
                line = encode_reply({} if value is None else value)
            except Refused as error:
                line = encode_error(error.qmp_class, error.desc)
        sys.stdout.buffer.write(line)
        if request["execute"] == "quit":
            break
    sys.stdout.buffer.flush()
    return 0


def main(argv: list[str], environment: Mapping[str, str], run: Callable[[Any], Any] = asyncio.run) -> int:
    """The program."""
    profile = PROFILES[environment.get("VMFERRY_FAKE_PROFILE", "11.1")]
    if "--version" in argv:
        print(profile.banner())
        return 0
    if "-qmp" in argv:
        if "accel=kvm" in " ".join(argv):
            print("qemu-system-x86_64: Could not access KVM kernel module", file=sys.stderr)
            return 1
        return answer_probe(profile, argv)
    line = CommandLine(argv)
    director = Director()
    director.connect(
        environment.get("VMFERRY_FAKE_DIRECTOR"),
        {
            "hello": line.name,
            "host": environment.get("VMFERRY_FAKE_HOST", ""),
            "pid": os.getpid(),
            "incoming": line.is_incoming,
        },
    )

    async def serve() -> None:
        await FakeQemu(profile, line, director).serve()

    run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
