"""Which pages go next, from the maps alone. Pure arithmetic over arrays; no connection, no thread.

Theory of operation
-------------------
In precopy a round sends every page that is here and was not sent since it changed (`round_windows`). At the switch to
postcopy everything that the destination does not have, or has an old copy of, is discarded there (`discards`). Then
`PageService` hands out pages one chunk at a time: what the destination's guest waits for, then what lies behind that,
then all the rest in order.

Rule 1: after its discard a page leaves exactly once: `PageService` marks it as sent when it hands it out. A second
        copy would end the destination's QEMU (protocol, 4.6).
Rule 2: pages of one host page leave together, on one channel, with nothing in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.engine.image import PAGE_BYTES, ImageBlock, Map
from vmferry.wire.events import Discard

Numbers = npt.NDArray[np.intp]

WINDOW_PAGES: Final = 8192
"""Pages of which marks are looked at together: 32 MiB, little enough that marks are fresh when pages are sent."""
RANGES_PER_DISCARD: Final = 12
"""QEMU's own number; a destination takes more, but nothing is gained."""
_LOOK_PAGES: Final = 4096
"""Marks that the background looks at in one go for the next page that was not sent."""


def round_windows(block: ImageBlock) -> Iterator[Numbers]:
    """The page numbers of a precopy round, ascending, window by window; each window's marks are taken when it is
    asked for, so that a change in a later window still goes with this round."""
    for start in range(0, block.count, WINDOW_PAGES):
        part = slice(start, start + WINDOW_PAGES)
        due = block.have[part] & (block.dirty[part] | ~block.sent[part])
        numbers = np.flatnonzero(due) + start
        if len(numbers):
            # Taken before the content is read: whoever writes the page from here on sets the mark again.
            block.dirty[numbers] = False
            block.sent[numbers] = True
            yield numbers


def pages_due(block: ImageBlock) -> int:
    """How many pages a round would send now."""
    return int(np.count_nonzero(block.have & (block.dirty | ~block.sent)))


def ranges_of(marks: Map, unit: int = 1) -> list[tuple[int, int]]:
    """(first, count) of each row of marked pages, widened to whole units."""
    if unit > 1:
        units = -(-len(marks) // unit)
        padded = np.zeros(units * unit, np.bool_)
        padded[: len(marks)] = marks
        marks = padded.reshape(units, unit).any(axis=1).repeat(unit)[: len(marks)]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marks, [False])).view(np.int8)))
    return [(int(first), int(stop - first)) for first, stop in zip(edges[::2], edges[1::2], strict=True)]


def discards(blocks: Sequence[ImageBlock]) -> list[Discard]:
    """The commands that make the destination drop whatever will be sent in postcopy; marks these pages as not sent.

    There is at least one: QEMU 11 hangs when postcopy begins without any.
    """
    commands: list[Discard] = []
    for block in blocks:
        stale = ~block.sent | block.dirty
        if not stale.any() and block is blocks[-1] and not commands:
            stale[-1] = True
        rows = ranges_of(stale, block.host_page_pages)
        for first, count in rows:
            block.sent[first : first + count] = False
            block.dirty[first : first + count] = False
        for at in range(0, len(rows), RANGES_PER_DISCARD):
            some = rows[at : at + RANGES_PER_DISCARD]
            spans = tuple((first * PAGE_BYTES, count * PAGE_BYTES) for first, count in some)
            commands.append(Discard(block.name, spans))
    return commands


@dataclass(frozen=True, slots=True)
class Chunk:
    """Pages of one block, side by side, to be sent now. `asked_s`: when the first of them was asked for, else None."""

    block: ImageBlock
    first: int
    count: int
    asked_s: float | None = None


