"""How a source's agent reaches the destination's over the way of the guest's memory, when their own link is down.

Theory of operation
-------------------
While a place holds a guest that needs pages its agent listens at a port of migration_ports (`KnockListener`). The
source's agent was told at the set-up where that may be, and has a token that opens it (`wants.RecoveryWay`). Each call
has nonces of both sides, so what somebody heard on the line opens nothing later:

    source                                              destination
    magic | job | nonce of the source ->                known job?
                        <- nonce of the destination     both: a ticket of this call, from token and nonces
    the ticket's greeting ->                            right?
                        <- the ticket's reply           from here on each knows that the other one has the token
                        <- the word                     what the destination did: length | JSON | its proof

After the word the connection is the QEMUs': nothing more of the agents' crosses it. The destination's QEMU says nothing
before the source's does, in a recovery as in TLS, so what comes first is the word and nothing else.

Rule 1: until the greeting was right nothing is done but reading it; who calls is bounded as in `channel`: how many at
        once, how many bytes, how long.
Rule 2: a word without its proof is no word: the connection is closed, and nothing was heard.
Rule 3: where a port of the list belongs to somebody else now, the next one is tried; nobody but the holder of the token
        can say the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from vmferry import limits
from vmferry.agent import channel as channels
from vmferry.agent.channel import Address, Channel, ChannelEnd, ChannelListener, Ticket
from vmferry.agent.wants import RecoveryWay
from vmferry.errors import HostUnreachable, NotTrusted

NAME = "recovery"
NONCE_BYTES = 32
TOKEN_BYTES = 32
_MAGIC = b"VMFERRY\x02"
_HELLO = struct.Struct(f"!8s16s{NONCE_BYTES}s")
_LENGTH = struct.Struct("!H")
_PROOF_BYTES = 32


class Caller(Protocol):
    """Somebody who has the token, and waits for the word."""

    channel: ChannelEnd
    """The connection; whoever is given the caller owns it."""

    def has_hung_up(self) -> bool:
        """Nobody waits any more, as far as this side's kernel knows."""

    def answer(self, word: dict[str, Any]) -> None:
        """Says the word, once. Raises HostUnreachable when it cannot leave; the channel is of no use then."""


OnCaller = Callable[[Caller], Awaitable[None]]


class KnockDoor(Protocol):
    """Somebody listens for callers, until `close`."""

    addresses: tuple[Address, ...]

    async def close(self) -> None: ...


def ports_of(job: str, first: int, last: int) -> tuple[int, ...]:
    """Where a job's place may listen, in the order in which both sides try: a few ports of the range, beginning at one
    that the job's name gives, so that jobs do not crowd. None where the kernel chooses ports (0): nobody could know."""
    if first <= 0:
        return ()
    count = last - first + 1
    begin = int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big") % count
    return tuple(first + (begin + n) % count for n in range(min(count, limits.RECOVERY_PORTS_MAX)))


def ticket_of(job: str, token: str, nonces: bytes) -> Ticket:
    """The ticket of one call."""
    key = hmac.digest(bytes.fromhex(token), b"vmferry recovery\0" + nonces, "sha256")
    return Ticket(job, NAME, key)


def seal(ticket: Ticket, word: dict[str, Any]) -> bytes:
    """The word as it crosses the line. Raises ValueError when it is too long."""
    text = json.dumps(word, separators=(",", ":")).encode()
    if len(text) > limits.RECOVERY_WORD_BYTES_MAX:
        raise ValueError(f"a word of {len(text)} bytes")
    return _LENGTH.pack(len(text)) + text + _proof(ticket, text)


def _proof(ticket: Ticket, text: bytes) -> bytes:
    return hmac.digest(ticket.token, b"vmferry word\0" + text, "sha256")


class SocketCaller:
    """A caller over TCP."""

    def __init__(self, ticket: Ticket, connection: socket.socket) -> None:
        self.channel: ChannelEnd = Channel(NAME, connection)
        self._ticket, self._socket = ticket, connection

    def has_hung_up(self) -> bool:
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def answer(self, word: dict[str, Any]) -> None:
        # QEMU may have the same socket by now and may have made it a non-blocking one: it is not waited for, and it
        # need not be, as nothing was sent here before but some bytes.
        data = seal(self._ticket, word)
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT)
        except OSError as error:
            raise HostUnreachable(
                f"the source does not wait any more: {channels.reason_of(error)}", side="source", cause=error
            ) from error
        if sent < len(data):
            raise HostUnreachable("the source does not read", side="source")


