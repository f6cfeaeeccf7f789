"""Stand-ins: somebody who speaks the other side's part when the real one is gone.

Theory of operation
-------------------
`StandInReceiver` is the destination of a postcopy recovery, for a source in postcopy-paused whose destination is gone
and never ran. It claims to have every page, so the source has nothing left to send and completes; its guest is then an
ordinary paused one again (protocol, section 10; experiment X20):

    source                                  stand-in
    RECV_BITMAP for every block         ->
                                        <-  RECV_BITMAP, all pages received
    POSTCOPY_RESUME                     ->
                                        <-  RESUME_ACK
    END of RAM, end of sections         ->
                                        <-  SHUT 0; the source is completed

`ThrowAwaySink` is the destination of an ordinary migration without return path: it reads everything and forgets it,
for a source that sticks in finish-migrate. Such a migration copies nothing that anybody wants; it only leads QEMU's
state machine to a place from which `cont` is allowed (experiments X8g, X15).

Rule 1: claiming pages destroys nothing at the source, but it lets the guest start there. Whether it may is decided
        by whoever makes the stand-in: here nobody knows anything of the destination.
Rule 2: a stand-in that dies leaves the source in postcopy-paused, and the next one may try. One exception: a QEMU
        before 8.0 whose connection breaks between connect and RESUME_ACK stays in postcopy-recover for good
        (protocol, section 10). So everything is ready before a source is told to connect, and what could be refused
        (an unknown block) is compared before.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from vmferry import limits
from vmferry.engine.errand import Errand
from vmferry.engine.image import PAGE_BYTES
from vmferry.engine.wires import Gone
from vmferry.wire import mapped_ram
from vmferry.wire.errors import refuse
from vmferry.wire.events import (
    DONE,
    NEED_DATA,
    AskBitmap,
    BitmapEnd,
    BitmapPiece,
    PageRun,
    PostcopyResume,
    RamBlock,
    ReceivedBitmap,
    ResumeAck,
    Shut,
    StreamEvent,
    ZeroRun,
)
from vmferry.wire.iterable import RAM
from vmferry.wire.stream import END, PART, Resume, Section, StreamDecoder

_PART_BYTES: Final = 5
"""Tag and number of a section: enough to learn the number that RAM has in this stream."""


class StandInReceiver(Errand):
    """Claims every page of a recovery. `blocks`: used length in bytes of every block of the source, by name.

    `ram_section`: the section number of RAM in the source's stream; learned from the stream if None.
    When it is complete the source has completed its migration; its guest is paused and may be continued. When it
    failed the source is in postcopy-paused as before (see the module's Rule 2). A preempt channel that the source opens
    beside needs nobody who reads it, only somebody who keeps it open until the end.
    """

    def __init__(
        self,
        sock: socket.socket,
        blocks: Mapping[str, int],
        *,
        ram_section: int | None = None,
        name: str = "stand-in-receiver",
        silence_s: float = limits.ENGINE_STAND_IN_SILENCE_S,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        assert blocks, "a source without memory has nothing to recover"
        assert all(size > 0 and size % PAGE_BYTES == 0 for size in blocks.values())
        super().__init__(sock, name=name, silence_s=silence_s, on_end=on_end)
        self._blocks = {name: RamBlock(name, size) for name, size in blocks.items()}
        self._ram_section = ram_section
        self._asked: set[str] = set()
        self._decoder = self._new_decoder(None)

    def _new_decoder(self, ram_section: int | None) -> StreamDecoder:
        sections = {} if ram_section is None else {ram_section: Section(RAM)}
        return StreamDecoder(resume=Resume(self._blocks, sections, footers=None))

    def _work(self) -> None:
        slab = memoryview(bytearray(limits.ENGINE_SLAB_BYTES))
        begin = bytearray()  # what came behind the acknowledgement, until the number of RAM's section is known
        is_done = False
        while not is_done:
            count = self._read(slab)
            if count == 0:
                raise Gone("the source closed the connection")
            if self._is_acknowledged and self._ram_section is None:
                begin += slab[:count]
                if len(begin) < _PART_BYTES:
                    continue
                self._learn(begin)
                self._decoder.feed(bytes(begin))
            else:
                self._decoder.feed(slab[:count])
            is_done = self._take_events()
        self._say(Shut(0))
        self._flush()
        self._is_complete = True
        # Closing while something unread is left would reset the connection, and with it the word just written.
        while self._read(slab):
            pass

    def _learn(self, begin: bytearray) -> None:
        if begin[0] not in (PART, END):
            refuse("tag", f"tag {begin[0]:#04x} after the resume", offset=self._decoder.offset, section="sections")
        self._ram_section = int.from_bytes(begin[1:_PART_BYTES], "big")
        self._decoder = self._new_decoder(self._ram_section)

    def _take_events(self) -> bool:
        """Carries out what has come. True at the end of the stream."""
        while (event := self._decoder.next()) is not NEED_DATA:
            if event is DONE:
                return True
            assert not isinstance(event, type(NEED_DATA))
            self._on_event(event)
        return False

    def _on_event(self, event: StreamEvent) -> None:
        match event:
            case AskBitmap(name):
                self._claim(name)
            case PostcopyResume():
                self._on_resume()
            case PageRun() | ZeroRun():
                self._pages += len(event.offsets)  # it has its own copy, which is the one that counts
            case _:
                pass  # parts, ends and footers of sections

    def _claim(self, name: str) -> None:
        block = self._blocks.get(name)
        if block is None:
            refuse("recv-bitmap", f"unknown block {name!r}", offset=self._decoder.offset, section="command")
        self._asked.add(name)
        bits = mapped_ram.make_bitmap(np.ones(block.used_length // PAGE_BYTES, np.bool_))
        self._say(ReceivedBitmap(name, len(bits)), BitmapPiece(memoryview(bits)), BitmapEnd())

    def _on_resume(self) -> None:
        """Nothing may come before the bitmaps were asked for: a source that did not ask would send every page."""
        if self._is_acknowledged or not self._asked:
            refuse("resume", "a resume out of turn", offset=self._decoder.offset, section="command")
        self._say(ResumeAck())
        self._flush()
        self._is_acknowledged = True


class ThrowAwaySink(Errand):
    """Reads a whole migration and forgets it. The source must have no return path and one channel.

    Complete when the source has closed the connection; whether its migration completed, QEMU itself must be asked.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        name: str = "throw-away",
        silence_s: float = limits.ENGINE_STAND_IN_SILENCE_S,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(sock, name=name, silence_s=silence_s, on_end=on_end)

    def _work(self) -> None:
        slab = memoryview(bytearray(limits.ENGINE_SLAB_BYTES))
        while self._read(slab):
            pass
        if self._is_cut:
            raise Gone("it was cut")
        self._is_complete = True
