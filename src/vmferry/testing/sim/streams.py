"""asyncio's stream pair over a simulated connection: what sessions and links of agents read and write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmferry.pki.authority import AGENT_URI
from vmferry.testing.sim.kernel import SimProcess, Socket


@dataclass(frozen=True, slots=True)
class Shown:
    """The certificate that the other side would have shown: TLS itself is other rings' to test."""

    host: str

    def getpeercert(self) -> dict[str, Any]:
        """As `ssl` gives it."""
        return {"subjectAltName": (("URI", f"{AGENT_URI}{self.host}"),)}


class ByteTransport(asyncio.Transport):
    """One end of a connection that carries bytes, and descriptors if somebody takes them."""

    def __init__(
        self,
        process: SimProcess,
        sock: Socket,
        *,
        on_descriptors: Callable[[tuple[int, ...]], None] | None = None,
    ) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self._process, self._sock, self._on_descriptors = process, sock, on_descriptors
        self._is_closing = False
        self.reader = asyncio.StreamReader(loop=loop)
        self._protocol = asyncio.StreamReaderProtocol(self.reader, loop=loop)
        self._protocol.connection_made(self)
        self.writer = asyncio.StreamWriter(self, self._protocol, self.reader, loop)
        sock.read(process, self._arrived, self._ended)
        process.kernel.at_end.append(self._forget)

    def write(self, data: Any) -> None:
        if data and not self._is_closing:
            self._sock.send((bytes(data), ()))

    def get_write_buffer_size(self) -> int:
        """What is written is on its way."""
        return 0

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        """What was sent arrives first: the end travels behind it."""
        if not self._is_closing:
            self._is_closing = True
            self._sock.let_go(self._process)

    def abort(self) -> None:
        self.close()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        shown = Shown(self._sock.path.target)
        return {"ssl_object": shown, "peercert": shown.getpeercert()}.get(name, default)

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        """Nobody sends so much."""

    def resume_reading(self) -> None:
        """See `pause_reading`."""

    def _forget(self) -> None:
        self._is_closing = True

    def _arrived(self, payload: tuple[bytes, tuple[int, ...]]) -> None:
        data, descriptors = payload
        if descriptors and self._on_descriptors is not None:
            self._on_descriptors(descriptors)
        if not self._is_closing:
            self.reader.feed_data(data)

    def _ended(self, reason: str) -> None:
        broke = None if reason == "the other side closed it" or self._is_closing else ConnectionError(110, reason)
        self._is_closing = True
        self._protocol.connection_lost(broke)
        self._sock.let_go(self._process)
