"""One QEMU process as an agent holds it: its identity, its QMP session, its events. Decides nothing.

Theory of operation
-------------------
A QEMU outlives the agent (own session, see `vm.spawn`); a restarted agent attaches again over the QMP socket.
The machine watches the process by a pidfd (`Process`), so its end is seen at once and never mistaken for a silent
QMP. When the session breaks and the process lives, `reattach` connects again.

Rule 1: `is_gone` is true as soon as the process has ended, by the kernel's word, and never before.
Rule 2: `kill` is carried out for whoever holds a row that asks for it; nothing here kills on its own account.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from vmferry.clock import Clock
from vmferry.errors import QemuError
from vmferry.qmp import client as qmp_client
from vmferry.qmp.client import QmpClient
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpDisconnected
from vmferry.vm import spawn as vm_spawn
from vmferry.vm.runtime import RuntimePaths
from vmferry.vm.spawn import ProcessIdentity

log = logging.getLogger("vmferry.agent")

ATTACH_S = 5.0
"""A QEMU that was just started answers within 0.1 s here; a busy host may need much longer."""
START_S = 20.0
"""A QEMU that preallocates much memory needs seconds; one that hangs is given up."""
SOCKET_POLL_S = 0.002
COMMAND_S = 5.0
"""Ordinary commands are answered within a millisecond; QEMU's main loop may hang for seconds in a load."""

EventHandler = Callable[[Event], None]


class Process(Protocol):
    """A process as the kernel lets somebody hold it: by a name that no other process can take over."""

    async def wait_exit(self) -> int | None:
        """Until it has ended; its status if the kernel tells."""

    def has_ended(self) -> bool:
        """Whether it has, by the kernel's word of this moment."""

    def kill(self) -> None:
        """SIGKILL. Raises ProcessLookupError when it has ended."""

    def close(self) -> None:
        """Gives the hold up; the process is not touched. May be called twice."""


class Connect(Protocol):
    """How to get a QMP session at a path: `qmp.client.connect_unix`."""

    async def __call__(
        self, path: str, *, name: str | None = None, on_event: EventHandler | None = None, deadline_s: float = ...
    ) -> QmpClient: ...


class EndedProcess:
    """A process that had ended before anybody could hold it."""

    async def wait_exit(self) -> int | None:
        return None

    def has_ended(self) -> bool:
        return True

    def kill(self) -> None:
        raise ProcessLookupError

    def close(self) -> None:
        """Nothing is held."""


