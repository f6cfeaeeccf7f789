"""The far end of an outgoing endpoint in the test's own thread: it reads, and says, what the test tells it to.

Theory of operation
-------------------
`dial` makes a pair of connected sockets and keeps one end. `begin` takes the main channel, `read_until` decodes it up
to an event of some kind and keeps the memory that it describes. So a test is a conversation, line by line; nothing
happens meanwhile that the test did not ask for.

Rule 1: whatever the real QEMU dies of is an AssertionError here: a page that is sent twice after its discard, or in
        postcopy without one.
Rule 2: every wait ends: at the latest after `WAIT_S` there is a TimeoutError.
"""

from __future__ import annotations

import json
import queue
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from vmferry.engine.image import PAGE_BYTES, Image
from vmferry.wire import encode
from vmferry.wire.events import (
    DONE,
    NEED_DATA,
    BitmapEnd,
    BitmapPiece,
    Configuration,
    DeviceSection,
    Discard,
    EndOfRam,
    Event,
    PageRun,
    Pause,
    PostcopyListen,
    RamBlock,
    ReceivedBitmap,
    ZeroRun,
)
from vmferry.wire.mapped_ram import make_bitmap
from vmferry.wire.preempt import PreemptDecoder
from vmferry.wire.stream import StreamDecoder

WAIT_S: Final = 20.0
PROOF_PING: Final = 0x42


def make_image(
    blocks: Mapping[str, int | tuple[int, int]],
    *,
    machine: str = "pc-i440fx-11.1",
    uuid: bytes | None = None,
    whole: bool = True,
) -> Image:
    """An image of blocks: name -> pages, or (pages, pages of a host page). A third of the pages is zero."""
    image = Image()
    image.configuration = Configuration(machine, None, None, uuid, ("configuration/uuid",) if uuid else ())
    random = np.random.default_rng(len(blocks))
    for name, size in blocks.items():
        pages, unit = size if isinstance(size, tuple) else (size, 1)
        block = image.add_block(RamBlock(name, pages * PAGE_BYTES, None if unit == 1 else unit * PAGE_BYTES))
        if whole:
            filled = np.flatnonzero(np.arange(pages) % 3 != 1)
            content = random.integers(0, 256, (len(filled), PAGE_BYTES), np.uint8)
            block.write(filled.astype(np.uint64) * np.uint64(PAGE_BYTES), content)
            block.assume_zeros()
            block.dirty[:] = False
    image.devices = [DeviceSection(9, "timer", 0, 2, b"t" * 24), DeviceSection(10, "cpu", 0, 12, b"c" * 900)]
    fields = [{"name": "state", "type": "buffer", "size": len(each.body)} for each in image.devices]
    devices = [
        {"name": each.idstr, "instance_id": 0, "vmsd_name": each.idstr, "version": each.version, "fields": [known]}
        for each, known in zip(image.devices, fields, strict=True)
    ]
    image.description = json.dumps({"page_size": PAGE_BYTES, "devices": devices}).encode()
    image.is_device_state_whole = whole
    return image


