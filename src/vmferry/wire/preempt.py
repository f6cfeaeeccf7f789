"""The preempt channel: requested pages, as RAM records without anything around them.

It has no header and no sections. Its end is the record EOS (machine types up to 7.2) or just its close.
"""

from __future__ import annotations

from collections.abc import Mapping

from vmferry.wire.buffer import Buffer, Bytes
from vmferry.wire.errors import WireError
from vmferry.wire.events import DONE, NEED_DATA, EndOfRam, Pause, RamBlock, RamEvent
from vmferry.wire.ram import RamReader


class PreemptDecoder:
    """Decodes one preempt channel, whose blocks the main channel has announced."""

    def __init__(self, blocks: Mapping[str, RamBlock], *, page_size: int = 4096, compress: bool = False) -> None:
        self._buffer = Buffer()
        self._reader = RamReader(page_size=page_size, blocks=dict(blocks), compress=compress)
        self._reader.is_preempt = True
        self._ended = False
        self._error: WireError | None = None

    def feed(self, data: Bytes) -> None:
        """Append bytes; pages may be views of them."""
        self._buffer.feed(data)

    @property
    def is_between(self) -> bool:
        """Whether the connection may end here without cutting a page in two."""
        return len(self._buffer) == 0

    @property
    def unread_bytes(self) -> int:
        """Bytes that were fed and belong to no event yet."""
        return len(self._buffer)

    def next(self) -> RamEvent | Pause:
        """The next run of pages, NEED_DATA, or DONE after EOS. Raises `WireError`, then the same one again."""
        if self._error is not None:
            raise self._error
        if self._ended:
            return DONE
        try:
            event = self._reader.next(self._buffer)
        except WireError as error:
            self._error = error
            raise
        if isinstance(event, EndOfRam):
            self._ended = True
        if event is NEED_DATA:
            self._buffer.release()
        return event
