"""The main channel: header, configuration, sections, commands, end. One decoder for precopy, postcopy and recovery.

Theory of operation
-------------------
`feed` takes bytes, `next` gives one event at a time, NEED_DATA, or DONE after the end of the stream; `finish` says
that no more will come. The framing is a loop over tags. Bodies of iterable sections are read by `ram` and
`iterable`, record by record; bodies of device sections have no length and are delimited by `devices`:

    before RAM (early devices)      by the footer and what follows it
    after RAM, precopy              all at once, by the vmdescription behind them
    in postcopy's package           all at once, by footers, exactly to the package's last byte
    after RAM, no vmdescription     by footers, but only at the end of the input and if `end` allows it

What machine types switch (configuration, footers) is learnt from the stream itself.

Rule 1: any bytes give events, NEED_DATA, DONE or one `WireError`; after that the decoder repeats the error.
Rule 2: bytes behind the end are not touched (`unread_bytes`).
Rule 3: this file knows the form of a stream, not what a destination must do about it: who may send a PING when is
        the endpoints' business. It refuses what would leave it unable to read on, or its reader with a guess.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NoReturn

from vmferry.wire import commands, configuration, devices, iterable, limits, mapped_ram
from vmferry.wire.buffer import Buffer, Bytes
from vmferry.wire.errors import WireError, refuse
from vmferry.wire.events import (
    DONE,
    NEED_DATA,
    AskBitmap,
    BitmapChunk,
    Description,
    DeviceSection,
    EndOfRam,
    EndOfSections,
    Header,
    MappedData,
    OpaqueDevices,
    Packaged,
    PackageEnd,
    Pause,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamBlock,
    SectionFooter,
    SectionPart,
    SectionStart,
    StreamEvent,
)
from vmferry.wire.ram import RamReader

MAGIC: Final = b"QEVM\x00\x00\x00\x03"
EOF, START, PART, END, FULL, DESCRIPTION = 0x00, 0x01, 0x02, 0x03, 0x04, 0x06
_ID = struct.Struct(">I")

_State = Literal[
    "header", "configuration", "tag", "ram", "bitmaps", "footer", "gap",
    "early", "package", "tail", "description", "done",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """What the wire does not tell.

    `end`: "description" demands the proof of a vmdescription at the end of a precopy stream; "end-of-input" lets
    `finish` end a stream without one, its devices told apart by footers or, without footers, not at all.
    `file_offset`: where the stream begins in its mapped-ram file.
    """

    page_size: int = 4096
    compress: bool = False
    end: Literal["description", "end-of-input"] = "description"
    file_offset: int = 0


@dataclass(slots=True)
class Section:
    """An iterable section that was introduced."""

    idstr: str
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """What the stream of a recovery takes for granted from the connection before."""

    blocks: Mapping[str, RamBlock]
    sections: Mapping[int, Section] = field(default_factory=dict)
    footers: bool | None = True
    """None: not known (nobody saw the connection before); the first section's end tells."""
    page_size: int = 4096


