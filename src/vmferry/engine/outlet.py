"""Writes events and pages to one connection, and keeps what did not fit.

Theory of operation
-------------------
A channel of RAM records remembers the block of its last record; `Outlet` does that, weaves heads and pages into one
buffer, and writes. What the socket does not take stays in `pending`; nothing else is written before it. `drain`
waits for room; `offer` does not.

A single page goes out as it lies in memory, behind a head: no array is made for it. In postcopy that is the way of
nearly everything that somebody waits for.

Rule 1: one owner.
Rule 2: a buffer of `pending` is not touched before it is written: the woven one is used again only when nothing is
        pending. Pages that are sent from where they lie may change meanwhile: then they are marked, and go again.
"""

from __future__ import annotations

import itertools
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.engine.image import PAGE_BYTES, ImageBlock, MemoryFile, Pages
from vmferry.engine.wires import IOVECS_MAX, Waker, Wire, view_of
from vmferry.wire import encode
from vmferry.wire.events import Encoded, Event, RamBlock
from vmferry.wire.ram import CONTINUE, PAGE, ZERO

RUN_PAGES: Final = 64
"""Pages woven into one buffer: 256 KiB, what a unix socket takes at once and a cache holds."""
_STRIDE: Final = 8 + PAGE_BYTES
_WORD: Final = struct.Struct(">Q")
_ZERO_FILL: Final = memoryview(b"\0")


