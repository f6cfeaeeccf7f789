"""An asyncio QMP client: pairs replies with commands, keeps events in order, and never waits for ever.

Theory of operation
-------------------
`QmpClient` knows no sockets: a `Transport` carries its bytes, and whoever reads calls `data_received` and
`connection_lost`. transport.py has the two real ones; the simulator brings its own. `connect_unix`,
`connect_socket` and `connect_stream` give a client that has negotiated already.

A command is in one of four places: waiting for its turn, unanswered with a caller, unanswered and given up
(its caller timed out or was cancelled; the id is remembered so that a late reply is recognised and dropped),
or answered. Only `limits.QMP_IN_BAND_UNANSWERED_MAX` in-band commands are unanswered at a time, because a
QEMU with 8 queued commands stops reading, and then no out-of-band command gets through either. Given-up
commands count too: they are still in QEMU's queue.

Ids begin with a random session name: when a client goes away while QEMU works on its command, QEMU sends the
reply to the *next* client of that monitor, which must not take it for an answer of its own.

Rule 1: a timed-out command may still run. The session stays usable; its late reply is dropped by id.
Rule 2: events and replies reach their receivers in the order in which they arrived.
Rule 3: a reply whose id is unknown is dropped (see above); whoever misses one runs into its deadline.
Rule 4: commands with file descriptors go one at a time: QEMU keeps only the descriptors received last.
Rule 5: everything runs on one loop; no method may be called from another thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vmferry import limits
from vmferry.errors import QemuError
from vmferry.qmp.codec import (
    Decoder,
    ErrorReply,
    Event,
    Greeting,
    Message,
    NeedData,
    Reply,
    encode_command,
)
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout
from vmferry.qmp.sockets import open_unix
from vmferry.qmp.transport import StreamTransport, UnixTransport

_log = logging.getLogger(__name__)

EventCallback = Callable[[Event], None]


class Transport(Protocol):
    """What carries a client's bytes. `send` queues and never blocks; `abort` and `close` may be repeated."""

    @property
    def peer_pid(self) -> int | None: ...

    def send(self, data: bytes, fds: Sequence[int]) -> None: ...

    def abort(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class _Unanswered:
    command: str
    lanes: tuple[_Lane, ...]
    future: asyncio.Future[Any]  # done or cancelled once its caller gave up


class _Lane:
    """Lets a fixed number of commands be unanswered; the others wait in order of arrival."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        if self._free > 0 and not self._waiting:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave()  # the turn came in the same moment: hand it on
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def leave(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def break_up(self, make_error: Callable[[], QmpDisconnected]) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(make_error())


class QmpClient:
    """One session with one QMP server. `name` is who that is, for error messages.

    `greeting` is set after `negotiate`; `oob` says whether out-of-band commands may be sent; `closed` is a
    future whose result is the reason, set once the connection is gone (it never holds an exception).
    """

    def __init__(
        self,
        *,
        name: str,
        on_event: EventCallback | None = None,
        session_id: str | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.greeting: Greeting | None = None
        self.oob = False
        self.closed: asyncio.Future[str] = loop.create_future()
        self.late_replies = 0  # replies to commands that had been given up
        self._loop = loop
        self._decoder = decoder or Decoder()
        self._greeted: asyncio.Future[Greeting] = loop.create_future()
        self._subscribers: list[EventCallback] = [] if on_event is None else [on_event]
        self._unanswered: dict[str, _Unanswered] = {}
        self._in_band = _Lane(limits.QMP_IN_BAND_UNANSWERED_MAX)
        self._out_of_band = _Lane(limits.QMP_OUT_OF_BAND_UNANSWERED_MAX)
        self._fds_lane = _Lane(1)
        self._session_id = session_id or os.urandom(4).hex()
        self._next_id = 0
        self._transport: Transport | None = None

    # --- for callers ---

    @property
    def peer_pid(self) -> int | None:
        """The process at the other end of a unix socket, as the kernel says; None for other connections."""
        return None if self._transport is None else self._transport.peer_pid

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version from the greeting, (0, 0, 0) if it gave none."""
        numbers = {} if self.greeting is None else self.greeting.version.get("qemu", {})
        return int(numbers.get("major", 0)), int(numbers.get("minor", 0)), int(numbers.get("micro", 0))

    def attach(self, transport: Transport) -> None:
        """Give the client what carries its bytes; once, before anything is sent."""
        assert self._transport is None, "a client has one transport for life"
        self._transport = transport

    async def negotiate(self, *, deadline_s: float = limits.QMP_CONNECT_DEADLINE_S) -> Greeting:
        """Wait for the greeting and accept what it offers of ours (`oob`).

        Raises QmpTimeout when no greeting comes: then most likely another client holds the monitor, since
        QEMU serves one at a time. Raises QmpDisconnected when the connection ends first.
        """
        finish_s = self._loop.time() + deadline_s
        try:
            async with asyncio.timeout_at(finish_s):
                self.greeting = await asyncio.shield(self._greeted)
        except TimeoutError:
            message = f"{self.name} sent no greeting within {deadline_s:g} s; another client may hold it"
            raise QmpTimeout(message, was_sent=False) from None
        wanted = [name for name in ("oob",) if name in self.greeting.capabilities]
        arguments = {"enable": wanted} if wanted else None
        left_s = max(0.0, finish_s - self._loop.time())
        await self.execute("qmp_capabilities", arguments, deadline_s=left_s)
        self.oob = "oob" in wanted
        return self.greeting

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        deadline_s: float = limits.QMP_DEADLINE_S,
        fds: Sequence[int] = (),
    ) -> Any:
        """Run one command and give its return value. `fds` travel with it and stay the caller's to close.

        Raises QmpCommandError when the server refuses (nothing happened), QmpTimeout when no reply came
        within `deadline_s` seconds (the command may still run unless `was_sent` is False), QmpDisconnected
        when the connection ends (unknown whether it ran), QemuError for `oob` with a server that has none.
        When cancelled, the command may still run; its reply will be dropped.
        """
        if oob and not self.oob:
            raise QemuError(f"{self.name} takes no out-of-band commands, so {name} was not sent", retry="no")
        command_id = f"{self._session_id}-{self._next_id}"
        self._next_id += 1
        data = encode_command(name, arguments, id=command_id, oob=oob)
        if self.closed.done():
            raise self._disconnected()
        lanes: tuple[_Lane, ...] = (self._out_of_band if oob else self._in_band,)
        if fds:
            lanes = (self._fds_lane, *lanes)
        entry = _Unanswered(name, lanes, self._loop.create_future())
        try:
            async with asyncio.timeout(deadline_s):
                await self._send_in_turn(command_id, data, fds, entry)
                return await entry.future  # giving up cancels it; that is how a late reply is known
        except TimeoutError:
            was_sent = command_id in self._unanswered
            what = f"did not answer {name}" if was_sent else f"left no turn for {name}"
            raise QmpTimeout(f"{self.name} {what} within {deadline_s:g} s", was_sent=was_sent) from None

    def subscribe(self, callback: EventCallback) -> Callable[[], None]:
        """Call `callback` on the loop for each event from now on, in order; returns how to end that.

        An exception from the callback goes to the loop's exception handler; the session goes on.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    async def close(self) -> None:
        """End the session; commands that wait get QmpDisconnected. May be called twice."""
        self.connection_lost("closed by this side")
        if self._transport is not None:
            await self._transport.close()

    # --- for transports ---

    def data_received(self, data: bytes) -> None:
        """Bytes from the server, cut anywhere. Bytes that are no QMP end the session."""
        self._decoder.feed(data)
        while not self.closed.done():
            message = self._decoder.next()
            if isinstance(message, NeedData):
                return
            self._on_message(message)

    def connection_lost(self, reason: str) -> None:
        """The connection ended: everything that waits gets QmpDisconnected. Later calls do nothing."""
        if self.closed.done():
            return
        self.closed.set_result(reason)
        unanswered, self._unanswered = self._unanswered, {}
        for entry in unanswered.values():
            if not entry.future.done():
                message = f"the connection to {self.name} ended before it answered {entry.command}: {reason}"
                entry.future.set_exception(QmpDisconnected(message))
        for lane in (self._in_band, self._out_of_band, self._fds_lane):
            lane.break_up(self._disconnected)
        if not self._greeted.done():
            self._greeted.set_exception(self._disconnected())
            self._greeted.exception()  # whoever negotiates sees it; nobody may be negotiating

    # --- inside ---

    def _disconnected(self) -> QmpDisconnected:
        """For what was not sent, so had no effect."""
        return QmpDisconnected(f"{self.name} is not connected: {self.closed.result()}", guest="unharmed")

    async def _send_in_turn(self, command_id: str, data: bytes, fds: Sequence[int], entry: _Unanswered) -> None:
        entered: list[_Lane] = []
        try:
            for lane in entry.lanes:
                await lane.enter()
                entered.append(lane)
            if self.closed.done():
                raise self._disconnected()
            assert self._transport is not None, "attach a transport first"
            self._transport.send(data, fds)
        except BaseException:
            for lane in entered:
                lane.leave()
            raise
        self._unanswered[command_id] = entry

    def _on_message(self, message: Message) -> None:
        match message:
            case Reply() | ErrorReply():
                self._on_answer(message)
            case Event():
                for callback in tuple(self._subscribers):
                    self._loop.call_soon(callback, message)
            case Greeting():
                if not self._greeted.done():
                    self._greeted.set_result(message)
            case _:
                self._give_up(f"it sent what is no QMP: {message}")

    def _on_answer(self, message: Reply | ErrorReply) -> None:
        entry = self._unanswered.pop(message.id, None) if isinstance(message.id, str) else None
        if entry is not None:
            for lane in entry.lanes:
                lane.leave()
        if entry is None or entry.future.done():
            self.late_replies += 1
            _log.debug("%s: a reply that nobody waits for was dropped: %s", self.name, message)
        elif isinstance(message, Reply):
            entry.future.set_result(message.value)
        else:
            error = QmpCommandError(entry.command, message.qmp_class, message.desc, peer=self.name, data=message.data)
            entry.future.set_exception(error)

    def _give_up(self, reason: str) -> None:
        """The server does not speak QMP as agreed; nothing that it says can be paired any more."""
        self.connection_lost(reason)
        if self._transport is not None:
            self._transport.abort()


QUEUE_POLL_S = 0.005
"""There is no event for a listener's queue that has room again."""


