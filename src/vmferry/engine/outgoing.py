"""The outgoing endpoint: vmferry as the source of a real QEMU.

Theory of operation
-------------------
`Outgoing` sends an `Image` to a destination: all of it before the guest (precopy), or the guest first and the memory
behind it (postcopy from the first byte, or after a precopy part). A thread of its own writes the main channel and
hears the return path (`MainSender`); multifd channels have one each. The owner says when (`start_postcopy`), reads
facts, and says what only it can see (`saw_running`).

Connections are made by the owner's `dial`, called once for the main channel and once for each further one, in the
order that the destination needs: main first. The image may still be filled by an incoming endpoint, once that has the
block list (its SETUP_DONE): pages go out as they come, and a page that the destination's guest waits for and that is
not here is reported to `on_absent`, once.

Which thread touches what: see `Outbound`. Errors surface in `outcome` and as facts.

`completed` needs the proof that the destination runs its guest: nobody on this wire says so (SHUT 0 comes from a
paused guest too), so the owner does, with `saw_running`.
"""

from __future__ import annotations

import socket
import ssl
import statistics
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vmferry import limits
from vmferry.clock import Clock, SystemClock
from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus
from vmferry.engine.image import Image, ImageBlock
from vmferry.engine.ledger import Ledger
from vmferry.engine.sender import MainSender, Outbound, OutgoingOptions, SentEnd
from vmferry.engine.wires import Gone, Waker, Wire
from vmferry.errors import VmferryError

Dial = Callable[[], socket.socket]
OnAbsent = Callable[[ImageBlock, int, int], None]


@dataclass(frozen=True, slots=True)
class OutgoingOutcome:
    """How it ended, or stands. Times in µs, of the pages that were asked for before they had left; None without any."""

    status: MigrationStatus
    error: VmferryError | None
    bytes: int
    requests: int
    request_p50_us: float | None
    request_p99_us: float | None
    threads_left: tuple[str, ...] = ()
    requests_served: int = 0
    """Those whose times are known."""
    here_p50_us: float | None = None
    """Of pages that were here when they were asked for."""
    here_p99_us: float | None = None