class PageService:
    """Hands out the pages that are still to be sent in postcopy. One owner."""

    def __init__(self, blocks: Sequence[ImageBlock], *, near_pages: int, chunk_pages: int) -> None:
        self._blocks = blocks
        self._near_pages, self._chunk_pages = near_pages, chunk_pages
        self._urgent: deque[tuple[ImageBlock, int, float]] = deque()
        self._near: deque[tuple[ImageBlock, int, int]] = deque()
        self._absent: list[tuple[ImageBlock, int, float]] = []
        self._block_at, self._page_at = 0, 0
        self._left = sum(block.count - int(np.count_nonzero(block.sent)) for block in blocks)

    @property
    def left(self) -> int:
        """Pages that were not handed out yet."""
        return self._left

    @property
    def is_waiting(self) -> bool:
        """Somebody waits for a page that is not here."""
        return bool(self._absent)

    def ask(self, block: ImageBlock, first: int, count: int, *, at_s: float) -> list[tuple[int, int]]:
        """The destination waits for pages. Returns the host pages (first, count) of them that are not here yet."""
        unit = block.host_page_pages
        absent = []
        for page in range(first // unit * unit, first + count, unit):
            if block.sent[page]:
                continue  # it is on its way: a request and the background may cross
            if self._is_here(block, page):
                self._urgent.append((block, page, at_s))
            else:
                self._absent.append((block, page, at_s))
                absent.append((page, min(unit, block.count - page)))
        return absent

    def look_again(self) -> None:
        """Pages have come: those that somebody waits for go first."""
        still = []
        for block, page, at_s in self._absent:
            if block.sent[page]:
                continue
            if self._is_here(block, page):
                self._urgent.append((block, page, at_s))
            else:
                still.append((block, page, at_s))
        self._absent = still

    def next_urgent(self) -> Chunk | None:
        """A host page that somebody waits for."""
        while self._urgent:
            block, page, at_s = self._urgent.popleft()
            if not block.sent[page]:
                unit = min(block.host_page_pages, block.count - page)
                after = page + unit
                if self._near_pages and after < block.count:
                    self._near.append((block, after, min(after + self._near_pages, block.count)))
                    if len(self._near) > 64:
                        self._near.popleft()  # an old neighbourhood; the background gets there
                return self._take(block, page, unit, at_s)
        return None

    def next_near(self) -> Chunk | None:
        """What lies behind pages that were asked for: the guest will probably go on there."""
        while self._near:
            block, page, stop = self._near.popleft()
            found = self._row(block, page, stop)
            if found is not None:
                first, count = found
                if first + count < stop:
                    self._near.appendleft((block, first + count, stop))
                return self._take(block, first, count)
        return None

    def next_background(self) -> Chunk | None:
        """The next pages in order that are here and were not sent."""
        turns = 0
        while self._left and turns <= len(self._blocks):
            block = self._blocks[self._block_at]
            found = self._row(block, self._page_at, min(block.count, self._page_at + _LOOK_PAGES))
            if found is not None:
                first, count = found
                self._page_at = first + count
                return self._take(block, first, count)
            self._page_at += _LOOK_PAGES
            if self._page_at >= block.count:
                self._page_at = 0
                self._block_at = (self._block_at + 1) % len(self._blocks)
                turns += 1
        return None

    def _is_here(self, block: ImageBlock, page: int) -> bool:
        unit = block.host_page_pages
        return bool(block.have[page]) if unit == 1 else bool(block.have[page : page + unit].all())

    def _row(self, block: ImageBlock, first: int, stop: int) -> tuple[int, int] | None:
        """The first row of pages to send in a range: at most a chunk, whole host pages."""
        unit = block.host_page_pages
        due = block.have[first:stop] & ~block.sent[first:stop]
        if unit > 1:
            whole = len(due) // unit * unit
            due = due[:whole].reshape(-1, unit).all(axis=1).repeat(unit)
        start = int(due.argmax()) if len(due) else 0
        if not len(due) or not due[start]:
            return None
        most = max(self._chunk_pages // unit, 1) * unit
        rest = due[start : start + most]
        return first + start, len(rest) if rest.all() else int(rest.argmin())

    def _take(self, block: ImageBlock, first: int, count: int, asked_s: float | None = None) -> Chunk:
        assert not block.sent[first : first + count].any()
        block.sent[first : first + count] = True
        self._left -= count
        return Chunk(block, first, count, asked_s)
