"""Processes, descriptors and connections of the simulated hosts: what a kernel does when somebody dies.

Theory of operation
-------------------
A `SimProcess` is an owner of tasks (see `loop`). Killing it takes its tasks away between two steps, lets its
connections go (the other ends see that after the way there), and tells whoever watches it.

A `Socket` is one end of a connection. It is held by processes, as a descriptor that was passed on is held by two; it
ends when the last of them lets go, or when somebody shuts it down. What is sent arrives in order, after the time that
the path between the two hosts takes (`net`); while a path is blocked it waits there, and a connection whose data waits
too long is given up by its kernel.

Rule 1: what arrives is delivered as a callback of the receiving process: a frozen one gets it when it thaws, a dead
        one never.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vmferry.testing.sim.loop import OWNER, Handle, SimTask, VirtualLoop
from vmferry.testing.sim.net import Net, Path
from vmferry.testing.sim.trace import Trace

T = TypeVar("T")
Place = tuple[str, int | str]
FIRST_PID = 100
FIRST_DESCRIPTOR = 1000
FIRST_PORT = 40000
KEPT_TASKS = 512
CLOSE_TRIES = 20


class SimProcess:
    """One process of one host."""

    def __init__(self, kernel: Kernel, host: str, name: str) -> None:
        self.kernel, self.host, self.name = kernel, host, name
        self.pid = kernel.next_pid()
        self.is_dead = False
        self.is_frozen = False
        self.status: int | None = None
        self.parked: list[Handle] = []
        self.held: list[Socket] = []
        self.on_death: list[Callable[[], None]] = []
        """Called at once, outside of any process: what a kernel does."""
        self._tasks: list[SimTask] = []
        self._context = contextvars.Context()
        self._context.run(OWNER.set, self)

    def __str__(self) -> str:
        return f"{self.host}/{self.name}"

    def keep(self, task: SimTask) -> None:
        """Holds its tasks: one whose process is dead must not be freed before the run is over, as that would run its
        `finally` blocks."""
        if len(self._tasks) > KEPT_TASKS:
            self._tasks = [old for old in self._tasks if not old.done()]
        self._tasks.append(task)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """A task of this process."""
        return self.kernel.loop.create_task(work, name=name, context=self._context.copy())

    def call(self, callback: Callable[..., object], *args: Any, after_s: float = 0.0) -> None:
        """A callback of this process."""
        if after_s > 0:
            self.kernel.loop.call_later(after_s, callback, *args, context=self._context.copy())
        else:
            self.kernel.loop.call_soon(callback, *args, context=self._context.copy())

    def freeze(self) -> None:
        """SIGSTOP."""
        if not self.is_dead:
            self.is_frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        if self.is_frozen:
            self.is_frozen = False
            parked, self.parked = self.parked, []
            self.kernel.loop.resume(parked)

    def die(self, status: int = -9) -> None:
        """The end: SIGKILL, or an exit of its own."""
        if self.is_dead:
            return
        self.is_dead, self.is_frozen, self.status = True, False, status
        self.kernel.trace.tell(self.host, f"process {self.name} pid={self.pid} ended status={status}")
        for sock in list(self.held):
            sock.let_go(self)
        for hook in self.on_death:
            hook()

    def end(self) -> None:
        """The run is over: nothing of it may run any more, nor complain when its memory is freed."""
        self.is_dead = True
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                _close(task.get_coro())


def _close(coroutine: Any) -> None:
    """Lets a coroutine that will never go on run its `finally` blocks, which nobody sees any more."""
    if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:  # it has not come to await what it was given
        for given in coroutine.cr_frame.f_locals.values():
            if inspect.iscoroutine(given):
                given.close()
    for _ in range(CLOSE_TRIES):
        try:
            coroutine.close()
        except Exception:  # noqa: BLE001 - it waits again, or misses the world that is gone
            continue
        return


class Socket:
    """One end of a connection. `on_data` and `on_end` belong to the process that reads."""

    def __init__(self, kernel: Kernel, path: Path, label: str) -> None:
        self.kernel, self.path, self.label = kernel, path, label
        self.peer: Socket
        self.holders: list[SimProcess] = []
        self.reader: SimProcess | None = None
        self.is_over = False
        """Nothing goes out any more, and nothing comes in."""
        self._on_data: Callable[[Any], None] | None = None
        self._on_end: Callable[[str], None] | None = None
        self._waiting: deque[Any] = deque()
        self._end_reason: str | None = None
        self.last_arrival_s = 0.0
        """Of what was sent from here: nothing overtakes."""

    def held_by(self, process: SimProcess) -> Socket:
        """One more holder."""
        self.holders.append(process)
        process.held.append(self)
        return self

    def let_go(self, process: SimProcess) -> None:
        """A holder's descriptor was closed. The last one ends the connection."""
        if process in self.holders:
            self.holders.remove(process)
            process.held.remove(self)
        if not self.holders:
            self.shut("the other side closed it")

    def read(self, process: SimProcess, on_data: Callable[[Any], None], on_end: Callable[[str], None]) -> None:
        """From now on this process reads; what came before is given first."""
        self.reader, self._on_data, self._on_end = process, on_data, on_end
        while self._waiting:
            process.call(on_data, self._waiting.popleft())
        if self._end_reason is not None:
            process.call(on_end, self._end_reason)

    def unread(self) -> None:
        """Nobody reads for the moment: what comes waits for the next reader."""
        self.reader = self._on_data = self._on_end = None

    def send(self, payload: Any) -> None:
        """Queues it. On an ended connection it goes nowhere."""
        if not self.is_over:
            self.kernel.net.carry(self.path, self, payload)

    def shut(self, reason: str) -> None:
        """No more from here, and nothing is read any more: the other end learns it after the way there."""
        if not self.is_over:
            self.is_over = True
            self._ended(reason)
            self.kernel.net.carry_end(self.path, self)

    def broke(self, reason: str) -> None:
        """This end is told by its kernel that the connection is gone."""
        if not self.is_over:
            self.is_over = True
            self._ended(reason)

    def arrive(self, payload: Any) -> None:
        """For the net: something reached this end."""
        if self.is_over:
            return
        if self.reader is None or self._on_data is None:
            self._waiting.append(payload)
        else:
            self.reader.call(self._on_data, payload)

    def _ended(self, reason: str) -> None:
        self._end_reason = reason
        if self.reader is not None and self._on_end is not None:
            self.reader.call(self._on_end, reason)


