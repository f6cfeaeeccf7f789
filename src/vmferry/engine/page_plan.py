"""Which pages go next, from the maps alone. Pure arithmetic over arrays; no connection, no thread.

Theory of operation
-------------------
In precopy a round sends every page that is here and was not sent since it changed (`round_windows`). At the switch to
postcopy everything that the destination does not have, or has an old copy of, is discarded there (`discards`). Then
`PageService` hands out pages one chunk at a time: what the destination's guest waits for, then what lies behind that,
then all the rest in order.

A request costs no search and no array: nearly all of them name one page. What a peer asks for twice is noted once, in
a map, so that its requests never take more room than the map and a short queue.

Rule 1: after its discard a page leaves exactly once: `PageService` marks it as sent when it hands it out. A second
        copy would end the destination's QEMU (protocol, 4.6).
Rule 2: pages of one host page leave together, on one channel, with nothing in between.
Rule 3: `have` is read before `dirty`, which is set before it: a page that comes meanwhile is missed by neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vmferry import limits
from vmferry.engine.image import PAGE_BYTES, Arrivals, ImageBlock, Map
from vmferry.wire.events import Discard

Numbers = npt.NDArray[np.intp]

WINDOW_PAGES: Final = 8192
"""Pages of which marks are looked at together: 32 MiB, little enough that marks are fresh when pages are sent."""
RANGES_PER_DISCARD: Final = 12
"""QEMU's own number; a destination takes more, but nothing is gained."""
_ZERO_CHUNK_PAGES: Final = 1024
"""Zeros in one go: 9 KiB on the wire."""
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


