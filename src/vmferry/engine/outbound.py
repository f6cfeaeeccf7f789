"""What the parts of one outgoing endpoint share: its options, and what they all look at.

Rule 1: of `Outbound` the owner's threads write only the three orders, each a single store; everything else belongs to
        the thread of the main channel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from vmferry import limits
from vmferry.engine.image import Image, ImageBlock
from vmferry.engine.ledger import Ledger
from vmferry.engine.wires import Waker, Wire


@dataclass(frozen=True, slots=True)
class OutgoingOptions:
    """How an outgoing endpoint behaves. Both sides must agree on `postcopy`, `preempt`, `channels`.

    `postcopy`: the destination has postcopy-ram on; "at-once" switches before any page was sent, "on-order" when the
    owner says so, "never" cannot.
    `result_s`: so long the destination has for its final word, once everything was sent; then the connection is taken
    for lost. Longer for a destination whose owner holds its word back (`IncomingOptions.hold_result`).
    `near_pages`: how many pages behind one that was asked for go next. `chunk_pages`: at most so many in one go.
    """

    postcopy: Literal["never", "on-order", "at-once"] = "never"
    preempt: bool = False
    channels: int = 0
    near_pages: int = 16
    chunk_pages: int = 16
    handshake_s: float = limits.ENGINE_HANDSHAKE_S
    result_s: float = limits.ENGINE_RESULT_S


@dataclass
class Outbound:
    """See the module's text."""

    image: Image
    ledger: Ledger
    options: OutgoingOptions
    waker: Waker
    """Wakes the thread of the main channel: an order was given, pages have come, a multifd channel has news."""
    dial: Callable[[], Wire]
    """Makes one more connection. Raises Gone."""
    on_absent: Callable[[ImageBlock, int, int], None]
    on_request: Callable[[ImageBlock, int, int], None] | None = None
    """Hears of every request for pages, in order, on the thread of the main channel."""
    postcopy_ordered: bool = False
    stopping: bool = False
    pages_came: bool = False
    """Somebody brought pages since this was last looked at."""
    service_s: deque[float] = field(default_factory=lambda: deque(maxlen=limits.ENGINE_SERVICE_TIMES_MAX))
    """Seconds from a request that was read to its page written, of the latest requests."""
    service_here_s: deque[float] = field(default_factory=lambda: deque(maxlen=limits.ENGINE_SERVICE_TIMES_MAX))
    """The same of those whose page was here when it was asked for."""
    requests: int = 0

    def on_pages(self) -> None:
        """For the image: pages have come. From any thread."""
        self.pages_came = True
        self.waker.wake()
