"""What carries a QMP client's bytes on asyncio: a unix socket that can pass descriptors, or a stream pair.

Rule 1: a transport tells its receiver of the end exactly once, except when the receiver itself asked for it.
Rule 2: a failed write is not the end: what the peer said before it went is read first.
Rule 3: what waits to be written is bounded by the client, which limits its unanswered commands.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from vmferry import limits
from vmferry.errors import QemuError
from vmferry.qmp.sockets import peer_credentials


class Receiver(Protocol):
    """Who gets the bytes: the client."""

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, reason: str) -> None: ...


class UnixTransport:
    """A connected unix socket, owned from now on. `send` may pass descriptors (SCM_RIGHTS)."""

    def __init__(self, sock: socket.socket, receiver: Receiver) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[memoryview, tuple[int, ...]]] = deque()  # descriptors in it are ours
        self._is_writable = True
        self._is_open = True
        self._peer_pid: int | None = peer_credentials(sock).pid if sock.family == socket.AF_UNIX else None
        self._loop.add_reader(sock.fileno(), self._on_readable)

    @property
    def peer_pid(self) -> int | None:
        return self._peer_pid

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        """Queue `data`; `fds` arrive with its first byte. They are duplicated, so may be closed at once."""
        if not (self._is_open and self._is_writable):
            return
        was_empty = not self._queue
        self._queue.append((memoryview(data), tuple(os.dup(fd) for fd in fds)))
        if was_empty:
            self._flush()
            if self._queue:
                self._loop.add_writer(self._sock.fileno(), self._on_writable)

    def abort(self) -> None:
        """Close now. May be called twice."""
        if not self._is_open:
            return
        self._is_open = False
        self._drop_queue()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()

    async def close(self) -> None:
        """Close now; nothing has to be waited for."""
        self.abort()

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(limits.QMP_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error.strerror))
            return
        if data:
            self._receiver.data_received(data)
        else:
            self._end("the other side closed it")

    def _on_writable(self) -> None:
        self._flush()
        if not self._queue:
            self._loop.remove_writer(self._sock.fileno())

    def _flush(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._sock.sendmsg([data], rights)
            except BlockingIOError:
                return
            except OSError:
                # Whoever is gone may have said why: the reader finds that, and then the end.
                self._is_writable = False
                self._drop_queue()
                return
            for fd in fds:
                os.close(fd)
            self._queue[0] = (data[sent:], ())
            if sent == len(data):
                self._queue.popleft()

    def _drop_queue(self) -> None:
        while self._queue:
            for fd in self._queue.popleft()[1]:
                os.close(fd)

    def _end(self, reason: str) -> None:
        self.abort()
        self._receiver.connection_lost(reason)


class StreamTransport:
    """An asyncio stream pair, owned from now on; one task reads it."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receiver: Receiver, *, name: str
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._receiver = receiver
        self._task = asyncio.create_task(self._read(), name=f"qmp-read {name}")

    @property
    def peer_pid(self) -> int | None:
        return None

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        """Queue `data`. Raises QemuError for `fds`: a stream cannot carry them."""
        if fds:
            raise QemuError("file descriptors can only be passed over a unix socket", retry="no")
        if not self._writer.is_closing():
            self._writer.write(data)

    def abort(self) -> None:
        """Close now, without the goodbye of TLS. May be called twice."""
        self._task.cancel()
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close, saying goodbye if the other side answers within `limits.QMP_CLOSE_DEADLINE_S`."""
        self._task.cancel()
        await asyncio.wait({self._task})
        await close_writer(self._writer)

    async def _read(self) -> None:
        reason = "the other side closed it"
        try:
            while data := await self._reader.read(limits.QMP_READ_BYTES):
                self._receiver.data_received(data)
        except OSError as error:
            reason = error.strerror or str(error)
        self._writer.transport.abort()
        self._receiver.connection_lost(reason)


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Close a stream: politely for `limits.QMP_CLOSE_DEADLINE_S` seconds, then for good. Raises nothing."""
    writer.close()
    try:
        async with asyncio.timeout(limits.QMP_CLOSE_DEADLINE_S):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()