class Outlet:
    """See the module's text. `while_waiting` is called whenever `drain` cannot go on at once."""

    def __init__(
        self, wire: Wire, *, waker: Waker | None = None, while_waiting: Callable[[], None] | None = None
    ) -> None:
        self.wire, self._waker, self._while_waiting = wire, waker, while_waiting
        self.bytes = 0
        self._pending: deque[memoryview] = deque()
        self._block: RamBlock | None = None
        self._woven = np.empty((RUN_PAGES, _STRIDE), np.uint8)
        self._memory: dict[ImageBlock, memoryview] = {}

    @property
    def is_full(self) -> bool:
        """Something waits for room in the socket."""
        return bool(self._pending)

    # --- what to write -----------------------------------------------------------------------------------

    def put(self, *events: Event) -> None:
        """Any events but pages."""
        parts = [part for event in events for part in encode.encode(event)]
        # Thousands of small commands are one buffer.
        self.put_raw(parts[0] if len(parts) == 1 else b"".join(bytes(part) for part in parts))

    def put_raw(self, part: Encoded) -> None:
        """Bytes as they are; they must not change before they are written."""
        view = view_of(part)
        if len(view):
            self._pending.append(view)

    def put_pages(self, block: ImageBlock, first: int, count: int) -> None:
        """Pages side by side; zero pages as such. Only when nothing is pending."""
        if count == 1 and block.store.knows_zeros:
            self._put_page(block, first)
            return
        if not block.store.knows_zeros:
            pages = block.store.read(first, count)
            self._put_mixed(block, first, pages, np.asarray(pages.any(axis=1)))
            return
        touched = block.touched[first : first + count]
        if touched.all():
            self.put_run(block, np.arange(first, first + count), block.store.read(first, count))
        elif not touched.any():
            self.put_zeros(block, np.arange(first, first + count))
        else:
            self._put_known(block, first, touched)

    def _put_page(self, block: ImageBlock, number: int) -> None:
        is_filled = bool(block.touched[number])
        word = number * PAGE_BYTES | (PAGE if is_filled else ZERO)
        if self._block is block.wire:
            self._pending.append(memoryview(_WORD.pack(word | CONTINUE)))
        else:
            self._name(block, word)
        if not is_filled:
            self._pending.append(_ZERO_FILL)
            return
        if not isinstance(block.store, MemoryFile):
            self._pending.append(block.store.read(number, 1).reshape(-1).data)
            return
        memory = self._memory.get(block)
        if memory is None:
            memory = self._memory[block] = block.pages.reshape(-1).data
        self._pending.append(memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])

    def put_run(self, block: ImageBlock, numbers: npt.NDArray[np.intp], pages: Pages) -> None:
        """Row i of `pages` is page `numbers[i]`. Only when nothing is pending."""
        assert not self._pending
        self._put_pages_in(self._woven if len(numbers) <= RUN_PAGES else None, block, numbers, pages)

    def put_zeros(self, block: ImageBlock, numbers: npt.NDArray[np.intp]) -> None:
        """Zero pages, any number of them."""
        start = 0
        if self._block is not block.wire:
            self._name(block, int(numbers[0]) * PAGE_BYTES | ZERO)
            self._pending.append(_ZERO_FILL)
            start = 1
        if len(numbers) > start:
            out = np.zeros((len(numbers) - start, 9), np.uint8)
            out[:, :8] = _heads(numbers[start:], ZERO | CONTINUE)
            self._pending.append(out.reshape(-1).data)

    def _put_known(self, block: ImageBlock, first: int, touched: npt.NDArray[np.bool_]) -> None:
        """As `_put_mixed`, where zeros are known before anything is read."""
        edges = (np.flatnonzero(touched[1:] != touched[:-1]) + 1).tolist()
        for start, stop in zip([0, *edges], [*edges, len(touched)], strict=True):
            numbers = np.arange(first + start, first + stop)
            if touched[start]:
                self._put_pages_in(None, block, numbers, block.store.read(first + start, stop - start))
            else:
                self.put_zeros(block, numbers)

    def _put_mixed(self, block: ImageBlock, first: int, pages: Pages, filled: npt.NDArray[np.bool_]) -> None:
        """In page order: the records of a host page may not be taken apart."""
        edges = (np.flatnonzero(filled[1:] != filled[:-1]) + 1).tolist()
        for start, stop in zip([0, *edges], [*edges, len(filled)], strict=True):
            numbers = np.arange(first + start, first + stop)
            if filled[start]:
                self._put_pages_in(None, block, numbers, pages[start:stop])
            else:
                self.put_zeros(block, numbers)

    def _put_pages_in(self, room: Pages | None, block: ImageBlock, numbers: npt.NDArray[np.intp], pages: Pages) -> None:
        start = 0
        if self._block is not block.wire:
            self._name(block, int(numbers[0]) * PAGE_BYTES | PAGE)
            self._pending.append(memoryview(pages[0].tobytes()))
            start = 1
        count = len(numbers) - start
        if count:
            out = np.empty((count, _STRIDE), np.uint8) if room is None else room[:count]
            out[:, :8] = _heads(numbers[start:], PAGE | CONTINUE)
            out[:, 8:] = pages[start:]
            self._pending.append(out.reshape(-1).data)

    def _name(self, block: ImageBlock, word: int) -> None:
        name = block.name.encode("utf-8", "surrogateescape")
        self._pending.append(memoryview(word.to_bytes(8, "big") + bytes([len(name)]) + name))
        self._block = block.wire

    # --- writing -----------------------------------------------------------------------------------------

    def offer(self) -> bool:
        """Writes what there is room for; True when nothing is pending any more. Raises Gone."""
        pending = self._pending
        while pending:
            count = self.wire.write_some(tuple(itertools.islice(pending, IOVECS_MAX)))
            if count == 0:
                return False
            self.bytes += count
            while count:
                head = pending.popleft()
                if count < len(head):
                    pending.appendleft(head[count:])
                    break
                count -= len(head)
        return True

    def drain(self) -> None:
        """Writes everything. Raises Gone."""
        while not self.offer():
            self.wire.wait(readable=self._while_waiting is not None, writable=True, waker=self._waker)
            if self._while_waiting is not None:
                self._while_waiting()


def pages_of(block: ImageBlock, numbers: npt.NDArray[np.intp]) -> Pages:
    """The content of ascending pages, one per row; a view if they lie side by side."""
    first, count = int(numbers[0]), len(numbers)
    if int(numbers[-1]) - first == count - 1:
        return block.store.read(first, count)
    return block.store.read_some(numbers)


def _heads(numbers: npt.NDArray[np.intp], flags: int) -> npt.NDArray[np.uint8]:
    words = (numbers.astype(np.uint64) * np.uint64(PAGE_BYTES)) | np.uint64(flags)
    return words.astype(">u8").view(np.uint8).reshape(len(numbers), 8)
