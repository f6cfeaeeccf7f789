"""A relay that a test owns: it stands between two peers and does to their bytes what bad networks do.

Theory of operation
-------------------
A client connects to the relay, the relay connects to the target, and one thread per connection moves bytes
both ways. What happens to them is set per direction (`to_target`, `to_client`) and holds for every
connection, the next ones too: hold, drop, throttle, delay. `cut` and `half_close` act on the connections
that are there. A `Trigger` acts by itself at a byte pattern or offset, in the relay's thread, exactly there:
not a byte beyond the mark has gone on when its action runs.

    with Relay(("127.0.0.1", 4444)) as relay:
        seen = relay.to_target.at_pattern(b"proof", relay.to_target.hold)
        ...dial relay.address...
        seen.wait(5)

Rule 1: every thread is named, started by the relay, and joined by `stop`.
Rule 2: the relay never blocks in a send or receive, so `cut` and `stop` work whatever the peers do.
Rule 3: queues are bounded; a full one stops the reading, as a real network does.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

from vmferry.clock import Clock, SystemClock

Endpoint = tuple[str, int] | str  # (IP address, port), or the path of a unix socket

CHUNK_BYTES = 64 * 1024
QUEUE_BYTES_MAX = 8 * 1024 * 1024
CONNECT_S_MAX = 5.0
JOIN_S_MAX = 5.0
THROTTLE_STEPS_PER_S = 100


class Trigger:
    """Runs `action` once, when a connection's bytes reach its mark; `fired_at` is then the offset."""

    def __init__(self, action: Callable[[], object], *, pattern: bytes, offset: int, spare_bytes: int) -> None:
        self.pattern = pattern
        self.offset = offset
        self.spare_bytes = spare_bytes  # how many bytes of the pattern stay behind
        self.fired_at: int | None = None
        self._action = action
        self._fired = threading.Event()

    def wait(self, deadline_s: float) -> None:
        """Wait until it has run. Raises TimeoutError."""
        if not self._fired.wait(deadline_s):
            raise TimeoutError(f"nothing reached the mark {self.pattern or self.offset!r} in {deadline_s:g} s")

    @property
    def has_fired(self) -> bool:
        """Has the action run?"""
        return self._fired.is_set()

    def distance(self, passed: bytes, offset: int, waiting: bytes) -> int | None:
        """How many of the `waiting` bytes may pass until the mark; None when it is not among them."""
        if not self.pattern:
            ahead = self.offset - offset
            return ahead if 0 <= ahead <= len(waiting) else None
        tail = passed[max(0, len(passed) - len(self.pattern) + 1) :]
        found = (tail + waiting).find(self.pattern)
        if found < 0:
            return None
        return max(0, found + len(self.pattern) - len(tail) - self.spare_bytes)

    def fire(self, offset: int) -> None:
        """Run the action; called by the relay."""
        self.fired_at = offset
        self._action()
        self._fired.set()


