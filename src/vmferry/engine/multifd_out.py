"""The multifd channels of an outgoing migration: each written by a thread of its own.

Theory of operation
-------------------
The main channel's thread hands out windows of page numbers in turn and puts a SYNC on every channel at each barrier.
A channel sends packets of up to 128 pages: a head, and then the pages straight from the image where they lie side by
side. Zero pages do not come here: they go as records on the main channel, which every version takes.

Rule 1: a channel's queue keeps its order, so what was handed out before a SYNC leaves before it.
Rule 2: at most `QUEUED_MAX` windows wait per channel; then the main channel waits.
Rule 3: a channel that breaks says so in `error`, and takes everything from its queue so that nobody waits for it.
"""

from __future__ import annotations

import itertools
import queue
import struct
import threading
from collections.abc import Callable
from typing import Final

import numpy as np

from vmferry.engine.image import PAGE_BYTES, ImageBlock
from vmferry.engine.page_plan import Numbers
from vmferry.engine.wires import Gone, Wire, view_of
from vmferry.wire import encode
from vmferry.wire.events import MultifdInit
from vmferry.wire.multifd import MAGIC, SYNC, VERSION, places

QUEUED_MAX: Final = 4
_PLACES: Final = places(PAGE_BYTES)
_HEAD = struct.Struct(">IIIIIIQI28s256s")


class _Sync:
    """On a channel's queue: a barrier."""


class _End:
    """On a channel's queue: nothing follows."""


class MultifdOut:
    """All channels of one migration."""

    def __init__(self, *, uuid: bytes, name: str) -> None:
        self._uuid, self._name = uuid, name
        self._numbers = itertools.count()
        self._channels: list[_Channel] = []
        self._next = 0

    def open(self, wires: list[Wire], *, handshake: Callable[[Wire], None]) -> None:
        """Starts a thread per connection; the first bytes of the main channel must have been written."""
        for number, wire in enumerate(wires):
            self._channels.append(_Channel(wire, number, self._uuid, self._numbers, handshake, self._name))

    @property
    def is_open(self) -> bool:
        """There are channels."""
        return bool(self._channels)

    @property
    def bytes(self) -> int:
        """Written by all channels."""
        return sum(channel.bytes for channel in self._channels)

    @property
    def threads(self) -> list[threading.Thread]:
        """All of them, also those that have ended."""
        return [channel.thread for channel in self._channels]

    def put(self, block: ImageBlock, numbers: Numbers) -> None:
        """Pages, none of them known to be zero. Waits while the channel has enough to do. Raises Gone."""
        self._put(self._next, (block, numbers))
        self._next = (self._next + 1) % len(self._channels)

    def sync(self) -> None:
        """A barrier on every channel. Raises Gone."""
        for number in range(len(self._channels)):
            self._put(number, _Sync())

    def end(self) -> None:
        """Says goodbye on all channels. The connections stay open until `close`."""
        for number in range(len(self._channels)):
            self._put(number, _End())

    def finish(self, *, timeout_s: float) -> None:
        """Ends all threads, whatever they do (cut them first to be quick), and closes the connections."""
        for channel in self._channels:
            channel.queue.put(_End())
        for channel in self._channels:
            channel.thread.join(timeout_s)
            channel.wire.close()

    def cut(self) -> None:
        """Breaks all channels."""
        for channel in self._channels:
            channel.wire.cut()

    def check(self) -> None:
        """Raises Gone if a channel is broken."""
        for channel in self._channels:
            if channel.error:
                raise Gone(f"multifd: {channel.error}")

    def _put(self, number: int, what: _Work) -> None:
        self.check()
        self._channels[number].queue.put(what)


_Work = tuple[ImageBlock, Numbers] | _Sync | _End


class _Channel:
    def __init__(
        self,
        wire: Wire,
        number: int,
        uuid: bytes,
        numbers: itertools.count[int],
        handshake: Callable[[Wire], None],
        name: str,
    ) -> None:
        self.wire, self.error, self.bytes = wire, "", 0
        self.queue: queue.Queue[_Work] = queue.Queue(QUEUED_MAX)
        self._number, self._uuid, self._numbers, self._handshake = number, uuid, numbers, handshake
        self.thread = threading.Thread(target=self._run, name=f"{name}-multifd-{number}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._handshake(self.wire)
            self._write([view_of(part) for part in encode.encode(MultifdInit(self._number, self._uuid))])
        except Gone as error:
            self.error = str(error) or "gone"
        while True:
            work = self.queue.get()
            if isinstance(work, _End):
                break
            if self.error:
                continue
            try:
                self._carry_out(work)
            except (Gone, OSError) as error:
                self.error = str(error) or "gone"
        if not self.error:
            self.wire.end()

    def _carry_out(self, work: tuple[ImageBlock, Numbers] | _Sync) -> None:
        if isinstance(work, _Sync):
            self._write([memoryview(self._head(SYNC, b"", np.empty(0, np.intp)))])
            return
        block, numbers = work
        name = block.name.encode("utf-8", "surrogateescape")
        for at in range(0, len(numbers), _PLACES):
            some = numbers[at : at + _PLACES]
            first = int(some[0])
            if int(some[-1]) - first == len(some) - 1:
                pages = block.store.read(first, len(some))
            else:
                pages = np.concatenate([block.store.read(int(number), 1) for number in some])
            self._write([memoryview(self._head(0, name, some)), np.ascontiguousarray(pages).reshape(-1).data])

    def _head(self, flags: int, name: bytes, numbers: Numbers) -> bytes:
        offsets = np.zeros(_PLACES, ">u8")
        offsets[: len(numbers)] = numbers * PAGE_BYTES
        payload = len(numbers) * PAGE_BYTES
        head = _HEAD.pack(
            MAGIC, VERSION, flags, _PLACES, len(numbers), payload, next(self._numbers), 0, bytes(28), name
        )
        return head + offsets.tobytes()

    def _write(self, buffers: list[memoryview]) -> None:
        while buffers:
            count = self.wire.write_some(buffers)
            if count == 0:
                self.wire.wait(writable=True)
                continue
            self.bytes += count
            while count:
                if count < len(buffers[0]):
                    buffers[0] = buffers[0][count:]
                    break
                count -= len(buffers[0])
                buffers.pop(0)
