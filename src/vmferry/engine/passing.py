"""An image whose pages go on to somebody who keeps them: what a saved guest streams through, whatever its size.

Theory of operation
-------------------
An incoming endpoint writes pages into an `Image`. `PassingImage` has the same blocks and maps but no memory behind
them: each run of pages is handed to a `PageSink` in the thread that has read it, and is forgotten when the sink
returns. So the sink's speed is the stream's, and a source that sends faster waits in its own write.

Rule 1: the order of the stream is the order of the calls; a page that comes again replaces what came before. Within
        one call every page number is there once.
Rule 2: a precopy without compression only, on one connection: nothing here can be read back, so a difference to an
        earlier page is refused, as are postcopy and multifd, before the source has let go of its guest.
Rule 3: what the sink raises ends the stream as an error of the destination's: a source with a return path goes back
        to its guest.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from vmferry.engine.image import PAGE_BYTES, Image, ImageBlock, Pages
from vmferry.wire.errors import refuse
from vmferry.wire.events import RamBlock

Numbers = npt.NDArray[np.int64]
_SHIFT: Final = np.uint64(PAGE_BYTES.bit_length() - 1)


class PageSink(Protocol):
    """Who keeps the pages. Calls come from one thread at a time."""

    def put(self, block: str, numbers: Numbers, pages: Pages) -> None:
        """These pages are now that: one per row, valid until this returns. Raises VmferryError: the stream fails."""
        ...

    def put_zeros(self, block: str, numbers: Numbers) -> None:
        """These pages are zero now."""
        ...


class _Nowhere:
    """The memory of a block that keeps none."""

    knows_zeros = False

    def read(self, first: int, count: int) -> Pages:
        """Nothing can be read. Raises OSError."""
        raise OSError(f"pages {first} to {first + count - 1} went on")

    def read_some(self, numbers: npt.NDArray[np.intp]) -> Pages:
        """Nothing can be read. Raises OSError."""
        raise OSError(f"{len(numbers)} pages went on")

    def close(self) -> None:
        """There is nothing to give back."""


class PassingBlock(ImageBlock):
    """One RAM block on its way to the sink."""

    def __init__(self, wire: RamBlock, sink: PageSink) -> None:
        super().__init__(wire, _Nowhere())
        self._sink = sink

    @property
    def pages(self) -> Pages:
        """There are none: rule 2."""
        refuse("ram-compressed", "a page that needs the page before it", offset=0, section="ram")

    def write(self, offsets: npt.NDArray[np.uint64], pages: Pages, *, is_row: bool = False) -> None:
        """Passes pages on."""
        numbers = _numbers(offsets)
        if not is_row:
            numbers, pages = _last_of_each(numbers, pages)
        self._sink.put(self.name, numbers, pages)
        self.have[numbers] = True

    def write_zeros(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Passes pages of zeros on."""
        numbers = _numbers(offsets)
        self._sink.put_zeros(self.name, numbers)
        self.have[numbers] = True

    def discard(self, start_bytes: int, length_bytes: int) -> None:
        """A postcopy: refused."""
        refuse("postcopy", "a postcopy cannot be kept", offset=0, section="command")

    def assume_zeros(self) -> None:
        """What was never received is zero."""
        missing = np.flatnonzero(~self.have)
        if len(missing):
            self._sink.put_zeros(self.name, missing)
            self.have[:] = True


class PassingImage(Image):
    """See the module's text. `blocks` is whole once its first page has come."""

    def __init__(self, sink: PageSink) -> None:
        super().__init__()
        self._sink = sink

    def add_block(self, wire: RamBlock) -> ImageBlock:
        """A block of the stream's list. One that is there already must be the same."""
        if wire.name not in self.blocks:
            self.blocks[wire.name] = PassingBlock(wire, self._sink)
        return super().add_block(wire)


def _numbers(offsets: npt.NDArray[np.uint64]) -> Numbers:
    return (offsets >> _SHIFT).astype(np.int64)


def _last_of_each(numbers: Numbers, pages: Pages) -> tuple[Numbers, Pages]:
    """Without pages that come again later in the same run."""
    distinct, at_end = np.unique(numbers[::-1], return_index=True)
    if len(distinct) == len(numbers):
        return numbers, pages
    rows = len(numbers) - 1 - at_end
    return distinct, pages[rows]
