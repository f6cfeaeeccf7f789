"""Pages that only pass through: read from a snapshot, held until the sender takes them, gone then.

Rule 1: a page is put once and read once. Whoever puts one has the claim to it (`lazy`), and a sender takes each page
        that it sends exactly once (`page_plan`, rule 1).
        For single pages that are asked for it is `HeldPages`, a table of pages; for a restore that sends everything in
        order `HeldRuns`, which costs nothing per page.
Rule 2: what is held is counted, so that whoever reads ahead can wait for room; a page that a guest waits for is put
        without waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmferry.engine.image import PAGE_BYTES, Map, Pages

Numbers = npt.NDArray[np.intp]


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
        self.room = room
        self._rows: dict[int, Pages] = {}

    def put(self, numbers: Numbers, pages: Pages) -> None:
        """Pages with these numbers, one per row; what they are views of is held with them."""
        self._rows.update(zip(numbers.tolist(), pages, strict=True))
        self.room.came(len(numbers))

    def read(self, first: int, count: int) -> Pages:
        """Takes the pages. Raises OSError for one that is not here: it was taken before, or never came."""
        if count == 1:
            page = self._rows.pop(first, None)
            if page is None:
                raise OSError(f"page {first} is not here")
            self.room.left(1)
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
        self.room.left(count)
        return found

    def close(self) -> None:
        """Forgets what is here."""
        self._rows.clear()


@dataclass(slots=True, eq=False)
class _Run:
    """Pages that came together, in ascending order."""

    numbers: Numbers
    pages: Pages
    is_here: Map
    """Which of them were not taken yet."""


class HeldRuns:
    """As `HeldPages`, for pages that come in rows and leave in rows. Any thread puts, one takes."""

    knows_zeros = True

    def __init__(self, room: Room) -> None:
        self.room = room
        self._runs: list[_Run] = []
        """Added to by those who put, taken from by the one who takes: each is one step of a list."""

    def put(self, numbers: Numbers, pages: Pages) -> None:
        """Pages with these numbers, which ascend, one per row."""
        self._runs.append(_Run(numbers, pages, np.ones(len(numbers), np.bool_)))
        self.room.came(len(numbers))

    def read(self, first: int, count: int) -> Pages:
        """Takes the pages: a view where they came together. Raises OSError for one that is not here."""
        return self.read_some(np.arange(first, first + count))

    def read_some(self, numbers: Numbers) -> Pages:
        """Takes these pages, which ascend. Raises OSError."""
        out: Pages | None = None
        is_found = np.zeros(len(numbers), np.bool_)
        for run in self._runs.copy():
            # Where each is in the run, if it is; one behind the end is compared with the last, and differs.
            at = np.minimum(run.numbers.searchsorted(numbers), len(run.numbers) - 1)
            of_run = (run.numbers[at] == numbers) & run.is_here[at]
            if of_run.all():
                first, last = int(at[0]), int(at[-1])
                is_row = last - first == len(at) - 1
                return self._left(run, at, run.pages[first : last + 1] if is_row else run.pages[at])
            if of_run.any():
                out = np.empty((len(numbers), PAGE_BYTES), np.uint8) if out is None else out
                out[of_run] = self._left(run, at[of_run], run.pages[at[of_run]])
                is_found |= of_run
                if is_found.all():
                    return out
        raise OSError(f"page {int(numbers[is_found.argmin()])} is not here")

    def _left(self, run: _Run, at: Numbers, pages: Pages) -> Pages:
        run.is_here[at] = False
        if not run.is_here.any():
            self._runs.remove(run)
        self.room.left(len(at))
        return pages

    def close(self) -> None:
        """Forgets what is here."""
        self._runs.clear()
