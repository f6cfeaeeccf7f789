"""The main channel of an incoming migration: one thread that reads it, fills the image and writes the return path.

Theory of operation
-------------------
The loop reads a slab, hands it to the decoder and carries its events out one by one. Between slabs it looks at the
owner's orders and writes what is to be said to the source. When nothing is to be read it waits for the connection or
for the waker. So the socket, the decoder and the return path have one owner, and an order is followed within the
time of one slab.

The commit. Until then the source may take its guest back, and this side may forget everything:
    precopy                        our word SHUT 0, given when the owner wants it (`hold_result`)
    precopy without return path    the stream's last byte: the source asks nobody
    postcopy, source >= 10.2       our answer to ping 0x42 (`hold_proof`)
    postcopy, older source         the package itself
A word counts as given when all of it has left; a connection that breaks before cannot have carried it.
After the commit this side never says SHUT with an error: it would start a guest there that may run here (protocol, 7.3
and 15.3). Trouble then only closes the connection, which pauses both sides; but a source of 10.2 or newer that has sent
its last page goes back even then (`core.hazards`), so its owner pauses its guest before the switch.

Rule 1: facts are posted when they are true: a fact about a message after it was written, an end after everything
        is ready for the next connection.
Rule 2: whatever happens, `run` returns and says how in `end`; nothing escapes from the thread.
Rule 3: it waits in one place only, for the connection and the waker at once; `cut` ends every wait.
"""

from __future__ import annotations

import enum
import threading

import numpy as np

from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.engine.image import PAGE_BYTES, ImageBlock, KeptBitmaps
from vmferry.engine.machine_types import has_flush_per_section, has_switchover_ack
from vmferry.engine.shared import Shared
from vmferry.engine.voice import Voice
from vmferry.engine.wants import requests
from vmferry.engine.wires import Gone, Wire
from vmferry.errors import MigrationFailed, VmferryError
from vmferry.wire import mapped_ram
from vmferry.wire.errors import refuse
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
_ROOM_BYTES = 2 * PAGE_BYTES
"""In front of what is read: for the beginning of a page's record whose rest is read next."""


class End(enum.Enum):
    """How the main channel's thread ended."""

    COMPLETE = "complete"  # everything is here and the source was told
    FAILED = "failed"  # before the commit: what came is worth nothing
    PAUSED = "paused"  # after the commit: pages are missing, or the source was not told; another connection may follow


