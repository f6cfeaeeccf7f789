"""The main channel of an outgoing migration: one thread that writes the stream and hears the return path.

Theory of operation
-------------------
`run` goes through the stream once: what stands at its beginning, rounds of pages, then either the end of a precopy or
the switch to postcopy and the service of pages (`_serve`). Wherever it waits it also hears the return path
(`Answers`), so an answer is heard within the time of one buffer. A recovery enters at `_recover`.

The commit. Before it the image stays the guest's only home; after it the destination's guest is:
    precopy     the destination's word SHUT 0
    postcopy    its answer to ping 0x42, which stands behind the device state in the package (QEMU 7.2 answers it too)
A connection that breaks earlier is a failure, and the image is whole; one that breaks later waits for a recovery.

Rule 1: in postcopy this thread alone takes pages from the `PageService`, so a page leaves once.
Rule 2: a requested page never waits for room that the background took: the background writes one small chunk, and
        only when the connection says that there is room, which it says long before it is full
        (`ENGINE_SERVICE_SOCKET_BYTES`). A request always finds the rest.
Rule 3: whatever happens, `run` returns and says how in `end`; it says so in the ledger when everything is closed, so
        whoever hears it may go on at once.
Rule 4: every connection is either known to `cut` or never used.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Callable

import numpy as np

from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.engine import machine_types
from vmferry.engine.answers import PROOF_PING, Answers
from vmferry.engine.image import PAGE_BYTES, ImageBlock
from vmferry.engine.multifd_out import MultifdOut
from vmferry.engine.outbound import Outbound, OutgoingOptions
from vmferry.engine.outlet import RUN_PAGES, Outlet, pages_of
from vmferry.engine.page_plan import Chunk, Numbers, PageService, discards, pages_due, ranges_of, round_windows
from vmferry.engine.wires import POLL_OUT, Gone, Wire
from vmferry.errors import MigrationFailed, VmferryError
from vmferry.wire.encode import encode_package
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    AskBitmap,
    Configuration,
    Description,
    EndOfRam,
    EndOfSections,
    Event,
    Header,
    MemorySize,
    MultifdFlush,
    OpenReturnPath,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamBlock,
    SectionFooter,
    SectionPart,
    SectionStart,
    SwitchoverStart,
)
from vmferry.wire.iterable import DIRTY_BITMAP, KNOWN, RAM

__all__ = ["MainSender", "Outbound", "OutgoingOptions", "SentEnd"]

CHANNEL_PAGES = 1024
"""What one multifd channel gets at a time: 4 MiB, so that all of them have work until the end of a round."""


class SentEnd(enum.Enum):
    """How the main channel's thread ended."""

    COMPLETE = "complete"
    FAILED = "failed"  # before the commit: the image is the guest's home
    PAUSED = "paused"  # after the commit: another connection may follow


