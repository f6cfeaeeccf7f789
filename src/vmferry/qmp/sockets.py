"""What the client, the blocking client and the server all need of unix sockets; small and quick to import."""

from __future__ import annotations

import os
import socket
import struct

from vmferry.qmp.errors import QmpDisconnected
from vmferry.qmp.value import Value

_UCRED = struct.Struct("3i")
UNIX_PATH_BYTES_MAX = 107  # sun_path has 108 bytes, the last one is NUL


class PeerCredentials(Value):
    """Who is at the other end of a unix socket, as the kernel says."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Who connected or listened; of a socketpair, who made it. Raises OSError for other sockets."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(raw))


def open_unix(path: str, *, name: str) -> socket.socket:
    """A connected, non-blocking unix socket.

    Raises QmpDisconnected when nothing listens at `path` or the listener's queue is full; nothing is open
    then. Connecting to a unix socket never waits, so there is no deadline.
    """
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        message = f"the path of {name} is longer than {UNIX_PATH_BYTES_MAX} bytes: {path}"
        raise QmpDisconnected(message, guest="unharmed", retry="after-fix")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # Not loop.sock_connect: a full queue is EAGAIN here, which asyncio takes for "connected soon".
        sock.connect(path)
    except OSError as error:
        sock.close()
        reason = "its queue of connections is full" if isinstance(error, BlockingIOError) else error.strerror
        raise QmpDisconnected(f"cannot connect to {name}: {reason}", guest="unharmed", cause=error) from error
    return sock