def whole_units(marks: Map, unit: int, *, need_all: bool) -> Map:
    """Marks of whole units only: a unit is marked if all of its pages are (`need_all`), or any of them."""
    if unit == 1:
        return marks
    units = -(-len(marks) // unit)
    padded = np.full(units * unit, need_all, np.bool_)
    padded[: len(marks)] = marks
    rows = padded.reshape(units, unit)
    return (rows.all(axis=1) if need_all else rows.any(axis=1)).repeat(unit)[: len(marks)]


def ranges_of(marks: Map) -> list[tuple[int, int]]:
    """(first, count) of each row of marked pages."""
    if not len(marks):
        return []
    edges = [0] if marks[0] else []
    edges += (np.flatnonzero(marks[1:] != marks[:-1]) + 1).tolist()
    if marks[-1]:
        edges.append(len(marks))
    return [(first, stop - first) for first, stop in zip(edges[::2], edges[1::2], strict=True)]


def discards(blocks: Sequence[ImageBlock]) -> list[Discard]:
    """The commands that make the destination drop whatever will be sent in postcopy; marks these pages as not sent.

    That is also what is not here: its source took it back, and the copy that was sent before is an old one.
    There is at least one: QEMU 11 hangs when postcopy begins without any.
    """
    commands: list[Discard] = []
    for block in blocks:
        stale = ~block.have
        stale |= block.dirty
        stale |= ~block.sent
        if block is blocks[-1] and not commands and not stale.any():
            stale[-1] = True
        stale = whole_units(stale, block.host_page_pages, need_all=False)
        if stale.all():  # nearly always: postcopy from the first byte
            block.sent[:] = False
            block.dirty[:] = False
            commands.append(Discard(block.name, ((0, block.count * PAGE_BYTES),)))
            continue
        # Only these marks are written: a mark of another page may be set by another thread in the same moment.
        block.sent[stale] = False
        block.dirty[stale] = False
        rows = ranges_of(stale)
        for at in range(0, len(rows), RANGES_PER_DISCARD):
            some = rows[at : at + RANGES_PER_DISCARD]
            spans = tuple((first * PAGE_BYTES, count * PAGE_BYTES) for first, count in some)
            commands.append(Discard(block.name, spans))
    return commands


class Chunk(NamedTuple):
    """Pages of one block, side by side, to be sent now. `asked_s`: when the first of them was asked for, else None.
    `was_absent`: they were not here then."""

    block: ImageBlock
    first: int
    pages: int
    asked_s: float | None = None
    was_absent: bool = False


_NONE: Final[tuple[tuple[int, int], ...]] = ()


class PageService:
    """Hands out the pages that are still to be sent in postcopy. One owner.

    `arrivals`: see `Image`. Without them whatever is here leaves in the order of the blocks.
    """

    def __init__(
        self, blocks: Sequence[ImageBlock], *, near_pages: int, chunk_pages: int, arrivals: Arrivals | None = None
    ) -> None:
        self._arrivals = arrivals
        self._blocks = blocks
        self._near_pages, self._chunk_pages = near_pages, chunk_pages
        self._asked = {block: np.zeros(block.count, np.bool_) for block in blocks}
        """Pages that were asked for, once and for all."""
        self._urgent: deque[tuple[ImageBlock, int, int, float | None]] = deque()
        """(block, first, stop, when): asked for and here."""
        self._absent: list[tuple[ImageBlock, int, int, float]] = []
        """The same of host pages that are not here."""
        self._came_late: set[tuple[ImageBlock, int]] = set()
        """Those of `_urgent` that were not here when they were asked for, by their first page."""
        self._is_over = self._is_search_due = False
        """More was asked for than the two above hold: the rest is found by the marks."""
        self._near: deque[tuple[ImageBlock, int, int]] = deque()
        self._block_at, self._page_at = 0, 0
        self._left = sum(block.count - int(np.count_nonzero(block.sent)) for block in blocks)

    @property
    def left(self) -> int:
        """Pages that were not handed out yet."""
        return self._left

    @property
    def is_waiting(self) -> bool:
        """Somebody waits for a page that is not here."""
        return bool(self._absent) or self._is_over

    # --- requests -----------------------------------------------------------------------------------------

    def ask(self, block: ImageBlock, first: int, count: int, *, at_s: float) -> Sequence[tuple[int, int]]:
        """The destination waits for pages. Returns the rows (first, count) of them that are not here yet.

        What was asked for before is not told again, nor what is on its way: a request and the background may cross.
        """
        asked = self._asked[block]
        if count == 1 and block.host_page_pages == 1:
            if asked[first] or block.sent[first]:
                return _NONE
            asked[first] = True
            return self._note(block, first, first + 1, at_s, is_here=bool(block.have[first]))
        unit = block.host_page_pages
        first, stop = first // unit * unit, min(-(-(first + count) // unit) * unit, block.count)
        part = slice(first, stop)
        due = whole_units(~block.sent[part] & ~asked[part], unit, need_all=True)
        asked[part] |= due
        here = whole_units(block.have[part], unit, need_all=True)
        for start, pages in ranges_of(due & here):
            self._note(block, first + start, first + start + pages, at_s, is_here=True)
        absent = [(first + start, pages) for start, pages in ranges_of(due & ~here)]
        for start, pages in absent:
            self._note(block, start, start + pages, at_s, is_here=False)
        return absent

    def _note(
        self, block: ImageBlock, first: int, stop: int, at_s: float, *, is_here: bool
    ) -> Sequence[tuple[int, int]]:
        if is_here:
            if len(self._urgent) < limits.ENGINE_SERVICE_QUEUE_MAX:
                self._urgent.append((block, first, stop, at_s))
            else:
                self._is_over = self._is_search_due = True
            return _NONE
        unit = block.host_page_pages
        for page in range(first, stop, unit):
            if len(self._absent) >= limits.ENGINE_SERVICE_QUEUE_MAX:
                self._is_over = True
                break
            self._absent.append((block, page, min(page + unit, stop), at_s))
        return [(first, stop - first)]

    def look_again(self) -> None:
        """Pages have come: those that somebody waits for go first."""
        still = []
        for waiting in self._absent:
            block, first, stop, _ = waiting
            if block.sent[first]:
                continue
            if block.have[first:stop].all():
                self._urgent.append(waiting)
                self._came_late.add((block, first))
            else:
                still.append(waiting)
        self._absent = still
        self._is_search_due = self._is_over

    def _search(self) -> None:
        """Finds by the marks what did not fit into the queue."""
        self._is_search_due = self._is_over = False
        for block, asked in self._asked.items():
            due = asked & ~block.sent
            if not due.any():
                continue
            here = due & whole_units(block.have, block.host_page_pages, need_all=True)
            rows = ranges_of(here)
            room = max(0, limits.ENGINE_SERVICE_QUEUE_MAX - len(self._urgent))
            self._urgent += [(block, first, first + count, None) for first, count in rows[:room]]
            self._is_search_due |= len(rows) > room
            self._is_over |= len(rows) > room or bool((due & ~here).any())

    # --- what goes next -----------------------------------------------------------------------------------

    def next_urgent(self) -> Chunk | None:
        """Pages that somebody waits for."""
        while self._urgent or self._is_search_due:
            if not self._urgent:
                self._search()
                continue
            block, first, stop, at_s = self._urgent.popleft()
            if stop - first == 1:
                if block.sent[first]:
                    continue
                chunk = self._take(block, first, 1, at_s)
            else:
                row = self._row(block, first, stop)
                if row is None:
                    continue
                chunk = self._take(block, *row, at_s)
                if chunk.first + chunk.pages < stop:
                    self._urgent.appendleft((block, chunk.first + chunk.pages, stop, at_s))
            self._note_near(block, chunk.first + chunk.pages)
            if self._came_late and (block, first) in self._came_late:
                self._came_late.discard((block, first))
                return chunk._replace(was_absent=True)
            return chunk
        return None

    def _note_near(self, block: ImageBlock, after: int) -> None:
        if self._near_pages and after < block.count:
            unit = block.host_page_pages
            self._near.append((block, after, min(after + -(-self._near_pages // unit) * unit, block.count)))
            if len(self._near) > limits.ENGINE_SERVICE_NEAR_MAX:
                self._near.popleft()  # an old neighbourhood; the background gets there

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
        if self._arrivals is not None:
            return self._next_arrived(self._arrivals)
        turns = 0
        while self._left and turns <= len(self._blocks):
            block = self._blocks[self._block_at]
            look = max(_LOOK_PAGES, block.host_page_pages)
            found = self._row(block, self._page_at, min(block.count, self._page_at + look))
            if found is not None:
                first, count = found
                self._page_at = first + count
                return self._take(block, first, count)
            self._page_at += look
            if self._page_at >= block.count:
                self._page_at = 0
                self._block_at = (self._block_at + 1) % len(self._blocks)
                turns += 1
        return None

    def _next_arrived(self, arrivals: Arrivals) -> Chunk | None:
        """The next pages that have come. Zeros are some bytes each, so many of them are one small chunk."""
        while arrivals:
            block, first, stop = arrivals.popleft()
            touched = block.touched[first:stop]
            if not touched[0] and block.host_page_pages == 1:
                filled = int(touched.argmax())
                end = first + filled if filled else stop
                if end < stop:
                    arrivals.appendleft((block, end, stop))
                found = self._row(block, first, end, chunk_pages=_ZERO_CHUNK_PAGES)
                rest = end
            else:
                found = self._row(block, first, stop)
                rest = stop
            if found is None:
                continue
            start, count = found
            if start + count < rest:
                arrivals.appendleft((block, start + count, rest))
            return self._take(block, start, count)
        return None

    def _row(self, block: ImageBlock, first: int, stop: int, *, chunk_pages: int = 0) -> tuple[int, int] | None:
        """The first row of pages to send in a range of whole host pages: at most a chunk, whole host pages."""
        unit = block.host_page_pages
        due = whole_units(block.have[first:stop] & ~block.sent[first:stop], unit, need_all=True)
        start = int(due.argmax()) if len(due) else 0
        if not len(due) or not due[start]:
            return None
        most = max((chunk_pages or self._chunk_pages) // unit, 1) * unit
        rest = due[start : start + most]
        return first + start, len(rest) if rest.all() else int(rest.argmin())

    def _take(self, block: ImageBlock, first: int, count: int, asked_s: float | None = None) -> Chunk:
        if count == 1:
            assert not block.sent[first]
            block.sent[first] = True
        else:
            assert not block.sent[first : first + count].any()
            block.sent[first : first + count] = True
        self._left -= count
        return Chunk(block, first, count, asked_s)