class MainSender:
    """One connection's main channel. `run` in a thread of its own; `cut` from any."""

    def __init__(self, out: Outbound, *, round_no: int) -> None:
        self.out, self._round = out, round_no
        self.end: SentEnd | None = None
        self.error: VmferryError | None = None
        self._machine = out.image.machine
        self._lock = threading.Lock()
        """Guards the two below."""
        self._wires: list[Wire] = []
        self._is_cut = False
        self._wire: Wire
        self._main: Outlet
        self._answers: Answers | None = None
        self._urgent: Outlet | None = None
        self._multifd = MultifdOut(
            uuid=self._uuid(), name="outgoing", wake=out.waker.wake, while_full=self._wait_and_hear
        )
        self._service: PageService | None = None
        self._unnoted: list[tuple[float, bool]] = []
        """When the requests were read whose pages are on their way into the socket."""
        self._bitmap_chunks = 0
        """How many chunks of dirty bitmaps have left."""

    @property
    def sent_bytes(self) -> int:
        """Written so far, on all connections."""
        if self._answers is None:
            return 0
        return self._main.bytes + self._multifd.bytes + (self._urgent.bytes if self._urgent is not None else 0)

    @property
    def threads(self) -> list[threading.Thread]:
        """Those of the multifd channels."""
        return self._multifd.threads

    def cut(self) -> None:
        """Breaks all connections, also those that are just being made; from any thread."""
        with self._lock:
            self._is_cut = True
            for wire in self._wires:
                wire.cut()

    # --- the thread ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Sends until the end. Raises nothing but for a defect of this side, after saying so."""
        text = "a defect of this side"
        try:
            self._go()
            self.end = SentEnd.COMPLETE
        except Gone as error:
            text = str(error) or "the connection broke"
        except WireError as error:
            self.error = error
            text = str(error)
        except MemoryError as error:
            self.error = VmferryError("there is no memory to send the guest image", side="source", cause=error)
            text = str(self.error)
        except OSError as error:
            self.error = VmferryError(f"the guest image cannot be read: {error}", side="source", cause=error)
            text = str(error)
        finally:
            self._close()
            if self.end is None:
                self._on_lost(text)

    def _go(self) -> None:
        self._wire = wire = self.out.dial()
        answers = Answers(self.out, wire, is_recovery=bool(self._round), check=self._check)
        self._main = Outlet(wire, waker=self.out.waker, while_waiting=answers.hear)
        self._answers = answers
        try:
            if self._round:
                self._ask_bitmaps()
        finally:
            self._adopt(wire)
        self._wire.handshake(timeout_s=self.out.options.handshake_s, waker=self.out.waker)
        if self._round:
            self._recover()
        else:
            self._begin()
            self._send_all()
        self._await_result()

    def _close(self) -> None:
        if self.end is not SentEnd.COMPLETE:
            self.cut()
        self._multifd.finish(timeout_s=limits.ENGINE_STOP_S)
        if not any(thread.is_alive() for thread in self._multifd.threads):
            for wire in self._wires:
                wire.close()

    def _adopt(self, wire: Wire) -> Wire:
        """Makes a new connection known to `cut`. Raises Gone if that was called already."""
        with self._lock:
            self._wires.append(wire)
            if not (self._is_cut or self.out.stopping):
                return wire
        raise Gone("this side cut the connection")

    def _dial(self) -> Wire:
        wire = self._adopt(self.out.dial())
        wire.handshake(timeout_s=self.out.options.handshake_s, waker=self.out.waker)
        return wire

    def _on_lost(self, text: str) -> None:
        if self.out.stopping:
            text = "this side stopped"
        if self._round or (self._answers is not None and self._answers.has_proof):
            self.end = SentEnd.PAUSED
            self.out.ledger.post(Fact.LINK_LOST, round_no=self._round + 1, text=text)
        else:
            self.error = self.error or MigrationFailed(f"the destination is gone before it had everything: {text}")
            self.end = SentEnd.FAILED
            self.out.ledger.post(Fact.ERROR, text=text)

    # --- waiting ------------------------------------------------------------------------------------------

    @property
    def _answer(self) -> Answers:
        assert self._answers is not None
        return self._answers

    def _check(self) -> None:
        """A multifd channel that breaks ends a precopy; in postcopy they have nothing to say any more."""
        if self._service is None:
            self._multifd.check()

    def _await(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._wait_and_hear()

    def _await_result(self) -> None:
        """The destination's final word. What one of several connections lost may keep it waiting for ever."""
        until_s = time.monotonic() + self.out.options.result_s
        while not self._answer.has_result:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise Gone(f"it has not said in {self.out.options.result_s:.0f} s that it has everything")
            self._wire.wait(readable=True, timeout_s=left_s, waker=self.out.waker)
            self._answer.hear()

    def _wait_and_hear(self) -> None:
        self._wait()
        self._answer.hear()

    def _wait(self, *, for_room: bool = False) -> int:
        """Until the destination says something, there is room for what waits (or any, `for_room`), or the waker was
        called. What the main connection is ready for, as `Wire.wait` says it."""
        waker, urgent = self.out.waker, self._urgent
        writable = for_room or self._main.is_full
        if urgent is not None and urgent.is_full:
            return self._wire.wait_with(urgent.wire, writable=writable, waker=waker)
        return self._wire.wait(readable=True, writable=writable, waker=waker)

    def _drain(self, outlet: Outlet) -> None:
        """Writes all that waits, of the preempt channel too. Raises Gone."""
        while not outlet.offer():
            self._wait_and_hear()

    # --- the beginning ------------------------------------------------------------------------------------

    def _uuid(self) -> bytes:
        configuration = self.out.image.configuration
        return bytes(16) if configuration is None or configuration.uuid is None else configuration.uuid

    def _put(self, *events: Event) -> None:
        self._main.put(*events)

    def _put_footer(self, section_id: int) -> None:
        if self.out.image.has_footers:
            self._put(SectionFooter(section_id))

    def _begin(self) -> None:
        image, options = self.out.image, self.out.options
        assert image.blocks, "the block list comes first"
        if options.postcopy != "at-once":
            self._wire.allow_unsent(limits.ENGINE_STREAM_SOCKET_BYTES)
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
        for _ in range(options.channels):
            wire = self._adopt(self.out.dial())
            wire.allow_unsent(limits.ENGINE_STREAM_SOCKET_BYTES)
            self._multifd.open(wire, handshake=self._shake)
        if options.preempt and machine_types.has_early_preempt(self._machine):
            self._open_preempt()
        for device in image.early:
            self._put(device)
            self._put_footer(device.section_id)
        self._put(SectionStart(image.ram_section_id, RAM, 0, KNOWN[RAM]), MemorySize(image.total_bytes))
        for block in image:
            # What else the block's own source told of it (x-ignore-shared, mapped-ram) does not hold here either.
            page_size = block.wire.page_size if options.postcopy != "never" else None
            self._put(RamBlock(block.name, block.wire.used_length, page_size))
        self._end_ram_body(is_barrier=True)
        self._put_bitmaps_start()
        self._main.drain()
        self.out.ledger.post(Fact.SETUP_DONE)

    def _shake(self, wire: Wire) -> None:
        wire.handshake(timeout_s=self.out.options.handshake_s)

    def _open_preempt(self) -> None:
        self._urgent = Outlet(self._dial(), waker=self.out.waker)

    def _end_ram_body(self, *, is_barrier: bool) -> None:
        """The end of a section of RAM; before postcopy it is a barrier of multifd, in the machine type's form."""
        if self._multifd.is_open and is_barrier:
            self._multifd.sync()
            if not machine_types.has_flush_per_section(self._machine):
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
                self._main.drain()
                self._send_round(is_last=False)
                self._end_ram_body(is_barrier=True)
                self._main.drain()
            else:
                self._wait()
            self._answer.hear()
        if options.postcopy == "at-once" or self.out.postcopy_ordered:
            self._await(lambda: image.is_device_state_whole)
            self._switch_to_postcopy()
        else:
            self._finish_precopy()

    def _send_round(self, *, is_last: bool) -> None:
        """A round; the last one is not ended by an order to switch to postcopy, which came too late then."""
        for block in self.out.image:
            for numbers in round_windows(block):
                if self.out.postcopy_ordered and not is_last:
                    block.dirty[numbers] = True  # not sent, whatever was just marked: the discards will say so
                    return
                self._send_window(block, numbers)

    def _send_window(self, block: ImageBlock, numbers: Numbers) -> None:
        if not block.store.knows_zeros:  # nobody knows which of its pages are zero before they are read
            self._send_foreign(block, numbers)
            return
        filled = block.touched[numbers]
        if not filled.all():
            self._main.put_zeros(block, numbers[~filled])
            self._main.drain()
            numbers = numbers[filled]
        size = CHANNEL_PAGES if self._multifd.is_open else RUN_PAGES
        for at in range(0, len(numbers), size):
            some = numbers[at : at + size]
            if self._multifd.is_open:
                self._multifd.put(block, some)
            else:
                self._main.put_run(block, some, pages_of(block, some))
                self._main.drain()

    def _send_foreign(self, block: ImageBlock, numbers: Numbers) -> None:
        marks = np.zeros(int(numbers[-1]) + 1, np.bool_)
        marks[numbers] = True
        for first, count in ranges_of(marks):
            for at in range(first, first + count, RUN_PAGES):
                self._main.put_pages(block, at, min(RUN_PAGES, first + count - at))
                self._main.drain()

    def _finish_precopy(self) -> None:
        image = self.out.image
        self.out.ledger.post(Fact.SWITCHOVER)
        self._put_bitmaps_start()
        if machine_types.has_switchover_start(self._machine):
            self._put(SwitchoverStart())
        self._put(SectionPart(image.ram_section_id, last=True))
        self._main.drain()
        self._send_round(is_last=True)
        self._end_ram_body(is_barrier=True)
        self._put_bitmaps_end()
        for device in image.devices:
            self._put(device)
            self._put_footer(device.section_id)
        self._put(EndOfSections(), Description(image.description or b"{}"))
        self._main.drain()
        self._multifd.end()
        self._answer.is_all_sent = True
        self.out.ledger.post(Fact.ALL_SENT)

    def _put_bitmaps_start(self) -> None:
        """As soon as its chunks are here; their source may still be about to send them."""
        kept = self.out.image.bitmaps
        if kept is not None and kept.chunks_at_start and not self._bitmap_chunks:
            self._bitmap_chunks = kept.chunks_at_start
            self._put(SectionStart(kept.section_id, DIRTY_BITMAP, 0, KNOWN[DIRTY_BITMAP]))
            self._put(*kept.chunks[: self._bitmap_chunks])
            self._put_footer(kept.section_id)

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
            self._end_ram_body(is_barrier=True)
        ledger.post(Fact.SWITCHOVER)
        if self.out.options.preempt and self._urgent is None:
            self._main.drain()
            self._await(lambda: self._answer.pongs > 0)
            self._open_preempt()
        self._put_bitmaps_start()
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
        self._answer.is_package_put = True
        self._put(Ping(4))
        self._main.drain()
        ledger.post(Fact.PACKAGE_SENT)
        self._serve()

    def _make_service(self) -> None:
        options = self.out.options
        self._service = self._answer.service = PageService(
            list(self.out.image),
            near_pages=options.near_pages,
            chunk_pages=options.chunk_pages,
            arrivals=self.out.image.arrivals,
        )
        for outlet in (self._main, self._urgent):
            if outlet is not None:
                outlet.wire.limit_unsent(limits.ENGINE_SERVICE_SOCKET_BYTES)

    def _serve(self) -> None:
        """Pages until none is left, then the end of the stream."""
        service, main, urgent = self._service, self._main, self._urgent
        assert service is not None
        self._put(SectionPart(self.out.image.ram_section_id, last=False))
        has_more = True  # as far as is known, there are pages that nobody has to bring first
        while service.left or main.is_full or (urgent is not None and urgent.is_full):
            ready = self._wait(for_room=has_more)
            self._answer.hear(is_ready=bool(ready & ~POLL_OUT))
            if self.out.pages_came:
                self.out.pages_came = False  # before looking: what comes from here on says so again
                service.look_again()
            self._serve_urgent(service)
            if not ready & POLL_OUT:
                has_more = True
            elif main.offer():
                chunk = service.next_near() or service.next_background()
                has_more = chunk is not None
                if chunk is not None:
                    self._put_chunk(main, chunk)
                    main.offer()
        self._end_ram_body(is_barrier=False)
        self._put(SectionPart(self.out.image.ram_section_id, last=True))
        self._end_ram_body(is_barrier=False)
        self._put_bitmaps_end()
        self._put(EndOfSections())
        self._drain(main)
        self._answer.is_all_sent = True
        if urgent is not None and machine_types.has_early_preempt(self._machine):
            urgent.put(EndOfRam())
            # QEMU 7.2 waits for this mark; a newer one with the same machine type does not, and may have closed the
            # channel already. If the connection is lost indeed, the main channel says so.
            with contextlib.suppress(Gone):
                self._drain(urgent)
        self.out.ledger.post(Fact.ALL_SENT)

    def _serve_urgent(self, service: PageService) -> None:
        """Everything that somebody waits for; stops only for a socket that is full."""
        outlet = self._urgent or self._main
        while not outlet.is_full or outlet.offer():
            if self._unnoted:
                now_s = time.perf_counter()
                self.out.service_s.extend([now_s - asked_s for asked_s, _ in self._unnoted])
                self.out.service_here_s.extend(
                    [now_s - asked_s for asked_s, was_absent in self._unnoted if not was_absent]
                )
                self._unnoted.clear()
            chunk = service.next_urgent()
            if chunk is None:
                return
            if chunk.asked_s is not None:
                self._unnoted.append((chunk.asked_s, chunk.was_absent))
            self._put_chunk(outlet, chunk)

    def _put_chunk(self, outlet: Outlet, chunk: Chunk) -> None:
        """A host page may be of a GiB: it goes in pieces, with nothing in between."""
        if chunk.pages <= RUN_PAGES:
            outlet.put_pages(chunk.block, chunk.first, chunk.pages)
            return
        stop = chunk.first + chunk.pages
        for at in range(chunk.first, stop, RUN_PAGES):
            if at > chunk.first:
                self._drain(outlet)
            outlet.put_pages(chunk.block, at, min(RUN_PAGES, stop - at))

    # --- recovery -----------------------------------------------------------------------------------------

    def _ask_bitmaps(self) -> None:
        """The first words of a recovery, before anything may end its connection.

        A connection that ends without a word costs a waiting destination its guest: QEMU 7.2 exits, 11.1 goes from
        postcopy-paused to failed.
        """
        self._answer.bitmaps_due = set(self.out.image.blocks)
        self._put(*(AskBitmap(name) for name in self.out.image.blocks))
        if not self._wire.is_tls:
            self._main.offer()

    def _recover(self) -> None:
        ledger = self.out.ledger
        ledger.post(Fact.RECONNECTED, round_no=self._round)
        self._main.drain()
        if self.out.options.preempt and machine_types.has_early_preempt(self._machine):
            self._open_preempt()
        self._await(lambda: not self._answer.bitmaps_due)
        if self.out.options.preempt and self._urgent is None:
            self._open_preempt()
        self._make_service()
        self._answer.is_resume_put = True
        self._put(PostcopyResume())
        self._main.drain()
        self._await(lambda: self._answer.has_resumed)
        ledger.post(Fact.RESUME_ACK, round_no=self._round)
        self._serve()
