"""Real QEMUs migrate over the channel that vmferry connects, under the credentials of one job.

Every test runs for each pair of QEMU versions on this machine; the newer one is skipped where it is absent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vmferry.agent.channel import Channel, ChannelListener, Ticket, dial
from vmferry.errors import HostUnreachable, QemuError
from vmferry.pki import job_credentials
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.codec import encode_command
from vmferry.qmp.errors import QmpDisconnected
from vmferry.testing.relay import Relay

pytestmark = pytest.mark.real

OLD = shutil.which("qemu-system-x86_64")
NEW = Path(__file__).parents[2] / ".cache" / "qemu-forky" / "qemu-system-x86_64"
PAIRS = [("old", "old"), ("new", "new"), ("old", "new")]
SLOW_BYTES_PER_S = 64 * 1024  # the idle guest's few hundred kilobytes then take seconds
MODES = ["precopy", "postcopy"]


def binary(which: str) -> str:
    if which == "new" and not NEW.exists():
        pytest.skip("the newer QEMU is not installed")
    if which == "old" and OLD is None:
        pytest.skip("QEMU is not installed")
    return str(NEW if which == "new" else OLD)


class Qemu:
    """One QEMU with an idle guest, and its QMP."""

    def __init__(self, program: str, room: Path, name: str, *, incoming: bool) -> None:
        room.mkdir(exist_ok=True)
        socket_path = room / f"{name}.sock"
        argv = [program, "-machine", "pc-q35-7.2,accel=kvm:tcg", "-cpu", "qemu64", "-m", "64M", "-nodefaults"]
        argv += ["-nographic", "-no-user-config", "-qmp", f"unix:{socket_path},server=on,wait=off"]
        argv += ["-S", "-incoming", "defer"] if incoming else []
        self.log = room / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.qmp = self._connect(str(socket_path))

    def _connect(self, path: str) -> BlockingClient:
        end_s = time.monotonic() + 10
        while True:
            try:
                return BlockingClient(path)
            except QemuError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < end_s, "QEMU does not open its QMP socket"
                time.sleep(0.02)

    def configure(self, parameters: dict[str, Any], *, postcopy: bool = False) -> None:
        # Without the return path a source calls itself completed although the destination refused its
        # certificate: in TLS 1.3 a client is done before the server has judged it.
        wanted = {"postcopy-ram": postcopy, "return-path": True}
        capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
        self.execute("migrate-set-capabilities", {"capabilities": capabilities})
        self.execute("migrate-set-parameters", parameters)

    def give(self, channel: Channel) -> None:
        # The blocking client sends no descriptors: its reply to this line counts as one that nobody asked for.
        line = encode_command("getfd", {"fdname": "channel"}, id="fd")
        with socket.socket(fileno=os.dup(self.qmp.fileno())) as link:
            socket.send_fds(link, [line], [channel.fileno()])
        self.execute("query-status")  # in band behind it: an out-of-band command must not overtake the descriptor

    def status(self) -> str:
        return str(self.execute("query-migrate").get("status"))

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run it; a QEMU that is gone fails the test with its exit status and last words."""
        try:
            return self.qmp.execute(command, arguments)
        except QmpDisconnected:
            status = self.process.wait(5)
            pytest.fail(f"QEMU ended with {status} at {command}: {self.log.read_text()}")

    def is_running(self) -> bool:
        return bool(self.execute("query-status")["running"])

    async def reaches(self, *wanted: str, deadline_s: float = 15) -> str:
        end_s = time.monotonic() + deadline_s
        while (status := self.status()) not in wanted:
            assert time.monotonic() < end_s, f"status is {status}: {self.log.read_text()}"
            await asyncio.sleep(0.01)
        return status

    async def ends(self, deadline_s: float = 10) -> None:
        end_s = time.monotonic() + deadline_s
        while self.process.poll() is None:
            assert time.monotonic() < end_s, "QEMU does not end"
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self.qmp.close()
        self.process.kill()
        self.process.wait()


