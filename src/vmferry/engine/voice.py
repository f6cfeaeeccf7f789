"""What a destination says to its source: the writing half of a main channel.

Rule 1: it belongs to the thread that owns the connection, like the wire.
Rule 2: words leave in the order in which they were said, and nobody learns that something was said before all of
        it has left (`tell`): when the connection breaks before, the source cannot have understood it.
Rule 3: bounded. A source that does not listen is not read either (`is_full`).
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from vmferry import limits
from vmferry.engine.image import PAGE_BYTES
from vmferry.engine.wires import Gone, Waker, Wire, view_of
from vmferry.wire import encode
from vmferry.wire.events import Encoded, Event, RamBlock
from vmferry.wire.return_path import RequestEncoder


class Voice:
    """See the module's text."""

    def __init__(self, wire: Wire, waker: Waker) -> None:
        self._wire, self._waker = wire, waker
        self._out: deque[memoryview] = deque()
        self._requests = RequestEncoder(page_size=PAGE_BYTES)

    @property
    def has_words(self) -> bool:
        """Something waits for room in the connection."""
        return bool(self._out)

    @property
    def is_full(self) -> bool:
        """So much waits that the source must listen first."""
        return len(self._out) >= limits.ENGINE_WORDS_MAX

    def say(self, *events: Event) -> None:
        """Puts these words behind the others. Waits, when too many are there, until the source listens; or Gone."""
        for event in events:
            for part in encode.encode(event):
                self._add(part)
        if self.is_full:
            self.push_all()

    def tell(self, event: Event) -> None:
        """Says it, and returns when all of it has left. Raises Gone; the source has not understood it then."""
        self.say(event)
        self.push_all()

    def ask(self, block: RamBlock, start: int, length: int) -> None:
        """A page request, which must be aligned and inside the block."""
        self._add(self._requests.encode(block, start, length))

    def push(self) -> None:
        """Writes as much as there is room for. Raises Gone."""
        while self._out:
            count = self._wire.write_some(list(islice(self._out, limits.ENGINE_WORDS_MAX)))
            if count == 0:
                return
            while count:
                first = self._out.popleft()
                if count < len(first):
                    self._out.appendleft(first[count:])
                count -= min(count, len(first))

    def push_all(self) -> None:
        """Writes everything; a source listens all the time. Raises Gone."""
        self.push()
        while self._out:
            if self._wire.is_cut:
                raise Gone("it was cut")
            self._wire.wait(writable=True, waker=self._waker)
            self.push()

    def _add(self, part: Encoded) -> None:
        view = view_of(part)
        if len(view):
            self._out.append(view)
