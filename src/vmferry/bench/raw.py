"""The raw thing: two QEMUs and a bare QMP script that moves a guest between them, with vmferry's own settings.

Theory of operation
-------------------
What is left out is what vmferry adds: agents, a plan, reading options back, comparing hardware, a journal, a
grant. What is kept is what QEMU itself needs: the same command line, the same capabilities and parameters, TLS
with certificates of the job (made before the clock starts), a connected TCP socket without Nagle's delay handed
to both, the stop before the switchover, `cont` only once the source is done, the end of the source's process.

Rule 1: nothing here is clever, and nothing waits that could go on: every saving would be vmferry's to make too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from vmferry.core.option_table import Role
from vmferry.core.options import Mode, Refused, TlsChoice, build
from vmferry.errors import QemuError
from vmferry.pki import job_credentials
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.codec import Event, encode_command
from vmferry.qmp.errors import QmpDisconnected
from vmferry.testing.netns import Host
from vmferry.testing.serial_log import SerialReader
from vmferry.vm import argv as vm_argv
from vmferry.vm.runtime import RuntimePaths
from vmferry.vm.spec import VmSpec

START_S = 20.0
CONNECT_POLL_S = 0.001
MOVE_S = 120.0
END_S = 10.0
CHANNEL = "raw"


@dataclass(slots=True)
class RawQemu:
    """One QEMU of the script: process, monitor, console."""

    process: subprocess.Popen[bytes]
    monitor: BlockingClient
    console: SerialReader
    paths: RuntimePaths

    def give(self, descriptor: int) -> None:
        """getfd: its reply is dropped as one that nobody asked for; a failure shows at the descriptor's first use."""
        line = encode_command("getfd", {"fdname": CHANNEL}, id="fd")
        with socket.socket(fileno=os.dup(self.monitor.fileno())) as link:
            socket.send_fds(link, [line], [descriptor])

    def wait(self, wanted: Callable[[Event], bool]) -> Event:
        """The next event that is wanted. Raises QemuError."""
        for event in self.monitor.events(MOVE_S):
            if wanted(event):
                return event
            if event.name == "MIGRATION" and event.data.get("status") == "failed":
                break
        raise QemuError("the raw migration failed", cause=str(self.monitor.execute("query-migrate")))

    def end(self) -> None:
        """`quit`, and the kernel's word that it is gone."""
        with contextlib.suppress(QmpDisconnected):
            self.monitor.execute("quit")
        self.process.wait(END_S)

    def close(self) -> None:
        """Ends whatever is left of it."""
        self.monitor.close()
        self.console.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@dataclass(frozen=True, slots=True)
class RawMove:
    """One move: the whole, `migrate` to the source's completion, and STOP to RESUME by both QEMUs' event times."""

    wall_ms: float
    memory_ms: float
    stop_resume_ms: float


