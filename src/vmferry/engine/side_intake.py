"""The other channels of an incoming migration: multifd and preempt, each read by a thread of its own.

Nothing on the wire says who a connection belongs to, so each has to prove what it is: a multifd channel by its
introduction, the preempt channel by its first page. Until then it is a stranger's, whose end means nothing.

Rule 1: no channel touches a page before the block list has come on the main channel.
Rule 2: after a SYNC a channel reads nothing until the main channel has passed the barrier.
Rule 3: whatever happens, `run` returns; what went wrong with a channel of ours is told to the main channel, which
        knows what it means at this point of the migration.
"""

from __future__ import annotations

from vmferry import limits
from vmferry.engine.image import PAGE_BYTES, ImageBlock, Pages, leading_run
from vmferry.engine.shared import Shared
from vmferry.engine.wires import Gone, Wire
from vmferry.errors import VmferryError
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    DONE,
    MultifdEvent,
    MultifdInit,
    MultifdPacket,
    MultifdPages,
    MultifdPayload,
    Offsets,
    PageRun,
    Pause,
    RamBlock,
    ZeroRun,
)
from vmferry.wire.multifd import COMPRESSION, SYNC, MultifdDecoder, PageInflater
from vmferry.wire.preempt import PreemptDecoder


class SideIntake:
    """What both kinds of channels share: the loop."""

    is_multifd = False

    def __init__(self, shared: Shared, wire: Wire, first: bytes) -> None:
        self.shared, self.wire, self._first = shared, wire, first
        self.is_ours = False
        """It has proved to be a channel of this migration."""
        self._counters = shared.new_counters()
        self._block: ImageBlock | None = None
        shared.sides.add(wire, is_multifd=self.is_multifd)

    def run(self) -> None:
        """Reads until the connection ends. Never raises."""
        try:
            self._loop()
        except Gone:
            pass  # the main channel notices by itself what is missing
        except WireError as error:
            self._on_error(error)
        except MemoryError as error:
            self._on_error(VmferryError("there is no memory for a channel", side="destination", cause=error))
        finally:
            self.shared.sides.remove(self.wire)
            self._on_end()
            self.shared.end_counters(self._counters)
            self.wire.close()

    def _on_error(self, error: VmferryError) -> None:
        if self.is_ours:
            self.shared.fail(error, is_multifd=self.is_multifd)

    def _loop(self) -> None:
        slab = memoryview(bytearray(limits.ENGINE_SLAB_BYTES))
        is_over = self._digest(memoryview(self._first))
        while not is_over and not self.shared.stopping.is_set():
            count = self.wire.read_much(slab[: self._wanted_bytes()])
            if count is None:
                self.wire.wait(readable=True)
            elif count == 0:
                return
            else:
                is_over = self._digest(slab[:count])
                self._read_past_slab()

    def _wanted_bytes(self) -> int:
        return limits.ENGINE_SLAB_BYTES

    def _read_past_slab(self) -> None:
        """Reads what needs no look to where it belongs."""

    def _digest(self, data: memoryview) -> bool:
        raise NotImplementedError

    def _on_end(self) -> None:
        raise NotImplementedError

    def _block_of(self, wire: RamBlock) -> ImageBlock:
        if self._block is None or self._block.wire is not wire:
            self._block = self.shared.image.blocks[wire.name]
        return self._block


