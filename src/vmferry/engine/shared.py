"""What the threads of one incoming endpoint share: where pages go, what was posted, what the owner ordered.

Rule 1: everything here is either made before the first thread starts and never replaced, or safe to use from any
        thread by itself (deque, Event, Ledger, Barrier). Counters are one set per thread, added up when asked for.
"""

from __future__ import annotations

import ssl
import threading
from collections import deque
from dataclasses import dataclass, field, fields
from typing import Literal

from vmferry import limits
from vmferry.engine.barrier import Barrier
from vmferry.engine.image import Image
from vmferry.engine.ledger import Ledger
from vmferry.engine.wires import Waker
from vmferry.wire.events import RamBlock
from vmferry.wire.stream import Resume


@dataclass(frozen=True, slots=True)
class IncomingOptions:
    """How an incoming endpoint behaves. Both sides must agree on `channels`, `tls` and `compress`.

    `channels`: multifd channels, 0 for none.
    `hold_proof`: the answer to ping 0x42 waits for `give_proof`. Until then a source of QEMU 10.2 or newer stays in
        postcopy-device and can take its guest back.
    `hold_result`: the final word to the source waits for `give_result`: store what came first.
    `ack_switchover`: the source has switchover-ack on, and its machine type is at most 11.0 (protocol, 7.6).
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


@dataclass(slots=True)
class Counters:
    """What one thread did. Only that thread writes it."""

    bytes: int = 0
    pages: int = 0
    zero_pages: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class AskPages:
    """Order: ask the source for these bytes of a block."""

    block: RamBlock
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class GiveProof:
    """Order: answer ping 0x42."""


@dataclass(frozen=True, slots=True)
class GiveResult:
    """Order: tell the source that everything is here and safe."""


Order = AskPages | GiveProof | GiveResult


@dataclass
class Shared:
    """See the module's text."""

    image: Image
    ledger: Ledger
    options: IncomingOptions
    barrier: Barrier
    waker: Waker
    """Wakes the thread of the main channel."""
    orders: deque[Order] = field(default_factory=deque)
    blocks_ready: threading.Event = field(default_factory=threading.Event)
    """The block list has come, or the endpoint is stopping."""
    stopping: threading.Event = field(default_factory=threading.Event)
    has_preempt: threading.Event = field(default_factory=threading.Event)
    """A preempt channel is open: pages may come on it after the main channel's stream has ended."""
    counters: list[Counters] = field(default_factory=list)
    resume: Resume | None = None
    """What the next connection takes for granted, once there is something."""

    def new_counters(self) -> Counters:
        """For a thread that begins."""
        counters = Counters()
        self.counters.append(counters)
        return counters

    def totals(self) -> Counters:
        """The sums over all threads, past and present."""
        sums = {each.name: sum(getattr(one, each.name) for one in tuple(self.counters)) for each in fields(Counters)}
        return Counters(**sums)