@dataclass(slots=True)
class Listener:
    """Somebody accepts connections at an address."""

    process: SimProcess
    accept: Callable[[Socket], None]
    what: str


@dataclass(eq=False)
class Kernel:
    """All hosts of a run."""

    loop: VirtualLoop
    net: Net
    trace: Trace
    processes: list[SimProcess] = field(default_factory=list)
    listeners: dict[Place, Listener] = field(default_factory=dict)
    """By (address, port or path); an address is a host's name here."""
    descriptors: dict[int, tuple[SimProcess, Socket]] = field(default_factory=dict)
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """What must be told that the run is over, lest it complains when its memory is freed."""
    _pids: int = FIRST_PID
    _descriptors: int = FIRST_DESCRIPTOR
    _ports: int = FIRST_PORT

    def next_pid(self) -> int:
        self._pids += 1
        return self._pids

    def start(self, host: str, name: str) -> SimProcess:
        """A new process."""
        process = SimProcess(self, host, name)
        self.processes.append(process)
        self.trace.tell(host, f"process {name} pid={process.pid} began")
        return process

    def current(self) -> SimProcess:
        """The process that runs this very line."""
        owner = OWNER.get()
        assert isinstance(owner, SimProcess), "this is no process's code"
        return owner

    # --- connections ---

    def pair(self, kind: str, near: SimProcess, far: SimProcess, label: str) -> tuple[Socket, Socket]:
        """A connection between two processes, each holding its end."""
        one = Socket(self, self.net.path(kind, near.host, far.host), label)
        two = Socket(self, self.net.path(kind, far.host, near.host), label)
        one.peer, two.peer = two, one
        return one.held_by(near), two.held_by(far)

    def listen(self, process: SimProcess, port: int, accept: Callable[[Socket], None], what: str) -> int:
        """The port (0: any). Raises OSError when it is taken."""
        if port == 0:
            self._ports += 1  # never one that somebody had: a late close would hit a stranger
            port = self._ports
        key = (process.host, port)
        if key in self.listeners:
            raise OSError(98, "Address already in use")
        self._listen(key, Listener(process, accept, what))
        return port

    def listen_at(self, process: SimProcess, path: str, accept: Callable[[Socket], None], what: str) -> None:
        """At a path of the process's host; who listened there before does not any more."""
        self._listen((process.host, path), Listener(process, accept, what))

    def _listen(self, key: Place, listener: Listener) -> None:
        self.listeners[key] = listener
        listener.process.on_death.append(lambda: self.unlisten(key, listener.process))

    def unlisten(self, key: Place, process: SimProcess) -> None:
        """The process does not listen there any more."""
        found = self.listeners.get(key)
        if found is not None and found.process is process:
            del self.listeners[key]

    async def connect(self, process: SimProcess, host: str, port: int | str, kind: str) -> Socket:
        """Raises OSError when nobody listens; waits for ever while the path is blocked, as a lost SYN does."""
        await self.net.round_trip(process.host, host, kind)
        found = self.listeners.get((host, port))
        if found is None:
            raise ConnectionRefusedError(111, f"Connect call failed ('{host}', {port})")
        near, far = self.pair(kind, process, found.process, found.what)
        found.process.call(found.accept, far)
        return near

    def reset(self, kind: str) -> bool:
        """Every connection of the kind breaks for both ends; False when there is none."""
        found = [sock for process in self.processes for sock in process.held if sock.path.kind == kind]
        for sock in found:
            sock.broke("Connection reset by peer")
        return bool(found)

    # --- descriptors ---

    def give(self, process: SimProcess, sock: Socket) -> int:
        """A descriptor of the socket for a process that holds it."""
        self._descriptors += 1
        self.descriptors[self._descriptors] = (process, sock)
        return self._descriptors

    def pass_on(self, descriptor: int, to: SimProcess) -> int:
        """SCM_RIGHTS: the receiver has one of its own."""
        _, sock = self.descriptors[descriptor]
        return self.give(to, sock.held_by(to))

    def take(self, descriptor: int) -> Socket:
        """What a descriptor names; the number is used up, the hold is not."""
        return self.descriptors.pop(descriptor)[1]

    def close(self, descriptor: int) -> None:
        """Gives a descriptor and its hold back."""
        found = self.descriptors.pop(descriptor, None)
        if found is not None:
            found[1].let_go(found[0])

    def end(self) -> None:
        """The run is over."""
        for process in self.processes:
            process.end()
        for tell in self.at_end:
            tell()
