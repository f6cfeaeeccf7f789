"""An asyncio QMP server: the agent's control socket, and sessions with other agents over TLS.

`QmpServer` listens on unix sockets (`listen_unix`) and takes over connections that somebody else accepted
(`serve`). What a session does is in session.py; what a command does is in the handler.

Our own errors travel in the extra member `error.data` (`VmferryError.to_wire`), which QMP clients ignore and
ours turns back into the error (`QmpCommandError.remote`).

Rule 1: a socket appears under its path only when it listens and has its final mode.
Rule 2: the path of a living server is never taken over; that of a dead one is.
Rule 3: `close` returns when every task of the server is over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Mapping
from typing import Any

from vmferry import limits
from vmferry.clock import Clock
from vmferry.errors import Busy, Unfit
from vmferry.qmp.errors import QmpDisconnected
from vmferry.qmp.session import CommandNotFound, Handler, Peer, Session, Verbatim
from vmferry.qmp.sockets import UNIX_PATH_BYTES_MAX, open_unix, peer_credentials

__all__ = ["CommandNotFound", "Handler", "Peer", "QmpServer", "Session", "Verbatim"]

_log = logging.getLogger(__name__)


class QmpServer:
    """Serves one handler to any number of clients (at most `limits.QMP_SESSIONS_MAX`)."""

    def __init__(
        self,
        handle: Handler,
        *,
        version: Mapping[str, Any],
        clock: Clock,
        name: str,
        prompt: frozenset[str] | None = None,
    ) -> None:
        """`version` goes into the greeting as it is; `name` is for logs and task names; `prompt`: see `Session`."""
        self.name = name
        self._handle = handle
        self._version = version
        self._clock = clock
        self._prompt = prompt
        self._sessions: dict[Session, asyncio.Event] = {}  # with what is set when the session is over
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[tuple[asyncio.Server, str, int]] = []  # with path and inode
        self._next_number = 0
        self._is_closing = False

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions that are open now."""
        return tuple(self._sessions)

    async def listen_unix(self, path: str, *, mode: int = 0o600) -> None:
        """Listen on a unix socket whose file has `mode`.

        Raises Busy when a living process listens there already, Unfit when the socket cannot be made;
        nothing is changed then.
        """
        if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX - len(".new"):
            longest = UNIX_PATH_BYTES_MAX - len(".new")
            raise Unfit(f"the path of the socket is longer than {longest} bytes: {path}")
        if _is_alive(path):
            hint = "stop it, or use another path"
            raise Busy(f"another process listens on {path}", side="client", hint=hint)
        sock = _bind(path, mode)
        listener = await asyncio.start_unix_server(self._on_connection, sock=sock)
        self._listeners.append((listener, path, os.stat(path).st_ino))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, which is the server's from now on, until it ends."""
        self._next_number += 1
        name = f"{self.name}#{self._next_number}"
        if self._is_closing or len(self._sessions) >= limits.QMP_SESSIONS_MAX:
            _log.warning("%s: refused, %d sessions are open", name, len(self._sessions))
            writer.transport.abort()
            return
        session = Session(
            reader,
            writer,
            name=name,
            peer=_peer_of(writer),
            handle=self._handle,
            version=self._version,
            clock=self._clock,
            prompt=self._prompt,
        )
        self._sessions[session] = asyncio.Event()
        try:
            await session.run()
        finally:
            self._sessions.pop(session).set()

    def broadcast(self, name: str, data: Mapping[str, Any] | None = None, *, timestamp_us: int | None = None) -> None:
        """Send an event to every client that has negotiated."""
        for session in self.sessions:
            session.emit(name, data, timestamp_us=timestamp_us)

    async def close(self) -> None:
        """Stop listening, end every session, and wait for their ends. May be called twice.

        Not for a handler to await: its own session would wait for itself.
        """
        self._is_closing = True
        listeners, self._listeners = self._listeners, []
        for listener, path, inode in listeners:
            listener.close()
            if _inode_of(path) == inode:
                os.unlink(path)
        endings = list(self._sessions.items())
        for session, _ in endings:
            session.drop("the server closes")
        for _, is_over in endings:
            await is_over.wait()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for listener, _, _ in listeners:
            await listener.wait_closed()

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self.serve(reader, writer), name=f"qmp-session {self.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _peer_of(writer: asyncio.StreamWriter) -> Peer:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        return Peer(credentials=peer_credentials(sock))
    return Peer(certificate=writer.get_extra_info("peercert"))


def _is_alive(path: str) -> bool:
    """Whether `path` must be left alone: all but nothing and a socket on which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Unfit(f"{path} exists and is no socket")
        open_unix(path, name=path).close()
    except FileNotFoundError:
        return False
    except QmpDisconnected as error:
        return not isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError)
    return True


def _bind(path: str, mode: int) -> socket.socket:
    """A listening socket at `path`, put there in one step once it is ready."""
    new = f"{path}.new"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if _inode_of(new) is not None:
            os.unlink(new)  # left by a server that died between bind and rename
        sock.bind(new)
        os.chmod(new, mode)
        sock.listen(limits.QMP_SESSIONS_MAX)
        os.rename(new, path)
    except OSError as error:
        sock.close()
        raise Unfit(f"cannot make the socket {path}: {error.strerror}", cause=error) from error
    return sock


def _inode_of(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None
