"""What the threads of one incoming endpoint share: where pages go, what was posted, what the owner ordered.

Rule 1: everything here is either made before the first thread starts and never replaced, or safe to use from any
        thread by itself (Event, Ledger, Barrier, Gate). Counters are one set per thread, added up when asked for.
Rule 2: what the owner has ordered once holds for all connections: an order that comes between two of them counts.
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass, field, fields
from typing import Literal

from vmferry import limits
from vmferry.clock import Clock, SystemClock
from vmferry.engine.barrier import Barrier, Gate
from vmferry.engine.image import Image
from vmferry.engine.ledger import Ledger
from vmferry.engine.wants import Wants
from vmferry.engine.wires import Waker, Wire
from vmferry.errors import VmferryError
from vmferry.wire.stream import Resume


@dataclass(frozen=True, slots=True)
class IncomingOptions:
    """How an incoming endpoint behaves. Both sides must agree on `channels`, `tls` and `compress`.

    `channels`: multifd channels, 0 for none.
    `hold_proof`: the answer to ping 0x42 waits for `give_proof`. Until then a source of QEMU 10.2 or newer stays in
        postcopy-device and can take its guest back. (It may do so later, too: see the decision 0017.)
    `hold_result`: the final word to the source waits for `give_result`: store what came first.
    `ack_switchover`: the source has switchover-ack on; said only to machine types up to 11.0 (protocol, 7.6).
    `stragglers_s`: so long a postcopy whose main channel has ended waits for the next page of the preempt channel.
    `guest_bytes_max`: a larger guest is refused.
    `end`: "end-of-input" also takes a stream without vmdescription, which ends when the source closes.
    """

    channels: int = 0
    tls: ssl.SSLContext | None = None
    hold_proof: bool = False
    hold_result: bool = False
    compress: bool = False
    ack_switchover: bool = False
    end: Literal["description", "end-of-input"] = "description"
    handshake_s: float = limits.ENGINE_HANDSHAKE_S
    stragglers_s: float = limits.ENGINE_STRAGGLERS_S
    guest_bytes_max: int = limits.ENGINE_GUEST_BYTES_MAX


@dataclass(slots=True)
class Counters:
    """What one thread did. Only that thread writes it."""

    bytes: int = 0
    pages: int = 0
    zero_pages: int = 0
    repeated_pages: int = 0
    """Of these pages: came in postcopy although they were here, and were not stored."""
    requests: int = 0

    def add(self, other: Counters) -> None:
        """Sums up."""
        for each in fields(Counters):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class Sides:
    """The connections beside the main channel, while they live. Any thread."""

    def __init__(self, *gates: Gate) -> None:
        self._gates = gates
        self._lock = threading.Lock()
        self._wires: dict[Wire, bool] = {}
        self._proved: set[Wire] = set()
        self._preempt: Wire | None = None

    def add(self, wire: Wire, *, is_multifd: bool) -> None:
        """A connection that is not the main channel; who it is, it has to prove."""
        with self._lock:
            self._wires[wire] = is_multifd

    def remove(self, wire: Wire) -> None:
        """It is over."""
        with self._lock:
            self._wires.pop(wire, None)
            self._proved.discard(wire)
            if self._preempt is wire:
                self._preempt = None

    def claim_preempt(self, wire: Wire) -> bool:
        """A connection has proved to be the preempt channel; False if there is one already."""
        with self._lock:
            if self._preempt is None and not wire.is_cut:
                self._preempt = wire
                self._proved.add(wire)
            return self._preempt is wire

    def prove(self, wire: Wire) -> None:
        """A multifd channel has introduced itself."""
        with self._lock:
            self._proved.add(wire)

    def has_proved(self, wire: Wire) -> bool:
        """Whether it is known to be a channel of this migration."""
        with self._lock:
            return wire in self._proved

    def cut(self, *, multifd: bool) -> None:
        """Breaks the preempt channel and those who may be it; with `multifd` all others too."""
        with self._lock:
            wires = [wire for wire, is_multifd in self._wires.items() if multifd or not is_multifd]
            self._preempt = None
        for wire in wires:
            wire.cut()
        self.shake()

    def shake(self) -> None:
        """Connections were cut: those who wait at a gate look at theirs."""
        for gate in self._gates:
            gate.shake()


@dataclass
class Shared:
    """See the module's text."""

    image: Image
    ledger: Ledger
    options: IncomingOptions
    waker: Waker = field(default_factory=Waker)
    """Wakes the thread of the main channel."""
    clock: Clock = field(default_factory=SystemClock)
    wants: Wants = field(default_factory=Wants)
    gate: Gate = field(default_factory=Gate)
    """The block list has come."""
    postcopy_gate: Gate = field(default_factory=Gate)
    """Postcopy has begun: what was to be discarded is, so requested pages may be stored."""
    stopping: threading.Event = field(default_factory=threading.Event)
    proof_ordered: threading.Event = field(default_factory=threading.Event)
    result_ordered: threading.Event = field(default_factory=threading.Event)
    resume: Resume | None = None
    """What the next connection takes for granted, once there is something."""

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.options.channels, self.waker.wake)
        self.sides = Sides(self.gate, self.postcopy_gate)
        self._lock = threading.Lock()
        self._counters: list[Counters] = []
        self._past = Counters()
        self._failure: tuple[VmferryError, bool] | None = None
        if not self.options.hold_proof:
            self.proof_ordered.set()
        if not self.options.hold_result:
            self.result_ordered.set()

    # --- what went wrong beside the main channel ------------------------------------------------------------

    def fail(self, error: VmferryError, *, is_multifd: bool) -> None:
        """A channel that had proved to be one of ours broke the protocol; the main channel decides what that means."""
        with self._lock:
            if self._failure is None:
                self._failure = error, is_multifd
        self.waker.wake()

    def take_failure(self, *, is_postcopy: bool) -> VmferryError | None:
        """The first failure, once. In postcopy the multifd channels have nothing to say, so theirs means nothing."""
        with self._lock:
            failure, self._failure = self._failure, None
        return None if failure is None or (is_postcopy and failure[1]) else failure[0]

    # --- counters -------------------------------------------------------------------------------------------

    def new_counters(self) -> Counters:
        """For a thread that begins."""
        with self._lock:
            self._counters.append(counters := Counters())
        return counters

    def end_counters(self, counters: Counters) -> None:
        """The thread is over: only the sum stays."""
        with self._lock:
            self._counters = [each for each in self._counters if each is not counters]
            self._past.add(counters)

    def totals(self) -> Counters:
        """The sums over all threads, past and present."""
        sums = Counters()
        with self._lock:
            for each in (self._past, *self._counters):
                sums.add(each)
        return sums
