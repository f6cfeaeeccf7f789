"""The incoming endpoint: vmferry as the destination of a real QEMU.

Theory of operation
-------------------
`Incoming` fills an `Image` from a migration. Its connections come from a listening socket (multifd and preempt need
one, because the source opens several) or are handed over one by one. Each connection has a thread of its own, which
does the TLS handshake, reads the first bytes, and by them becomes the reader of the main channel (`MainIntake`), of a
multifd channel or of the preempt channel (`SideIntake`). The owner gives orders and reads facts and counters; none
of these calls waits for a connection.

Which thread touches what: see `Shared`. At most `limits.ENGINE_CONNECTIONS_MAX` threads, and the acceptor's.
In flight: one slab per connection.
Errors surface in `outcome` and as facts; a thread never ends with an exception.

The life of it: `listen` or `take` -> facts (LISTENING, HEADER_SEEN, …, LOADED) -> ALL_SENT, or ERROR, or LINK_LOST
of a round. After a LINK_LOST `take` (or the listener) continues it with a connection of the recovery. `stop` ends it
at any time, also with a peer that is stuck, and joins all threads.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from vmferry import limits
from vmferry.clock import Clock, SystemClock
from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus
from vmferry.engine.barrier import Barrier
from vmferry.engine.image import Image, ImageBlock
from vmferry.engine.intake import End, MainIntake
from vmferry.engine.ledger import Ledger
from vmferry.engine.shared import AskPages, Counters, GiveProof, GiveResult, IncomingOptions, Order, Shared
from vmferry.engine.side_intake import MultifdIntake, PreemptIntake, SideIntake
from vmferry.engine.wires import Gone, Waker, Wire
from vmferry.errors import VmferryError
from vmferry.wire.commands import TAG as COMMAND_TAG
from vmferry.wire.multifd import MAGIC as MULTIFD_MAGIC
from vmferry.wire.stream import MAGIC as STREAM_MAGIC

_FIRST_BYTES = 4
_MULTIFD = MULTIFD_MAGIC.to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class IncomingOutcome:
    """How it ended, or stands. `status` is computed from the facts; `threads_left` is empty unless a join failed."""

    status: MigrationStatus
    error: VmferryError | None
    counters: Counters
    threads_left: tuple[str, ...] = ()


class Incoming:
    """See the module's text. Every public call may come from any one thread, and returns at once but for `stop`."""

    def __init__(
        self,
        image: Image,
        *,
        options: IncomingOptions | None = None,
        name: str = "incoming",
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.image = image
        self.options = options or IncomingOptions()
        self.ledger = Ledger(is_source=False, clock=clock)
        self._clock = clock or SystemClock()
        self._shared = Shared(image, self.ledger, self.options, Barrier(self.options.channels), Waker())
        self._doors = Waker()
        """Wakes the acceptor."""
        self._lock = threading.Lock()
        """Guards the registers below. Never held while anything waits."""
        self._wires: set[Wire] = set()
        self._threads: list[threading.Thread] = []
        self._main: MainIntake | None = None
        self._sides: list[SideIntake] = []
        self._rounds = 0
        self._numbers = 0
        self._is_closed = False
        self.ledger.post(Fact.PREPARE)

    # --- the owner's side -----------------------------------------------------------------------------------

    def listen(self, listener: socket.socket) -> None:
        """Takes connections from `listener`, which belongs to this endpoint from now on."""
        listener.setblocking(False)
        self._start(lambda: self._accept(listener), "accept")
        self.ledger.post(Fact.LISTENING)

    def take(self, sock: socket.socket) -> None:
        """Takes one connection that somebody else made: the main channel, another one, or that of a recovery."""
        self.ledger.post(Fact.LISTENING)
        self._connection(sock)

    def request(self, block: ImageBlock, first_page: int, pages: int = 1) -> None:
        """Asks the source for pages (postcopy). Whole host pages: the range is widened to them."""
        unit = block.host_page_pages
        start = first_page // unit * unit
        stop = min(-(-(first_page + pages) // unit) * unit, block.count)
        size = block.wire.used_length // block.count
        self._order(AskPages(block.wire, start * size, (stop - start) * size))

    def give_proof(self) -> None:
        """Lets the source know that the device state is loaded (after `hold_proof`). There is no way back."""
        self._order(GiveProof())

    def give_result(self) -> None:
        """Lets the source know that everything is here and safe (after `hold_result`). There is no way back."""
        self._order(GiveResult())

    def counters(self) -> Counters:
        """What has come so far."""
        return self._shared.totals()

    @property
    def error(self) -> VmferryError | None:
        """What went wrong first, if anything did."""
        with self._lock:
            ends = [self._main, *self._sides]
        # A side's error breaks the barrier; what the main channel says of that is only its consequence.
        errors = [each.error for each in reversed(ends) if each is not None and each.error is not None]
        return errors[0] if errors else None

    def outcome(self) -> IncomingOutcome:
        """How things stand now."""
        left = tuple(thread.name for thread in self._threads if thread.is_alive())
        return IncomingOutcome(self.ledger.status, self.error, self.counters(), left)

    def cut(self) -> None:
        """Breaks all connections; what that means depends on the commit (see `intake`). Threads end by themselves."""
        with self._lock:
            wires = tuple(self._wires)
        for wire in wires:
            wire.cut()

    def stop(self, *, timeout_s: float = limits.ENGINE_STOP_S) -> IncomingOutcome:
        """Ends everything, in whatever state it is, and joins all threads.

        Before the commit the source keeps its guest; after it, it is paused until somebody recovers it.
        """
        self._shared.stopping.set()
        self._shared.barrier.break_up()
        self._shared.blocks_ready.set()
        self.cut()
        self._doors.wake()
        self._shared.waker.wake()
        until_s = self._clock.now_s() + timeout_s
        for thread in tuple(self._threads):
            thread.join(max(0.0, until_s - self._clock.now_s()))
        outcome = self.outcome()
        if not outcome.threads_left and not self._is_closed:
            self._is_closed = True
            self._doors.close()
            self._shared.waker.close()
        return outcome

    def _order(self, order: Order) -> None:
        self._shared.orders.append(order)
        self._shared.waker.wake()

    # --- connections ----------------------------------------------------------------------------------------

    def _start(self, work: Callable[[], None], what: str) -> None:
        with self._lock:
            self._numbers += 1
            thread = threading.Thread(target=work, name=f"{self.name}-{what}-{self._numbers}", daemon=True)
            self._threads = [each for each in self._threads if each.is_alive()]
            self._threads.append(thread)
            thread.start()

    def _accept(self, listener: socket.socket) -> None:
        """The acceptor's thread. Strangers cost a slot until they go; a full house accepts nobody."""
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(self._doors.fd, select.POLLIN)
        with listener:
            while not self._shared.stopping.is_set():
                poll.poll()
                with contextlib.suppress(OSError):
                    sock, _ = listener.accept()
                    self._connection(sock)

    def _connection(self, sock: socket.socket) -> None:
        try:
            wire = Wire(sock, tls=self.options.tls, server_side=True, clock=self._clock)
        except (OSError, ValueError):
            sock.close()
            return
        with self._lock:
            is_welcome = not self._shared.stopping.is_set() and len(self._wires) < limits.ENGINE_CONNECTIONS_MAX
            if is_welcome:
                self._wires.add(wire)
        if is_welcome:
            self._start(lambda: self._serve(wire), "connection")
        else:
            wire.close()

    def _serve(self, wire: Wire) -> None:
        """A connection's thread: who is it, and then its reader."""
        try:
            wire.handshake(timeout_s=self.options.handshake_s)
            first = self._first_bytes(wire)
            reader = self._reader(wire, first)
            if reader is not None:
                reader.run()
        except Gone:
            pass  # a connection that never said anything
        finally:
            with self._lock:
                self._wires.discard(wire)
            wire.close()

    def _first_bytes(self, wire: Wire) -> bytes:
        """Enough to know the kind of channel. A preempt channel may be silent for a long time. Raises Gone."""
        slab = memoryview(bytearray(limits.ENGINE_FIRST_BYTES))
        count = 0
        while count < _FIRST_BYTES:
            got = wire.read_into(slab[count:])
            if got is None:
                wire.wait(readable=True)
            elif got == 0:
                raise Gone("closed without a word")
            else:
                count += got
        return bytes(slab[:count])

    def _reader(self, wire: Wire, first: bytes) -> MainIntake | SideIntake | None:
        """Who reads this connection; None: nobody, it is a stranger's."""
        with self._lock:
            main, shared = self._main, self._shared
            if first[:4] == _MULTIFD:
                channels = sum(isinstance(side, MultifdIntake) for side in self._sides)
                if channels >= self.options.channels:
                    return None
                reader: SideIntake = MultifdIntake(shared, wire, first)
            elif first[:4] == STREAM_MAGIC[:4]:
                if main is not None:
                    return None
                self._main = MainIntake(shared, wire, first, round_no=0)
                return self._main
            elif first[0] == COMMAND_TAG:
                # A recovery has no header; its first byte is that of a command. No page begins so: its offset
                # would be beyond any memory.
                if main is None or main.end is not End.PAUSED:
                    return None
                self._rounds += 1
                self._main = MainIntake(shared, wire, first, round_no=self._rounds)
                return self._main
            elif shared.has_preempt.is_set():
                return None
            else:
                reader = PreemptIntake(shared, wire, first)
            self._sides.append(reader)
            return reader