def _spread_us(times_s: Iterable[float]) -> tuple[float | None, float | None]:
    """The median and the 99th percentile, in µs; None of nothing."""
    times = sorted(times_s)
    if not times:
        return None, None
    return statistics.median(times) * 1e6, times[min(len(times) - 1, len(times) * 99 // 100)] * 1e6


def _nobody(block: ImageBlock, first: int, count: int) -> None:
    """Nobody brings pages that are not here."""


class Outgoing:
    """See the module's text. Public calls return at once but for `stop`.

    `dial` is called from the endpoint's thread and may block for as long as the owner likes; it raises OSError.
    `tls`: this side's context (a source is the TLS client); `server_name` goes with it.
    """

    def __init__(
        self,
        image: Image,
        *,
        options: OutgoingOptions | None = None,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        on_absent: OnAbsent = _nobody,
        on_request: OnAbsent | None = None,
        name: str = "outgoing",
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.image = image
        self.options = options or OutgoingOptions()
        self.ledger = Ledger(is_source=True, clock=clock)
        self._tls, self._server_name = tls, server_name
        self._clock = clock or SystemClock()
        self._out = Outbound(image, self.ledger, self.options, Waker(), self._no_dial, on_absent, on_request)
        self._sender: MainSender | None = None
        self._thread: threading.Thread | None = None
        self._rounds = 0
        self._is_closed = False
        image.on_pages(self._out.on_pages)
        self._bytes_before = 0

    @classmethod
    def broken(
        cls,
        image: Image,
        *,
        options: OutgoingOptions | None = None,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        on_absent: OnAbsent = _nobody,
        on_request: OnAbsent | None = None,
        name: str = "stand-in",
    ) -> Outgoing:
        """One that stands in for a source which is gone: its destination is in postcopy-paused, `recover` goes on.

        The image must have every page that the destination lacks, or get it, as with any endpoint.
        """
        outgoing = cls(
            image, options=options, tls=tls, server_name=server_name, on_absent=on_absent, on_request=on_request,
            name=name,
        )  # fmt: skip
        for fact in (Fact.MIGRATE, Fact.SETUP_DONE, Fact.SWITCHOVER, Fact.PACKAGE_SENT, Fact.PACKAGE_LOADED):
            outgoing.ledger.post(fact, text="before this endpoint was made")
        outgoing.ledger.post(Fact.POSTCOPY_ANNOUNCED)
        outgoing.ledger.post(Fact.LINK_LOST, round_no=1, text="the source is gone")
        return outgoing

    # --- the owner's side -----------------------------------------------------------------------------------

    def start(self, dial: Dial) -> None:
        """Begins. `ledger` has the facts: SETUP_DONE, SWITCHOVER, PACKAGE_SENT, PACKAGE_LOADED, ALL_SENT, PEER_ACK …"""
        assert self._sender is None
        self.ledger.post(Fact.MIGRATE)
        self._begin(dial)

    def start_postcopy(self) -> None:
        """Switches to postcopy now (`postcopy="on-order"`). Pages that have not gone yet follow the guest."""
        assert self.options.postcopy == "on-order"
        self.ledger.post(Fact.START_POSTCOPY)
        self._out.postcopy_ordered = True
        self._out.waker.wake()

    def recover(self, dial: Dial) -> None:
        """Goes on after a LINK_LOST, with new connections (the destination's migrate-recover waits for them)."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(limits.ENGINE_STOP_S)  # it said so in its last moment
        self._rounds = self.ledger.log.last_round(Fact.LINK_LOST)
        assert self._rounds
        self.ledger.post(Fact.RESUME_WANTED, round_no=self._rounds)
        self._begin(dial)

    def saw_running(self) -> None:
        """The owner has proof that the destination's guest runs."""
        self.ledger.post(Fact.RUN_ACKED)

    @property
    def error(self) -> VmferryError | None:
        """What went wrong first on the present connection, if anything did."""
        return None if self._sender is None else self._sender.error

    def outcome(self) -> OutgoingOutcome:
        """How things stand now."""
        out = self._out
        (p50, p99), (here_p50, here_p99) = _spread_us(out.service_s), _spread_us(out.service_here_s)
        sent = self._bytes_before + (0 if self._sender is None else self._sender.sent_bytes)
        threads = [] if self._sender is None else [self._thread, *self._sender.threads]
        left = tuple(thread.name for thread in threads if thread is not None and thread.is_alive())
        return OutgoingOutcome(
            self.ledger.status, self.error, sent, out.requests, p50, p99, left, len(out.service_s), here_p50, here_p99
        )  # fmt: skip

    def cut(self) -> None:
        """Breaks all connections. Before the commit that is a failure, after it a pause."""
        if self._sender is not None:
            self._sender.cut()

    def stop(self, *, timeout_s: float = limits.ENGINE_STOP_S) -> OutgoingOutcome:
        """Ends everything, in whatever state it is, and joins all threads. The image stays as it is."""
        self._out.stopping = True
        self._out.waker.wake()
        self.cut()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self.ledger.post(Fact.CLEANUP)
        outcome = self.outcome()
        if not outcome.threads_left and not self._is_closed:
            self._is_closed = True
            self.image.forget(self._out.on_pages)
            self._out.waker.close()
        return outcome

    # --- the thread -----------------------------------------------------------------------------------------

    def _begin(self, dial: Dial) -> None:
        self._out.dial = lambda: self._wire(dial)
        self._bytes_before += 0 if self._sender is None else self._sender.sent_bytes
        self._sender = MainSender(self._out, round_no=self._rounds)
        self._thread = threading.Thread(target=self._run, name=f"{self.name}-main-{self._rounds}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        sender = self._sender
        assert sender is not None
        try:
            sender.run()
        finally:
            if sender.end is SentEnd.FAILED:
                self.ledger.post(Fact.CLEANUP)

    def _wire(self, dial: Dial) -> Wire:
        try:
            sock = dial()
        except OSError as error:
            raise Gone(f"no connection: {error}") from error
        try:
            return Wire(sock, tls=self._tls, server_name=self._server_name, clock=self._clock)
        except (OSError, ValueError) as error:
            sock.close()
            raise Gone(f"no connection: {error}") from error

    def _no_dial(self) -> Wire:
        raise Gone("it was not started")