class Direction:
    """What happens to the bytes of one direction. Set from any thread; read by the relay's."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self.is_held = False
        self.is_dropping = False
        self.bytes_per_s: float | None = None
        self.delay_s = 0.0
        self.passed_bytes = 0  # over all connections; written by their threads, exact once they are quiet
        self.triggers: list[Trigger] = []

    def hold(self) -> None:
        """Let nothing pass until `release`; the sender meets back-pressure once the queue is full."""
        self.is_held = True
        self._wake()

    def release(self) -> None:
        """End `hold`."""
        self.is_held = False
        self._wake()

    def drop(self) -> None:
        """Read and forget everything from now on, as if one way of the line were dead but acknowledged."""
        self.is_dropping = True
        self._wake()

    def throttle(self, bytes_per_s: float | None) -> None:
        """At most this many bytes per second and connection; None = no limit."""
        self.bytes_per_s = bytes_per_s
        self._wake()

    def delay(self, delay_s: float) -> None:
        """Every byte read from now on arrives this much later; the rate is not limited by it."""
        self.delay_s = delay_s
        self._wake()

    def at_pattern(
        self, pattern: bytes, action: Callable[[], object], *, when: Literal["before", "after"] = "before"
    ) -> Trigger:
        """Act at the next `pattern`: "before" = all but its last byte has passed, "after" = all of it has."""
        assert pattern, "an empty pattern is everywhere"
        spare_bytes = 1 if when == "before" else 0
        return self._add(Trigger(action, pattern=pattern, offset=-1, spare_bytes=spare_bytes))

    def at_offset(self, offset: int, action: Callable[[], object]) -> Trigger:
        """Act when exactly `offset` bytes of a connection have passed."""
        return self._add(Trigger(action, pattern=b"", offset=offset, spare_bytes=0))

    def next_stop(self, passed: bytes, offset: int, waiting: bytes) -> tuple[int, Trigger | None]:
        """How many of the `waiting` bytes may pass now, and the trigger that is reached by then."""
        nearest: tuple[int, Trigger | None] = (len(waiting), None)
        for trigger in self.triggers:
            ahead = trigger.distance(passed, offset, waiting)
            if ahead is not None and (nearest[1] is None or ahead < nearest[0]):
                nearest = (ahead, trigger)
        return nearest

    def take(self, trigger: Trigger) -> bool:
        """May the caller run this trigger? True for one caller only."""
        with self._lock:
            if trigger not in self.triggers:
                return False
            self.triggers = [other for other in self.triggers if other is not trigger]
            return True

    def _add(self, trigger: Trigger) -> Trigger:
        with self._lock:
            self.triggers = [*self.triggers, trigger]
        self._wake()
        return trigger


class _Flow:
    """One direction of one connection. Touched by the connection's thread only."""

    def __init__(self, direction: Direction, source: socket.socket, sink: socket.socket, clock: Clock) -> None:
        self.direction = direction
        self.source = source
        self.sink = sink
        self._clock = clock
        self._queue: deque[tuple[float, bytes]] = deque()
        self._queued_bytes = 0
        self._passed = b""  # the last bytes that went on, for patterns that straddle two pieces
        self._offset = 0
        self._free_at_s = 0.0  # when the throttle lets the next piece go
        self._has_ended = False  # the source has sent all
        self.is_closed = False  # the sink was told so

    def wants_read(self) -> bool:
        return not self._has_ended and self._queued_bytes < QUEUE_BYTES_MAX

    def wants_write(self) -> bool:
        return self.wait_s() == 0.0

    def wait_s(self) -> float | None:
        """Seconds until the head of the queue may go; None = not by the passing of time."""
        if self.is_closed or self.direction.is_held or not self._queue:
            return None
        return max(0.0, max(self._queue[0][0], self._free_at_s) - self._clock.now_s())

    def read(self) -> None:
        try:
            data = self.source.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        if data and self.direction.is_dropping:
            return
        self._has_ended = not data
        self._queue.append((self._clock.now_s() + self.direction.delay_s, data))
        self._queued_bytes += len(data)

    def write(self) -> None:
        due_s, waiting = self._queue.popleft()
        if not waiting:
            self.close_sink()
            return
        stop, trigger = self.direction.next_stop(self._passed, self._offset, waiting)
        limit = self.direction.bytes_per_s
        most = stop if limit is None else min(stop, max(1, int(limit / THROTTLE_STEPS_PER_S)))
        sent = self._send(waiting[:most]) if most else 0
        if limit is not None:
            self._free_at_s = max(self._free_at_s, self._clock.now_s()) + sent / limit
        self._passed = (self._passed + waiting[:sent])[-CHUNK_BYTES:]
        self._offset += sent
        self._queued_bytes -= sent
        self.direction.passed_bytes += sent
        if waiting[sent:]:
            self._queue.appendleft((due_s, waiting[sent:]))
        if trigger is not None and sent == stop and self.direction.take(trigger):
            trigger.fire(self._offset)

    def close_sink(self) -> None:
        """Tell the sink that no more comes."""
        self.is_closed = True
        with contextlib.suppress(OSError):
            self.sink.shutdown(socket.SHUT_WR)

    def _send(self, data: bytes) -> int:
        try:
            return self.sink.send(data)
        except BlockingIOError:
            return 0