class Pair:
    """Two QEMUs, a room for credentials, and the job's listener."""

    def __init__(self, programs: tuple[str, str], room: Path, listener: ChannelListener) -> None:
        self.room = room
        self.listener = listener
        self.source = Qemu(programs[0], room, "source", incoming=False)
        self.destination = Qemu(programs[1], room, "destination", incoming=True)
        self.channels: list[Channel] = []
        self.entrusts = True

    def secure(self, job: str, *, stranger: job_credentials.Role | None = None, postcopy: bool) -> None:
        """Credentials of `job` on both sides; the `stranger` shows those of another job instead."""
        now = datetime.now(UTC)
        rooms = {role: self.room / role for role in ("source", "destination")}
        made = {role: job_credentials.make(job, role, rooms[role], now=now) for role in _ROLES}
        peers = {role: made[role].ca_pem_own for role in _ROLES}
        if stranger is not None:
            made[stranger] = job_credentials.make(job, stranger, rooms[stranger], now=now)
        made["source"].accept_peer(peers["destination"])
        made["destination"].accept_peer(peers["source"])
        for role, qemu in zip(_ROLES, (self.source, self.destination), strict=True):
            version = qemu.qmp.execute("query-version")["qemu"]
            priority = job_credentials.tls_priority((version["major"], version["minor"]))
            creds = job_credentials.tls_creds_object(job, role, rooms[role], priority=priority)
            qemu.qmp.execute("object-add", creds)
            parameters = {"tls-creds": creds["id"]}
            if role == "source":
                parameters["tls-hostname"] = job_credentials.tls_hostname(job)
            qemu.configure(parameters, postcopy=postcopy)
            made[role].remove()

    async def connect(self, name: str = "main", *, through: Relay | None = None) -> tuple[Channel, Channel]:
        ticket = self.listener.expect(name)
        addresses = self.listener.addresses
        if through is not None:
            assert not isinstance(through.address, str)
            addresses = (through.address,)
        pair = await asyncio.gather(dial(addresses, ticket, deadline_s=5), self.listener.arrived(name, deadline_s=5))
        self.channels += pair
        return pair

    def migrate(self, source: Channel, destination: Channel) -> None:
        self.destination.give(destination)
        self.destination.qmp.execute("migrate-incoming", {"uri": "fd:channel"})
        self.source.give(source)
        self.source.qmp.execute("migrate", {"uri": "fd:channel"})
        if self.entrusts:
            assert source.entrust(self.source.process.pid)
            assert destination.entrust(self.destination.process.pid)

    async def begin_slowly(self, *, postcopy: bool = False) -> tuple[Channel, Channel]:
        """A migration under job credentials that is active, and stays so for seconds."""
        self.secure("job-1", postcopy=postcopy)
        slow = {"max-bandwidth": SLOW_BYTES_PER_S} | ({"max-postcopy-bandwidth": SLOW_BYTES_PER_S} if postcopy else {})
        self.source.execute("migrate-set-parameters", slow)
        channels = await self.connect()
        self.migrate(*channels)
        await self.source.reaches("active")
        return channels

    def stop(self) -> None:
        for channel in self.channels:
            channel.close()
        self.source.stop()
        self.destination.stop()


async def until_let_go(channel: Channel, qemu: Qemu, deadline_s: float = 10) -> None:
    end_s = time.monotonic() + deadline_s
    while channel.is_held_by(qemu.process.pid):
        assert time.monotonic() < end_s, f"QEMU keeps the channel: {qemu.log.read_text()}"
        await asyncio.sleep(0.01)


_ROLES: tuple[job_credentials.Role, job_credentials.Role] = ("source", "destination")


@pytest.fixture
def room() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vf"))  # short: unix socket paths are
    yield path
    shutil.rmtree(path)


@contextlib.asynccontextmanager
async def pair_of(pair: tuple[str, str], room: Path) -> AsyncIterator[Pair]:
    programs = binary(pair[0]), binary(pair[1])
    listener = await ChannelListener.open("job-1", ["127.0.0.1"])
    made = Pair(programs, room, listener)
    try:
        yield made
    finally:
        made.stop()
        await listener.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
async def test_a_guest_goes_over_under_job_credentials(pair: tuple[str, str], mode: str, room: Path) -> None:
    async with pair_of(pair, room) as both:
        both.secure("job-1", postcopy=mode == "postcopy")
        with Relay(both.listener.addresses[0]) as relay:
            plain = relay.to_target.at_pattern(b"QEVM", lambda: None, when="after")
            channels = await both.connect(through=relay)
            if mode == "postcopy":
                both.source.qmp.execute("migrate-set-parameters", {"max-bandwidth": SLOW_BYTES_PER_S})
            both.migrate(*channels)
            if mode == "postcopy":
                await both.source.reaches("active")
                both.source.qmp.execute("migrate-start-postcopy")
            await both.source.reaches("completed")
            await both.destination.reaches("completed")
            assert not plain.has_fired, "the stream's magic went over the line in the clear"
        assert not both.source.is_running()
        both.destination.qmp.execute("cont")
        assert both.destination.is_running()
        assert not any(path.is_dir() for role in _ROLES for path in (room / role).glob("job-*"))


