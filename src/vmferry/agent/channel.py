"""The migration channel belongs to vmferry: it connects the sockets, hands them to QEMU, and can cut them.

Theory of operation
-------------------
The destination opens a `ChannelListener` for the job and makes one `Ticket` per channel ("main", "preempt",
"main-2" for a later round); the ticket goes to the source over the agents' verified link. The source dials
with it. Both sides end with a `Channel`: a connected, blocking TCP socket that has carried the greeting and
not one byte more. Its number goes to QEMU with getfd; vmferry keeps its own, which is the same connection.

    source                                              destination
    magic | job | channel name | proof of the source ->  known ticket? proof right? ticket unused?
                        <- proof of the destination      then the channel is taken
    proof = HMAC-SHA256(token, role | job | channel name)

The token itself never crosses this network, so who holds the port or listens on the line learns nothing
that opens another channel. The greeting keeps strangers out; it does not hide the stream: TLS does that.

Rule 1: a ticket opens one channel once.
Rule 2: while our descriptor is open the peer sees no end of the stream when QEMU dies or drops it (a refused
        certificate, a failed load). So once QEMU has its descriptor, `entrust` gives ours up: the end is the
        peer's end at once, and `cut` borrows QEMU's descriptor from the kernel. Where that is not permitted
        `entrust` says so; the owner must then watch `is_held_by` and cut what QEMU has let go.
Rule 3: nothing here changes the flags of a Channel's socket: QEMU shares them.
Rule 4: everything is bounded: strangers at once, bytes read from each, and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vmferry.agent import descriptors
from vmferry.errors import HostUnreachable, NotTrusted, Unfit, VmferryError

STRANGERS_MAX = 16  # connections that have not proved themselves; one more drops the oldest
TICKETS_MAX = 64  # per job: channels times recovery rounds
GREETING_S_MAX = 5.0  # a source greets at once, so this only covers a slow network
NAME_BYTES_MAX = 24
TOKEN_BYTES = 32
BACKLOG = 16

# The agent's own timers end a silent migration long before; these end it when no agent is left to do so.
# The user timeout also runs while the peer reads nothing, so it must be longer than any honest pause.
SILENCE_MS_MAX = 120_000
KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 6

_MAGIC = b"VMFERRY\x01"
_GREETING = struct.Struct(f"!8s16s{NAME_BYTES_MAX}s32s")
GREETING_BYTES = _GREETING.size
REPLY_BYTES = 32

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to open one channel of one job once. `token` is secret: for the agents' link only."""

    job_id: str
    channel: str
    token: bytes = field(repr=False)

    def greeting(self) -> bytes:
        """What the source sends first."""
        return _GREETING.pack(_MAGIC, job_tag(self.job_id), self.channel.encode(), self._proof(b"source"))

    def reply(self) -> bytes:
        """What the destination answers."""
        return self._proof(b"destination")

    def _proof(self, role: bytes) -> bytes:
        text = b"\0".join((b"vmferry channel", role, job_tag(self.job_id), self.channel.encode()))
        return hmac.digest(self.token, text, "sha256")


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """What the kernel knows of a connection: enough to see a stall and to estimate the link."""

    is_established: bool
    rtt_us: int
    rtt_min_us: int
    unacked_segments: int
    retransmitted_segments: int
    last_receive_ms: int
    last_ack_ms: int
    acked_bytes: int
    received_bytes: int
    unsent_bytes: int
    delivery_bytes_per_s: int


class ChannelEnd(Protocol):
    """One end of a connected channel, as attempts use it; `Channel` says what each means."""

    name: str

    def fileno(self) -> int: ...

    @property
    def is_entrusted(self) -> bool: ...

    @property
    def is_cut(self) -> bool: ...

    def entrust(self, pid: int) -> bool: ...

    def is_held_by(self, pid: int) -> bool: ...

    async def spoken(self, *, deadline_s: float) -> bool: ...

    def cut(self) -> None: ...

    def close(self) -> None: ...


