"""One client of a QMP server: reads its commands, runs them, and sends it replies and events.

Theory of operation
-------------------
`Session.run` owns the connection from greeting to close. Three tasks: *read* decodes and negotiates, *work*
runs in-band commands one after the other, *write* sends. Each out-of-band command has a task of its own.

    bytes -> read -> queue -> work -> outgoing -> write -> bytes
                  \\-> one task per out-of-band command -/

What bounds the memory: read stops when the queue of commands is full, or when too many out-of-band commands
run; replies wait while `limits.QMP_SESSION_OUT_BYTES_MAX` are unsent; events cannot wait, so a session with
`limits.QMP_SESSION_EVENT_BYTES_MAX` of them unsent is dropped. A session that takes no byte for
`limits.QMP_WRITE_STALL_S` is dropped too.

Rule 1: when the client goes, its commands are cancelled. A handler that must not be cut hands its work to a
task that is not the session's.
Rule 2: every command gets exactly one reply, unless the session ends first.
Rule 3: before negotiation nothing but its commands is served and no event is sent, as QEMU does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmferry import limits
from vmferry.clock import Clock
from vmferry.errors import UsageError, VmferryError
from vmferry.qmp.codec import (
    MISSING,
    BadSyntax,
    Command,
    Decoder,
    ErrorReply,
    Event,
    Greeting,
    Malformed,
    Message,
    NeedData,
    Reply,
    encode_error,
    encode_event,
    encode_greeting,
    encode_reply,
)
from vmferry.qmp.errors import QmpCommandError
from vmferry.qmp.sockets import PeerCredentials
from vmferry.qmp.transport import close_writer

_log = logging.getLogger(__name__)

CAPABILITIES = ("oob",)
# What only a server says, by the member that shows it.
_MEMBERS = {Reply: "return", ErrorReply: "error", Event: "event", Greeting: "QMP"}


class CommandNotFound(UsageError):
    """A handler raises this for a command that it does not have; it becomes QMP's own error class."""

    def __init__(self, command: str) -> None:
        super().__init__(f"The command {command} has not been found")