class _Connection:
    """Two sockets and the one thread that moves bytes between them, until both ends are done or it is cut."""

    def __init__(self, relay: Relay, client: socket.socket, target: socket.socket, number: int) -> None:
        self._sockets = (client, target)
        for end in self._sockets:
            end.setblocking(False)
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.flows = (
            _Flow(relay.to_target, client, target, relay.clock),
            _Flow(relay.to_client, target, client, relay.clock),
        )
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._lock = threading.Lock()
        self._is_done = False
        self._is_cut = False
        self._reset = False
        self._half_closed: list[_Flow] = []
        self.thread = threading.Thread(target=self._run, name=f"relay-connection-{number}")

    def wake(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._is_done:
                os.write(self._wake_write, b"!")

    def cut(self, *, reset: bool) -> None:
        self._reset = self._reset or reset
        self._is_cut = True
        self.wake()
        if self.thread is not threading.current_thread():
            self.thread.join(JOIN_S_MAX)
            assert not self.thread.is_alive(), f"{self.thread.name} does not end"

    def half_close(self, direction: Direction) -> None:
        self._half_closed += [flow for flow in self.flows if flow.direction is direction]
        self.wake()

    def _run(self) -> None:
        try:
            while not self._is_cut and not all(flow.is_closed for flow in self.flows):
                self._turn()
        except OSError:
            self._is_cut = True  # one end is gone, and an honest network tells the other
        finally:
            self._finish()

    def _turn(self) -> None:
        for flow in self._half_closed:
            flow.close_sink()
        waits = [wait_s for flow in self.flows if (wait_s := flow.wait_s())]
        reads: list[socket.socket | int] = [flow.source for flow in self.flows if flow.wants_read()]
        writes = [flow.sink for flow in self.flows if flow.wants_write()]
        readable, writable, _ = select.select([*reads, self._wake_read], writes, [], min(waits) if waits else None)
        if self._wake_read in readable:
            os.read(self._wake_read, CHUNK_BYTES)
        for flow in self.flows:
            if flow.source in readable:
                flow.read()
            # Again asked, because an action of the other direction's trigger may have held or cut this one.
            if flow.sink in writable and flow.wants_write() and not self._is_cut:
                flow.write()

    def _finish(self) -> None:
        with self._lock:
            self._is_done = True
            os.close(self._wake_read)
            os.close(self._wake_write)
        for end in self._sockets:
            if self._reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


class Relay:
    """Listens at `address` and relays each connection to `target`. A context manager; `stop` ends it all."""

    def __init__(self, target: Endpoint, *, listen: Endpoint = ("127.0.0.1", 0), clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.target = target
        self.to_target = Direction(self._wake)
        self.to_client = Direction(self._wake)
        self.refused = 0
        self._is_refusing = False
        self._is_stopped = False
        self._connections: list[_Connection] = []
        self._accepted = threading.Condition()
        self._server = _listen(listen)
        name = self._server.getsockname()
        self.address: Endpoint = name if isinstance(name, str) else (name[0], name[1])
        self._acceptor = threading.Thread(target=self._accept_all, name="relay-accept")
        self._acceptor.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def cut(self, *, reset: bool = False, number: int | None = None) -> None:
        """End every connection there is, with FIN or RST, without passing on what is queued.

        `number`: only one of them, counted from 0 in the order in which they came, and round and round.
        """
        connections = list(self._connections)
        if number is not None and connections:
            connections = [connections[number % len(connections)]]
        for connection in connections:
            connection.cut(reset=reset)

    def half_close(self, direction: Direction) -> None:
        """End one direction of every connection there is; the other goes on."""
        for connection in list(self._connections):
            connection.half_close(direction)

    def refuse(self, *, refusing: bool = True) -> None:
        """Close new connections at once, until told otherwise."""
        self._is_refusing = refusing

    def wait_connections(self, count: int, deadline_s: float) -> None:
        """Wait until this many connections were ever relayed: a peer is connected a moment before its
        connection can be cut. Raises TimeoutError."""
        with self._accepted:
            if not self._accepted.wait_for(lambda: len(self._connections) >= count, deadline_s):
                raise TimeoutError(f"{len(self._connections)} of {count} connections came in {deadline_s:g} s")

    def stop(self) -> None:
        """Cut everything, stop listening, and join every thread."""
        if self._is_stopped:
            return
        self._is_stopped = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the acceptor
        self._acceptor.join(JOIN_S_MAX + CONNECT_S_MAX)
        assert not self._acceptor.is_alive(), "relay-accept does not end"
        self._server.close()
        if isinstance(self.address, str):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address)
        self.cut()

    def _wake(self) -> None:
        for connection in self._connections:
            connection.wake()

    def _accept_all(self) -> None:
        while not self._is_stopped:
            try:
                client, _ = self._server.accept()
            except OSError:
                continue  # the visitor left, or `stop` woke us
            try:
                if self._is_refusing:
                    raise ConnectionRefusedError
                target = _connect(self.target)
            except OSError:
                self.refused += 1
                client.close()
                continue
            connection = _Connection(self, client, target, len(self._connections) + 1)
            connection.thread.start()
            with self._accepted:
                self._connections.append(connection)
                self._accepted.notify_all()


def _family(endpoint: Endpoint) -> socket.AddressFamily:
    if isinstance(endpoint, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in endpoint[0] else socket.AF_INET


def _listen(endpoint: Endpoint) -> socket.socket:
    server = socket.socket(_family(endpoint), socket.SOCK_STREAM)
    try:
        # A relay that ends and begins again has its address at once: what it cut lingers there for a minute.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(endpoint)
        server.listen(16)
    except OSError:
        server.close()
        raise
    return server


def _connect(endpoint: Endpoint) -> socket.socket:
    end = socket.socket(_family(endpoint), socket.SOCK_STREAM)
    try:
        end.settimeout(CONNECT_S_MAX)
        end.connect(endpoint)
    except OSError:
        end.close()
        raise
    return end