@dataclass(slots=True)
class RawGuest:
    """A guest that only the script moves. `qemu` is the one that runs it now."""

    spec: VmSpec
    program: str
    folder: Path
    hosts: tuple[Host, Host]
    with_tls: bool
    names: frozenset[str] = frozenset()
    count: int = 0
    qemu: RawQemu = field(init=False)

    def start(self) -> None:
        """Boots it."""
        self.qemu = self.spawn(incoming=False)
        self.qemu.monitor.execute("cont")
        names = {c["capability"] for c in self.qemu.monitor.execute("query-migrate-capabilities")}
        names |= set(self.qemu.monitor.execute("query-migrate-parameters"))
        self.names = frozenset(names)

    def spawn(self, *, incoming: bool) -> RawQemu:
        """A QEMU of this guest; close it. Raises QemuError."""
        self.count += 1
        folder = self.folder / f"{self.spec.name}-{self.count}"
        folder.mkdir()
        paths = RuntimePaths(str(folder))
        assert self.spec.accel != "auto", "the spec is pinned"
        argv = vm_argv.build_argv(
            self.spec,
            qemu=self.program,
            machine=self.spec.machine,
            accel=self.spec.accel,
            runtime=paths,
            incoming=incoming,
        )
        console = SerialReader.follow(Path(paths.serial_log_path))
        with open(paths.log_path, "wb") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            monitor = _connect(paths, process)
        except BaseException:
            process.kill()
            process.wait()
            console.close()
            raise
        return RawQemu(process, monitor, console, paths)

    def move(self) -> tuple[RawMove, RawQemu]:
        """Moves the guest to a new QEMU. Returns the numbers, and the old QEMU, which is gone; close it."""
        here = self.qemu
        job = secrets.token_hex(16)
        setup = {role: self.setup(job, role) for role in ("source", "destination")}
        exchange(setup["source"], setup["destination"])
        began_s = time.monotonic()
        there = self.spawn(incoming=True)
        try:
            setup["destination"].apply(there.monitor)
            setup["source"].apply(here.monitor)
            with self._channel() as (far, near):
                there.give(far.fileno())
                there.monitor.execute("migrate-incoming", {"uri": f"fd:{CHANNEL}"})
                here.give(near.fileno())
                started_s = time.monotonic()
                here.monitor.execute("migrate", {"uri": f"fd:{CHANNEL}"})
            stop = here.wait(lambda event: event.name == "STOP")
            here.wait(_is_status("pre-switchover"))
            here.monitor.execute("migrate-continue", {"state": "pre-switchover"})
            here.wait(_is_status("completed"))
            memory_ms = (time.monotonic() - started_s) * 1000
            there.wait(_is_status("completed"))
            while there.monitor.execute("query-status")["status"] == "inmigrate":
                pass  # it is told a moment before it is so, and one question takes a third of a millisecond
            there.monitor.execute("cont")
            resume = there.wait(lambda event: event.name == "RESUME")
            here.end()
            wall_ms = (time.monotonic() - began_s) * 1000
        except BaseException:
            there.close()
            raise
        self.qemu = there
        setup["destination"].undo(there.monitor)
        for part in setup.values():
            part.forget()
        pause_ms = ((resume.timestamp_us or 0) - (stop.timestamp_us or 0)) / 1000
        return RawMove(wall_ms, memory_ms, pause_ms), here

    def setup(self, job: str, side: Literal["source", "destination"]) -> Setup:
        """What vmferry would set on this side, from vmferry's own table."""
        creds_id = f"vmferry-tls-{job_credentials.tag(job)}"
        tls = TlsChoice(creds_id, creds_id, job_credentials.tls_hostname(job)) if self.with_tls else None
        options = build(
            Mode.PRECOPY, {}, source_known=self.names, destination_known=self.names, tls=tls, multifd_channels=0
        )
        assert not isinstance(options, Refused), options
        made = creds = None
        if self.with_tls:
            made = job_credentials.make(job, side, self.folder, now=datetime.now(UTC))
            version = self.qemu.monitor.execute("query-version")["qemu"]
            priority = job_credentials.tls_priority((version["major"], version["minor"]))
            creds = job_credentials.tls_creds_object(job, side, self.folder, priority=priority)
        return Setup(list(options.commands(Role.SOURCE if side == "source" else Role.DESTINATION)), made, creds)

    @contextlib.contextmanager
    def _channel(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """A connection between the two hosts: the destination's end and the source's."""
        with self.hosts[1].inside():
            door = socket.create_server((self.hosts[1].address, 0))
        with door:
            with self.hosts[0].inside():
                near = socket.create_connection(door.getsockname())
            far, _ = door.accept()
        with near, far:
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield far, near

    def close(self) -> None:
        """Ends the guest."""
        self.qemu.close()


@dataclass(slots=True)
class Setup:
    """One side's settings for one move."""

    commands: list[tuple[str, dict[str, Any]]]
    made: job_credentials.JobCredentials | None
    creds: dict[str, Any] | None

    def apply(self, monitor: BlockingClient) -> None:
        """Credentials and options."""
        if self.creds is not None:
            monitor.execute("object-add", self.creds)
        for name, arguments in self.commands:
            monitor.execute(name, arguments)

    def undo(self, monitor: BlockingClient) -> None:
        """So that the next move can make its own."""
        if self.creds is not None:
            monitor.execute("migrate-set-parameters", {"tls-creds": "", "tls-hostname": ""})
            monitor.execute("object-del", {"id": self.creds["id"]})

    def forget(self) -> None:
        """The files go."""
        if self.made is not None:
            self.made.remove()


def exchange(one: Setup, other: Setup) -> None:
    """Each side trusts the other's certificates of the job."""
    if one.made is not None and other.made is not None:
        one.made.accept_peer(other.made.ca_pem_own)
        other.made.accept_peer(one.made.ca_pem_own)


def _is_status(word: str) -> Callable[[Event], bool]:
    return lambda event: event.name == "MIGRATION" and event.data.get("status") == word


def _connect(paths: RuntimePaths, process: subprocess.Popen[bytes]) -> BlockingClient:
    """QEMU tells nobody that it listens now, so this asks until it does."""
    end_s = time.monotonic() + START_S
    while True:
        try:
            return BlockingClient(paths.qmp_path, name="the raw QEMU")
        except QmpDisconnected as error:
            if process.poll() is not None or time.monotonic() > end_s:
                words = Path(paths.log_path).read_text(errors="replace")
                raise QemuError("the raw QEMU does not start", cause=words or error) from error
            select.select([], [], [], CONNECT_POLL_S)
