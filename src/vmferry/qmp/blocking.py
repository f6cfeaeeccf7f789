"""A QMP client without asyncio, for the command line: one plain socket, and waits that end.

Rule 1: this file and what it imports stay small, because every command pays for them before it does anything.
Rule 2: events that arrive while a reply is awaited are never lost silently: they go to `on_event`, or are
kept for `events`; of more than `limits.QMP_EVENTS_KEPT_MAX` the oldest are dropped and counted.
Rule 3: one thread. Whoever needs two conversations opens two clients.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from vmferry import limits
from vmferry.clock import Clock, SystemClock
from vmferry.errors import QemuError
from vmferry.qmp.codec import Decoder, ErrorReply, Event, Greeting, Message, NeedData, Reply, encode_command
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout
from vmferry.qmp.sockets import open_unix, peer_credentials


class BlockingClient:
    """One session with the QMP server at a unix socket; connects and negotiates when made.

    Raises QmpDisconnected when nothing listens at `path`, QmpTimeout when the server does not greet within
    `deadline_s` seconds; nothing stays open then. A context manager: leaving it closes the connection.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        deadline_s: float = limits.QMP_CONNECT_DEADLINE_S,
        clock: Clock | None = None,
    ) -> None:
        self.name = name or f"QMP socket {path}"
        self.greeting: Greeting | None = None
        self.oob = False
        self.events_dropped = 0
        self.late_replies = 0
        self._clock = clock or SystemClock()
        self._kept: deque[Event] = deque(maxlen=limits.QMP_EVENTS_KEPT_MAX)
        self._decoder = Decoder()
        self._session_id = os.urandom(4).hex()
        self._next_id = 0
        self._sock: socket.socket | None = open_unix(path, name=self.name)
        self.peer_pid = peer_credentials(self._sock).pid
        try:
            self._negotiate(deadline_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """For a caller that polls several things. Raises QmpDisconnected when closed."""
        return self._open_socket().fileno()

    def close(self) -> None:
        """End the session. May be called twice."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def execute(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        deadline_s: float = limits.QMP_DEADLINE_S,
        on_event: Callable[[Event], None] | None = None,
    ) -> Any:
        """Run one command and give its return value; see `call` for `on_event`.

        Raises QmpCommandError when the server refuses, QmpTimeout when no reply came within `deadline_s`
        seconds (the command may still run, the session stays usable), QmpDisconnected when the connection
        ends (unknown whether it ran), QemuError for `oob` with a server that has none.
        """
        if oob and not self.oob:
            raise QemuError(f"{self.name} takes no out-of-band commands, so {name} was not sent", retry="no")
        finish_s = self._clock.now_s() + deadline_s
        command_id = f"{self._session_id}-{self._next_id}"
        self._next_id += 1
        self._send(encode_command(name, arguments, id=command_id, oob=oob), name, finish_s)
        while (message := self._receive(finish_s, asked=name)) is not None:
            match message:
                case Reply(value, id) if id == command_id:
                    return value
                case ErrorReply(qmp_class, desc, id, data) if id == command_id:
                    raise QmpCommandError(name, qmp_class, desc, peer=self.name, data=data)
                case Event():
                    self._keep(message, on_event)
                case Reply() | ErrorReply():
                    self.late_replies += 1
                case _:
                    raise self._broken(f"it sent what is no QMP: {message}")
        raise QmpTimeout(f"{self.name} did not answer {name} within {deadline_s:g} s", was_sent=True)

    def call(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        on_event: Callable[[Event], None],
        deadline_s: float = limits.QMP_DEADLINE_S,
    ) -> Any:
        """`execute`, giving each event to `on_event` as it arrives (the kept ones first).

        What `on_event` raises ends the call; the reply is then late and dropped.
        """
        while self._kept:
            on_event(self._kept.popleft())
        return self.execute(name, arguments, deadline_s=deadline_s, on_event=on_event)

    def events(self, deadline_s: float | None = None) -> Iterator[Event]:
        """Events in order, kept ones first, until `deadline_s` seconds have passed (None: no end).

        Raises QmpDisconnected when the connection ends.
        """
        finish_s = None if deadline_s is None else self._clock.now_s() + deadline_s
        while True:
            if self._kept:
                yield self._kept.popleft()
                continue
            message = self._receive(finish_s, asked=None)
            match message:
                case None:
                    return
                case Event():
                    yield message
                case Reply() | ErrorReply():
                    self.late_replies += 1
                case _:
                    raise self._broken(f"it sent what is no QMP: {message}")

    # --- inside ---

    def _negotiate(self, deadline_s: float) -> None:
        finish_s = self._clock.now_s() + deadline_s
        message = self._receive(finish_s, asked=None)
        while isinstance(message, Reply | ErrorReply):  # for the client that was here before us
            message = self._receive(finish_s, asked=None)
        if message is None:
            text = f"{self.name} sent no greeting within {deadline_s:g} s; another client may hold it"
            raise QmpTimeout(text, was_sent=False)
        if not isinstance(message, Greeting):
            raise self._broken(f"it did not greet but sent {message}")
        self.greeting = message
        wanted = [name for name in ("oob",) if name in message.capabilities]
        left_s = max(0.0, finish_s - self._clock.now_s())
        self.execute("qmp_capabilities", {"enable": wanted} if wanted else None, deadline_s=left_s)
        self.oob = "oob" in wanted

    def _keep(self, event: Event, on_event: Callable[[Event], None] | None) -> None:
        if on_event is not None:
            on_event(event)
            return
        self.events_dropped += len(self._kept) == self._kept.maxlen
        self._kept.append(event)

    def _receive(self, finish_s: float | None, *, asked: str | None) -> Message | None:
        """The next message, or None when `finish_s` came first."""
        while True:
            message = self._decoder.next()
            if not isinstance(message, NeedData):
                return message
            if not self._wait(select.POLLIN, finish_s):
                return None
            try:
                data = self._open_socket().recv(limits.QMP_READ_BYTES)
            except OSError as error:
                raise self._broken(str(error.strerror), asked=asked) from error
            if not data:
                raise self._broken("the other side closed it", asked=asked)
            self._decoder.feed(data)

    def _send(self, data: bytes, name: str, finish_s: float) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._open_socket().send(rest) :]
            except BlockingIOError:
                if self._wait(select.POLLOUT, finish_s):
                    continue
                was_sent = len(rest) < len(data)
                if was_sent:  # half a command would garble the next one
                    self.close()
                raise QmpTimeout(f"{self.name} did not take {name} in time", was_sent=was_sent) from None
            except OSError as error:
                raise self._broken(str(error.strerror), asked=name) from error

    def _wait(self, what: int, finish_s: float | None) -> bool:
        poll = select.poll()
        poll.register(self._open_socket(), what)
        wait_ms = None if finish_s is None else max(0.0, finish_s - self._clock.now_s()) * 1000
        return bool(poll.poll(wait_ms))

    def _open_socket(self) -> socket.socket:
        if self._sock is None:
            raise QmpDisconnected(f"{self.name} is not connected: closed by this side", guest="unharmed")
        return self._sock

    def _broken(self, reason: str, *, asked: str | None = None) -> QmpDisconnected:
        self.close()
        before = "" if asked is None else f" before it answered {asked}"
        return QmpDisconnected(f"the connection to {self.name} ended{before}: {reason}")