class MainIntake:
    """One connection's main channel. `run` in a thread of its own; `cut` through the wire."""

    def __init__(self, shared: Shared, wire: Wire, first: bytes, *, round_no: int) -> None:
        self.shared, self.wire, self._first = shared, wire, first
        self._round = round_no
        """How many connections were lost before this one."""
        self.end: End | None = None
        self.error: VmferryError | None = None
        self.over = threading.Event()
        """The thread has nothing more to do; `end` says how it went."""
        self.is_result_due = False
        """Everything is here, and nothing but the owner's order is missing to tell the source."""
        options = shared.options
        resume = shared.resume if round_no else None
        self._decoder = StreamDecoder(Settings(compress=options.compress, end=options.end), resume=resume)
        self._counters = shared.new_counters()
        self._voice = Voice(wire, shared.waker)
        self._return_path = self._is_committed = bool(round_no)
        self._is_proof_due = self._asks_proof = self._in_package = self._has_shut = False
        self._may_ask = self._has_acked = False
        self._block: ImageBlock | None = None
        self._bitmaps_open = False
        self._is_stream_over = self._is_input_over = False
        self._owed = -1  # pages that were missing when it was last looked, and until when more may come
        self._patience_s = 0.0
        self._flush_per_section = has_flush_per_section(shared.image.machine)

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Reads until the end. Never raises."""
        try:
            self._loop()
        except Gone as error:
            self._on_lost(str(error) or "the connection broke")
        except VmferryError as error:  # the peer broke the protocol, or whoever keeps the pages cannot
            self._on_error(error)
        except (MemoryError, OSError) as error:
            self._on_error(VmferryError("there is no memory for the guest image", side="destination", cause=error))
        finally:
            if self.end is None:  # a defect of ours; it shows in the thread's traceback, and nobody waits in vain
                self._on_lost("a defect of this program")
            self.shared.end_counters(self._counters)
            self.over.set()

    def _loop(self) -> None:
        slab = memoryview(bytearray(_ROOM_BYTES + limits.ENGINE_SLAB_BYTES))
        if self._round:
            self.shared.ledger.post(Fact.RECONNECTED, round_no=self._round)
        slab[_ROOM_BYTES : _ROOM_BYTES + len(self._first)] = self._first
        self._digest(slab, len(self._first))
        while self.end is None:
            try:
                self._look_up()
            except Gone:
                self._take_the_rest(slab)
                raise
            if self.end is None:
                self._read(slab)

    def _take_the_rest(self, slab: memoryview) -> None:
        """Nothing can be said any more; what had come before counts. A source that died will not send it again.

        1. the source sends its last pages and closes   2. a word of ours cannot be written   3. the pages are still
        here to read
        """
        while not self.wire.is_cut and not self._voice.is_full:
            count = self.wire.read_much(slab[_ROOM_BYTES:])
            if not count:
                return
            self._digest(slab, count)

    def _look_up(self) -> None:
        """What others want: a cut, an order, a failure to be told; and what is still to be said. Raises Gone."""
        if self.wire.is_cut:
            raise Gone("it was cut")
        failure = self.shared.take_failure(is_postcopy=self._decoder.is_postcopy)
        if failure is not None:
            self._on_error(failure)
            return
        self._give_proof()
        if self._is_stream_over:
            self._finish_when_whole()
        self._give_result()
        self._ask()
        self._voice.push()

    def _read(self, slab: memoryview) -> None:
        may_read = not self._is_input_over and not self._voice.is_full
        count = self.wire.read_much(slab[_ROOM_BYTES:]) if may_read else None
        if count is None:
            left_s = self._patience_s - self.shared.clock.now_s() if self._owed > 0 else None
            self.wire.wait(
                readable=may_read, writable=self._voice.has_words, timeout_s=left_s, waker=self.shared.waker
            )  # fmt: skip
        elif count:
            self._digest(slab, count)
        else:
            self._on_close()

    def _digest(self, slab: memoryview, count: int) -> None:
        self._counters.bytes += count
        if self._is_stream_over:
            return  # whatever a source says behind its stream, QEMU's own destination ignores it too
        self._decoder.feed_behind(slab, _ROOM_BYTES, _ROOM_BYTES + count)
        self._take_events()
        self.shared.image.announce_pages()

    def _take_events(self) -> None:
        while True:
            event = self._decoder.next()
            if isinstance(event, PageRun | ZeroRun):  # first, and without a detour: nearly everything is pages
                self._on_pages(event)
            elif isinstance(event, Pause):
                if event is DONE:
                    self._on_stream_end()
                return
            else:
                self._on_event(event)

    def _on_pages(self, run: PageRun | ZeroRun) -> None:
        block, offsets = self._block_of(run.block), run.offsets
        count = stored = len(offsets)
        if isinstance(run, PageRun):
            self._counters.pages += count
            if self._decoder.is_postcopy:
                stored = block.write_missing(offsets, run.pages)
            else:
                block.write(offsets, run.pages, is_row=run.is_row)
        else:
            self._counters.zero_pages += count
            if self._decoder.is_postcopy:
                stored = block.write_missing_zeros(offsets)
            else:
                block.write_zeros(offsets)
        self._counters.repeated_pages += count - stored

    def _block_of(self, wire: RamBlock) -> ImageBlock:
        if self._block is None or self._block.wire is not wire:
            self._block = self.shared.image.blocks[wire.name]
        return self._block

    # --- orders -------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Says the owner's page requests, as many as the source listens to."""
        if not self._may_ask or self._has_shut:
            return
        while not self._voice.is_full:
            want = self.shared.wants.take(self.shared.image)
            if want is None:
                return
            for start, length in requests(want):
                self._voice.ask(want.block.wire, start, length)
                self._counters.requests += 1

    def _ask_again(self) -> None:
        """From here on the source takes requests; those from before it never heard, or has forgotten."""
        self._may_ask = True
        self.shared.wants.again(self.shared.image)

    def _give_proof(self) -> None:
        if self._is_proof_due and self.shared.proof_ordered.is_set():
            self._is_proof_due = False
            self._voice.tell(Pong(PROOF_PING))
            self._is_committed = True
            self.shared.ledger.post(Fact.PACKAGE_LOADED, text="the source was told")

    def _give_result(self) -> None:
        """A source must hear of the proof first: it takes an earlier result for the end of everything."""
        if not (self.is_result_due and self.shared.result_ordered.is_set()) or self.end is not None:
            return
        if self._decoder.is_postcopy and not self._is_committed:
            return
        self.is_result_due = False
        if self._return_path:
            self._voice.tell(Shut(0))
            self._is_committed = self._has_shut = True
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
                    self._pass_point()
            case SectionFooter() | SectionPart():
                pass
            case RamBlock():
                self._on_block(event)
            case XbzrlePage() | CompressedPage():
                self._on_packed_page(event)
            case Configuration():
                self._on_configuration(event)
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
                wants_ack = self.shared.options.ack_switchover and has_switchover_ack(self.shared.image.machine)
                if wants_ack and not self._has_acked:
                    self._has_acked = True
                    self._voice.say(SwitchoverAck())
            case Ping(value):
                if not self._return_path:
                    refuse("ping", "a ping without return path", offset=self._decoder.offset, section="command")
                if value == PROOF_PING and self._in_package:
                    self._asks_proof = True
                else:
                    self._voice.say(Pong(value))
            case SwitchoverStart():
                self.shared.ledger.post(Fact.SWITCHOVER)
            case AskBitmap(block):
                self._on_ask_bitmap(block)
            case PostcopyResume():
                self._voice.tell(ResumeAck())
                self.shared.ledger.post(Fact.RESUME_ACK, round_no=self._round)
                self._ask_again()
            case _:
                pass  # advice, listen, run, memory size, end of sections: the decoder keeps their order

    def _on_blocks_listed(self) -> None:
        """The block list is whole: other channels may begin. Before the first barrier, which waits for them."""
        if not self.shared.gate.is_open:
            self.shared.gate.open()
            self.shared.ledger.post(Fact.SETUP_DONE)

    def _pass_point(self) -> None:
        """Waits for a SYNC of every multifd channel.

        A source whose main channel is gone may still have channels with data in them, but opens no more: when some
        never came, it is not waited for long.
        """
        until_s: float | None = None
        while not self.shared.barrier.try_pass(self._decoder.offset):
            now_s = self.shared.clock.now_s()
            if self.wire.is_cut or (until_s is not None and now_s >= until_s):
                raise Gone("it was cut" if self.wire.is_cut else "the source is gone, and not all channels came")
            is_gone = self.wire.is_hung_up()
            if until_s is None and is_gone and not self.shared.barrier.has_all:
                until_s = now_s + self.shared.options.stragglers_s
            left_s = None if until_s is None else until_s - now_s
            self.wire.wait_for_hangup(self.shared.waker, is_known=is_gone, timeout_s=left_s)

    def _on_configuration(self, event: Configuration) -> None:
        if "x-ignore-shared" in (event.capabilities or ()):
            message = "x-ignore-shared leaves out memory that both sides are to share"
            refuse("ignore-shared", message, offset=self._decoder.offset, section="configuration")
        self.shared.image.configuration = event
        self._flush_per_section = has_flush_per_section(event.machine)

    def _on_block(self, block: RamBlock) -> None:
        offset, known = self._decoder.offset, self.shared.image.blocks.get(block.name)
        if block.mapped is not None:
            refuse("mapped-ram", "a mapped-ram stream is a file", offset=offset, section="ram")
        if block.used_length % PAGE_BYTES or self._decoder.ram.page_size != PAGE_BYTES:
            refuse("page-size", "only pages of 4096 bytes are known", offset=offset, section="ram")
        total = self.shared.image.total_bytes + (0 if known else block.used_length)
        if total > self.shared.options.guest_bytes_max:
            refuse("guest-size", f"more than {total} bytes of memory", offset=offset, section="ram")
        if known is not None and known.wire.used_length != block.used_length:
            refuse("ram-block-size", f"block {block.name!r} has another length here", offset=offset, section="ram")
        self.shared.image.add_block(block)

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
            self._is_proof_due = True
            self._give_proof()
        else:
            self._is_committed = True
            self.shared.ledger.post(Fact.PACKAGE_LOADED, text="the source asks for no proof")
        self.shared.postcopy_gate.open()
        self._ask_again()

    def _on_ask_bitmap(self, name: str) -> None:
        block = self.shared.image.blocks.get(name)
        if block is None:
            refuse("recv-bitmap", f"block {name!r} is asked for", offset=self._decoder.offset, section="command")
        block.forget_parts()
        bits = mapped_ram.make_bitmap(block.have)
        self._voice.say(ReceivedBitmap(name, len(bits)), BitmapPiece(memoryview(bits)))
        self._voice.tell(
            BitmapEnd()
        )  # so that there is one bitmap in memory, and not one for each time it is asked for

    # --- ends ---------------------------------------------------------------------------------------------

    def _on_stream_end(self) -> None:
        self._is_stream_over = True
        if not self._decoder.is_postcopy:
            self._assume_zeros()
            self._is_committed = not self._return_path
            self.shared.image.is_device_state_whole = True
            self.shared.ledger.post(Fact.LOADED)

    def _assume_zeros(self) -> None:
        for block in self.shared.image:
            block.assume_zeros()

    def _finish_when_whole(self) -> None:
        """In postcopy the last pages may still be on their way on the preempt channel."""
        if self.is_result_due or self._has_shut:
            return
        if self._decoder.is_postcopy:
            owed, now_s = self.shared.image.owed_pages(), self.shared.clock.now_s()
            if owed != self._owed:
                self._owed, self._patience_s = owed, now_s + self.shared.options.stragglers_s
            if owed:
                if now_s >= self._patience_s:
                    refuse("pages", f"the stream ended, {owed} pages never came", offset=0, section="ram")
                return
            # A page that was neither sent nor taken back is one that nobody uses: unplugged virtio-mem, say.
            self._assume_zeros()
        self.is_result_due = True

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
        self._end(End.COMPLETE, Fact.ALL_SENT)

    def _on_lost(self, text: str) -> None:
        if self.end is not None:
            return
        if self.shared.stopping.is_set():
            text = "this side stopped"
        if self._has_shut or (self._is_stream_over and not self._return_path):
            # Whether the result has arrived or not, everything is here, and it was told.
            self._complete()
        elif self._is_committed:
            self._end(End.PAUSED, Fact.LINK_LOST, text)
        else:
            self.error = self.error or MigrationFailed(f"the source is gone before everything came: {text}")
            self._end(End.FAILED, Fact.ERROR, text)

    def _end(self, end: End, fact: Fact, text: str = "") -> None:
        """Lets go of everything, and says so last: who hears of it may connect at once."""
        self.wire.close()
        self.shared.resume = self._decoder.resume()
        self.shared.barrier.break_up()
        # After a failure what the others bring is worth nothing, and a source notices a closed channel soonest.
        # Otherwise the multifd channels are left to the source, who may still write their last packet.
        self.shared.sides.cut(multifd=end is End.FAILED)
        self.shared.gate.open()
        self.end = end
        round_no = self._round + 1 if fact is Fact.LINK_LOST else 0
        self.shared.ledger.post(fact, round_no=round_no, text=text)

    def _on_error(self, error: VmferryError) -> None:
        """The peer broke the protocol, or this side cannot go on. What a channel told of itself comes first."""
        self.error = self.shared.take_failure(is_postcopy=self._decoder.is_postcopy) or error
        if self._return_path and not self._is_committed and not self.wire.is_cut:
            try:
                self._voice.say(Shut(1))
                self._voice.push()
            except Gone:
                pass  # closing the connection says the same
        self._on_lost(str(self.error))
