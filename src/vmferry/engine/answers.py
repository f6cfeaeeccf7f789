"""The return path of an outgoing migration: what the destination says, checked, and what follows from it.

Theory of operation
-------------------
`hear` reads what is there, without waiting, and changes the fields of this object; the thread of the main channel,
which calls it, waits until they are as it needs them. Requests go to the `PageService` at once.

Rule 1: nothing here believes the destination more than it must: whatever a message names must exist, be asked for,
        and come in its time. Everything else is refused, which ends the connection.
Rule 2: after the final word nothing is read any more: whatever a broken peer says then changes nothing.
Rule 3: one call reads one slab at most: a peer that never stops talking does not keep the others waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.engine.image import PAGE_BYTES, ImageBlock
from vmferry.engine.outbound import Outbound
from vmferry.engine.page_plan import PageService, whole_units
from vmferry.engine.wires import Gone, Wire
from vmferry.wire.errors import refuse
from vmferry.wire.events import (
    NEED_DATA,
    BitmapEnd,
    BitmapPiece,
    Pause,
    Pong,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    ReturnPathEvent,
    Shut,
    SwitchoverAck,
)
from vmferry.wire.return_path import ReturnPathDecoder, bitmap_bytes, check_request

PROOF_PING = 0x42


class Answers:
    """See the module's text. `check` is called whenever something may be heard; it may raise Gone."""

    def __init__(self, out: Outbound, wire: Wire, *, is_recovery: bool, check: Callable[[], None]) -> None:
        self._out, self._wire, self._check = out, wire, check
        self._decoder = ReturnPathDecoder()
        self._slab = memoryview(bytearray(limits.ENGINE_RETURN_PATH_BYTES))
        self._known = {name: block.wire for name, block in out.image.blocks.items()}
        self._last_asked: str | None = None
        self._heard_s = 0.0
        self._bitmap: bytearray | None = None
        self._bitmap_of: ImageBlock | None = None
        # --- what the destination has said ---
        self.pongs = 0
        self.has_proof = is_recovery
        """It has the device state, and may run the guest."""
        self.has_result = False
        """It has everything."""
        self.has_resumed = False
        # --- what was said to it ---
        self.service: PageService | None = None
        """Takes requests from the switchover on."""
        self.is_package_put = False
        self.is_all_sent = False
        self.bitmaps_due: set[str] = set()
        """Blocks whose bitmap was asked for and has not come."""
        self.is_resume_put = False

    def hear(self, *, is_ready: bool = True) -> None:
        """Reads what the destination says (if `is_ready`), without waiting. Raises Gone or WireError."""
        if self._out.stopping:
            raise Gone("this side stopped")
        self._check()
        if self.has_result or not is_ready:
            return
        count = self._wire.read_into(self._slab)
        if count is None:
            return
        if count == 0:
            raise Gone("the destination closed the connection")
        self._heard_s = time.perf_counter()
        request = self._decoder.lone_request(self._slab[:count])
        if request is not None:
            self._on_request(request)
            return
        self._decoder.feed(self._slab[:count])
        while not self.has_result:
            event = self._decoder.next()
            if isinstance(event, RequestPages):
                self._on_request(event)
            elif isinstance(event, Pause):
                assert event is NEED_DATA
                return
            else:
                self._on_message(event)

    def _on_message(self, event: ReturnPathEvent) -> None:
        match event:
            case Pong(value):
                self.pongs += 1
                if value == PROOF_PING:
                    self._on_proof()
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
                if not self.is_resume_put:
                    refuse("resume-ack", "nobody asked whether it can go on", offset=0, section="return path")
                self.has_resumed = True
            case SwitchoverAck():
                pass
            case RequestPages():
                raise AssertionError

    def _on_request(self, request: RequestPages) -> None:
        wire = check_request(request, self._known, self._last_asked, page_size=PAGE_BYTES)
        self._last_asked = wire.name
        if self.service is None:
            return  # harmless before the switchover; in a recovery they all come again
        block = self._out.image.blocks[wire.name]
        self._out.requests += 1
        first, count = request.start // PAGE_BYTES, request.length // PAGE_BYTES
        if self._out.on_request is not None:
            self._out.on_request(block, first, count)
        for page, pages in self.service.ask(block, first, count, at_s=self._heard_s):
            self._out.on_absent(block, page, pages)

    # --- the commit -----------------------------------------------------------------------------------------

    def _on_proof(self) -> None:
        if self.has_proof:
            return  # also in a recovery, whose destination has long proved it
        if not self.is_package_put:
            refuse("pong", "an answer to a ping that was not sent", offset=0, section="return path")
        self.has_proof = True
        ledger = self._out.ledger
        ledger.post(Fact.PACKAGE_SENT)  # the sender's thread may still be about to say so
        ledger.post(Fact.PACKAGE_LOADED, text="ping 0x42 was answered")
        ledger.post(Fact.POSTCOPY_ANNOUNCED)

    def _on_shut(self, code: int) -> None:
        if code:
            raise Gone(f"the destination says that it failed (SHUT {code})")
        if not self.is_all_sent:
            refuse("shut", "the destination claims to have everything", offset=0, section="return path")
        if self.is_package_put:
            self._on_proof()  # it has more than what the proof is about
        self.has_result = self.has_proof = True
        self._out.ledger.post(Fact.PEER_ACK)

    # --- bitmaps --------------------------------------------------------------------------------------------

    def _on_bitmap(self, name: str, size: int) -> None:
        block = self._out.image.blocks.get(name)
        if block is None or name not in self.bitmaps_due or size != bitmap_bytes(block.count):
            refuse("received-bitmap", f"{size} bytes for block {name!r}", offset=0, section="return path")
        self._bitmap, self._bitmap_of = bytearray(), block

    def _take_bitmap(self) -> None:
        block, bits = self._bitmap_of, self._bitmap
        assert block is not None
        assert bits is not None
        received = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: block.count].astype(np.bool_)
        # A host page of which something is missing was not placed, and goes again as a whole.
        block.sent[:] = whole_units(received, block.host_page_pages, need_all=True)
        self._bitmap = self._bitmap_of = None
        self.bitmaps_due.discard(block.name)
