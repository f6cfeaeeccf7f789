"""The main channel of an incoming migration: one thread that reads it, fills the image and writes the return path.

Theory of operation
-------------------
The loop reads a slab, hands it to the decoder and carries its events out one by one. Between slabs it looks at the
owner's orders and writes what is to be said to the source. When nothing is to be read it waits for the connection or
for the waker. So the socket, the decoder and the return path have one owner, and an order is followed within the
time of one slab.

The commit. Until then the source may take its guest back, and this side may forget everything:
    precopy                        our word SHUT 0, given when the owner wants it (`hold_result`)
    postcopy, source >= 10.2       our answer to ping 0x42 (`hold_proof`)
    postcopy, older source         the package itself
After it the source has no guest any more, so this side never says SHUT with an error: it would start a guest there
that may run here (protocol, 7.3 and 15.3). Trouble then only closes the connection, which pauses both sides.

Rule 1: facts are posted when they are true: a fact about a message after it was written.
Rule 2: whatever happens, `run` returns and says how in `end`; nothing escapes from the thread.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass

import numpy as np

from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.engine.image import PAGE_BYTES, ImageBlock, KeptBitmaps
from vmferry.engine.machine_types import has_flush_per_section
from vmferry.engine.shared import AskPages, GiveProof, GiveResult, Shared
from vmferry.engine.wires import Gone, Wire, view_of
from vmferry.errors import MigrationFailed, VmferryError
from vmferry.wire import encode, mapped_ram, return_path
from vmferry.wire.errors import WireError, refuse
from vmferry.wire.events import (
    DONE,
    AskBitmap,
    BitmapChunk,
    BitmapEnd,
    BitmapPiece,
    CompressedPage,
    Configuration,
    Description,
    DeviceSection,
    Discard,
    Encoded,
    EndOfRam,
    Event,
    Header,
    MultifdFlush,
    OpaqueDevices,
    OpenReturnPath,
    Packaged,
    PackageEnd,
    PageRun,
    Pause,
    Ping,
    Pong,
    PostcopyResume,
    RamBlock,
    ReceivedBitmap,
    ResumeAck,
    SectionFooter,
    SectionPart,
    SectionStart,
    Shut,
    SwitchoverAck,
    SwitchoverStart,
    XbzrlePage,
    ZeroRun,
)
from vmferry.wire.iterable import DIRTY_BITMAP, RAM
from vmferry.wire.ram import inflate_page
from vmferry.wire.stream import Settings, StreamDecoder
from vmferry.wire.xbzrle import apply

PROOF_PING = 0x42
"""The ping whose answer decides whether the source may still take its guest back (QEMU 10.2 and newer)."""


class End(enum.Enum):
    """How the main channel's thread ended."""

    COMPLETE = "complete"  # everything is here and the source was told
    FAILED = "failed"  # before the commit: what came is worth nothing
    PAUSED = "paused"  # after the commit: pages are missing, or the source was not told; another connection may follow


@dataclass(slots=True)
class _Hold:
    """Something that waits for the owner's order, and whether the order came first."""

    is_due: bool = False
    is_ordered: bool = False