class KnockListener(ChannelListener):
    """Where the source of a job may call. Lives on one loop; `close` ends its tasks and sockets, not the callers that
    were given to `on_caller`."""

    def __init__(
        self,
        job: str,
        token: str,
        servers: Sequence[socket.socket],
        on_caller: OnCaller,
        *,
        greeting_s_max: float = channels.GREETING_S_MAX,
    ) -> None:
        super().__init__(job, servers, greeting_s_max)
        self._token, self._on_caller = token, on_caller
        self._calls: set[asyncio.Task[None]] = set()

    @classmethod
    async def listen(
        cls, job: str, token: str, hosts: Sequence[str], ports: Iterable[int], on_caller: OnCaller
    ) -> KnockListener:
        """At each of `hosts` on the first free port of `ports`. Raises Unfit when one cannot be bound."""
        return cls(job, token, channels.bind_all(hosts, ports), on_caller)

    async def _meet(self, connection: socket.socket) -> bool:
        try:
            async with asyncio.timeout(self._greeting_s_max):
                ticket = await self._greeted(connection)
        except (OSError, EOFError):
            return False
        if ticket is None:
            return False
        connection.setblocking(True)
        # A call is not ended by `close`: what it does to QEMU it does to its end.
        call = asyncio.get_running_loop().create_task(self._call(SocketCaller(ticket, connection)), name="recovery")
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return True

    async def _call(self, caller: Caller) -> None:
        await self._on_caller(caller)

    async def _greeted(self, connection: socket.socket) -> Ticket | None:
        """The ticket of this call once its owner has shown it, or None for a stranger."""
        loop = asyncio.get_running_loop()
        hello = await channels.receive_exactly(connection, _HELLO.size)
        magic, tag, theirs = _HELLO.unpack(hello)
        if magic != _MAGIC or not hmac.compare_digest(tag, channels.job_tag(self.job_id)):
            return None
        ours = os.urandom(NONCE_BYTES)
        channels.tune(connection)
        await loop.sock_sendall(connection, ours)
        ticket = ticket_of(self.job_id, self._token, theirs + ours)
        greeting = await channels.receive_exactly(connection, channels.GREETING_BYTES)
        if not hmac.compare_digest(greeting, ticket.greeting()):
            return None
        await loop.sock_sendall(connection, ticket.reply())
        return ticket


async def call(job: str, way: RecoveryWay) -> tuple[ChannelEnd, dict[str, Any]]:
    """Calls the destination's agent: the connection, and the word that was said on it. The caller owns the channel.

    Raises HostUnreachable when nobody with the token was reached, or said no word in time; no connection is open then,
    and what a destination without a word did is not known: at most its QEMU was paused, or waits for a channel. Raises
    NotTrusted when what answered everywhere is not the destination.
    """
    loop = asyncio.get_running_loop()
    end_s = loop.time() + limits.RECOVERY_CALL_S
    failures: list[str] = []
    impostor = False
    for host in way.hosts:
        for port in way.ports:
            address = (host, port)
            left_s = end_s - loop.time()
            if left_s <= 0:
                break
            try:
                return await _call_one(job, way.token, address, min(left_s, limits.RECOVERY_CONNECT_S))
            except (EOFError, NotTrusted, OSError) as error:
                impostor = impostor or isinstance(error, NotTrusted)
                failures.append(channels.failure_at(address, error))
                if isinstance(error, TimeoutError):
                    break  # the way there is what is wrong, not this port
    kind = NotTrusted if impostor else HostUnreachable
    raise kind(f"the destination cannot be reached beside its agent's link: {'; '.join(failures) or 'nowhere to call'}")


async def _call_one(job: str, token: str, address: Address, reach_s: float) -> tuple[ChannelEnd, dict[str, Any]]:
    """Raises TimeoutError, EOFError, NotTrusted or OSError when nobody with the token was reached, HostUnreachable for
    one that said no word."""
    family, target = channels.resolve(address)
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        async with asyncio.timeout(reach_s):
            ticket = await _reach(job, token, connection, target)
        try:
            async with asyncio.timeout(limits.RECOVERY_WORD_S):
                word = await _word(connection, ticket)
        except (TimeoutError, EOFError, OSError, NotTrusted, ValueError) as error:
            raise HostUnreachable(
                f"{channels.address_text(address)} answered and said no word: {error or 'nothing came'}",
                side="destination", guest="unknown", cause=error,
            ) from error  # fmt: skip
        connection.setblocking(True)
        return Channel(NAME, connection), word
    except BaseException:
        connection.close()
        raise


async def _reach(job: str, token: str, connection: socket.socket, target: Any) -> Ticket:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, target)
    channels.tune(connection)
    ours = os.urandom(NONCE_BYTES)
    await loop.sock_sendall(connection, _HELLO.pack(_MAGIC, channels.job_tag(job), ours))
    theirs = await channels.receive_exactly(connection, NONCE_BYTES)
    ticket = ticket_of(job, token, ours + theirs)
    await loop.sock_sendall(connection, ticket.greeting())
    reply = await channels.receive_exactly(connection, channels.REPLY_BYTES)
    if not hmac.compare_digest(reply, ticket.reply()):
        raise NotTrusted("the destination did not prove that it knows the token")
    return ticket


async def _word(connection: socket.socket, ticket: Ticket) -> dict[str, Any]:
    """Exactly the word, and not one byte more: what follows is the QEMUs'."""
    (length,) = _LENGTH.unpack(await channels.receive_exactly(connection, _LENGTH.size))
    if length > limits.RECOVERY_WORD_BYTES_MAX:
        raise ValueError(f"a word of {length} bytes")
    text = await channels.receive_exactly(connection, length)
    proof = await channels.receive_exactly(connection, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _proof(ticket, text)):
        raise NotTrusted("a word without its proof")
    word = json.loads(text)
    if not isinstance(word, dict):
        raise ValueError("a word that is no object")
    return word


def close_quietly(channel: ChannelEnd) -> None:
    """Ends a connection for both sides, whatever has become of it."""
    with contextlib.suppress(OSError):
        channel.cut()
        channel.close()
