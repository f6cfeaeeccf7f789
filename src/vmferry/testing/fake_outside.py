"""What a fake QEMU needs of the process that it is, and of the world around it.

`OwnProcess` is a real process with real sockets; the simulator (`testing.sim`) has another one, in which a process is
a value. What a fake QEMU *is* stands in `fake_state`, `fake_commands`, `fake_outgoing` and `fake_incoming`, and is the
same code in both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from vmferry.testing.fake_link import Link, SocketLink, from_descriptor

EXIT_S = 0.01
"""Between the last words of a QEMU that gives up and its end."""

Accept = Callable[[], Awaitable[Link]]


class Outside(Protocol):
    """The process and its world."""

    def now_s(self) -> float:
        """A clock that only grows."""

    def die(self) -> None:
        """SIGKILL to itself."""

    def exit_soon(self, status: int) -> None:
        """Ends the process a moment later."""

    def complain(self, text: str) -> None:
        """One line to standard error."""

    async def open_link(self, descriptor: int) -> Link:
        """The connection behind a descriptor, which is the link's from now on."""

    def close_descriptor(self, descriptor: int) -> None:
        """Gives a descriptor back."""

    async def connect(self, host: str, port: int) -> Link:
        """Raises OSError."""

    async def listen(self, host: str, port: int) -> tuple[tuple[str, int], Accept]:
        """(the address, how to get the first connection). Raises OSError."""

    async def serve(self, host: str, port: int, met: Callable[[Link], None]) -> Callable[[], None]:
        """Takes every connection until the function that it returns is called. Raises OSError."""

    async def listen_at(self, path: str) -> Accept:
        """The same at a path, which is gone when the first connection is there or nobody waits for it any more."""


class OwnProcess:
    """This very process."""

    def now_s(self) -> float:
        return time.monotonic()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def exit_soon(self, status: int) -> None:
        asyncio.get_running_loop().call_later(EXIT_S, os._exit, status)

    def complain(self, text: str) -> None:
        print(f"qemu-system-x86_64: {text}", file=sys.stderr, flush=True)

    async def open_link(self, descriptor: int) -> Link:
        return await from_descriptor(descriptor)

    def close_descriptor(self, descriptor: int) -> None:
        os.close(descriptor)

    async def connect(self, host: str, port: int) -> Link:
        return SocketLink(*await asyncio.open_connection(host, port))

    async def listen(self, host: str, port: int) -> tuple[tuple[str, int], Accept]:
        links: asyncio.Queue[Link] = asyncio.Queue()

        async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            links.put_nowait(SocketLink(reader, writer))

        server = await asyncio.start_server(met, host, port, family=socket.AF_INET)
        bound = server.sockets[0].getsockname()

        async def first() -> Link:
            link = await links.get()
            server.close()
            return link

        return (bound[0], bound[1]), first

    async def serve(self, host: str, port: int, met: Callable[[Link], None]) -> Callable[[], None]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            met(SocketLink(reader, writer))

        return (await asyncio.start_server(connected, host, port, family=socket.AF_INET)).close

    async def listen_at(self, path: str) -> Accept:
        links: asyncio.Queue[Link] = asyncio.Queue()

        async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            links.put_nowait(SocketLink(reader, writer))

        server = await asyncio.start_unix_server(met, path)

        async def first() -> Link:
            try:
                return await links.get()
            finally:
                server.close()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

        return first
