"""What tests of connections between agents ask of a socket."""

from __future__ import annotations

import asyncio
import socket

LOOPBACK = "127.0.0.1"


async def is_hung_up(reader: asyncio.StreamReader) -> bool:
    """Whether the other side has ended the connection, or does so now."""
    try:
        async with asyncio.timeout(2):
            return await reader.read(1) == b""
    except ConnectionError:
        return True


def unused_port(host: str = LOOPBACK) -> int:
    """One at which nobody listens."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