class StreamDecoder:
    """Decodes one main channel, from its first byte."""

    def __init__(self, settings: Settings | None = None, *, resume: Resume | None = None) -> None:
        self.settings = settings or Settings()
        self._buffer = Buffer()
        self._events: deque[StreamEvent] = deque()
        self._state: _State = "header"
        self._footers: bool | None = None
        self._sections: dict[int, Section] = {}
        self._closing = 0  # the section whose footer is due
        self._held = bytearray()  # an early section or a package, so far
        self._searched = 0
        self._package_bytes = 0
        self._gap = 0
        self._early: set[tuple[str, int]] = set()
        self._tail: devices.Tail | None = None
        self._finished = False
        self._error: WireError | None = None
        page_size = self.settings.page_size
        if resume is not None:
            self._state = "tag"
            self._footers = resume.footers
            # A source that was cut off after a section's end says that end again.
            self._sections = {each: Section(old.idstr) for each, old in resume.sections.items()}
            page_size = resume.page_size
        self._is_recovery = resume is not None
        self.ram = RamReader(
            page_size=page_size, blocks=dict(resume.blocks) if resume else None, compress=self.settings.compress
        )
        self.ram.file_offset = self.settings.file_offset
        self.ram.is_postcopy = self._is_recovery

    # --- the public side ----------------------------------------------------------------------------------

    def feed(self, data: Bytes) -> None:
        """Append bytes. Events may be views of `data`: leave it as it is until they are done with."""
        assert not self._finished
        self._buffer.feed(data)

    def feed_behind(self, slab: memoryview, start: int, stop: int) -> None:
        """Append slab[start:stop]; slab[:start] is room for the beginning of what goes on there (see `Buffer`)."""
        assert not self._finished
        self._buffer.feed_behind(slab, start, stop)

    def finish(self) -> None:
        """The connection or file has ended: `next` gives what is left, then DONE or an error."""
        self._finished = True

    def next(self) -> StreamEvent | Pause:
        """The next event, NEED_DATA or DONE. Raises `WireError`."""
        if self._error is not None:
            raise self._error
        try:
            event = self._next()
            while event is NEED_DATA and self._finished:
                self._end_of_input()
                event = self._next()
        except WireError as error:
            self._error = error
            raise
        if event is NEED_DATA:
            self._buffer.release()
        return event

    @property
    def offset(self) -> int:
        """The stream position behind the last event."""
        return self._buffer.offset

    @property
    def unread_bytes(self) -> int:
        """Bytes that were fed and belong to no event yet; after DONE: what came behind the stream."""
        return len(self._buffer)

    @property
    def is_postcopy(self) -> bool:
        """Whether LISTEN was seen, or this is a recovery."""
        return self.ram.is_postcopy

    @property
    def gap_bytes(self) -> int:
        """In a mapped-ram file: bytes from here up to where the stream goes on; else 0."""
        return self._gap

    def skip_gap(self) -> None:
        """The caller has jumped over the rest of the gap: what is fed next comes from behind it."""
        assert self._state == "gap"
        assert len(self._buffer) == 0
        self._buffer.offset += self._gap
        self._gap = 0
        self._state = "ram"

    def resume(self) -> Resume:
        """For the decoder of the connection after this one."""
        return Resume(dict(self.ram.blocks), self._sections, self._footers is not False, self.ram.page_size)

    # --- one step -----------------------------------------------------------------------------------------

    def _next(self) -> StreamEvent | Pause:
        while True:
            if self._events:
                return self._events.popleft()
            event: StreamEvent | Pause | None
            match self._state:
                case "ram":
                    event = self._on_ram()
                case "tag":
                    event = self._on_tag()
                case "footer":
                    event = self._on_footer()
                case "header":
                    event = self._on_header()
                case "configuration":
                    event = self._on_configuration()
                case "bitmaps":
                    event = self._on_bitmaps()
                case "gap":
                    event = self._on_gap()
                case "early":
                    event = self._on_early()
                case "package":
                    event = self._on_package()
                case "tail":
                    event = self._on_tail()
                case "description":
                    event = self._on_description()
                case _:
                    assert self._state == "done"
                    return DONE
            if event is not None:
                return event

    def _on_header(self) -> StreamEvent | Pause:
        head = self._buffer.peek(8)
        if head is None:
            return NEED_DATA
        if head[:4] != MAGIC[:4]:
            self._refuse("magic", f"the stream begins with {head[:4].hex()}", "header")
        if head != MAGIC:
            self._refuse("version", f"stream version {_ID.unpack(head[4:])[0]}, known is 3", "header")
        self._buffer.take(8)
        self._state = "configuration"
        return Header()

    def _on_configuration(self) -> StreamEvent | Pause | None:
        tag = self._buffer.peek(1)
        if tag is None:
            return NEED_DATA
        if tag[0] != configuration.TAG:  # machine types up to 2.3 send none
            self._state = "tag"
            return None
        found = configuration.decode(self._buffer)
        if isinstance(found, Pause):
            return found
        self._state = "tag"
        if found.page_bits is not None:
            self.ram.set_page_size(1 << found.page_bits)
        capabilities = found.capabilities or ()
        self.ram.ignore_shared = "x-ignore-shared" in capabilities
        self.ram.mapped = "mapped-ram" in capabilities
        return found

    def _on_tag(self) -> StreamEvent | Pause | None:
        tag = self._buffer.peek(1)
        if tag is None:
            return NEED_DATA
        match tag[0]:
            case 0x02 | 0x03:
                return self._on_part()
            case 0x01:
                return self._on_start()
            case 0x08:
                return self._on_command()
            case 0x04:
                return self._on_full()
            case 0x00:
                self._buffer.take(1)
                self._state = "done" if self.is_postcopy else "description"
                return EndOfSections()
            case other:
                return self._refuse("tag", f"tag {other:#04x}", "sections")

    def _on_start(self) -> StreamEvent | Pause:
        begin = self._buffer.peek(6)
        whole = None if begin is None else self._buffer.peek(14 + begin[5])
        head = None if whole is None else devices.head_at(whole, 0)
        if head is None:
            return NEED_DATA
        iterable.check_known(head.idstr, head.instance, head.version, self.offset)
        if head.section_id in self._sections or any(head.idstr == each.idstr for each in self._sections.values()):
            self._refuse("section-twice", "it is introduced twice, or its number is taken", head.idstr)
        self._sections[head.section_id] = Section(head.idstr)
        self._buffer.take(head.end)
        self._begin_body(head.section_id)
        return SectionStart(head.section_id, head.idstr, head.instance, head.version)

    def _on_part(self) -> StreamEvent | Pause:
        head = self._buffer.peek(5)
        if head is None:
            return NEED_DATA
        (section_id,) = _ID.unpack_from(head, 1)
        section = self._sections.get(section_id)
        if section is None or section.ended:
            self._refuse("section-id", f"section {section_id} was not introduced, or is over", "sections")
        section.ended = last = head[0] == END
        self._buffer.take(5)
        self._begin_body(section_id)
        return SectionPart(section_id, last)

    def _begin_body(self, section_id: int) -> None:
        self._closing = section_id
        self._state = "ram" if self._sections[section_id].idstr == iterable.RAM else "bitmaps"

    def _on_ram(self) -> StreamEvent | Pause:
        event = self.ram.next(self._buffer)
        if isinstance(event, EndOfRam):
            self._state = "footer"
        elif isinstance(event, RamBlock) and event.mapped is not None:
            self._gap = mapped_ram.gap_end(event) - self.settings.file_offset - self.offset
            self._state = "gap"
        return event

    def _on_bitmaps(self) -> StreamEvent | Pause:
        event = iterable.next_chunk(self._buffer)
        if isinstance(event, BitmapChunk) and event.flags & iterable.EOS:
            self._state = "footer"
        return event

    def _on_footer(self) -> StreamEvent | Pause | None:
        tag = self._buffer.peek(1)
        if tag is None:
            return NEED_DATA
        if self._footers is None:
            self._footers = tag[0] == devices.FOOTER
        if not self._footers:
            self._state = "tag"
            return None
        footer = self._buffer.peek(5)
        if footer is None:
            return NEED_DATA
        if footer[0] != devices.FOOTER or _ID.unpack_from(footer, 1)[0] != self._closing:
            section = self._sections[self._closing].idstr
            self._refuse("footer", f"{footer.hex()} instead of the footer of section {self._closing}", section)
        self._buffer.take(5)
        self._state = "tag"
        return SectionFooter(self._closing)

    def _on_gap(self) -> StreamEvent | Pause | None:
        piece = self._buffer.take_some(min(self._gap, limits.PIECE_BYTES_MAX))
        if self._gap and not piece:
            return NEED_DATA
        self._gap -= len(piece)
        if not self._gap:
            self._state = "ram"
        return MappedData(self.settings.file_offset + self.offset - len(piece), piece) if piece else None

    # --- commands -----------------------------------------------------------------------------------------

    def _on_command(self) -> StreamEvent | Pause | None:
        head = self._buffer.peek(5)
        if head is None:
            return NEED_DATA
        number, length = commands.HEAD.unpack_from(head, 1)
        commands.check_head(number, length, self.offset)
        whole = self._buffer.peek(5 + length)
        if whole is None:
            return NEED_DATA
        event = commands.decode(number, whole[5:], self.offset)
        match event:
            case PostcopyListen() | PostcopyRun():
                self._refuse("command-place", f"{type(event).__name__} outside of a package", "command")
            case PostcopyResume() | AskBitmap():
                if not self._is_recovery:
                    self._refuse("command-place", f"{type(event).__name__} outside of a recovery", "command")
            case PostcopyAdvise(page_sizes, _):
                self.ram.has_page_sizes = page_sizes not in (None, self.ram.page_size)
            case Packaged(length):
                if self.is_postcopy:
                    self._refuse("command-place", "a second package", "command")
                self._buffer.take(len(whole))
                self._package_bytes = length
                self._state = "package"
                return None
        self._buffer.take(len(whole))
        return event

    def _on_package(self) -> StreamEvent | Pause | None:
        self._held += self._buffer.take_some(self._package_bytes - len(self._held))
        if len(self._held) < self._package_bytes:
            return NEED_DATA if len(self._buffer) == 0 else None
        data, self._held = bytes(self._held), bytearray()
        start = self.offset - len(data)
        found = devices.split_chain(data, is_package=True, offset=start)
        if found is None:
            self._refuse("package", "its device sections cannot be told apart", "package")
        self._events.append(Packaged(len(data)))
        for piece in found[0]:
            if isinstance(piece[0], devices.Head):
                self._add_section(devices.section_of(piece[0], data[piece[0].end : piece[1]]), footer=True)
                continue
            event = commands.decode(piece[0], piece[1], start)
            if isinstance(event, Packaged | PostcopyResume | AskBitmap | PostcopyAdvise):
                self._refuse("command-place", f"{type(event).__name__} inside of a package", "package")
            if isinstance(event, PostcopyListen):
                self.ram.is_postcopy = True
            self._events.append(event)
        if not self.is_postcopy:
            self._refuse("package", "it does not say LISTEN", "package")
        self._events.append(PackageEnd())
        self._state = "tag"
        return None

    # --- device sections ----------------------------------------------------------------------------------

    def _on_full(self) -> StreamEvent | Pause | None:
        if self.is_postcopy:
            self._refuse("section-place", "a device section behind the package", "sections")
        if not self._sections:
            self._state = "early"
            return None
        early = frozenset(self._early)
        self._tail = devices.Tail(offset=self.offset, footers=self._footers is not False, early=early)
        self._state = "tail"
        return None

    def _on_early(self) -> StreamEvent | Pause | None:
        start = self.offset - len(self._held)
        self._take_all(self._held)
        found = devices.early_section(self._held, self._searched, offset=start)
        if isinstance(found, int):
            self._searched = found
            return NEED_DATA
        section, end = found
        if len(self._early) >= limits.SECTIONS_MAX:
            self._refuse("sections", "too many device sections", "device sections")
        self._early.add((section.idstr, section.instance))
        self._add_section(section, footer=True)
        self._buffer.unread(self._held[end + devices.FOOTER_BYTES :])
        self._held, self._searched = bytearray(), 0
        self._footers = True
        self._state = "tag"
        return None

    def _on_tail(self) -> StreamEvent | Pause | None:
        tail = self._tail
        assert tail is not None
        piece = self._buffer.take_some(limits.PIECE_BYTES_MAX)
        if not piece:
            return NEED_DATA
        if not tail.feed(piece):
            return None
        assert tail.description is not None
        begin, end = tail.description
        self._buffer.unread(tail.data[end:])
        for section in tail.sections:
            self._add_section(section, footer=self._footers is not False)
        self._events.append(EndOfSections())
        self._events.append(Description(bytes(tail.data[begin:end])))
        self._done()
        return None

    def _on_description(self) -> StreamEvent | Pause:
        head = self._buffer.peek(5)
        if head is None:
            return NEED_DATA
        (length,) = _ID.unpack_from(head, 1)
        if head[0] != DESCRIPTION or length > limits.DESCRIPTION_BYTES_MAX:
            self._refuse("description", f"{head.hex()} instead of a vmdescription", "vmdescription")
        if len(self._buffer) < 5 + length:
            return NEED_DATA
        whole = self._buffer.take(5 + length)
        assert whole is not None
        self._done()
        return Description(bytes(whole[5:]))

    def _add_section(self, section: DeviceSection, *, footer: bool) -> None:
        self._events.append(section)
        if footer:
            self._events.append(SectionFooter(section.section_id))

    def _take_all(self, into: bytearray) -> None:
        while len(self._buffer):
            into += self._buffer.take_some(limits.PIECE_BYTES_MAX)

    # --- the end ------------------------------------------------------------------------------------------

    def _end_of_input(self) -> None:
        """There is not enough for another event, and no more will come."""
        lenient = self.settings.end == "end-of-input"
        if self._state == "description" and lenient and len(self._buffer) == 0:
            self._done()
        elif self._state == "tail" and lenient:
            self._end_tail()
        else:
            self._refuse("truncated", f"the input ends in the middle ({self._state})", "end of input")

    def _end_tail(self) -> None:
        assert self._tail is not None
        data = bytes(self._tail.data)
        start = self.offset - len(data)
        found = None if self._footers is False else devices.split_chain(data, is_package=False, offset=start)
        if found is None and self._footers is not False:
            self._refuse("truncated", "the device sections cannot be told apart", "device sections")
        self._done()
        if found is None:
            self._events.append(OpaqueDevices(data))
            return
        for piece in found[0]:
            assert isinstance(piece[0], devices.Head)
            self._add_section(devices.section_of(piece[0], data[piece[0].end : piece[1]]), footer=True)
        self._events.append(EndOfSections())
        if found[1] + 1 < len(data):
            self._events.append(Description(data[found[1] + 6 :]))

    def _done(self) -> None:
        self._tail = None
        self._state = "done"

    def _refuse(self, reason: str, message: str, section: str) -> NoReturn:
        refuse(reason, message, offset=self.offset, section=section)
