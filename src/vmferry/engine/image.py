"""The guest image: a guest's memory, device state and configuration, as one value that endpoints work on.

Theory of operation
-------------------
An `Image` holds RAM blocks, each in a memory file of its own, with one map per question: which pages are here
(`have`), which of them may hold something else than zeros (`touched`), which were changed since they were last
sent (`dirty`), which have left for good (`sent`), which the source took back and must send again (`owed`). An
incoming endpoint fills it, an outgoing one sends it, and both may work on the same image at the same time.

Rule 1: a map is an array of bytes, one per page, not of bits. Setting one byte is one store, so threads that work on
        different pages never take each other's marks back, and no lock is on the path of a page.
Rule 2: who writes a page writes its content first, then `touched`, then `dirty`, then `have`. Who sends a page takes
        its `dirty` mark first and reads its content afterwards. So a page that changes while it is sent is sent again:
            1. the sender clears dirty   2. the sender reads old content   3. the writer writes new content
            4. the writer sets dirty     5. the sender finds the mark in its next round
        And who finds a page here finds its mark as well, also of one that comes in this moment.
Rule 3: each map has one kind of writer: `have`, `touched`, `owed` and `dirty` (set) the incoming side, `sent` and
        `dirty` (clear) the outgoing side.
Rule 4: a page that is not here is never read; a page that was discarded is not here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from vmferry.wire.events import BitmapChunk, Configuration, DeviceSection, RamBlock

Map = npt.NDArray[np.bool_]
Pages = npt.NDArray[np.uint8]

PAGE_BYTES: Final = 4096
"""The target page of x86. Streams of other sizes are refused by the endpoints, not by the codec."""


_HUGE_FROM_BYTES: Final = 64 << 20
"""Blocks of this size get huge pages where the kernel gives them to shared memory (`shmem_enabled`, which is `never` on
many hosts). Small ones (firmware, video memory) would only take more memory."""


class PageStore(Protocol):
    """Where the content of a block's pages is."""

    @property
    def knows_zeros(self) -> bool:
        """Whether the block's `touched` says which pages are zero, so that those need not be read."""
        ...

    def read(self, first: int, count: int) -> Pages:
        """The pages from `first` on, one per row. A view or a copy; valid until the next call by the same thread.

        Raises OSError when the content is out of reach (the process whose memory it was is gone, say).
        """
        ...

    def read_some(self, numbers: npt.NDArray[np.intp]) -> Pages:
        """The same for these pages, in this order."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


class MemoryFile:
    """Pages in an anonymous memory file, mapped. Unwritten pages are zero and take no memory."""

    knows_zeros = True

    def __init__(self, name: str, size_bytes: int) -> None:
        # The kernel takes 249 bytes of a name; a block's may have 255.
        self.fd = os.memfd_create(f"vmferry {name}"[:120], os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size_bytes)
            self._map = mmap.mmap(self.fd, size_bytes)
        except OSError:
            os.close(self.fd)
            raise
        if size_bytes >= _HUGE_FROM_BYTES:
            with contextlib.suppress(OSError):  # a kernel without huge pages for shared memory
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.pages: Pages = np.frombuffer(self._map, np.uint8).reshape(-1, PAGE_BYTES)

    def read(self, first: int, count: int) -> Pages:
        """A view."""
        return self.pages[first : first + count]

    def read_some(self, numbers: npt.NDArray[np.intp]) -> Pages:
        """A copy."""
        return self.pages[numbers]

    def close(self) -> None:
        """Gives the memory back. Views that others still hold keep the mapping alive until they are gone."""
        self.pages = np.empty((0, PAGE_BYTES), np.uint8)
        os.close(self.fd)
        with contextlib.suppress(BufferError):  # somebody still holds a view; the mapping goes with it
            self._map.close()


class ForeignMemory:
    """Pages that lie in a file or in another process's memory; read only.

    `offset_bytes` is where the block begins: in a RAM file its offset there, in /proc/PID/mem its address.
    The descriptor belongs to this object from now on.
    """

    knows_zeros = False

    def __init__(self, fd: int, offset_bytes: int) -> None:
        self.fd, self._offset_bytes = fd, offset_bytes

    def read(self, first: int, count: int) -> Pages:
        """A copy. Raises OSError, also when fewer bytes than asked for are there."""
        out = np.empty((count, PAGE_BYTES), np.uint8)
        view = out.data.cast("B")
        at = self._offset_bytes + first * PAGE_BYTES
        done = 0
        while done < len(view):
            got = os.preadv(self.fd, [view[done:]], at + done)
            if got == 0:
                raise OSError(f"memory ends at {at + done:#x}")
            done += got
        return out

    def read_some(self, numbers: npt.NDArray[np.intp]) -> Pages:
        """A copy. Raises OSError."""
        return np.concatenate([self.read(int(number), 1) for number in numbers])

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.fd)


class ImageBlock:
    """One RAM block: its description as on the wire, its pages, and the maps of the module's text."""

    def __init__(self, wire: RamBlock, store: PageStore | None = None) -> None:
        self.wire = wire
        self.count = wire.used_length // PAGE_BYTES
        self.store: PageStore = store if store is not None else MemoryFile(wire.name, wire.used_length)
        self.have: Map = np.zeros(self.count, np.bool_)
        self.touched: Map = np.zeros(self.count, np.bool_)
        self.sent: Map = np.zeros(self.count, np.bool_)
        self.dirty: Map = np.zeros(self.count, np.bool_)
        self.owed: Map = np.zeros(self.count, np.bool_)

    @property
    def name(self) -> str:
        """The block's name."""
        return self.wire.name

    @property
    def host_page_pages(self) -> int:
        """How many pages travel together in postcopy: 1 but for huge pages."""
        return (self.wire.page_size or PAGE_BYTES) // PAGE_BYTES

    @property
    def pages(self) -> Pages:
        """The writable pages. Only of a block that has its own memory file."""
        assert isinstance(self.store, MemoryFile)
        return self.store.pages

    def write(self, offsets: npt.NDArray[np.uint64], pages: Pages, *, is_row: bool = False) -> None:
        """Stores pages; row i at byte offset `offsets[i]`. Any order; of equal offsets the last one counts.

        `is_row`: somebody has looked already: they lie side by side."""
        count = len(offsets)
        first = int(offsets[0]) // PAGE_BYTES
        if is_row or count == 1 or _is_ascending(offsets):
            where: slice | npt.NDArray[np.intp] = slice(first, first + count)
        else:
            where = _numbers(offsets)
        self.pages[where] = pages
        self._mark(where)

    def place(self, first: int, count: int) -> memoryview:
        """Where the content of these pages lies, for a reader that writes it without a copy and then says `placed`."""
        return self.pages[first : first + count].reshape(-1).data

    def placed(self, first: int, count: int) -> None:
        """The content of these pages is there."""
        self._mark(slice(first, first + count))

    def _mark(self, where: slice | npt.NDArray[np.intp]) -> None:
        self.touched[where] = True
        self.dirty[where] = True
        self.have[where] = True

    def write_zeros(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Stores pages of zeros; costs nothing where nothing else was written."""
        where = _numbers(offsets)
        stale = where[self.touched[where]]
        if len(stale):
            self.pages[stale] = 0
            self.touched[stale] = False
        self.dirty[where] = True
        self.have[where] = True

    def write_missing(self, offsets: npt.NDArray[np.uint64], pages: Pages) -> int:
        """Stores those pages that are not here; how many that were. For postcopy: see `write_missing_zeros`."""
        missing = ~self.have[_numbers(offsets)]
        if missing.all():
            self.write(offsets, pages)
            return len(offsets)
        if missing.any():
            self.write(offsets[missing], pages[missing])
        return int(np.count_nonzero(missing))

    def write_missing_zeros(self, offsets: npt.NDArray[np.uint64]) -> int:
        """Stores those pages of zeros that are not here; how many that were.

        In postcopy a page that is here may be in use already, and changed by those who use it. Its content at the
        source has been the same since the switchover, so a second copy is never needed.
        """
        missing = ~self.have[_numbers(offsets)]
        if missing.any():
            self.write_zeros(offsets[missing])
        return int(np.count_nonzero(missing))

    def discard(self, start_bytes: int, length_bytes: int) -> None:
        """These pages are not here any more: they will come again."""
        where = slice(start_bytes // PAGE_BYTES, (start_bytes + length_bytes) // PAGE_BYTES)
        self.have[where] = False
        self.owed[where] = True

    def forget_parts(self) -> None:
        """Takes pages for missing whose host page has not come whole: it is sent as a whole again."""
        unit = self.host_page_pages
        if unit > 1 and self.count % unit == 0:
            whole = self.have.reshape(-1, unit).all(axis=1)
            self.have[~np.repeat(whole, unit)] = False

    def assume_zeros(self) -> None:
        """What was never received is zero: true at the end of a stream (protocol, 4.3), if nothing is owed."""
        missing = ~self.have
        stale = np.flatnonzero(missing & self.touched)
        if len(stale):
            self.pages[stale] = 0
            self.touched[stale] = False
        self.dirty |= missing
        self.have[:] = True

    def prefault(self) -> None:
        """Takes all memory now, for measurements: the first touch of a page is slow and varies."""
        assert not self.have.any()
        self.pages[:] = 0


def leading_run(offsets: npt.NDArray[np.uint64]) -> int:
    """How many of these pages, from the first on, lie side by side."""
    if _is_ascending(offsets):
        return len(offsets)
    return int((offsets[1:] - offsets[:-1] != PAGE_BYTES).argmax()) + 1


def _numbers(offsets: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    return (offsets // np.uint64(PAGE_BYTES)).astype(np.intp)


def _is_ascending(offsets: npt.NDArray[np.uint64]) -> bool:
    """Whether the pages lie side by side."""
    return bool(
        int(offsets[-1]) - int(offsets[0]) == (len(offsets) - 1) * PAGE_BYTES
        and (offsets[1:] - offsets[:-1] == PAGE_BYTES).all()
    )


Arrivals = deque[tuple[ImageBlock, int, int]]
"""Rows of pages that have come: block, first, the page after the last. Each row within `ARRIVAL_PAGES_MAX`."""
ARRIVAL_PAGES_MAX: Final = 4096


@dataclass(slots=True)
class KeptBitmaps:
    """A `dirty-bitmap` section, kept as it came: its number and all of its chunks in order."""

    section_id: int
    chunks: list[BitmapChunk] = field(default_factory=list)
    chunks_at_start: int = 0


class Image:
    """Everything that a destination needs to run a guest, or as much of it as has come.

    Owner: whoever made it; endpoints borrow it, and `close` may be called when they have stopped.
    """

    def __init__(self) -> None:
        self.configuration: Configuration | None = None
        self.has_footers = True
        self.ram_section_id = 1
        self.blocks: dict[str, ImageBlock] = {}
        self.early: list[DeviceSection] = []
        """Device sections that stand before RAM, in their order."""
        self.devices: list[DeviceSection] = []
        self.description: bytes | None = None
        """The vmdescription; None after a postcopy, which has none."""
        self.bitmaps: KeptBitmaps | None = None
        self.is_device_state_whole = False
        """All of `early` and `devices` are here: a guest can be started from this image, or soon."""
        self.arrivals: Arrivals | None = None
        """None: all pages that are here may be sent at any time. Else only those leave unasked that stand in it, in its
        order, the first ones first: whoever fills the image appends to it, and a sender takes from it."""
        self._wakers: list[Callable[[], None]] = []

    @property
    def machine(self) -> str:
        """The machine type, '' before the configuration has come or if the stream has none."""
        return "" if self.configuration is None else self.configuration.machine

    @property
    def total_bytes(self) -> int:
        """The lengths of all blocks."""
        return sum(block.wire.used_length for block in self.blocks.values())

    @property
    def has_all_pages(self) -> bool:
        """No page is missing. Looks at every page's mark: 25 µs per GiB."""
        return all(bool(block.have.all()) for block in self.blocks.values())

    def missing_pages(self) -> int:
        """How many pages are not here."""
        return sum(block.count - int(np.count_nonzero(block.have)) for block in self.blocks.values())

    def owed_pages(self) -> int:
        """How many pages the source took back in postcopy and has not sent again."""
        return sum(int(np.count_nonzero(block.owed & ~block.have)) for block in self.blocks.values())

    def add_block(self, wire: RamBlock) -> ImageBlock:
        """A block of the stream's list. One that is there already must be the same."""
        known = self.blocks.get(wire.name)
        if known is None:
            known = self.blocks[wire.name] = ImageBlock(wire)
        assert known.wire.used_length == wire.used_length
        return known

    def on_pages(self, wake: Callable[[], None]) -> None:
        """`wake` is called (from the threads of an incoming endpoint) after pages have come. It must not block."""
        self._wakers.append(wake)

    def forget(self, wake: Callable[[], None]) -> None:
        """`wake` is not called any more."""
        self._wakers = [each for each in self._wakers if each != wake]

    def announce_pages(self) -> None:
        """Pages have come."""
        for wake in self._wakers:
            wake()

    def __iter__(self) -> Iterator[ImageBlock]:
        return iter(self.blocks.values())

    def close(self) -> None:
        """Gives all memory back."""
        for block in self.blocks.values():
            block.store.close()
        self.blocks.clear()