class ScriptedDestination:
    """See the module's text. A context manager; leaving it closes every connection."""

    def __init__(self) -> None:
        self.sock: socket.socket
        self.events: list[Any] = []
        self.memory: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self.have: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = {}
        self.discarded: list[Discard] = []
        self._dialled: queue.Queue[socket.socket] = queue.Queue()
        self._all: list[socket.socket] = []
        self._decoder = StreamDecoder()
        self._preempt: PreemptDecoder | None = None
        self._is_postcopy = False

    def __enter__(self) -> ScriptedDestination:
        return self

    def __exit__(self, *_: object) -> None:
        while not self._dialled.empty():
            self._dialled.get().close()
        for sock in self._all:
            sock.close()

    # --- connections --------------------------------------------------------------------------------------

    def dial(self) -> socket.socket:
        """For the endpoint."""
        mine, theirs = socket.socketpair()
        theirs.settimeout(WAIT_S)
        self._dialled.put(theirs)
        return mine

    def accept(self) -> socket.socket:
        """The next connection that the endpoint made."""
        sock = self._dialled.get(timeout=WAIT_S)
        self._all.append(sock)
        return sock

    @property
    def has_connection(self) -> bool:
        """Whether there is another one to accept."""
        return not self._dialled.empty()

    def begin(self, *, is_recovery: bool = False) -> None:
        """Takes the main channel."""
        self.sock = self.accept()
        self._decoder = StreamDecoder(resume=self._decoder.resume() if is_recovery else None)

    def close(self) -> None:
        """Breaks the main channel."""
        self.sock.close()

    def say(self, *events: Event) -> None:
        """On the return path."""
        self.sock.sendall(b"".join(bytes(part) for event in events for part in encode.encode(event)))

    def say_bitmap(self, name: str) -> None:
        """What it has of a block."""
        bits = make_bitmap(self.have[name])
        self.say(ReceivedBitmap(name, len(bits)), BitmapPiece(memoryview(bits)), BitmapEnd())

    # --- reading ------------------------------------------------------------------------------------------

    def read_until(self, *wanted: type[Event] | Event) -> Any:
        """Everything up to an event of one of these kinds, or equal to one. Raises EOFError, TimeoutError."""
        while True:
            event = self._decoder.next()
            if event is DONE:
                raise EOFError("the stream is over")
            if event is NEED_DATA:
                data = self.sock.recv(1 << 20)
                if not data:
                    raise EOFError("the source has closed")
                self._decoder.feed(data)
                continue
            assert not isinstance(event, Pause)
            self.take(event)
            if any(event == each or (isinstance(each, type) and isinstance(event, each)) for each in wanted):
                return event

    def read_while(self, is_so: Callable[[], bool], *, bytes_at_once: int = 1 << 20) -> None:
        """As long as this holds, and no byte further than needed. Raises EOFError, TimeoutError."""
        while is_so():
            event = self._decoder.next()
            if event is not NEED_DATA and event is not DONE:
                assert not isinstance(event, Pause)
                self.take(event)
                continue
            data = b"" if event is DONE else self.sock.recv(bytes_at_once)
            if not data:
                raise EOFError("the source has ended")
            self._decoder.feed(data)

    def read_preempt(self, sock: socket.socket, pages: int) -> bool:
        """So many pages from the preempt channel, or all up to its end; whether that was there."""
        if self._preempt is None:
            blocks = {name: RamBlock(name, memory.size) for name, memory in self.memory.items()}
            self._preempt = PreemptDecoder(blocks)
        while pages > 0:
            event = self._preempt.next()
            if event is DONE:
                return True
            if event is NEED_DATA:
                data = sock.recv(1 << 20)
                if not data:
                    return False
                self._preempt.feed(data)
            else:
                assert isinstance(event, PageRun | ZeroRun | EndOfRam)
                self.take(event)
                pages -= 0 if isinstance(event, EndOfRam) else len(event.offsets)
        return False

    def take(self, event: Event) -> None:
        """Carries an event out."""
        match event:
            case PageRun(block, offsets, pages):
                self._place(block, offsets)
                self.memory[block.name][offsets // PAGE_BYTES] = pages
                self.have[block.name][offsets // PAGE_BYTES] = True
                return
            case ZeroRun(block, offsets):
                self._place(block, offsets)
                self.memory[block.name][offsets // PAGE_BYTES] = 0
                self.have[block.name][offsets // PAGE_BYTES] = True
                return
            case RamBlock(name, used_length):
                self.memory[name] = np.zeros((used_length // PAGE_BYTES, PAGE_BYTES), np.uint8)
                self.have[name] = np.zeros(used_length // PAGE_BYTES, np.bool_)
            case Discard(name, ranges):
                assert len(ranges) <= 12
                for start, length in ranges:
                    self.have[name][start // PAGE_BYTES : (start + length) // PAGE_BYTES] = False
                self.discarded.append(event)
            case PostcopyListen():
                self._is_postcopy = True
        self.events.append(event)

    def _place(self, block: RamBlock, offsets: Any) -> None:
        present = self.have[block.name][offsets // PAGE_BYTES]
        assert not (self._is_postcopy and present.any()), f"pages of {block.name} came twice"

    def differing_pages(self, image: Image) -> int:
        """How many pages are not what the image has, or did not come."""
        return sum(
            int(np.count_nonzero((block.store.read(0, block.count) != self.memory[block.name]).any(axis=1)))
            + int(np.count_nonzero(~self.have[block.name]))
            for block in image
        )