class PidfdProcess:
    """A process of this host. Owns its pidfd."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd

    async def wait_exit(self) -> int | None:
        return await vm_spawn.wait_exit(self._pidfd)

    def has_ended(self) -> bool:
        return vm_spawn.has_ended(self._pidfd)

    def kill(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Machine:
    """A QEMU process and the session with it. Lives on the agent's loop; `close` ends the session only."""

    def __init__(
        self,
        vm: str,
        identity: ProcessIdentity,
        qmp_path: str,
        *,
        process: Process,
        clock: Clock,
        connect: Connect = qmp_client.connect_unix,
    ) -> None:
        self.vm, self.identity, self.qmp_path, self.clock = vm, identity, qmp_path, clock
        self.client: QmpClient | None = None
        self.on_event: EventHandler | None = None
        self.on_gone: Callable[[], None] | None = None
        self.listeners: set[EventHandler] = set()
        """Who hears its events beside the one who holds it."""
        self._process, self._connect = process, connect
        self._gone = asyncio.Event()
        self._watch = asyncio.create_task(self._watch_exit(), name=f"exit-{vm}-{identity.pid}")
        self._attaching = asyncio.Lock()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.identity.pid

    @property
    def version(self) -> tuple[int, int]:
        """QEMU's major and minor version, (0, 0) before the first session."""
        return (0, 0) if self.client is None else self.client.version[:2]

    @property
    def version_text(self) -> str:
        """QEMU's version as people write it."""
        return "unknown" if self.client is None else ".".join(str(n) for n in self.client.version)

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended. The kernel is asked each time: the loop hears of an end only in its next turn.

        1. the destination's QEMU dies, loaded and never started  2. the order to start arrives  3. its guard finds a
        QEMU that lives, and `cont` is written to nobody  4. the loop hears of the end: now it has to be taken as having
        run, and the guest, which the source has whole, is lost
        """
        return self._gone.is_set() or self._process.has_ended()

    async def attach(self, *, deadline_s: float = ATTACH_S) -> QmpClient:
        """The QMP session, connected if it is not. Raises QemuError; the guest is then as it was."""
        async with self._attaching:
            if self.client is not None and not self.client.closed.done():
                return self.client
            if self.is_gone:
                raise QemuError(f"the QEMU of {self.vm} (process {self.pid}) is gone", guest="unknown")
            self.client = await self._connect(
                self.qmp_path, name=f"the QEMU of {self.vm}", on_event=self.hear, deadline_s=deadline_s
            )
            return self.client

    def hear(self, event: Event) -> None:
        """An event of this QEMU arrived: pass it to the one who holds the machine, then to those who listen."""
        if self.on_event is not None:
            self.on_event(event)
        for listen in tuple(self.listeners):
            listen(event)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        deadline_s: float = COMMAND_S,
        fds: tuple[int, ...] = (),
    ) -> Any:
        """One command of this QEMU. Raises QmpCommandError (no effect), QmpTimeout or QmpDisconnected."""
        client = await self.attach()
        return await client.execute(command, arguments, oob=oob, deadline_s=deadline_s, fds=fds)

    async def execute_all(self, commands: Iterable[tuple[str, Mapping[str, Any] | None]]) -> list[Any]:
        """Commands that QEMU shall carry out in this order, sent without waiting for the answer to the one before:
        their answers. Raises the first error once all are answered; those after a refused one were carried out."""
        answers = await asyncio.gather(*(self.execute(*command) for command in commands), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def run_state(self, *, deadline_s: float = COMMAND_S) -> str:
        """QEMU's run state word ('running', 'paused', 'inmigrate' …)."""
        return str((await self.execute("query-status", deadline_s=deadline_s))["status"])

    async def migration(self, *, deadline_s: float = COMMAND_S) -> dict[str, Any]:
        """What query-migrate says, as it is."""
        info = await self.execute("query-migrate", deadline_s=deadline_s)
        return dict(info)

    async def wait_gone(self, *, deadline_s: float) -> bool:
        """True once the process has ended; False if it has not within the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._gone.wait()
        except TimeoutError:
            return False
        return True

    async def quit(self, *, deadline_s: float = 3.0) -> None:
        """Ends the process: asks it to quit, then kills it. Only for a row that says so."""
        try:
            await self.execute("quit", deadline_s=min(1.0, deadline_s))
        except QmpDisconnected:
            log.debug("vm=%s pid=%d quit ended the session before it answered", self.vm, self.pid)
        except QemuError as error:
            log.warning("vm=%s pid=%d command=quit result=%s", self.vm, self.pid, error)
        if not await self.wait_gone(deadline_s=deadline_s):
            await self.kill()

    async def kill(self, *, deadline_s: float = 5.0) -> bool:
        """SIGKILL to exactly this process; True once the kernel says that it is gone."""
        if not self.is_gone:
            try:
                self._process.kill()
            except ProcessLookupError:
                log.debug("vm=%s pid=%d was gone before the kill", self.vm, self.pid)
        return await self.wait_gone(deadline_s=deadline_s)

    async def close(self) -> None:
        """Ends the session and the watching. The process is not touched."""
        self.on_event = self.on_gone = None
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        if self.client is not None:
            await self.client.close()
        self._process.close()

    async def _watch_exit(self) -> None:
        status = await self._process.wait_exit()
        log.info("vm=%s pid=%d result=exited status=%s", self.vm, self.pid, status)
        self._gone.set()
        if self.on_gone is not None:
            self.on_gone()


async def launch(
    vm: str, argv: list[str], runtime: RuntimePaths, *, clock: Clock, deadline_s: float = START_S
) -> Machine:
    """Starts a QEMU and connects to it. Raises SpecError with QEMU's own words when it refuses, QemuError when
    it does not answer in time; no process and no file is left then."""
    end_s = clock.now_s() + deadline_s

    async def connected() -> QmpClient:
        while True:
            try:
                return await qmp_client.connect_unix(runtime.qmp_path, name=f"the QEMU of {vm}")
            except QmpDisconnected:
                # The socket is not there yet: QEMU makes it 20 ms after its start and has no event for it.
                if clock.now_s() >= end_s:
                    raise
                await asyncio.sleep(SOCKET_POLL_S)

    spawned, client = await vm_spawn.start(argv, runtime=runtime, ready=connected, timeout_s=deadline_s)
    machine = Machine(vm, spawned.identity, runtime.qmp_path, process=PidfdProcess(spawned.pidfd), clock=clock)
    machine.client = client
    client.subscribe(machine.hear)
    return machine


def attach_process(vm: str, identity: ProcessIdentity, qmp_path: str, *, clock: Clock) -> Machine | None:
    """The machine of a process that was started earlier, or None if exactly that process is gone."""
    pidfd = vm_spawn.open_process(identity)
    if pidfd is None:
        return None
    return Machine(vm, identity, qmp_path, process=PidfdProcess(pidfd), clock=clock)


def ended(vm: str, identity: ProcessIdentity, qmp_path: str, *, clock: Clock) -> Machine:
    """The machine of a process that is known to be gone."""
    machine = Machine(vm, identity, qmp_path, process=EndedProcess(), clock=clock)
    machine._gone.set()
    return machine
