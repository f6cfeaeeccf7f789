"""The pages that somebody waits for: asked for by the owner, said to the source by the main channel's thread.

Theory of operation
-------------------
A want is a mark in a map and, as long as there are not too many, an entry in a queue. The queue keeps the order; the
map remembers what has to be asked for again after a recovery, because a source forgets requests with the
connection (protocol, section 10).

Rule 1: who wants marks the map first and queues then; who asks for everything empties the queue first and looks at
        the map then. So a want is found by one of the two, or by both, which does no harm.
Rule 2: requests are whole host pages, inside of their block, and of a length that sources are known to take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vmferry import limits
from vmferry.engine.image import PAGE_BYTES, Image, ImageBlock, Map


@dataclass(frozen=True, slots=True)
class Want:
    """Pages of a block."""

    block: ImageBlock
    first: int
    count: int


class Wants:
    """`add` by the owner; everything else by the thread of the main channel."""

    def __init__(self) -> None:
        self._queue: deque[Want] = deque()
        self._maps: dict[str, Map] = {}
        self._is_too_much = False

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, block: ImageBlock, first: int, count: int) -> None:
        """Somebody waits for these pages; the range is widened to whole host pages."""
        assert 0 <= first < first + count <= block.count
        unit = block.host_page_pages
        start, stop = first // unit * unit, min(-(-(first + count) // unit) * unit, block.count)
        asked = self._maps.get(block.name)
        if asked is None:
            asked = self._maps.setdefault(block.name, np.zeros(block.count, np.bool_))
        asked[start:stop] = True
        if len(self._queue) < limits.ENGINE_REQUESTS_MAX:
            self._queue.append(Want(block, start, stop - start))
        else:
            self._is_too_much = True

    def take(self, image: Image) -> Want | None:
        """The next one whose pages are not here yet, or None."""
        if self._is_too_much:
            self.again(image)
        while self._queue:
            want = self._queue.popleft()
            if not want.block.have[want.first : want.first + want.count].all():
                return want
        return None

    def again(self, image: Image) -> None:
        """Queues everything that was asked for and is not here."""
        self._is_too_much = False
        self._queue.clear()
        for block in image:
            asked = self._maps.get(block.name)
            if asked is not None:
                self._queue.extend(_ranges(block, asked & ~block.have))


def requests(want: Want) -> Iterator[tuple[int, int]]:
    """What to ask for: (start, length) in bytes."""
    most = max(limits.ENGINE_REQUEST_BYTES_MAX, want.block.host_page_pages * PAGE_BYTES)
    start, stop = want.first * PAGE_BYTES, (want.first + want.count) * PAGE_BYTES
    while start < stop:
        length = min(most, stop - start)
        yield start, length
        start += length


def _ranges(block: ImageBlock, wanted: Map) -> Iterator[Want]:
    """The marked pages as ranges of whole host pages."""
    unit = block.host_page_pages
    edges = np.flatnonzero(np.diff(wanted.view(np.int8), prepend=0, append=0)).tolist()
    done = 0
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        start, stop = max(done, begin // unit * unit), min(-(-end // unit) * unit, block.count)
        if start < stop:
            yield Want(block, start, stop - start)
            done = stop
