"""Everything that can be on the migration wire, as a closed set of values.

Rule 1: decode and encode meet here: `encode.encode(event)` gives exactly the bytes that the event came from.
        So events carry what the wire leaves open, such as whether a page repeats its block's name (`named`).
Rule 2: pages travel as runs. A run's arrays are views of the slab it came in; whoever keeps them copies them.
Rule 3: names are text by UTF-8 with surrogate escapes, so that any bytes survive.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmferry.wire.buffer import Bytes

Offsets = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.uint8]


class Pause(enum.Enum):
    """What a decoder's `next` gives when there is no event."""

    NEED_DATA = "need-data"  # feed more
    DONE = "done"  # the stream has ended; bytes after it are left alone


NEED_DATA: Final = Pause.NEED_DATA
DONE: Final = Pause.DONE


# --- framing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """The file header, `QEVM` and version 3."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The source's machine type and what both sides must agree on.

    Subsections in the order of the wire; None: absent.
    """

    machine: str
    page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None
    order: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SectionStart:
    """An iterable section is introduced; its first body follows."""

    section_id: int
    idstr: str
    instance: int
    version: int


@dataclass(frozen=True, slots=True)
class SectionPart:
    """A further body of an iterable section follows; `last`: its END."""

    section_id: int
    last: bool


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """A device's state, whole and untouched; `early`: it came before RAM."""

    section_id: int
    idstr: str
    instance: int
    version: int
    body: bytes
    early: bool = False


@dataclass(frozen=True, slots=True)
class SectionFooter:
    """Closes a section (absent in streams of machine types up to 2.3)."""

    section_id: int


@dataclass(frozen=True, slots=True)
class OpaqueDevices:
    """Device sections up to the end of the input that nothing delimits (no footers, no vmdescription)."""

    data: bytes


@dataclass(frozen=True, slots=True)
class EndOfSections:
    """The tag 0x00; in postcopy the end of the stream."""


@dataclass(frozen=True, slots=True)
class Description:
    """The vmdescription, JSON text; the end of a precopy stream."""

    text: bytes


# --- commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenReturnPath:
    """The destination may write now."""


@dataclass(frozen=True, slots=True)
class Ping:
    """To be answered with a `Pong` of the same value."""

    value: int


@dataclass(frozen=True, slots=True)
class PostcopyAdvise:
    """Postcopy may follow. Both None: only dirty bitmaps will be postcopied."""

    page_sizes: int | None = None  # all blocks' page sizes, or-ed
    target_page_size: int | None = None


@dataclass(frozen=True, slots=True)
class PostcopyListen:
    """From now on pages may come at any time."""


@dataclass(frozen=True, slots=True)
class PostcopyRun:
    """Start the guest."""


@dataclass(frozen=True, slots=True)
class Discard:
    """These ranges (start, length; bytes) of a block will come again."""

    block: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Packaged:
    """The events up to `PackageEnd` are the switchover package, `length` bytes, which has come whole."""

    length: int


@dataclass(frozen=True, slots=True)
class PackageEnd:
    """Nothing on the wire: the package is over."""


@dataclass(frozen=True, slots=True)
class PostcopyResume:
    """Recovery: the source is ready; answer with `ResumeAck`."""


@dataclass(frozen=True, slots=True)
class AskBitmap:
    """Recovery: answer with a block's `ReceivedBitmap`."""

    block: str


@dataclass(frozen=True, slots=True)
class SwitchoverStart:
    """The source has stopped its guest."""


# --- RAM ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MappedHeader:
    """Where a mapped-ram file has a block's bitmap and pages; absolute file offsets."""

    page_size: int
    bitmap_offset: int
    pages_offset: int


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A piece of guest memory. The optional values are on the wire only in certain modes."""

    name: str
    used_length: int
    page_size: int | None = None  # hugetlb, when postcopy may follow
    address: int | None = None  # x-ignore-shared
    mapped: MappedHeader | None = None


@dataclass(frozen=True, slots=True)
class MemorySize:
    """RAM's block list follows: `RamBlock`s until their lengths add up."""

    total: int


@dataclass(frozen=True, slots=True)
class MappedData:
    """Bytes of a mapped-ram file's bitmaps and pages, in passing."""

    file_offset: int
    data: memoryview


@dataclass(frozen=True, slots=True, eq=False)
class PageRun:
    """Pages of one block whose records lie side by side; row i of `pages` belongs at `offsets[i]`.

    `named`: the first record names the block; all others continue the one before. `is_row`: the decoder has seen that
    the pages lie side by side in the block too, so that nobody has to look again; they may do so without it.
    """

    block: RamBlock
    offsets: Offsets
    pages: Pages
    named: bool
    is_row: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ZeroRun:
    """Pages that are all zero, like `PageRun`."""

    block: RamBlock
    offsets: Offsets
    named: bool


