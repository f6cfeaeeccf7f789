"""What two fake QEMUs say to each other over the real connection that the agents made and handed over.

Theory of operation
-------------------
Not QEMU's stream, only its turning points: `header`, `ram`, `device` (precopy's last part), `package` (postcopy's),
`pages` (all of them are over) one way; `ack`, `proof`, `result`, `resumed` the other way; `resume` after a break.
Each is a length and a JSON object. A link that ended, by whomever, is `lost` for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from abc import ABC, abstractmethod
from typing import Any

_LENGTH = struct.Struct("!I")


class LinkLost(Exception):
    """The other end is gone, or somebody cut the connection."""


class Link(ABC):
    """One connection, whatever carries it. Lives on one loop."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    @abstractmethod
    def send(self, kind: str, **more: Any) -> None:
        """Queues one message; on a lost link it goes nowhere."""

    @abstractmethod
    def cut(self) -> None:
        """Ends the connection for both sides, as a shutdown of the socket does."""

    @abstractmethod
    def close(self) -> None:
        """Gives this side's descriptor up, after what was sent has left."""

    async def receive(self) -> dict[str, Any]:
        """The next message. Raises LinkLost once the link has ended and all that came before it was taken."""
        got = asyncio.ensure_future(self._inbox.get())
        end = asyncio.ensure_future(self.lost.wait())
        await asyncio.wait({got, end}, return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        if got.done():
            return got.result()
        got.cancel()
        raise LinkLost


class SocketLink(Link):
    """A link over a connected socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__()
        self._reader, self._writer = reader, writer
        self._task = asyncio.create_task(self._read(), name="fake-link")

    def send(self, kind: str, **more: Any) -> None:
        text = json.dumps({"kind": kind, **more}).encode()
        self._writer.write(_LENGTH.pack(len(text)) + text)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self.lost.set()

    def close(self) -> None:
        self._writer.close()
        self._task.cancel()
        self.lost.set()

    async def _read(self) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                self._inbox.put_nowait(json.loads(await self._reader.readexactly(length)))
        self.lost.set()


async def from_descriptor(descriptor: int) -> SocketLink:
    """A link over a connected socket, owned from now on."""
    return SocketLink(*await asyncio.open_connection(sock=socket.socket(fileno=descriptor)))