class ChannelDoor(Protocol):
    """Where a job's channels arrive, as attempts use it; `ChannelListener` says what each means."""

    addresses: tuple[Address, ...]

    def expect(self, channel: str) -> Ticket: ...

    async def arrived(self, channel: str, *, deadline_s: float) -> ChannelEnd: ...

    async def close(self) -> None: ...


class Channel:
    """One connected channel. Used from the loop only; holds one descriptor until `close`."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        self.name = name
        self.peer: Address = _address(connection.getpeername())
        self.inode = os.fstat(connection.fileno()).st_ino  # names the connection in the journal and /proc
        self._socket = connection
        self._pid = 0  # of the process that it is entrusted to
        self._pidfd = -1
        self._is_cut = False

    @classmethod
    def reclaim(cls, name: str, pid: int, inode: int) -> Channel | None:
        """The channel that an earlier agent left with process `pid`; None when it is gone.

        Raises OSError when this user may not take it.
        """
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                connection = descriptors.fetch_socket(pidfd, pid, inode)
            finally:
                os.close(pidfd)
            if connection is not None:
                channel = cls(name, connection)
                channel.entrust(pid)
                return channel
        return None

    def fileno(self) -> int:
        """The descriptor to send to QEMU with getfd (SCM_RIGHTS copies it); -1 once entrusted or closed."""
        return self._socket.fileno()

    def hand_over(self) -> socket.socket:
        """The socket in the state that QEMU is to get it: blocking, and nothing read ahead."""
        return self._socket

    @property
    def is_entrusted(self) -> bool:
        """Does QEMU alone hold the connection?"""
        return self._pidfd >= 0

    @property
    def is_cut(self) -> bool:
        """Has `cut` or `close` ended this channel from here?"""
        return self._is_cut

    def entrust(self, pid: int) -> bool:
        """Leave the connection to process `pid` alone, once it has it by getfd; `cut` still works.

        A process that has dropped it already, or is dead, ended the connection: giving up ours shows the
        peer so. False when this user may not borrow it back: then nothing has changed, and the owner must
        watch `is_held_by`.
        """
        assert self._pidfd < 0, "a channel is entrusted once"
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                borrowed = descriptors.fetch_socket(pidfd, pid, self.inode)
            except OSError:
                os.close(pidfd)
                return False
            if borrowed is not None:
                borrowed.close()
            self._pid, self._pidfd = pid, pidfd
        self._socket.close()
        return True

    def is_held_by(self, pid: int) -> bool:
        """Does process `pid` (our QEMU) still have a descriptor of this connection? False once it is dead.

        Costs about 0.1 ms. Raises PermissionError when this user may not look.
        """
        return self.inode in descriptors.socket_descriptors(pid)

    async def spoken(self, *, deadline_s: float) -> bool:
        """Wait until the peer has sent something, which stays for whoever reads next. False when the connection ended
        instead, or nothing came in time. Only before it is entrusted."""
        loop, descriptor, heard = asyncio.get_running_loop(), self._socket.fileno(), asyncio.Event()
        loop.add_reader(descriptor, heard.set)
        try:
            async with asyncio.timeout(deadline_s):
                await heard.wait()
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except (TimeoutError, OSError):
            return False
        finally:
            loop.remove_reader(descriptor)

    def cut(self) -> None:
        """End the connection for both QEMUs at once, whoever else holds descriptors of it. Never raises.

        Both QEMUs then see end of file or a broken pipe; whether the guest is unharmed is for the caller
        to know: before the grant the source resumes, in postcopy both sides pause and can be recovered.
        """
        self._is_cut = True
        # An OSError means that it was already gone, which is what was asked for.
        with contextlib.suppress(OSError), self._borrowed() as connection:
            if connection is not None:
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give up this side's descriptor. The connection lives on if QEMU still has its own."""
        self._is_cut = True
        self._socket.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def tcp_info(self) -> TcpInfo | None:
        """The kernel's numbers now; None once the channel is closed or the connection is gone."""
        with contextlib.suppress(OSError), self._borrowed() as connection:
            if connection is not None:
                return _tcp_info(connection)
        return None

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[socket.socket | None]:
        """Our descriptor, or QEMU's for as long as the block runs; None when there is none any more."""
        if self._pidfd < 0:
            yield self._socket if self._socket.fileno() >= 0 else None
            return
        connection = descriptors.fetch_socket(self._pidfd, self._pid, self.inode)
        try:
            yield connection
        finally:
            if connection is not None:
                connection.close()


