"""The incoming endpoint: vmferry as the destination of a real QEMU.

Theory of operation
-------------------
`Incoming` fills an `Image` from a migration. Its connections come from a listening socket (multifd and preempt need
one, because the source opens several) or are handed over one by one. Each connection has a thread of its own, which
does the TLS handshake, reads the first bytes, and by them becomes the reader of the main channel (`MainIntake`), of a
multifd channel or of the preempt channel (`SideIntake`). The owner gives orders and reads facts and counters; none
of these calls waits for a connection.

Which thread touches what: see `Shared`. At most `limits.ENGINE_CONNECTIONS_MAX` connections, each with its thread, and
the acceptor's. In flight: one slab per connection.
Errors surface in `outcome` and as facts; a thread never ends with an exception.

Nothing but TLS tells a stranger from the source, so a connection counts for nothing until it has proved what it is.
When the house is full, the one that has been silent longest makes room for the newcomer.

The life of it: `listen` or `take` -> facts (LISTENING, HEADER_SEEN, …, LOADED) -> ALL_SENT, or ERROR, or LINK_LOST
of a round. After a LINK_LOST `take` (or the listener) continues it with a connection of the recovery. `stop` ends it
at any time, also with a peer that is stuck, and joins all threads.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from vmferry import limits
from vmferry.clock import Clock, SystemClock
from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus
from vmferry.engine.image import Image, ImageBlock
from vmferry.engine.intake import End, MainIntake
from vmferry.engine.ledger import Ledger
from vmferry.engine.shared import Counters, IncomingOptions, Shared
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
        self._shared = Shared(image, self.ledger, self.options, clock=self._clock)
        self._doors = Waker()
        """Wakes the acceptor."""
        self._lock = threading.Lock()
        """Guards the registers below. Never held while anything waits."""
        self._wires: dict[Wire, bool] = {}
        """All connections, oldest first, and whether they are a main channel."""
        self._threads: list[threading.Thread] = []
        self._main: MainIntake | None = None
        self._rounds = 0
        self._numbers = 0
        self._is_closed = False
        self.ledger.post(Fact.PREPARE)

    # --- the owner's side -----------------------------------------------------------------------------------

    def listen(self, listener: socket.socket) -> None:
        """Takes connections from `listener`, which belongs to this endpoint from now on."""
        listener.setblocking(False)
        with self._lock:
            is_open = self._start(lambda: self._accept(listener), "accept")
        if not is_open:
            listener.close()
            return
        self.ledger.post(Fact.LISTENING)

    def take(self, sock: socket.socket) -> None:
        """Takes one connection that somebody else made: the main channel, another one, or that of a recovery."""
        self.ledger.post(Fact.LISTENING)
        self._connection(sock)

    def request(self, block: ImageBlock, first_page: int, pages: int = 1) -> None:
        """Asks the source for pages (postcopy), as soon as it can be asked, and again after a recovery."""
        self._shared.wants.add(block, first_page, pages)
        self._wake()

    def give_proof(self) -> None:
        """Lets the source know that the device state is loaded (after `hold_proof`). No way back for this side.

        That is no leave to run the guest: see the decision 0017, "Two words that may be lost".
        """
        self._shared.proof_ordered.set()
        self._wake()

    def give_result(self) -> None:
        """Lets the source know that everything is here and safe (after `hold_result`). No way back for this side.

        That is no leave to run the guest: see the decision 0017, "Two words that may be lost".
        """
        self._shared.result_ordered.set()
        self._wake()

    @property
    def is_result_due(self) -> bool:
        """Everything is here, and nothing but `give_result` is missing."""
        main = self._main
        return main is not None and main.is_result_due

    @property
    def is_over(self) -> bool:
        """The main channel's thread has nothing more to do; after a LINK_LOST another connection may follow."""
        main = self._main
        return main is not None and main.over.is_set()

    def counters(self) -> Counters:
        """What has come so far."""
        return self._shared.totals()

    @property
    def error(self) -> VmferryError | None:
        """What went wrong first, if anything did."""
        main = self._main
        return None if main is None else main.error

    def outcome(self) -> IncomingOutcome:
        """How things stand now."""
        left: tuple[str, ...] = ()
        if self._shared.stopping.is_set():
            with self._lock:
                left = tuple(thread.name for thread in self._threads if thread.is_alive())
        return IncomingOutcome(self.ledger.status, self.error, self.counters(), left)

    def cut(self) -> None:
        """Breaks all connections; what that means depends on the commit (see `intake`). Threads end by themselves."""
        with self._lock:
            wires = tuple(self._wires)
        for wire in wires:
            wire.cut()
        self._shared.sides.shake()
        self._wake()

    def stop(self, *, timeout_s: float = limits.ENGINE_STOP_S) -> IncomingOutcome:
        """Ends everything, in whatever state it is, and joins all threads.

        Before the commit the source keeps its guest; after it, it is paused until somebody recovers it.
        """
        self._shared.stopping.set()
        with self._lock:  # from here on no connection is added, and no thread started
            threads = tuple(self._threads)
        self.cut()
        self._shared.barrier.break_up()
        self._doors.wake()
        until_s = self._clock.now_s() + timeout_s
        for thread in threads:
            thread.join(max(0.0, until_s - self._clock.now_s()))
        if self._main is None:
            self.ledger.post(Fact.ERROR, text="this side stopped before anything came")
        outcome = self.outcome()
        with self._lock:
            closes = not outcome.threads_left and not self._is_closed
            if closes:
                self._is_closed = True
                self._doors.close()
                self._shared.waker.close()
        return outcome

    def _wake(self) -> None:
        """An owner may still give orders when everything is over; the descriptor may be another's then."""
        with self._lock:
            if not self._is_closed:
                self._shared.waker.wake()

    # --- connections ----------------------------------------------------------------------------------------

    def _start(self, work: Callable[[], None], what: str) -> bool:
        """A new thread, unless the endpoint stops; with the lock held."""
        if self._shared.stopping.is_set():
            return False
        self._numbers += 1
        thread = threading.Thread(target=work, name=f"{self.name}-{what}-{self._numbers}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more
            return False
        self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(thread)
        return True

    def _accept(self, listener: socket.socket) -> None:
        """The acceptor's thread."""
        poll, doors = select.poll(), select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(self._doors.fd, select.POLLIN)
        doors.register(self._doors.fd, select.POLLIN)
        with listener:
            while not self._shared.stopping.is_set():
                poll.poll()
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError:  # no descriptors: the connection stays in the queue, and would wake us at once
                    doors.poll(limits.ENGINE_ACCEPT_AGAIN_S * 1000)
                    continue
                self._connection(sock)

    def _connection(self, sock: socket.socket) -> None:
        try:
            wire = Wire(sock, tls=self.options.tls, server_side=True, clock=self._clock)
        except (OSError, ValueError):
            sock.close()
            return
        silent = None
        with self._lock:
            if len(self._wires) >= limits.ENGINE_CONNECTIONS_MAX:
                sides = self._shared.sides
                silent = next(
                    (each for each, is_main in self._wires.items() if not is_main and not sides.has_proved(each)), None
                )
            is_welcome = (silent is not None or len(self._wires) < limits.ENGINE_CONNECTIONS_MAX) and self._start(
                lambda: self._serve(wire), "connection"
            )
            if is_welcome:
                self._wires[wire] = False
                if silent is not None:
                    del self._wires[silent]
        if silent is not None:
            silent.cut()
            self._shared.sides.shake()
        if not is_welcome:
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
                self._wires.pop(wire, None)
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
        if first[:4] == _MULTIFD:
            return MultifdIntake(self._shared, wire, first) if self.options.channels else None
        if first[:4] == STREAM_MAGIC[:4]:
            return self._begin(wire, first, before=None)
        if first[0] == COMMAND_TAG:
            # A recovery has no header; its first byte is that of a command. No page begins so: its offset would be
            # beyond any memory. It may come before this side has noticed that the connection before is lost.
            before = self._main
            if before is None or not before.over.wait(self.options.handshake_s) or before.end is not End.PAUSED:
                return None
            return self._begin(wire, first, before=before)
        return PreemptIntake(self._shared, wire, first) if first[0] == 0 else None

    def _begin(self, wire: Wire, first: bytes, *, before: MainIntake | None) -> MainIntake | None:
        """The main channel that follows `before`; None if another one does."""
        with self._lock:
            if self._main is not before or wire.is_cut:
                return None
            if before is not None:
                self._rounds += 1
            self._main = MainIntake(self._shared, wire, first, round_no=self._rounds)
            self._wires[wire] = True
            return self._main