@dataclass(frozen=True, slots=True)
class XbzrlePage:
    """One page as difference to its last content on this wire (`xbzrle.apply`)."""

    block: RamBlock
    offset: int
    delta: bytes
    named: bool


@dataclass(frozen=True, slots=True)
class CompressedPage:
    """One page as a zlib stream of its own (`ram.inflate_page`)."""

    block: RamBlock
    offset: int
    data: bytes
    named: bool


@dataclass(frozen=True, slots=True)
class MultifdFlush:
    """Barrier: wait here until every multifd channel has delivered its next SYNC."""


@dataclass(frozen=True, slots=True)
class EndOfRam:
    """The end of a RAM body, also of the preempt channel (machine types up to 7.2)."""


# --- dirty bitmaps --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BitmapChunk:
    """One chunk of the `dirty-bitmap` section. Names are sticky: None means as before."""

    flags: int
    node: str | None = None
    bitmap: str | None = None
    granularity: int = 0  # with START
    bitmap_flags: int = 0  # with START: 1 enabled, 2 persistent
    first_sector: int = 0  # with BITS
    sectors: int = 0  # with BITS
    data: bytes = b""  # with BITS, unless ZEROES


# --- return path ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shut:
    """The destination is done: 0 well, anything else not."""

    code: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers a `Ping`."""

    value: int


@dataclass(frozen=True, slots=True)
class RequestPages:
    """The destination's guest waits for these bytes. `block` None: the block of the request before."""

    start: int
    length: int
    block: str | None = None


@dataclass(frozen=True, slots=True)
class ReceivedBitmap:
    """Recovery: `size` bytes of bitmap of a block follow as `BitmapPiece`s, then `BitmapEnd`."""

    block: str
    size: int


@dataclass(frozen=True, slots=True)
class BitmapPiece:
    """Bytes of a received bitmap: bit i of byte j is page 8 j + i."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class BitmapEnd:
    """A received bitmap is complete, its end mark was right."""


@dataclass(frozen=True, slots=True)
class ResumeAck:
    """Recovery: the destination is ready; always 1."""

    value: int = 1


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """The destination agrees to the switchover."""


# --- multifd --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MultifdInit:
    """A multifd channel introduces itself; `uuid` is the source's, zeros if it has none."""

    channel: int
    uuid: bytes = bytes(16)


@dataclass(frozen=True, slots=True, eq=False)
class MultifdPacket:
    """The head of a packet. `offsets` has all places of the table: normal pages, zero pages, and leftovers.

    `payload_claimed` is what the wire says; a payload follows only if there are normal pages.
    """

    flags: int
    pages_alloc: int
    normal: int
    zero: int
    payload_claimed: int
    number: int
    block: RamBlock | None
    name: bytes
    offsets: Offsets

    @property
    def normal_offsets(self) -> Offsets:
        """Where the pages of the payload belong."""
        return self.offsets[: self.normal]

    @property
    def zero_offsets(self) -> Offsets:
        """Pages that are zero."""
        return self.offsets[self.normal : self.normal + self.zero]


@dataclass(frozen=True, slots=True, eq=False)
class MultifdPages:
    """Plain pages of the current packet, as many as lay together."""

    block: RamBlock
    offsets: Offsets
    pages: Pages


@dataclass(frozen=True, slots=True)
class MultifdPayload:
    """Compressed bytes of the current packet (`multifd.PageInflater`)."""

    data: memoryview
    last: bool


Command = (
    OpenReturnPath | Ping | PostcopyAdvise | PostcopyListen | PostcopyRun | Discard | Packaged | PostcopyResume
    | AskBitmap | SwitchoverStart
)  # fmt: skip
RamEvent = (
    MemorySize | RamBlock | MappedData | PageRun | ZeroRun | XbzrlePage | CompressedPage | MultifdFlush | EndOfRam
)
StreamEvent = (
    Header | Configuration | SectionStart | SectionPart | DeviceSection | SectionFooter | OpaqueDevices
    | EndOfSections | Description | PackageEnd | BitmapChunk | Command | RamEvent
)  # fmt: skip
ReturnPathEvent = (
    Shut | Pong | RequestPages | ReceivedBitmap | BitmapPiece | BitmapEnd | ResumeAck | SwitchoverAck
)  # fmt: skip
MultifdEvent = MultifdInit | MultifdPacket | MultifdPages | MultifdPayload
Event = StreamEvent | ReturnPathEvent | MultifdEvent

Encoded = Bytes | npt.NDArray[Any]


def to_text(raw: Bytes) -> str:
    """A name of the wire as text that keeps every byte."""
    return bytes(raw).decode("utf-8", "surrogateescape")


def to_raw(text: str) -> bytes:
    """The bytes of a name."""
    return text.encode("utf-8", "surrogateescape")