@pytest.mark.parametrize("entrusts", [True, False], ids=["entrusted", "held"])
@pytest.mark.parametrize("stranger", _ROLES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
async def test_credentials_of_another_job_are_refused(
    pair: tuple[str, str], stranger: job_credentials.Role, entrusts: bool, room: Path
) -> None:
    async with pair_of(pair, room) as both:
        both.entrusts = entrusts
        both.secure("job-1", stranger=stranger, postcopy=False)
        source, destination = await both.connect()
        both.source.qmp.execute("migrate-set-parameters", {"max-bandwidth": SLOW_BYTES_PER_S})
        both.migrate(source, destination)
        # Who refuses drops the channel. While our descriptors hold it, the other sees nothing of that.
        refuser, channel = (both.destination, destination) if stranger == "source" else (both.source, source)
        if not entrusts:
            await until_let_go(channel, refuser)
            channel.cut()
        await both.source.reaches("failed")
        assert both.source.is_running()
        with contextlib.suppress(QemuError):  # 7.2 ends itself
            assert both.destination.qmp.execute("query-migrate").get("status") != "completed"


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
async def test_a_stranger_without_the_token_never_reaches_qemu(pair: tuple[str, str], room: Path) -> None:
    async with pair_of(pair, room) as both:
        both.secure("job-1", postcopy=False)
        with pytest.raises(HostUnreachable):
            await dial(both.listener.addresses, Ticket("job-1", "main", bytes(32)), deadline_s=5)
        assert both.listener.strangers_dropped == 1
        both.migrate(*await both.connect())
        await both.source.reaches("completed")
        await both.destination.reaches("completed")


@pytest.mark.parametrize("frozen", [False, True], ids=["alive", "frozen"])
@pytest.mark.parametrize("side", _ROLES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
async def test_cut_ends_the_migration_and_the_source_runs(
    pair: tuple[str, str], side: job_credentials.Role, frozen: bool, room: Path
) -> None:
    """Also through a destination that is frozen and can say nothing itself."""
    async with pair_of(pair, room) as both:
        channels = await both.begin_slowly()
        if frozen:
            both.destination.process.send_signal(signal.SIGSTOP)
        else:
            await both.destination.reaches("active")
        began_s = time.monotonic()
        channels[_ROLES.index(side)].cut()
        await both.source.reaches("failed", deadline_s=2)
        assert time.monotonic() - began_s < 2
        assert both.source.is_running()
        if not frozen:
            await both.destination.ends()  # an incoming QEMU that loses its stream gives up


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
async def test_postcopy_is_cut_and_goes_on_over_a_second_channel(pair: tuple[str, str], room: Path) -> None:
    async with pair_of(pair, room) as both:
        source, destination = await both.begin_slowly(postcopy=True)
        both.source.qmp.execute("migrate-start-postcopy")
        await both.source.reaches("postcopy-active")
        await both.destination.reaches("postcopy-active")
        both.destination.qmp.execute("cont")
        source.cut()
        await both.source.reaches("postcopy-paused")
        await both.destination.reaches("postcopy-paused")
        source.close()
        destination.close()

        source, destination = await both.connect("main-2")
        both.destination.give(destination)
        both.destination.qmp.execute("migrate-recover", {"uri": "fd:channel"}, oob=True)
        both.source.give(source)
        both.source.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        both.source.qmp.execute("migrate", {"uri": "fd:channel", "resume": True})
        await both.source.reaches("completed")
        await both.destination.reaches("completed")
        assert both.destination.is_running()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("entrusts", [True, False], ids=["entrusted", "held"])
async def test_only_a_held_channel_hides_the_death_of_the_peer(
    pair: tuple[str, str], entrusts: bool, room: Path
) -> None:
    async with pair_of(pair, room) as both:
        both.entrusts = entrusts
        _, destination = await both.begin_slowly()
        both.destination.process.kill()
        both.destination.process.wait()
        if not entrusts:
            await asyncio.sleep(0.3)
            assert both.source.status() == "active"
            destination.cut()
        await both.source.reaches("failed", deadline_s=2)
        assert both.source.is_running()