class MultifdIntake(SideIntake):
    """A multifd channel."""

    is_multifd = True

    def __init__(self, shared: Shared, wire: Wire, first: bytes) -> None:
        super().__init__(shared, wire, first)
        self._blocks: dict[str, RamBlock] = {}
        self._decoder = MultifdDecoder(self._blocks)
        self._head = bytearray(self._decoder.head_bytes)
        self._inflater = PageInflater()
        self._packet: MultifdPacket | None = None
        self._left = 0  # normal pages of the packet that are still to come

    def _loop(self) -> None:
        """This thread only reads, so its reads wait in the kernel: the pages of a packet come in one call."""
        if not self.wire.is_tls:
            self.wire.block()
        super()._loop()

    def _digest(self, data: memoryview) -> bool:
        self._counters.bytes += len(data)
        self._decoder.feed(data)
        while True:
            event = self._decoder.next()
            if isinstance(event, MultifdPages):
                self._store(event.block, event.offsets, event.pages)
            elif isinstance(event, Pause):
                self.shared.image.announce_pages()
                return False
            else:
                self._on_event(event)

    def _on_event(self, event: MultifdEvent) -> None:
        match event:
            case MultifdPacket():
                self._on_packet(event)
            case MultifdPayload(_, last):
                pages = self._inflater.feed(event)
                if last:
                    assert pages is not None
                    assert self._packet is not None
                    assert self._packet.block is not None
                    self._store(self._packet.block, self._packet.normal_offsets, pages)
            case MultifdInit(channel, _):
                self._on_introduction(channel)
            case MultifdPages():
                raise AssertionError

    def _wanted_bytes(self) -> int:
        return self._decoder.wanted_bytes

    def _read_past_slab(self) -> None:
        """Plain pages that lie side by side go from the socket to their place: half of the work is copying."""
        is_plain_wire = not self.wire.is_tls
        while not self.shared.stopping.is_set():
            if (plain := self._decoder.plain_pages()) is not None:
                count = leading_run(plain[1])
                if count < limits.ENGINE_DIRECT_PAGES:
                    return
                self._read_to_place(self._block_of(plain[0]), int(plain[1][0]) // PAGE_BYTES, count)
                self._decoder.skip_pages(count)
                self._left -= count
                self._sync_if_due()
            elif not (is_plain_wire and self._decoder.is_at_head and self._read_packet()):
                return

    def _read_packet(self) -> bool:
        """A whole head, and its pages if they lie side by side. False: the connection has ended."""
        head = self._head
        got = self.wire.read_whole(memoryview(head))
        row = self._decoder.take_row(head) if got == len(head) else None
        if row is None:
            self._digest(memoryview(head)[:got])
            return got == len(head)
        self._counters.bytes += got
        self._read_to_place(self._block_of(row[0]), row[1], row[2])
        return True

    def _read_to_place(self, block: ImageBlock, first: int, count: int) -> None:
        place = block.place(first, count)
        got = self.wire.read_whole(place)
        self._counters.bytes += got
        block.placed(first, got // PAGE_BYTES)
        if got < len(place):
            raise Gone("closed in the middle of a packet")
        self._counters.pages += count
        self.shared.image.announce_pages()

    def _on_introduction(self, channel: int) -> None:
        if not self.shared.barrier.introduce(channel):
            raise Gone("a channel that nobody expects")
        self.is_ours = True
        self.shared.sides.prove(self.wire)
        self.shared.gate.wait(self.wire)
        self._blocks.update({block.name: block.wire for block in self.shared.image})

    def _on_packet(self, packet: MultifdPacket) -> None:
        self._packet, self._left = packet, packet.normal
        if packet.zero:
            assert packet.block is not None
            self._block_of(packet.block).write_zeros(packet.zero_offsets)
            self._counters.zero_pages += packet.zero
        if packet.normal and packet.flags & COMPRESSION:
            self._inflater.begin(packet)
        self._sync_if_due()

    def _store(self, wire: RamBlock, offsets: Offsets, pages: Pages) -> None:
        self._block_of(wire).write(offsets, pages)
        self._counters.pages += len(offsets)
        self._left -= len(offsets)
        self._sync_if_due()

    def _sync_if_due(self) -> None:
        """QEMU 7.2 puts a SYNC on packets with pages too: these pages belong before the barrier."""
        assert self._packet is not None
        if self._packet.flags & SYNC and not self._left:
            self.shared.image.announce_pages()
            self.shared.barrier.arrive()

    def _on_end(self) -> None:
        if self.is_ours:
            self.shared.barrier.end_channel()


class PreemptIntake(SideIntake):
    """The channel of requested pages, or somebody who may be it."""

    def __init__(self, shared: Shared, wire: Wire, first: bytes) -> None:
        super().__init__(shared, wire, first)
        self._decoder: PreemptDecoder | None = None

    def _digest(self, data: memoryview) -> bool:
        self._counters.bytes += len(data)
        if self._decoder is None:
            self.shared.postcopy_gate.wait(self.wire)
            self._decoder = PreemptDecoder({block.name: block.wire for block in self.shared.image})
        self._decoder.feed(data)
        while True:
            event = self._decoder.next()
            if isinstance(event, PageRun | ZeroRun):
                self._store(event)
            elif isinstance(event, Pause):
                self.shared.image.announce_pages()
                self.shared.waker.wake()  # if its stream is over, it waits for these pages
                return event is DONE
            elif not self.is_ours:
                return True

    def _store(self, run: PageRun | ZeroRun) -> None:
        if not self.is_ours:
            if not self.shared.sides.claim_preempt(self.wire):
                raise Gone("a second preempt channel")
            self.is_ours = True
        block, count = self._block_of(run.block), len(run.offsets)
        if isinstance(run, PageRun):
            stored = block.write_missing(run.offsets, run.pages)
            self._counters.pages += count
        else:
            stored = block.write_missing_zeros(run.offsets)
            self._counters.zero_pages += count
        self._counters.repeated_pages += count - stored

    def _on_end(self) -> None:
        self.shared.waker.wake()