def cut_what_was_let_go(channels: Iterable[ChannelEnd], pid: int) -> None:
    """Rule 2's duty of an owner whose channels could not be entrusted: where QEMU let go, the peer must learn it."""
    for channel in channels:
        if not channel.is_entrusted and not channel.is_cut and not channel.is_held_by(pid):
            channel.cut()


class ChannelListener:
    """The destination's side of a job's channels. Lives on one loop; `close` ends all its tasks and sockets.

    At most STRANGERS_MAX connections are being greeted, at most TICKETS_MAX tickets are made per job.
    """

    def __init__(self, job_id: str, servers: Sequence[socket.socket], greeting_s_max: float) -> None:
        self.job_id = job_id
        self.addresses: tuple[Address, ...] = tuple(_address(server.getsockname()) for server in servers)
        self._servers = tuple(servers)
        self._greeting_s_max = greeting_s_max
        self._tickets: dict[str, Ticket] = {}
        self._names: set[str] = set()
        self._arrivals: dict[str, asyncio.Future[Channel]] = {}  # until `arrived` has given the channel away
        self._strangers: dict[asyncio.Task[bool], socket.socket] = {}  # oldest first
        self.strangers_dropped = 0
        self._acceptors = [
            asyncio.get_running_loop().create_task(self._accept_all(server), name="channel-accept")
            for server in self._servers
        ]

    @classmethod
    async def open(
        cls,
        job_id: str,
        hosts: Sequence[str],
        *,
        ports: Iterable[int] = (0,),
        greeting_s_max: float = GREETING_S_MAX,
    ) -> ChannelListener:
        """Listen at each of `hosts` (this machine's IP addresses) on the first free port of `ports`; 0 = any.

        Raises Unfit when one of them cannot be bound; then nothing listens.
        """
        return cls(job_id, bind_all(hosts, ports), greeting_s_max)

    def expect(self, channel: str) -> Ticket:
        """A fresh ticket for a channel of this name; the name is used once per job."""
        assert 0 < len(channel.encode()) <= NAME_BYTES_MAX, f"channel name {channel!r} does not fit"
        assert channel not in self._names, f"channel {channel!r} has had its ticket"
        assert len(self._names) < TICKETS_MAX, "a job has a bounded number of channels"
        self._names.add(channel)
        ticket = Ticket(self.job_id, channel, secrets.token_bytes(TOKEN_BYTES))
        self._tickets[channel] = ticket
        self._arrivals[channel] = asyncio.get_running_loop().create_future()
        return ticket

    async def arrived(self, channel: str, *, deadline_s: float) -> Channel:
        """The channel of this name, once the source has opened it; from then on the caller owns it.

        Raises HostUnreachable when it did not come in time; its ticket is then void.
        """
        arrival = self._arrivals[channel]
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(arrival)
        except TimeoutError as error:
            self._tickets.pop(channel, None)
            # Without a result it is cancelled now, so that a greeting under way is not accepted for nobody.
            if arrival.cancel():
                del self._arrivals[channel]
                raise self._late(channel, deadline_s) from error
        del self._arrivals[channel]
        return arrival.result()

    async def close(self) -> None:
        """Stop listening, drop strangers, void tickets. Channels given away by `arrived` live on."""
        self._tickets.clear()
        tasks = [*self._acceptors, *self._strangers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            server.close()
        for arrival in self._arrivals.values():
            if not arrival.cancel() and not arrival.cancelled():
                arrival.result().close()
        self._arrivals.clear()

    async def _accept_all(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(server)
            except OSError:
                # The visitor left before we answered, or descriptors ran out: yield, then serve the next one.
                await asyncio.sleep(0.05)
                continue
            task = loop.create_task(self._meet(connection), name="channel-greeting")
            self._strangers[task] = connection
            task.add_done_callback(self._part)
            await asyncio.sleep(0)  # sock_accept does not yield while visitors wait in the backlog
            while len(self._strangers) > STRANGERS_MAX:
                # The oldest goes, not the newest: an honest source greets at once, a squatter waits.
                oldest = next(iter(self._strangers))
                oldest.cancel()
                await asyncio.wait([oldest])

    def _part(self, task: asyncio.Task[bool]) -> None:
        """The greeting is over; unless it was accepted, so is the connection (even if it never began)."""
        connection = self._strangers.pop(task)
        if task.cancelled() or not task.result():
            self.strangers_dropped += 1
            connection.close()

    def _late(self, channel: str, deadline_s: float) -> HostUnreachable:
        sentence = f"the source did not open the {channel} channel of job {self.job_id} in {deadline_s:g} s"
        return HostUnreachable(sentence, side="source")

    async def _meet(self, connection: socket.socket) -> bool:
        """Read one greeting; was the connection given to its channel?"""
        try:
            async with asyncio.timeout(self._greeting_s_max):
                greeting = await receive_exactly(connection, GREETING_BYTES)
                ticket = self._ticket_for(greeting)
                if ticket is None:
                    return False
                # Rule 1: void before the next await, so a second greeter finds nothing.
                del self._tickets[ticket.channel]
                tune(connection)
                await asyncio.get_running_loop().sock_sendall(connection, ticket.reply())
            return self._deliver(ticket, connection)
        except (OSError, EOFError):
            return False

    def _ticket_for(self, greeting: bytes) -> Ticket | None:
        found: Ticket | None = None
        for ticket in self._tickets.values():
            # Every open ticket is compared, in constant time, so that timing tells a stranger nothing.
            if hmac.compare_digest(ticket.greeting(), greeting):
                found = ticket
        return found

    def _deliver(self, ticket: Ticket, connection: socket.socket) -> bool:
        arrival = self._arrivals.get(ticket.channel)
        if arrival is None or arrival.done():
            return False
        connection.setblocking(True)
        arrival.set_result(Channel(ticket.channel, connection))
        return True


async def dial(addresses: Sequence[Address], ticket: Ticket, *, deadline_s: float) -> Channel:
    """Open the ticket's channel at the first of `addresses` (IP, port) that answers; the caller owns it.

    Each address gets an equal share of what is left of `deadline_s`. Raises HostUnreachable naming every
    address and what went wrong there, or NotTrusted when what answered is not the destination. No channel
    is then open, the guest is untouched, and a further attempt needs a fresh ticket.
    """
    assert addresses, "a channel needs an address to dial"
    loop = asyncio.get_running_loop()
    end_s = loop.time() + deadline_s
    failures: list[str] = []
    impostor = False
    for index, address in enumerate(addresses):
        share_s = max(0.0, end_s - loop.time()) / (len(addresses) - index)
        try:
            async with asyncio.timeout(share_s):
                return await _dial_one(address, ticket)
        except (EOFError, NotTrusted, OSError) as error:
            impostor = impostor or isinstance(error, NotTrusted)
            failures.append(failure_at(address, error))
    kind: type[VmferryError] = NotTrusted if impostor else HostUnreachable
    sentence = f"the {ticket.channel} channel cannot be opened: {'; '.join(failures)}"
    raise kind(sentence, hint="check that the migration ports are open at the destination")


def failure_at(address: Address, error: EOFError | NotTrusted | OSError) -> str:
    """Why nobody with the token was reached there, as a clause."""
    match error:
        case TimeoutError():
            return f"{address_text(address)} did not answer"
        case EOFError():
            return f"{address_text(address)} hung up on the greeting"
        case NotTrusted():
            return f"{address_text(address)} answered without the token"
        case _:
            return f"{address_text(address)}: {reason_of(error)}"


async def _dial_one(address: Address, ticket: Ticket) -> Channel:
    loop = asyncio.get_running_loop()
    family, target = resolve(address)
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, target)
        tune(connection)
        await loop.sock_sendall(connection, ticket.greeting())
        reply = await receive_exactly(connection, REPLY_BYTES)
        if not hmac.compare_digest(reply, ticket.reply()):
            raise NotTrusted("the destination did not prove that it knows the token")
        connection.setblocking(True)
        return Channel(ticket.channel, connection)
    except BaseException:
        connection.close()
        raise


async def receive_exactly(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes, and not one more taken from the kernel. Raises EOFError when they end early."""
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < count:
        piece = await loop.sock_recv(connection, count - len(received))
        if not piece:
            raise EOFError
        received += piece
    return received


def bind_all(hosts: Sequence[str], ports: Iterable[int]) -> list[socket.socket]:
    """Listens at each of the hosts, on the first free port of `ports`. Raises Unfit; then nothing listens."""
    assert hosts, "a listener needs an address"
    servers: list[socket.socket] = []
    choices = tuple(ports)
    try:
        for host in hosts:
            servers.append(_bind_first(host, choices))
    except Unfit:
        for server in servers:
            server.close()
        raise
    return servers


def _bind_first(host: str, ports: Sequence[int]) -> socket.socket:
    reason = "no port was given"
    for port in ports:
        try:
            family, target = resolve((host, port))
        except OSError:
            reason = "that is not an IP address"
            break
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.bind(target)
            server.listen(BACKLOG)
        except OSError as error:
            server.close()
            reason = reason_of(error)
            continue
        server.setblocking(False)
        return server
    span = f"ports {ports[0]} to {ports[-1]}" if ports else "no port"
    raise Unfit(f"the migration channel cannot listen at {host}, {span}: {reason}", side="destination")


def resolve(address: Address) -> tuple[int, Any]:
    """The family and the kernel's form of an IP address and port. Numbers only: names would need a thread."""
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return found[0][0], found[0][4]


def tune(connection: socket.socket) -> None:
    """What a migration channel needs of the kernel."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS_MAX)


def job_tag(job_id: str) -> bytes:
    """A job's name on the wire: 16 bytes that say nothing of it."""
    return hashlib.sha256(job_id.encode()).digest()[:16]


def _address(name: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    return name[0], name[1]


def reason_of(error: OSError) -> str:
    """Why the kernel said no, in its words."""
    # asyncio puts a text of its own into a failed connect, and a resolver's errors are not errno values.
    resolver = isinstance(error, socket.gaierror) or error.errno is None
    return str(error.strerror or error) if resolver else os.strerror(error.errno or 0)


def address_text(address: Address) -> str:
    """The address for people."""
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


# struct tcp_info of linux/tcp.h: 8 one-byte fields, 24 u32, 4 u64, 6 u32, one u64; the kernel only appends.
_TCP_INFO = struct.Struct("=8B24I4Q6IQ")
_TCP_ESTABLISHED = 1


def _tcp_info(connection: socket.socket) -> TcpInfo:
    raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    # Linux 4.9 and later return this much; QEMU's postcopy and our pidfds need a later one anyway.
    values = _TCP_INFO.unpack(raw)
    words, longs, tail = values[8:32], values[32:36], values[36:]
    return TcpInfo(
        is_established=values[0] == _TCP_ESTABLISHED,
        rtt_us=words[15],
        rtt_min_us=tail[3],
        unacked_segments=words[4],
        retransmitted_segments=words[23],
        last_receive_ms=words[11],
        last_ack_ms=words[12],
        acked_bytes=longs[2],
        received_bytes=longs[3],
        unsent_bytes=tail[2],
        delivery_bytes_per_s=tail[6],
    )