class MainIntake:
    """One connection's main channel. `run` in a thread of its own; `cut` through the wire."""

    def __init__(self, shared: Shared, wire: Wire, first: bytes, *, round_no: int) -> None:
        self.shared, self.wire, self._first = shared, wire, first
        self._round = round_no
        """How many connections were lost before this one."""
        self.end: End | None = None
        self.error: VmferryError | None = None
        options = shared.options
        resume = shared.resume if round_no else None
        self._decoder = StreamDecoder(Settings(compress=options.compress, end=options.end), resume=resume)
        self._counters = shared.new_counters()
        self._out: deque[memoryview] = deque()
        self._requests = return_path.RequestEncoder(page_size=PAGE_BYTES)
        self._proof = _Hold(is_ordered=not options.hold_proof)
        self._result = _Hold(is_ordered=not options.hold_result)
        self._return_path = self._is_committed = bool(round_no)
        self._asks_proof = self._in_package = self._has_shut = False
        self._block: ImageBlock | None = None
        self._bitmaps_open = False
        self._is_stream_over = self._is_input_over = False
        self._flush_per_section = has_flush_per_section(shared.image.machine)

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Reads until the end. Never raises."""
        slab = memoryview(bytearray(limits.ENGINE_SLAB_BYTES))
        try:
            if self._round:
                self.shared.ledger.post(Fact.RECONNECTED, round_no=self._round)
            if self._first:
                self._digest(memoryview(self._first))
            while self.end is None:
                self._follow_orders()
                if self._is_stream_over:
                    self._finish_when_whole()
                self._write()
                if self.end is None:
                    self._read(slab)
        except Gone as error:
            self._on_lost(str(error) or "the connection broke")
        except WireError as error:
            self._on_error(error)
        except MemoryError as error:
            self._on_error(VmferryError("there is no memory for the guest image", side="destination", cause=error))
        finally:
            self.shared.resume = self._decoder.resume()
            self.shared.blocks_ready.set()
            self.wire.close()

    def _read(self, slab: memoryview) -> None:
        count = None if self._is_input_over else self.wire.read_into(slab)
        if count is None:
            self.wire.wait(readable=not self._is_input_over, writable=bool(self._out), waker=self.shared.waker)
        elif count:
            self._digest(slab[:count])
        else:
            self._on_close()

    def _digest(self, data: memoryview) -> None:
        self._counters.bytes += len(data)
        if self._is_stream_over:
            return  # whatever a source says behind its stream, QEMU's own destination ignores it too
        self._decoder.feed(data)
        self._take_events()
        self.shared.image.announce_pages()

    def _take_events(self) -> None:
        while True:
            event = self._decoder.next()
            if isinstance(event, PageRun):  # first, and without a detour: nearly everything is pages
                self._block_of(event.block).write(event.offsets, event.pages)
                self._counters.pages += len(event.offsets)
            elif isinstance(event, ZeroRun):
                self._block_of(event.block).write_zeros(event.offsets)
                self._counters.zero_pages += len(event.offsets)
            elif isinstance(event, Pause):
                if event is DONE:
                    self._on_stream_end()
                return
            else:
                self._on_event(event)

    def _block_of(self, wire: RamBlock) -> ImageBlock:
        if self._block is None or self._block.wire is not wire:
            self._block = self.shared.image.blocks[wire.name]
        return self._block

    # --- orders and words to the source -------------------------------------------------------------------

    def _follow_orders(self) -> None:
        orders = self.shared.orders
        while orders:
            match orders.popleft():
                case AskPages(block, start, length):
                    # Before LISTEN a request means nothing; the page is on its way.
                    if self._return_path and self._decoder.is_postcopy and not self._has_shut:
                        self._say_raw(self._requests.encode(block, start, length))
                        self._counters.requests += 1
                case GiveProof():
                    self._proof.is_ordered = True
                    self._give_proof()
                case GiveResult():
                    self._result.is_ordered = True
                    self._give_result()

    def _say(self, event: Event) -> None:
        for part in encode.encode(event):
            self._say_raw(part)

    def _say_raw(self, part: Encoded) -> None:
        self._out.append(view_of(part))

    def _write(self) -> None:
        while self._out:
            count = self.wire.write_some([self._out[0]])
            if count == 0:
                return
            left = self._out.popleft()[count:]
            if len(left):
                self._out.appendleft(left)

    def _write_all(self) -> None:
        """Writes what is to be said before anything else is done; the source reads its return path all the time."""
        self._write()
        while self._out:
            self.wire.wait(writable=True, waker=self.shared.waker)
            self._write()

    def _give_proof(self) -> None:
        if self._proof.is_due and self._proof.is_ordered:
            self._proof.is_due = False
            # Written before it is posted. If the connection breaks in between, nobody knows whether it arrived, so
            # from here on the source counts as having let go.
            self._is_committed = True
            self._say(Pong(PROOF_PING))
            self._write_all()
            self.shared.ledger.post(Fact.PACKAGE_LOADED, text="the source was told")

    def _give_result(self) -> None:
        if not (self._result.is_due and self._result.is_ordered):
            return
        self._result.is_due = False
        if self._return_path:
            self._is_committed = self._has_shut = True
            self._say(Shut(0))
            self._write_all()
        self.shared.ledger.post(Fact.PEER_ACK, text="the source was told" if self._has_shut else "no return path")
        if not self._return_path:
            self._complete()

    # --- events -------------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:  # one arm per kind of event
        image, ledger = self.shared.image, self.shared.ledger
        match event:
            case EndOfRam() | MultifdFlush():
                self._on_blocks_listed()
                if isinstance(event, EndOfRam) is self._flush_per_section and not self._decoder.is_postcopy:
                    self.shared.barrier.pass_point(self._decoder.offset)
            case SectionFooter() | SectionPart():
                pass
            case RamBlock():
                if event.mapped is not None:
                    refuse("mapped-ram", "a mapped-ram stream is a file", offset=self._decoder.offset, section="ram")
                if event.used_length % PAGE_BYTES or self._decoder.ram.page_size != PAGE_BYTES:
                    refuse("page-size", "only pages of 4096 bytes are known", offset=0, section="ram")
                image.add_block(event)
            case XbzrlePage() | CompressedPage():
                self._on_packed_page(event)
            case Configuration():
                image.configuration = event
                self._flush_per_section = has_flush_per_section(event.machine)
            case SectionStart(section_id, idstr, _, _):
                self._on_section(section_id, idstr)
            case BitmapChunk():
                self._on_bitmap_chunk(event)
            case DeviceSection():
                (image.early if event.early else image.devices).append(event)
            case OpaqueDevices():
                refuse("no-footers", "devices that nothing tells apart", offset=self._decoder.offset, section="devices")
            case Description(text):
                image.description = text
            case Discard(block, ranges):
                self._on_discard(block, ranges)
            case Packaged():
                self._in_package = True
                ledger.post(Fact.PACKAGE_SENT)
            case PackageEnd():
                self._on_package_end()
            case _:
                self._on_command(event)

    def _on_command(self, event: Event) -> None:
        match event:
            case Header():
                self.shared.ledger.post(Fact.HEADER_SEEN)
            case OpenReturnPath():
                self._return_path = True
                if self.shared.options.ack_switchover:
                    self._say(SwitchoverAck())
            case Ping(value):
                if not self._return_path:
                    refuse("ping", "a ping without return path", offset=self._decoder.offset, section="command")
                if value == PROOF_PING and self._in_package:
                    self._asks_proof = True
                else:
                    self._say(Pong(value))
            case SwitchoverStart():
                self.shared.ledger.post(Fact.SWITCHOVER)
            case AskBitmap(block):
                self._on_ask_bitmap(block)
            case PostcopyResume():
                self._say(ResumeAck())
                self._write_all()
                self.shared.ledger.post(Fact.RESUME_ACK, round_no=self._round)
            case _:
                pass  # advice, listen, run, memory size, end of sections: the decoder keeps their order

    def _on_blocks_listed(self) -> None:
        """The block list is whole: other channels may begin. Before the first barrier, which waits for them."""
        if not self.shared.blocks_ready.is_set():
            self.shared.blocks_ready.set()
            self.shared.ledger.post(Fact.SETUP_DONE)

    def _on_section(self, section_id: int, idstr: str) -> None:
        image = self.shared.image
        if not self._round and idstr == RAM:
            image.ram_section_id = section_id
        if idstr == DIRTY_BITMAP:
            image.bitmaps = KeptBitmaps(section_id)
            self._bitmaps_open = True

    def _on_bitmap_chunk(self, chunk: BitmapChunk) -> None:
        kept = self.shared.image.bitmaps
        if kept is None:
            refuse("bitmaps", "they were not introduced", offset=self._decoder.offset, section=DIRTY_BITMAP)
        kept.chunks.append(chunk)
        if len(kept.chunks) > limits.ENGINE_BITMAP_CHUNKS_MAX:
            refuse("bitmaps", "too many chunks", offset=self._decoder.offset, section=DIRTY_BITMAP)
        if self._bitmaps_open and chunk.flags & 0x01:
            self._bitmaps_open = False
            kept.chunks_at_start = len(kept.chunks)

    def _on_packed_page(self, event: XbzrlePage | CompressedPage) -> None:
        block = self._block_of(event.block)
        number = event.offset // PAGE_BYTES
        if isinstance(event, XbzrlePage):
            if not block.have[number]:
                refuse(
                    "ram-xbzrle", f"a difference to page {event.offset:#x}, which never came", offset=0, section="ram"
                )
            apply(memoryview(block.pages[number]), event.delta)
        else:
            block.pages[number] = np.frombuffer(inflate_page(event, PAGE_BYTES), np.uint8)
        block.touched[number] = block.have[number] = block.dirty[number] = True
        self._counters.pages += 1

    def _on_discard(self, name: str, ranges: tuple[tuple[int, int], ...]) -> None:
        block = self.shared.image.blocks.get(name)
        for start, length in ranges:
            if block is None or start + length > block.wire.used_length or (start | length) % PAGE_BYTES:
                refuse("discard", f"{length} bytes at {start:#x} of block {name!r}", offset=0, section="command")
            block.discard(start, length)

    def _on_package_end(self) -> None:
        """The device state is here. Whoever sends no ping 0x42 has let go of its guest with the package."""
        self._in_package = False
        self.shared.image.is_device_state_whole = True
        self.shared.ledger.post(Fact.LOADED)
        if self._asks_proof:
            self._proof.is_due = True
            self._give_proof()
        else:
            self._is_committed = True
            self.shared.ledger.post(Fact.PACKAGE_LOADED, text="the source asks for no proof")

    def _on_ask_bitmap(self, name: str) -> None:
        block = self.shared.image.blocks.get(name)
        if block is None:
            refuse("recv-bitmap", f"block {name!r} is asked for", offset=self._decoder.offset, section="command")
        bits = mapped_ram.make_bitmap(block.have)
        self._say(ReceivedBitmap(name, len(bits)))
        self._say(BitmapPiece(memoryview(bits)))
        self._say(BitmapEnd())

    # --- ends ---------------------------------------------------------------------------------------------

    def _on_stream_end(self) -> None:
        self._is_stream_over = True
        if not self._decoder.is_postcopy:
            for block in self.shared.image:
                block.assume_zeros()
            self.shared.image.is_device_state_whole = True
            self.shared.ledger.post(Fact.LOADED)

    def _finish_when_whole(self) -> None:
        """In postcopy the last pages may still be on their way on the preempt channel."""
        if self._result.is_due or self._has_shut or self.end is not None:
            return
        if self._decoder.is_postcopy:
            missing = self.shared.image.missing_pages()
            if missing and self.shared.has_preempt.is_set():
                return
            if missing:
                refuse("pages", f"the stream ended, {missing} pages never came", offset=0, section="ram")
        self._result.is_due = True
        self._give_result()

    def _on_close(self) -> None:
        if self._has_shut:
            self._complete()
        elif self._return_path or self._decoder.is_postcopy:
            self._on_lost("the source closed the connection")
        else:
            # Without a return path this is how a stream ends; the decoder knows whether it was whole.
            self._is_input_over = True
            if not self._is_stream_over:
                self._decoder.finish()
                self._take_events()

    def _complete(self) -> None:
        self.shared.ledger.post(Fact.ALL_SENT)
        self.end = End.COMPLETE

    def _on_lost(self, text: str) -> None:
        if self.shared.stopping.is_set():
            text = "this side stopped"
        if self._has_shut:
            self._complete()  # the result may or may not have arrived; everything is here in any case
        elif self._is_committed:
            self.end = End.PAUSED
            self.shared.ledger.post(Fact.LINK_LOST, round_no=self._round + 1, text=text)
        else:
            self.error = self.error or MigrationFailed(f"the source is gone before everything came: {text}")
            self.end = End.FAILED
            self.shared.ledger.post(Fact.ERROR, text=text)

    def _on_error(self, error: VmferryError) -> None:
        """The peer broke the protocol, or this side cannot go on."""
        self.error = error
        self.shared.barrier.break_up()
        if self._return_path and not self._is_committed and not self._has_shut:
            try:
                self._say(Shut(1))
                self._write()
            except Gone:
                pass  # closing the connection says the same
        self._on_lost(str(error))
