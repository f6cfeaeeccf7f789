"""The main channel of an outgoing migration: one thread that writes the stream and hears the return path.

Theory of operation
-------------------
`run` goes through the stream once: what stands at its beginning, rounds of pages, then either the end of a precopy or
the switch to postcopy and the service of pages (`_serve`). Wherever it waits for room in the socket it also reads the
return path, so an answer is heard within the time of one buffer. A recovery enters at `_recover`.

The commit. Before it the image stays the guest's only home; after it the destination's guest is:
    precopy     the destination's word SHUT 0
    postcopy    its answer to ping 0x42, which stands behind the device state in the package (QEMU 7.2 answers it too)
A connection that breaks earlier is a failure, and the image is whole; one that breaks later waits for a recovery.

Rule 1: in postcopy this thread alone takes pages from the `PageService`, so a page leaves once.
Rule 2: nothing but pages of a chunk stands between a request that was read and its page: chunks and what the socket
        holds (`ENGINE_SERVICE_SOCKET_BYTES`) are small.
Rule 3: whatever happens, `run` returns and says how in `end`.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.engine import machine_types
from vmferry.engine.image import PAGE_BYTES, Image, ImageBlock
from vmferry.engine.ledger import Ledger
from vmferry.engine.multifd_out import MultifdOut
from vmferry.engine.outlet import RUN_PAGES, Outlet
from vmferry.engine.page_plan import Chunk, Numbers, PageService, discards, pages_due, round_windows
from vmferry.engine.wires import Gone, Waker, Wire
from vmferry.errors import MigrationFailed, VmferryError
from vmferry.wire.encode import encode_package
from vmferry.wire.errors import WireError, refuse
from vmferry.wire.events import (
    NEED_DATA,
    AskBitmap,
    BitmapEnd,
    BitmapPiece,
    Configuration,
    Description,
    EndOfRam,
    EndOfSections,
    Event,
    Header,
    MemorySize,
    MultifdFlush,
    OpenReturnPath,
    Pause,
    Ping,
    Pong,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    ReturnPathEvent,
    SectionFooter,
    SectionPart,
    SectionStart,
    Shut,
    SwitchoverAck,
    SwitchoverStart,
)
from vmferry.wire.iterable import DIRTY_BITMAP, KNOWN, RAM
from vmferry.wire.return_path import ReturnPathDecoder, bitmap_bytes, check_request

PROOF_PING = 0x42


@dataclass(frozen=True, slots=True)
class OutgoingOptions:
    """How an outgoing endpoint behaves. Both sides must agree on `postcopy`, `preempt`, `channels`.

    `postcopy`: the destination has postcopy-ram on; "at-once" switches before any page was sent, "on-order" when the
    owner says so, "never" cannot.
    `near_pages`: how many pages behind one that was asked for go next. `chunk_pages`: at most so many in one go.
    """

    postcopy: Literal["never", "on-order", "at-once"] = "never"
    preempt: bool = False
    channels: int = 0
    near_pages: int = 16
    chunk_pages: int = 16
    handshake_s: float = limits.ENGINE_HANDSHAKE_S


class SentEnd(enum.Enum):
    """How the main channel's thread ended."""

    COMPLETE = "complete"
    FAILED = "failed"  # before the commit: the image is the guest's home
    PAUSED = "paused"  # after the commit: another connection may follow


@dataclass
class Outbound:
    """What the threads of one outgoing endpoint share; see `engine.shared` for the rules."""

    image: Image
    ledger: Ledger
    options: OutgoingOptions
    waker: Waker
    dial: Callable[[], Wire]
    """Makes one more connection. Raises Gone."""
    on_absent: Callable[[ImageBlock, int, int], None]
    postcopy_ordered: bool = False
    stopping: bool = False
    service_s: deque[float] = field(default_factory=lambda: deque(maxlen=limits.ENGINE_SERVICE_TIMES_MAX))
    """Seconds from a request that was read to its page written, of the latest requests."""
    bytes: int = 0
    requests: int = 0


