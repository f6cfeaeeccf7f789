"""The multifd channels of an outgoing migration: each written by a thread of its own.

Theory of operation
-------------------
The main channel's thread hands out windows of page numbers in turn and puts a SYNC on every channel at each barrier.
A channel sends packets of up to 128 pages: a head, and then the pages straight from the image where they lie side by
side. Zero pages do not come here: they go as records on the main channel, which every version takes.

Rule 1: a channel's queue keeps its order, so what was handed out before a SYNC leaves before it.
Rule 2: at most `QUEUED_MAX` windows wait per channel; then the main channel's thread waits, in its own way
        (`while_full`), because it must go on hearing its peer; `wake` tells it that there is room again.
Rule 3: a channel that breaks says so in `error` and wakes the main channel's thread; its queue is dead from then on.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import struct
import threading
from collections.abc import Callable
from typing import Final

import numpy as np

from vmferry.engine.image import PAGE_BYTES, ImageBlock
from vmferry.engine.outlet import pages_of
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

    def __init__(self, *, uuid: bytes, name: str, wake: Callable[[], None], while_full: Callable[[], None]) -> None:
        self._uuid, self._name, self._wake, self._while_full = uuid, name, wake, while_full
        self._numbers = itertools.count()
        self._channels: list[_Channel] = []
        self._next = 0

    def open(self, wire: Wire, *, handshake: Callable[[Wire], None]) -> None:
        """One more channel, with a thread; the first bytes of the main channel must have been written."""
        number = len(self._channels)
        self._channels.append(_Channel(wire, number, self._uuid, self._numbers, handshake, self._name, self._wake))

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
        """Pages, none of them known to be zero. Waits while all channels have enough to do. Raises Gone."""
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
        """Ends all threads and closes the connections. A thread that is in the middle of a write must be cut before."""
        for channel in self._channels:
            channel.stop()
        for channel in self._channels:
            channel.thread.join(timeout_s)
            if not channel.thread.is_alive():
                channel.wire.close()

    def check(self) -> None:
        """Raises Gone if a channel is broken."""
        for channel in self._channels:
            if channel.error:
                raise Gone(f"multifd: {channel.error}")

    def _put(self, number: int, what: _Work) -> None:
        while True:
            self.check()
            try:
                self._channels[number].queue.put_nowait(what)
            except queue.Full:
                self._while_full()
            else:
                return


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
        wake: Callable[[], None],
    ) -> None:
        self.wire, self.error, self.bytes = wire, "", 0
        self.queue: queue.Queue[_Work] = queue.Queue(QUEUED_MAX)
        self._wake, self._is_stopped = wake, False
        self._number, self._uuid, self._numbers, self._handshake = number, uuid, numbers, handshake
        self.thread = threading.Thread(target=self._run, name=f"{name}-multifd-{number}", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Nothing more is to be done, whatever waits in the queue."""
        self._is_stopped = True
        with contextlib.suppress(queue.Full):  # then there is something to wake up for
            self.queue.put_nowait(_End())

    def _run(self) -> None:
        try:
            self._work()
        except (Gone, OSError) as error:
            self._on_broken(str(error) or "gone")
        except BaseException:
            self._on_broken("a defect of this side")
            raise

    def _work(self) -> None:
        self._handshake(self.wire)
        self._write([view_of(part) for part in encode.encode(MultifdInit(self._number, self._uuid))])
        while not self._is_stopped:
            work = self.queue.get()
            if self.queue.qsize() >= QUEUED_MAX - 1:
                self._wake()
            if isinstance(work, _End):
                break
            self._carry_out(work)
        self.wire.end()

    def _on_broken(self, text: str) -> None:
        """Whoever puts something into the queue looks at `error` first; who has done so already finds room again."""
        self.error = text
        self._wake()

    def _carry_out(self, work: tuple[ImageBlock, Numbers] | _Sync) -> None:
        if isinstance(work, _Sync):
            self._write([memoryview(self._head(SYNC, b"", np.empty(0, np.intp)))])
            return
        block, numbers = work
        name = block.name.encode("utf-8", "surrogateescape")
        for at in range(0, len(numbers), _PLACES):
            some = numbers[at : at + _PLACES]
            pages = pages_of(block, some)
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