async def connect_socket(
    sock: socket.socket,
    *,
    name: str,
    on_event: EventCallback | None = None,
    deadline_s: float = limits.QMP_CONNECT_DEADLINE_S,
) -> QmpClient:
    """A negotiated client over a connected unix socket, which it owns from now on (also when this raises)."""
    client = QmpClient(name=name, on_event=on_event)
    client.attach(UnixTransport(sock, client))
    return await _negotiated(client, deadline_s)


async def connect_unix(
    path: str,
    *,
    name: str | None = None,
    on_event: EventCallback | None = None,
    deadline_s: float = limits.QMP_CONNECT_DEADLINE_S,
) -> QmpClient:
    """A negotiated client of the QMP socket at `path`. Raises QmpDisconnected if nothing listens there, or if nobody
    takes its connections for that long."""
    name = name or f"QMP socket {path}"
    end_s = asyncio.get_running_loop().time() + deadline_s
    sock = await _open(path, name=name, end_s=end_s)
    left_s = end_s - asyncio.get_running_loop().time()
    return await connect_socket(sock, name=name, on_event=on_event, deadline_s=left_s)


async def _open(path: str, *, name: str, end_s: float) -> socket.socket:
    # QEMU's queue holds one connection. 1. two come at once  2. the second one finds it full  3. the first is accepted.
    while True:
        try:
            return open_unix(path, name=name)
        except QmpDisconnected as error:
            is_full = isinstance(error.__cause__, BlockingIOError)
            if not is_full or asyncio.get_running_loop().time() + QUEUE_POLL_S >= end_s:
                raise
        await asyncio.sleep(QUEUE_POLL_S)


async def connect_stream(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    name: str,
    on_event: EventCallback | None = None,
    deadline_s: float = limits.QMP_CONNECT_DEADLINE_S,
) -> QmpClient:
    """A negotiated client over a stream pair, TLS or not, which it owns from now on. It cannot send fds."""
    client = QmpClient(name=name, on_event=on_event)
    client.attach(StreamTransport(reader, writer, client, name=name))
    return await _negotiated(client, deadline_s)


async def _negotiated(client: QmpClient, deadline_s: float) -> QmpClient:
    try:
        await client.negotiate(deadline_s=deadline_s)
    except BaseException:
        await client.close()
        raise
    return client
