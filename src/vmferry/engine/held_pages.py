"""Pages that only pass through: read from a snapshot, held until the sender takes them, gone then.

Rule 1: a page is put once and read once. Whoever puts one has the claim to it (`lazy`), and a sender takes each page
        that it sends exactly once (`page_plan`, rule 1).
Rule 2: what is held is counted, so that whoever reads ahead can wait for room; a page that a guest waits for is put
        without waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from vmferry.engine.image import PAGE_BYTES, Pages


class Room:
    """How many pages are held, of several stores together. One thread takes, any thread puts."""

    def __init__(self, pages_max: int) -> None:
        self.pages_max = pages_max
        self._changed = threading.Condition()
        self._came = 0
        """Written under the condition."""
        self._left = 0
        """Written by the thread that takes."""
        self._is_awaited = False

    @property
    def held(self) -> int:
        """Pages that came and have not left."""
        return self._came - self._left

    @property
    def is_full(self) -> bool:
        """Nobody should read ahead now."""
        return self.held >= self.pages_max

    def came(self, pages: int) -> None:
        """They are held from now on."""
        with self._changed:
            self._came += pages

    def left(self, pages: int) -> None:
        """They are not held any more."""
        self._left += pages
        if self._is_awaited and self.held <= self.pages_max // 2:
            self.wake()

    def wake(self) -> None:
        """Whoever waits looks again."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Until there is room, somebody called `wake`, or the time is over."""
        with self._changed:
            self._is_awaited = True
            if self.is_full:
                self._changed.wait(timeout_s)
            self._is_awaited = False


class HeldPages:
    """The content of one block, as far as it is here and has not left. A `PageStore` whose zeros are known."""

    knows_zeros = True

    def __init__(self, room: Room) -> None:
        self._room = room
        self._rows: dict[int, Pages] = {}

    def put(self, numbers: Iterable[int], pages: Iterable[Pages], count: int) -> None:
        """Pages with these numbers, one each, `count` of them; what they are views of is held with them."""
        self._rows.update(zip(numbers, pages, strict=True))
        self._room.came(count)

    def read(self, first: int, count: int) -> Pages:
        """Takes the pages. Raises OSError for one that is not here: it was taken before, or never came."""
        if count == 1:
            page = self._rows.pop(first, None)
            if page is None:
                raise OSError(f"page {first} is not here")
            self._room.left(1)
            return page.reshape(1, PAGE_BYTES)
        return self._take(range(first, first + count), count)

    def read_some(self, numbers: npt.NDArray[np.intp]) -> Pages:
        """Takes these pages. Raises OSError."""
        return self._take(numbers.tolist(), len(numbers))

    def _take(self, numbers: Iterable[int], count: int) -> Pages:
        pop = self._rows.pop
        try:
            found = np.array([pop(number) for number in numbers])
        except KeyError as error:
            raise OSError(f"page {error} is not here") from error
        self._room.left(count)
        return found

    def close(self) -> None:
        """Forgets what is here."""
        self._rows.clear()
