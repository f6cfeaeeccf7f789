"""A cursor over the slabs that a caller feeds.

Theory of operation
-------------------
The caller reads its socket into a slab and feeds it. What lies whole inside the slab is handed out as a view of
it. Only what begins in one slab and ends in another is copied, into `_carry`, and no more of it than the
element needs. A caller who leaves room in front of what it reads (`feed_behind`) gets the beginning put there: then
nothing is cut in two, and what began in one slab is read with the rest of the next as if it had come with it.

Rule 1: views that `take` and `window` give alias the caller's slab. After `release` (which the decoders call
        before they say NEED_DATA) the buffer holds no view of the slab any more; the caller may use it again
        as soon as it is done with the events.
Rule 2: `_carry` is empty, or it holds the bytes directly before the rest of the slab.
Rule 3: nothing here reads a length from the bytes.
"""

from __future__ import annotations

from typing import Final

Bytes = bytes | bytearray | memoryview

_NOTHING: Final = memoryview(b"")


class Buffer:
    """Bytes that have come and are not consumed yet; `offset` is the stream position of the first of them."""

    __slots__ = ("_carry", "_position", "_slab", "offset")

    def __init__(self, offset: int = 0) -> None:
        self._carry = bytearray()
        self._slab = _NOTHING
        self._position = 0
        self.offset = offset

    def __len__(self) -> int:
        return len(self._carry) + len(self._slab) - self._position

    def feed(self, data: Bytes) -> None:
        """Append a slab. What is left of the one before is copied, so feed again only after NEED_DATA."""
        self.release()
        self._slab = memoryview(data).cast("B")

    def feed_behind(self, slab: memoryview, start: int, stop: int) -> None:
        """Append slab[start:stop], of single bytes; the beginning of it is free, and takes what is left, if it can."""
        self.release()
        left = len(self._carry)
        if left <= start:
            start -= left
            slab[start : start + left] = self._carry
            self._carry.clear()
            self._slab, self._position = slab[:stop], start
        else:
            self._slab = slab[start:stop]

    def release(self) -> None:
        """Keep a copy of what is left, and no view of the slab."""
        if self._position < len(self._slab):
            self._carry += self._slab[self._position :]
        self._slab = _NOTHING
        self._position = 0

    def peek(self, count: int) -> bytes | None:
        """A copy of the next `count` bytes, or None while there are fewer. For short things."""
        if len(self) < count:
            return None
        if not self._carry:
            return bytes(self._slab[self._position : self._position + count])
        self._fill_carry(count)
        return bytes(self._carry[:count])

    def take(self, count: int) -> memoryview | None:
        """Consume the next `count` bytes, contiguous, or None while there are fewer."""
        if len(self) < count:
            return None
        self.offset += count
        if not self._carry:
            start = self._position
            self._position = start + count
            return self._slab[start : start + count]
        self._fill_carry(count)
        if len(self._carry) == count:
            taken, self._carry = self._carry, bytearray()
            return memoryview(taken)
        copied = bytes(self._carry[:count])
        del self._carry[:count]
        return memoryview(copied)

    def take_some(self, count_max: int) -> memoryview:
        """Consume at most `count_max` bytes, as many as lie together; empty if there are none."""
        together = len(self._carry) or len(self._slab) - self._position
        taken = self.take(min(together, count_max))
        assert taken is not None
        return taken

    def window(self) -> memoryview:
        """What lies together in the slab from here on; empty while a copied beginning comes first."""
        return _NOTHING if self._carry else self._slab[self._position :]

    def skip(self, count: int) -> None:
        """Consume bytes of the window, which were looked at there."""
        assert not self._carry
        assert 0 <= count <= len(self._slab) - self._position
        self._position += count
        self.offset += count

    def unread(self, data: Bytes) -> None:
        """Put bytes back that were taken last."""
        self.release()
        self._carry[:0] = data
        self.offset -= len(data)

    def _fill_carry(self, count: int) -> None:
        missing = count - len(self._carry)
        if missing > 0:
            self._carry += self._slab[self._position : self._position + missing]
            self._position += missing
