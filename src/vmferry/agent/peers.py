"""Links to the other agents: one per peer, dialled when needed, kept, and dialled again when it broke.

Theory of operation
-------------------
Agents speak QMP to each other (one codec for everything) over TLS 1.3 with both certificates checked; the
certificate's name must be the peer's configured name. A call answers with a value, with the peer's own error
(rebuilt in its class), or with `HostUnreachable`, after which nobody may conclude anything about the guest:
the command may have been carried out. Facts that a peer pushes arrive as events.

Rule 1: a link that broke says nothing about a migration; QEMUs talk to each other without it.
Rule 2: `clear_text` links exist only where the agent was told so by name.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from vmferry.agent.config import PeerConfig
from vmferry.clock import Clock
from vmferry.errors import HostUnreachable, NotTrusted, QemuError, UnknownHost, VmferryError
from vmferry.pki import tls
from vmferry.qmp import client as qmp_client
from vmferry.qmp.client import QmpClient
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout

log = logging.getLogger("vmferry.agent")

CONNECT_S = 3.0
"""A TCP connect and a TLS handshake between hosts of one site take milliseconds; lost packets seconds."""
CALL_S = 10.0
USER_TIMEOUT_MS = 15_000
"""The kernel gives a link up after unacknowledged data of this age, so a cut cable is seen."""
REDIAL_PAUSE_S = 0.2
"""After a failed dial nobody dials again for this long: callers that retry must not storm a dead host."""

PROTOCOL = 1
"""The agents' own protocol: places, grants, their acknowledgement (`ran`), releases. Raised when an order changes
its meaning; an agent speaks its own and the one before."""
PROTOCOLS_SPOKEN = frozenset({PROTOCOL, PROTOCOL - 1} - {0})

PeerEvent = Callable[[str, Event], None]
Connect = Callable[[str, int, ssl.SSLContext | None], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class PeerLink:
    """The link to one peer; lives on the agent's loop."""

    def __init__(
        self,
        peer: PeerConfig,
        context: ssl.SSLContext | None,
        *,
        clock: Clock,
        on_event: PeerEvent,
        connect: Connect,
    ) -> None:
        self.peer, self.clock = peer, clock
        self.clock_offset_s: float | None = None
        """The peer's wall clock minus ours, measured at connect to half a round trip."""
        self.round_trip_s: float | None = None
        self._context = context
        self._on_event, self._connect = on_event, connect
        self._client: QmpClient | None = None
        self._dialling = asyncio.Lock()
        self._failed_at_s = float("-inf")
        self._failure: VmferryError | None = None

    @property
    def is_up(self) -> bool:
        """A session is open; that says nothing about whether the next call will be answered."""
        return self._client is not None and not self._client.closed.done()

    async def call(self, command: str, arguments: dict[str, Any], *, deadline_s: float = CALL_S) -> Any:
        """One command of the peer. Raises the peer's own error, NotTrusted, or HostUnreachable: after that one
        it is not known whether the command was carried out."""
        end_s = self.clock.now_s() + deadline_s
        client = await self._connected(min(CONNECT_S, deadline_s))
        try:
            return await client.execute(command, arguments, deadline_s=max(0.05, end_s - self.clock.now_s()))
        except QmpCommandError as error:
            raise (error.remote or error) from error
        except (QmpTimeout, QmpDisconnected) as error:
            if isinstance(error, QmpTimeout):
                # The kernel may take long to see a dead link; a fresh one tells at once how things are.
                await self.close()
            raise HostUnreachable(
                f"the agent of {self.peer.name} did not answer {command}", guest="unknown", cause=error
            ) from error

    async def _connected(self, deadline_s: float) -> QmpClient:
        async with self._dialling:
            if self._client is not None and not self._client.closed.done():
                return self._client
            if self._failure is not None and self.clock.now_s() < self._failed_at_s + REDIAL_PAUSE_S:
                raise self._failure
            try:
                self._client = await self._dial_any(deadline_s)
                self._failure = None
            except VmferryError as error:
                self._failed_at_s, self._failure = self.clock.now_s(), error
                raise
            return self._client

    async def _dial_any(self, deadline_s: float) -> QmpClient:
        failure: VmferryError | None = None
        for address in self.peer.addresses:
            try:
                async with asyncio.timeout(deadline_s):
                    return await self._dial(address.host, address.port)
            except TimeoutError as error:
                failure = HostUnreachable(f"the agent of {self.peer.name} at {address} does not answer", cause=error)
            except OSError as error:
                failure = tls.explain(error, f"the agent of {self.peer.name} at {address}")
            except QmpCommandError as error:
                failure = error.remote or error
            except QemuError as error:
                failure = HostUnreachable(
                    f"what answers at {address} is not the agent of {self.peer.name}", cause=error
                )
            except VmferryError as error:
                failure = error
            if isinstance(failure, NotTrusted):
                break
        assert failure is not None, "a peer has at least one address"
        raise failure

    async def _dial(self, host: str, port: int) -> QmpClient:
        reader, writer = await self._connect(host, port, self._context)
        try:
            tune(writer.get_extra_info("socket"))
            if self._context is not None:
                tls.check_peer(writer.get_extra_info("ssl_object"), self.peer.name)
            client = await qmp_client.connect_stream(
                reader,
                writer,
                name=f"the agent of {self.peer.name}",
                on_event=lambda event: self._on_event(self.peer.name, event),
            )
            await self._greet(client)
        except QmpDisconnected as error:
            # In TLS 1.3 a client learns only at its first read that the server refused its certificate.
            cause = reader.exception()
            if isinstance(cause, OSError):
                raise cause from error
            if self._context is not None and self.round_trip_s is None:
                raise NotTrusted(
                    f"the agent of {self.peer.name} closed the link before it said a word; most likely it does not"
                    " accept this host's certificate",
                    side="client",
                    cause=error,
                ) from error
            raise
        except BaseException:
            writer.close()
            raise
        return client

    async def _greet(self, client: QmpClient) -> None:
        """Measures the round trip and the offset of the two wall clocks (NTP's four-stamp rule)."""
        best: tuple[float, float] | None = None
        for _ in range(3):
            sent_s = self.clock.wall_s()
            answer = await client.execute("peer-hello", {"time": sent_s, "protocol": PROTOCOL})
            received_s = self.clock.wall_s()
            trip_s = received_s - sent_s
            if best is None or trip_s < best[0]:
                best = (trip_s, float(answer["time"]) - (sent_s + received_s) / 2)
            if int(answer["protocol"]) not in PROTOCOLS_SPOKEN:
                raise NotTrusted(
                    f"the agent of {self.peer.name} speaks protocol {answer['protocol']}, this one {PROTOCOL}",
                    hint="upgrade the older agent; guests that run are not concerned",
                )
        assert best is not None
        self.round_trip_s, self.clock_offset_s = best

    async def close(self) -> None:
        """Ends the session; the next call dials again."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


def tune(sock: socket.socket | None) -> None:
    """What an agents' link needs of the kernel; a connection that is no socket (a simulated one) needs nothing."""
    if sock is None:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


class Peers:
    """All links of this agent, by name."""

    def __init__(
        self,
        peers: dict[str, PeerConfig],
        context: ssl.SSLContext | None,
        *,
        clock: Clock,
        on_event: PeerEvent,
        connect: Connect,
    ) -> None:
        self.links = {
            name: PeerLink(peer, context, clock=clock, on_event=on_event, connect=connect)
            for name, peer in peers.items()
        }

    def link(self, name: str) -> PeerLink:
        """Raises UnknownHost, naming the hosts that are known."""
        link = self.links.get(name)
        if link is None:
            known = ", ".join(sorted(self.links)) or "none"
            raise UnknownHost(f"{name} is not a known host (known: {known})")
        return link

    async def close(self) -> None:
        """Ends every session."""
        await asyncio.gather(*(link.close() for link in self.links.values()))