class MainSender:
    """One connection's main channel. `run` in a thread of its own."""

    def __init__(self, out: Outbound, *, round_no: int) -> None:
        self.out, self._round = out, round_no
        self.end: SentEnd | None = None
        self.error: VmferryError | None = None
        self._machine = out.image.machine
        self._decoder = ReturnPathDecoder()
        self._slab = memoryview(bytearray(limits.ENGINE_RETURN_PATH_BYTES))
        self._wire: Wire | None = None
        self._main: Outlet
        self._urgent: Outlet | None = None
        self._multifd = MultifdOut(uuid=self._uuid(), name="outgoing")
        self._service: PageService | None = None
        self._last_asked: str | None = None
        self._pongs = 0
        self._has_proof = bool(round_no)
        self._all_sent = self._has_result = False
        self._bitmap: bytearray | None = None
        self._bitmap_of: ImageBlock | None = None
        self._bitmaps_due = 0
        self._resume_acked = False

    @property
    def wires(self) -> list[Wire]:
        """All connections, for a cut."""
        return [wire for wire in (self._wire, self._urgent.wire if self._urgent else None) if wire is not None]

    def cut(self) -> None:
        """Breaks all connections; from any thread."""
        for wire in self.wires:
            wire.cut()
        self._multifd.cut()

    # --- the thread ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Sends until the end. Never raises."""
        try:
            self._wire = self._dial()
            self._main = Outlet(self._wire, waker=self.out.waker, while_waiting=self._hear)
            if self._round:
                self._recover()
            else:
                self._begin()
                self._send_all()
            self._await(lambda: self._has_result)
            self.end = SentEnd.COMPLETE
        except Gone as error:
            self._on_lost(str(error) or "the connection broke")
        except WireError as error:
            self.error = error
            self._on_lost(str(error))
        except OSError as error:
            self.error = VmferryError(f"the guest image cannot be read: {error}", side="source", cause=error)
            self._on_lost(str(error))
        finally:
            self._close()

    def _close(self) -> None:
        if self._multifd.is_open:
            if self.end is not SentEnd.COMPLETE:
                self._multifd.cut()
            self._multifd.finish(timeout_s=limits.ENGINE_STOP_S)
        for wire in self.wires:
            wire.close()
        self.out.bytes += self._main.bytes if self._wire is not None else 0

    def _dial(self) -> Wire:
        wire = self.out.dial()
        if self.out.stopping:
            wire.close()
            raise Gone("this side stopped")
        wire.handshake(timeout_s=self.out.options.handshake_s, waker=self.out.waker)
        return wire

    def _on_lost(self, text: str) -> None:
        if self.out.stopping:
            text = "this side stopped"
        if self._has_proof:
            self.end = SentEnd.PAUSED
            self.out.ledger.post(Fact.LINK_LOST, round_no=self._round + 1, text=text)
        else:
            self.error = self.error or MigrationFailed(f"the destination is gone before it had everything: {text}")
            self.end = SentEnd.FAILED
            self.out.ledger.post(Fact.ERROR, text=text)

    # --- the beginning ------------------------------------------------------------------------------------

    def _uuid(self) -> bytes:
        configuration = self.out.image.configuration
        return bytes(16) if configuration is None or configuration.uuid is None else configuration.uuid

    def _put(self, *events: Event) -> None:
        for event in events:
            self._main.put(event)

    def _put_footer(self, section_id: int) -> None:
        if self.out.image.has_footers:
            self._put(SectionFooter(section_id))

    def _begin(self) -> None:
        image, options = self.out.image, self.out.options
        self._put(Header())
        if image.configuration is not None:
            # Capabilities of the source's own run (x-ignore-shared, mapped-ram) do not hold for this stream.
            known = image.configuration
            order = tuple(each for each in known.order if "capabilities" not in each)
            self._put(Configuration(known.machine, known.page_bits, None, known.uuid, order))
        self._put(OpenReturnPath(), Ping(1))
        if options.postcopy != "never":
            sizes = PAGE_BYTES
            for block in image:
                sizes |= block.wire.page_size or PAGE_BYTES
            self._put(PostcopyAdvise(sizes, PAGE_BYTES))
        self._main.drain()
        # A destination of 7.2 takes the first connection as the main one, whatever it says.
        self._multifd.open([self.out.dial() for _ in range(options.channels)], handshake=self._shake)
        if options.preempt and machine_types.has_early_preempt(self._machine):
            self._open_preempt()
        for device in image.early:
            self._put(device)
            self._put_footer(device.section_id)
        self._put(SectionStart(image.ram_section_id, RAM, 0, KNOWN[RAM]), MemorySize(image.total_bytes))
        for block in image:
            self._put(block.wire)
        self._end_ram_body(is_round=True)
        if image.bitmaps is not None:
            self._put(SectionStart(image.bitmaps.section_id, DIRTY_BITMAP, 0, KNOWN[DIRTY_BITMAP]))
            self._put(*image.bitmaps.chunks[: image.bitmaps.chunks_at_start])
            self._put_footer(image.bitmaps.section_id)
        self._main.drain()
        self.out.ledger.post(Fact.SETUP_DONE)

    def _shake(self, wire: Wire) -> None:
        wire.handshake(timeout_s=self.out.options.handshake_s)

    def _open_preempt(self) -> None:
        self._urgent = Outlet(self._dial(), waker=self.out.waker)

    def _end_ram_body(self, *, is_round: bool) -> None:
        """The end of a section of RAM, with multifd's barrier in the form that the machine type has."""
        per_section = machine_types.has_flush_per_section(self._machine)
        if self._multifd.is_open and (is_round or per_section):
            self._multifd.sync()
            if not per_section:
                self._put(MultifdFlush())
        self._put(EndOfRam())
        self._put_footer(self.out.image.ram_section_id)

    # --- precopy ------------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        image, options = self.out.image, self.out.options
        while not (options.postcopy == "at-once" or self.out.postcopy_ordered):
            due = sum(pages_due(block) for block in image)
            if image.is_device_state_whole and due < limits.ENGINE_LAST_ROUND_PAGES and image.has_all_pages:
                break
            if due:
                self._put(SectionPart(image.ram_section_id, last=False))
                self._send_round()
                self._end_ram_body(is_round=True)
                self._main.drain()
            else:
                self._wait()
            self._hear()
        if options.postcopy == "at-once" or self.out.postcopy_ordered:
            self._await(lambda: image.is_device_state_whole)
            self._switch_to_postcopy()
        else:
            self._finish_precopy()

    def _send_round(self) -> None:
        for block in self.out.image:
            for numbers in round_windows(block):
                if self.out.postcopy_ordered:
                    block.dirty[numbers] = True  # not sent, whatever was just marked: the discards will say so
                    return
                filled = block.touched[numbers]
                if not filled.all():
                    self._main.put_zeros(block, numbers[~filled])
                    self._main.drain()
                    numbers = numbers[filled]
                if self._multifd.is_open and len(numbers):
                    self._multifd.put(block, numbers)
                else:
                    self._send_window(block, numbers)

    def _send_window(self, block: ImageBlock, numbers: Numbers) -> None:
        for at in range(0, len(numbers), RUN_PAGES):
            some = numbers[at : at + RUN_PAGES]
            first = int(some[0])
            if int(some[-1]) - first == len(some) - 1:
                pages = block.store.read(first, len(some))
            else:
                pages = np.concatenate([block.store.read(int(number), 1) for number in some])
            self._main.put_run(block, some, pages)
            self._main.drain()

    def _finish_precopy(self) -> None:
        image = self.out.image
        self.out.ledger.post(Fact.SWITCHOVER)
        if machine_types.has_switchover_start(self._machine):
            self._put(SwitchoverStart())
        self._put(SectionPart(image.ram_section_id, last=True))
        self._main.drain()
        self._send_round()
        self._end_ram_body(is_round=True)
        self._put_bitmaps_end()
        for device in image.devices:
            self._put(device)
            self._put_footer(device.section_id)
        self._put(EndOfSections(), Description(image.description or b"{}"))
        self._all_sent = True
        self._main.drain()
        if self._multifd.is_open:
            self._multifd.end()
        self.out.ledger.post(Fact.ALL_SENT)

    def _put_bitmaps_end(self) -> None:
        kept = self.out.image.bitmaps
        if kept is not None:
            self._put(SectionPart(kept.section_id, last=True), *kept.chunks[kept.chunks_at_start :])
            self._put_footer(kept.section_id)

    # --- postcopy -----------------------------------------------------------------------------------------

    def _switch_to_postcopy(self) -> None:
        image, ledger = self.out.image, self.out.ledger
        if self._multifd.is_open:
            self._put(SectionPart(image.ram_section_id, last=False))
            self._end_ram_body(is_round=True)
        ledger.post(Fact.SWITCHOVER)
        if self.out.options.preempt and self._urgent is None:
            self._main.drain()
            self._await(lambda: self._pongs > 0)
            self._open_preempt()
        if machine_types.has_switchover_start(self._machine):
            self._put(SwitchoverStart())
        blocks = list(image)
        self._put(*discards(blocks), Ping(2))
        self._make_service()
        package: list[Event] = [PostcopyListen()]
        for device in image.devices:
            package.append(device)
            if image.has_footers:
                package.append(SectionFooter(device.section_id))
        package += [Ping(3), Ping(PROOF_PING), PostcopyRun()]
        for part in encode_package(package):
            self._main.put_raw(part)
        self._put(Ping(4))
        self._main.drain()
        ledger.post(Fact.PACKAGE_SENT)
        self._serve()

    def _make_service(self) -> None:
        options = self.out.options
        self._service = PageService(
            list(self.out.image), near_pages=options.near_pages, chunk_pages=options.chunk_pages
        )
        for outlet in (self._main, self._urgent):
            if outlet is not None:
                outlet.wire.limit_unsent(limits.ENGINE_SERVICE_SOCKET_BYTES)

    def _serve(self) -> None:
        """Pages until none is left, then the end of the stream."""
        service, main = self._service, self._main
        assert service is not None
        self._put(SectionPart(self.out.image.ram_section_id, last=False))
        while service.left or main.is_full:
            self._hear()
            self._serve_urgent(service)
            if not main.offer():
                self._wait(writable=True)
                continue
            chunk = service.next_near() or service.next_background()
            if chunk is not None:
                main.put_pages(chunk.block, chunk.first, chunk.count)
            elif service.left:
                self._wait()
                service.look_again()
        self._end_ram_body(is_round=False)
        self._put(SectionPart(self.out.image.ram_section_id, last=True))
        self._end_ram_body(is_round=False)
        self._put_bitmaps_end()
        self._put(EndOfSections())
        main.drain()
        if self._urgent is not None and machine_types.has_early_preempt(self._machine):
            self._urgent.put(EndOfRam())
            self._urgent.drain()
        self._all_sent = True
        self.out.ledger.post(Fact.ALL_SENT)

    def _serve_urgent(self, service: PageService) -> None:
        """Everything that somebody waits for; stops only for a socket that is full."""
        outlet = self._urgent or self._main
        while outlet.offer():
            chunk = service.next_urgent()
            if chunk is None:
                return
            outlet.put_pages(chunk.block, chunk.first, chunk.count)
            outlet.offer()
            self._note_service(chunk)

    def _note_service(self, chunk: Chunk) -> None:
        if chunk.asked_s is not None:
            self.out.service_s.append(time.perf_counter() - chunk.asked_s)

    # --- recovery -----------------------------------------------------------------------------------------

    def _recover(self) -> None:
        image, ledger = self.out.image, self.out.ledger
        ledger.post(Fact.RECONNECTED, round_no=self._round)
        if self.out.options.preempt and machine_types.has_early_preempt(self._machine):
            self._open_preempt()
        for block in image:
            self._put(AskBitmap(block.name))
        self._bitmaps_due = len(image.blocks)
        self._main.drain()
        self._await(lambda: self._bitmaps_due == 0)
        if self.out.options.preempt and self._urgent is None:
            self._open_preempt()
        self._make_service()
        self._put(PostcopyResume())
        self._main.drain()
        self._await(lambda: self._resume_acked)
        ledger.post(Fact.RESUME_ACK, round_no=self._round)
        self._serve()

    # --- the return path ----------------------------------------------------------------------------------

    def _await(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._wait()
            self._hear()
            self._multifd.check()

    def _wait(self, *, writable: bool = False) -> None:
        assert self._wire is not None
        self._wire.wait(readable=True, writable=writable, waker=self.out.waker)

    def _hear(self) -> None:
        """Reads what the destination says, without waiting. Raises Gone or WireError."""
        assert self._wire is not None
        if self.out.stopping:
            raise Gone("this side stopped")
        while True:
            count = self._wire.read_into(self._slab)
            if count is None:
                return
            if count == 0:
                if self._has_result:
                    return  # its last word was said
                raise Gone("the destination closed the connection")
            self._decoder.feed(self._slab[:count])
            while True:
                event = self._decoder.next()
                if isinstance(event, Pause):
                    assert event is NEED_DATA
                    break
                self._on_message(event)

    def _on_message(self, event: ReturnPathEvent) -> None:
        match event:
            case RequestPages():
                self._on_request(event)
            case Pong(value):
                self._pongs += 1
                if value == PROOF_PING and not self._has_proof and self._service is not None:
                    self._has_proof = True
                    self.out.ledger.post(Fact.PACKAGE_LOADED, text="ping 0x42 was answered")
                    self.out.ledger.post(Fact.POSTCOPY_ANNOUNCED)
            case Shut(code):
                self._on_shut(code)
            case ReceivedBitmap(name, size):
                self._on_bitmap(name, size)
            case BitmapPiece(data):
                assert self._bitmap is not None
                self._bitmap += data
            case BitmapEnd():
                self._take_bitmap()
            case ResumeAck():
                self._resume_acked = True
            case SwitchoverAck():
                pass

    def _on_request(self, request: RequestPages) -> None:
        blocks = {name: block.wire for name, block in self.out.image.blocks.items()}
        wire = check_request(request, blocks, self._last_asked, page_size=PAGE_BYTES)
        self._last_asked = wire.name
        if self._service is None:
            return  # harmless in precopy
        block = self.out.image.blocks[wire.name]
        self.out.requests += 1
        first, count = request.start // PAGE_BYTES, request.length // PAGE_BYTES
        for page, pages in self._service.ask(block, first, count, at_s=time.perf_counter()):
            self.out.on_absent(block, page, pages)

    def _on_shut(self, code: int) -> None:
        if code:
            raise Gone(f"the destination says that it failed (SHUT {code})")
        if not self._all_sent:
            refuse("shut", "the destination claims to have everything", offset=0, section="return path")
        self._has_result = self._has_proof = True
        self.out.ledger.post(Fact.PEER_ACK)

    def _on_bitmap(self, name: str, size: int) -> None:
        block = self.out.image.blocks.get(name)
        if block is None or not self._bitmaps_due or size != bitmap_bytes(block.count):
            refuse("received-bitmap", f"{size} bytes for block {name!r}", offset=0, section="return path")
        self._bitmap, self._bitmap_of = bytearray(), block

    def _take_bitmap(self) -> None:
        block, bits = self._bitmap_of, self._bitmap
        assert block is not None
        assert bits is not None
        received = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: block.count]
        block.sent[:] = received.astype(np.bool_)
        self._bitmap = self._bitmap_of = None
        self._bitmaps_due -= 1