class Verbatim(Exception):
    """A handler raises this to answer with exactly these words: it passes on what another server said."""

    def __init__(self, qmp_class: str, desc: str) -> None:
        super().__init__(desc)
        self.qmp_class, self.desc = qmp_class, desc


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end: `credentials` of a unix socket, or the `certificate` of TLS (a dict)."""

    credentials: PeerCredentials | None = None
    certificate: Mapping[str, Any] | None = None


Handler = Callable[["Session", Command], Awaitable[Any]]


class Session:
    """Made by the server; a handler gets it to see `peer` and to `emit` events to this client alone."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        name: str,
        peer: Peer,
        handle: Handler,
        version: Mapping[str, Any],
        clock: Clock,
        prompt: frozenset[str] | None = None,
    ) -> None:
        """`prompt`: events that are sent at once; any other may wait `limits.QMP_EVENT_GATHER_S` for company.
        None: all are."""
        self.name = name
        self.peer = peer
        self.negotiated = False
        self.oob = False
        self.ended_because = ""  # why the session is over; empty while it is not
        self._reader = reader
        self._writer = writer
        self._handle = handle
        self._version = version
        self._clock = clock
        self._decoder = Decoder(max_message_bytes=limits.QMP_COMMAND_BYTES_MAX)
        self._queue: asyncio.Queue[Command | Malformed] = asyncio.Queue(limits.QMP_SESSION_QUEUED_MAX)
        self._oob_turn = asyncio.Semaphore(limits.QMP_OUT_OF_BAND_UNANSWERED_MAX)
        self._oob_tasks: set[asyncio.Task[None]] = set()
        self._outgoing: deque[tuple[bytes, bool]] = deque()  # (line, whether it is an event)
        self._outgoing_bytes = 0
        self._event_bytes = 0
        self._has_outgoing = asyncio.Event()
        self._prompt = prompt
        self._has_prompt = asyncio.Event()
        self._has_room = asyncio.Event()
        self._stop = asyncio.Event()

    # --- for handlers and the server ---

    def emit(self, name: str, data: Mapping[str, Any] | None = None, *, timestamp_us: int | None = None) -> None:
        """Send an event, after all that was sent before; before negotiation and after the end do nothing.
        `timestamp_us`: when it happened, if that was not now."""
        if not self.negotiated or self.ended_because:
            return
        at_us = int(self._clock.wall_s() * 1e6) if timestamp_us is None else timestamp_us
        line = encode_event(name, data, timestamp_us=at_us)
        if self._event_bytes + len(line) > limits.QMP_SESSION_EVENT_BYTES_MAX:
            self.drop(f"it reads too slowly: {self._event_bytes} bytes of events are unsent")
            return
        self._event_bytes += len(line)
        self._put(line, is_event=True, is_prompt=self._prompt is None or name in self._prompt)

    def drop(self, reason: str) -> None:
        """End the session soon; what is unsent gets a moment to leave. The first reason stays."""
        if not self.ended_because:
            self.ended_because = reason
            _log.info("%s: session ends: %s", self.name, reason)
        self._stop.set()
        self._has_prompt.set()
        self._has_outgoing.set()

    async def run(self) -> None:
        """Serve the client until it goes or is dropped; then everything of the session is gone."""
        await self._send(encode_greeting(self._version, CAPABILITIES))
        named = {"read": self._read(), "work": self._work(), "stop": self._wait_for_stop()}
        tasks = [asyncio.create_task(work, name=f"qmp-{what} {self.name}") for what, work in named.items()]
        write = asyncio.create_task(self._write(), name=f"qmp-write {self.name}")
        try:
            await asyncio.wait([*tasks, write], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.drop("the connection ended")
            await _end([*tasks, *self._oob_tasks])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.QMP_CLOSE_DEADLINE_S):
                    await asyncio.wait({write})
            await _end([write])
            await close_writer(self._writer)

    # --- reading ---

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(limits.QMP_READ_BYTES):
                self._decoder.feed(data)
                while not isinstance(message := self._decoder.next(), NeedData):
                    await self._on_message(message)
        except OSError as error:
            self.drop(f"the connection broke: {error.strerror or error}")

    async def _on_message(self, message: Message) -> None:
        match message:
            case BadSyntax(desc):
                await self._queue.put(Malformed(desc))
            case Command(oob=True) if self.oob:
                await self._oob_turn.acquire()
                task = asyncio.create_task(self._run_oob(message), name=f"qmp-oob {self.name} {message.name}")
                self._oob_tasks.add(task)
                task.add_done_callback(self._oob_tasks.discard)
            case Command(id=id, oob=True):
                desc = "QMP input member 'exec-oob' is unexpected"
                await self._queue.put(Malformed(desc, id))
            case Command() | Malformed():
                await self._queue.put(message)
            case Reply() | ErrorReply() | Event() | Greeting():
                desc = f"QMP input member '{_MEMBERS[type(message)]}' is unexpected"
                await self._queue.put(Malformed(desc, getattr(message, "id", MISSING)))

    # --- working ---

    async def _work(self) -> None:
        while True:
            message = await self._queue.get()
            if isinstance(message, Malformed):
                line = encode_error("GenericError", message.desc, id=message.id)
            elif message.name == "qmp_capabilities" or not self.negotiated:
                line = self._negotiate(message)
            else:
                line = await self._answer(message)
            await self._send(line)

    async def _run_oob(self, command: Command) -> None:
        try:
            await self._send(await self._answer(command))
        finally:
            self._oob_turn.release()

    def _negotiate(self, command: Command) -> bytes:
        qmp_class, desc = "CommandNotFound", ""
        enable = command.arguments.get("enable", [])
        if command.name != "qmp_capabilities":
            desc = "Expecting capabilities negotiation with 'qmp_capabilities'"
        elif self.negotiated:
            desc = "Capabilities negotiation is already complete, command ignored"
        elif command.arguments.keys() - {"enable"} or not isinstance(enable, list):
            qmp_class, desc = "GenericError", "qmp_capabilities takes 'enable', an array, and nothing else"
        elif unknown := [name for name in enable if name not in CAPABILITIES]:
            qmp_class, desc = "GenericError", f"Parameter 'enable' does not accept value {unknown[0]!r}"
        if desc:
            return encode_error(qmp_class, desc, id=command.id)
        self.negotiated = True
        self.oob = "oob" in enable
        return encode_reply({}, id=command.id)

    async def _answer(self, command: Command) -> bytes:
        try:
            value = await self._handle(self, command)
            return encode_reply({} if value is None else value, id=command.id)
        except CommandNotFound as error:
            return encode_error("CommandNotFound", error.message, id=command.id)
        except Verbatim as error:
            return encode_error(error.qmp_class, error.desc, id=command.id)
        except QmpCommandError as error:
            return encode_error(error.qmp_class, error.message, id=command.id, data=error.to_wire())
        except VmferryError as error:
            return encode_error("GenericError", error.message, id=command.id, data=error.to_wire())
        except Exception as error:  # noqa: BLE001
            # A mistake of ours: the client is told, the session and the agent go on.
            _log.exception("%s: %s failed inside", self.name, command.name)
            message = f"{command.name} failed inside the agent: {type(error).__name__}: {error}"
            return encode_error("GenericError", message, id=command.id, data=VmferryError(message).to_wire())

    # --- writing ---

    async def _send(self, line: bytes) -> None:
        while self._outgoing_bytes > limits.QMP_SESSION_OUT_BYTES_MAX:
            self._has_room.clear()
            await self._has_room.wait()
        self._put(line, is_event=False, is_prompt=True)

    def _put(self, line: bytes, *, is_event: bool, is_prompt: bool) -> None:
        transport = self._writer.transport
        if is_prompt and not self._outgoing and not transport.is_closing() and not transport.get_write_buffer_size():
            # Nothing is before it: it leaves now, a turn of the loop sooner than by the task that writes.
            self._writer.write(line)
            if is_event:
                self._event_bytes -= len(line)
            if not transport.get_write_buffer_size():
                return
            line, is_event = b"", False  # that task looks whether the rest is ever taken
        self._outgoing.append((line, is_event))
        self._outgoing_bytes += len(line)
        if is_prompt:
            self._has_prompt.set()
        self._has_outgoing.set()

    async def _write(self) -> None:
        """Sends until the session is stopped and nothing is left, or the client takes nothing any more."""
        try:
            while self._outgoing or not self._stop.is_set():
                if not self._outgoing:
                    self._has_outgoing.clear()
                    await self._has_outgoing.wait()
                    continue
                await self._gather()
                lines = [self._outgoing.popleft() for _ in range(len(self._outgoing))]
                self._writer.write(b"".join(line for line, _ in lines))
                async with asyncio.timeout(limits.QMP_WRITE_STALL_S):
                    await self._writer.drain()
                self._outgoing_bytes -= sum(len(line) for line, _ in lines)
                self._event_bytes -= sum(len(line) for line, is_event in lines if is_event)
                self._has_room.set()
        except TimeoutError:
            self.drop(f"it took no byte for {limits.QMP_WRITE_STALL_S:g} s")
            self._writer.transport.abort()
        except OSError as error:
            self.drop(f"the connection broke: {error.strerror or error}")

    async def _gather(self) -> None:
        """Lets events that nobody waits for leave together: each send wakes the client up, and takes half a
        millisecond from an agent that may have a paused guest in its hands."""
        if not self._has_prompt.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.QMP_EVENT_GATHER_S):
                    await self._has_prompt.wait()
        if not self._stop.is_set():
            self._has_prompt.clear()

    async def _wait_for_stop(self) -> None:
        await self._stop.wait()


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel and await all of them; an exception in one is a mistake of ours and is logged."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            _log.error("a task of a QMP session failed", exc_info=result)
