"""Fills an image out of a snapshot while it is sent: what the guest asks for at once, the rest behind it.

Theory of operation
-------------------
The image begins with its zeros only. One thread (`asked`) reads the single pages that the guest waits for, others
(`ahead`) read in runs, in this order, looked at anew for each run:

    1. what lies behind pages that were asked for
    2. pages in the order in which an earlier restore touched them first
    3. all the rest, small blocks first, in the order of addresses

What was read is put into the image and announced; the sender takes it from there, and then it is not held any more, so
memory is bounded whatever the guest's size (`held_pages.Room`). A page that the guest asks for waits for no run: it has
a reader of its own.

Trouble. A read that fails is tried again, with growing pauses, for as long as this lives: nothing else is a reason to
give a guest's memory up. `retry="no"` means that the object is damaged: then a run is taken apart until the damaged
pages are alone, and everything else goes on. No list is kept of them, for they may be all that a guest has: when all
runs are through, what is still absent is tried again, from the beginning. Taking apart costs a read per page, so
whoever does it rests for nine times as long as it took. The owner hears of trouble and of its end.

Rule 1: a page is put once: whoever puts it has looked under the lock that it is not here.
Rule 2: nothing is put that the reader did not vouch for: `pages` raises, or gives what was saved.
Rule 3: what raises something else than VmferryError is a defect: it is trouble that never ends, and is told.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vmferry import limits
from vmferry.engine.held_pages import HeldPages, HeldRuns, Room
from vmferry.engine.image import ARRIVAL_PAGES_MAX, Image, ImageBlock, Map, Pages
from vmferry.errors import VmferryError
from vmferry.wire.events import RamBlock

log = logging.getLogger("vmferry.engine")

Numbers = npt.NDArray[np.intp]
_TOGETHER: Final = 8
"""Neighbours that are read with a page that was touched before."""
_DAMAGE: Final = "damage"
"""Whose trouble damaged objects are: everybody's who reads ahead, until all is there."""
_ROOM_S: Final = 1.0
"""How long a reader waits for room before it looks whether it is still wanted."""


class SnapshotPages(Protocol):
    """A snapshot's pages; `store.reader.SnapshotReader` is one. All raise VmferryError; several threads may call."""

    def page(self, block: str, number: int) -> Pages:
        """One page."""
        ...

    def read_some(self, block: str, pages: npt.NDArray[np.int64]) -> Pages:
        """These pages, one per row."""
        ...

    def is_zero(self, block: str) -> Map:
        """Which pages are zero."""
        ...


_PAGE_BITS: Final = 40
_PAGE_MASK: Final = (1 << _PAGE_BITS) - 1


class Touches:
    """Pages that a guest asked for, in order: a number each, block << 40 | page, as `names` counts the blocks."""

    def __init__(self, names: Sequence[str], codes: npt.NDArray[np.uint64] | None = None) -> None:
        self.names = list(names)
        self._codes = array("Q", [] if codes is None else codes.tobytes())
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, block: str, first: int, count: int) -> None:
        """Pages of a block that has a name here; beyond the limit nothing is added."""
        if len(self._codes) < limits.RESTORE_ORDER_PAGES_MAX:
            code = self._numbers[block] << _PAGE_BITS
            self._codes.extend(range(code | first, (code | first) + count))

    @property
    def codes(self) -> npt.NDArray[np.uint64]:
        """A copy."""
        return np.array(self._codes, np.uint64)

    @property
    def is_sound(self) -> bool:
        """Every number is of a block that has a name."""
        return not len(self._codes) or int(self.codes.max() >> np.uint64(_PAGE_BITS)) < len(self.names)

    def distinct(self) -> npt.NDArray[np.uint64]:
        """Each page once, where it was touched first."""
        codes = self.codes
        _, where = np.unique(codes, return_index=True)
        return np.asarray(codes[np.sort(where)])

    def first_of_each(self, pages_together: int = 1) -> list[tuple[str, Numbers]]:
        """Each group of so many neighbours once, where it was touched first: rows of a block and groups of it."""
        codes = self.codes
        keys = (codes & ~np.uint64(_PAGE_MASK)) | (codes & np.uint64(_PAGE_MASK)) // np.uint64(pages_together)
        _, where = np.unique(keys, return_index=True)
        keys = keys[np.sort(where)]
        blocks = (keys >> np.uint64(_PAGE_BITS)).astype(np.intp)
        groups = (keys & np.uint64(_PAGE_MASK)).astype(np.intp)
        edges = np.flatnonzero(np.diff(blocks)) + 1
        parts = zip(np.split(blocks, edges), np.split(groups, edges), strict=True)
        return [(self.names[int(block[0])], group) for block, group in parts if len(group)]


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why pages do not come. `guest_waits`: the guest has asked for one of them."""

    error: VmferryError
    guest_waits: bool


class _Run(NamedTuple):
    """Pages to be read together, and the row of pages that may leave when they are here."""

    block: ImageBlock
    pages: Numbers
    first: int
    stop: int
    is_near: bool = False


def image_of(blocks: Sequence[RamBlock], pages: SnapshotPages, *, is_lazy: bool) -> Image:
    """An image of these blocks with nothing but its zeros. `is_lazy`: it is sent in the order in which pages come."""
    image, room = Image(), Room(limits.RESTORE_PAGES_HELD_MAX)
    for wire in blocks:
        held = HeldPages(room) if is_lazy else HeldRuns(room)
        block = image.blocks[wire.name] = ImageBlock(wire, held)
        block.have[:] = pages.is_zero(wire.name)
        np.logical_not(block.have, out=block.touched)
    image.arrivals = deque() if is_lazy else None
    return image


class LazySource:
    """See the module's text. `start` begins to serve what is asked for, `go` to read ahead; `stop` ends both."""

    def __init__(
        self,
        image: Image,
        pages: SnapshotPages,
        *,
        order: Touches | None = None,
        readers: int = 1,
        run_pages: int = limits.RESTORE_LAZY_RUN_PAGES,
        on_trouble: Callable[[Trouble | None], None] = lambda trouble: None,
        name: str = "restore",
    ) -> None:
        self.image = image
        self.touches = Touches([block.name for block in image])
        """What was asked for, in order; the same page may be in it again."""
        self._pages, self._on_trouble, self._run_pages = pages, on_trouble, run_pages
        stores = [block.store for block in image if isinstance(block.store, HeldPages | HeldRuns)]
        assert len(stores) == len(image.blocks), "an image of `image_of`"
        self._room = stores[0].room
        self._placing = threading.Lock()
        """Guards what is put where."""
        self._planning = threading.Lock()
        """Guards which run is next."""
        self._runs = self._all_runs(order)
        self._near: deque[tuple[ImageBlock, int, int]] = deque(maxlen=limits.RESTORE_NEAR_MAX)
        self._has_bad = self._had_bad = False
        """Something was left out in this pass over all runs, or in the one before."""
        self._asked: deque[tuple[ImageBlock, int, int]] = deque()
        self._asked_s = 0.0
        """When the guest asked for a page last."""
        self._failed: deque[tuple[ImageBlock, int, int]] = deque()
        self._wanted = threading.Condition()
        """Something is asked for, or what failed is to be tried again."""
        self._resting = threading.Condition()
        """The same for those who read ahead."""
        self._reading: dict[str, float] = {}
        """Who reads at this moment, and since when."""
        self._troubles: dict[str, VmferryError] = {}
        self._told: Trouble | None = None
        self._telling = threading.Lock()
        self._stopping = threading.Event()
        self._beginning = threading.Lock()
        """Guards who has begun: nobody begins once it is to end."""
        self._threads: list[threading.Thread] = []
        """Those that have begun."""
        self._serving = [threading.Thread(target=self._serve_asked, name=f"{name}-asked", daemon=True)]
        self._ahead = [
            threading.Thread(target=self._read_ahead, args=(f"ahead-{number}",), name=f"{name}-ahead-{number}",
                             daemon=True)
            for number in range(readers)
        ]  # fmt: skip

    # --- the owner's side ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Serves what is asked for from now on."""
        self._begin(self._serving)

    def go(self) -> None:
        """Reads ahead from now on. Of a recovery only when it is known what has arrived (RESUME_ACK)."""
        self._begin(self._ahead)

    def _begin(self, threads: list[threading.Thread]) -> None:
        """Those of them that have not begun. Any thread: a sender's says `go` while the owner's says `stop`."""
        with self._beginning:
            while threads and not self._stopping.is_set():
                threads[0].start()
                self._threads.append(threads.pop(0))

    @property
    def trouble(self) -> Trouble | None:
        """Why pages do not come, if that is so."""
        troubles = dict(self._troubles)
        if not troubles:
            return None
        return Trouble(troubles.get("asked") or next(iter(troubles.values())), "asked" in troubles)

    def retry(self) -> None:
        """What failed is tried again at once."""
        for condition in (self._wanted, self._resting):
            with condition:
                condition.notify_all()

    def stalled(self) -> Trouble | None:
        """A read that hangs: it is no error yet, and the guest may wait for it."""
        begun = dict(self._reading)
        oldest_s = time.monotonic() - min(begun.values(), default=float("inf"))
        if oldest_s < limits.RESTORE_STALL_S:
            return None
        error = VmferryError("the repository has not answered for seconds", retry="yes")
        return Trouble(error, "asked" in begun)

    def stop(self, *, timeout_s: float = limits.ENGINE_STOP_S) -> tuple[str, ...]:
        """Ends it, begun or not, and joins its threads; the names of those that hang in a read, which end with that."""
        with self._beginning:
            self._stopping.set()
            threads = tuple(self._threads)
        self._room.wake()
        self.retry()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)
        return tuple(thread.name for thread in threads if thread.is_alive())

    # --- for the sender, on its thread --------------------------------------------------------------------

    def on_request(self, block: ImageBlock, first: int, count: int) -> None:
        """The guest asked for pages, here or not."""
        self._asked_s = time.monotonic()
        self.touches.add(block.name, first, count)

    def on_absent(self, block: ImageBlock, first: int, count: int) -> None:
        """The guest waits for pages that are not here."""
        with self._wanted:
            self._asked.append((block, first, count))
            self._wanted.notify()

    # --- what is asked for --------------------------------------------------------------------------------

    def _serve_asked(self) -> None:
        pause_s = limits.RESTORE_RETRY_MIN_S
        again: deque[tuple[ImageBlock, int, int]] = deque()
        while not self._stopping.is_set():
            with self._wanted:
                if not self._asked and not again and not self._stopping.is_set():
                    self._wanted.wait(pause_s if self._failed else None)
                is_new = bool(self._asked)
                wanted = self._asked.popleft() if is_new else None
            if wanted is not None:
                self._try(wanted)
                continue
            if not again:
                again, self._failed = self._failed, deque()
            if again:
                # One at a time: a try may hang for a minute, and what is asked for meanwhile comes first after it.
                self._try(again.popleft())
            if again:
                continue
            pause_s = min(pause_s * 2, limits.RESTORE_RETRY_MAX_S) if self._failed else limits.RESTORE_RETRY_MIN_S
            if not self._failed:
                self._note_trouble("asked", None)

    def _try(self, wanted: tuple[ImageBlock, int, int]) -> None:
        block, first, count = wanted
        if self._stopping.is_set():
            return
        self._reading["asked"] = time.monotonic()
        try:
            if count == 1:
                if not block.have[first]:
                    self._place(block, np.array([first]), self._pages.page(block.name, first).reshape(1, -1))
            else:
                numbers = _absent(block, first, first + count)
                if len(numbers):
                    self._place(block, numbers, self._pages.read_some(block.name, numbers))
        except Exception as error:  # noqa: BLE001  the guest waits for what this thread does: it must not end
            self._failed.append(wanted)
            self._note_trouble("asked", _as_ours(error))
            return
        finally:
            self._reading.pop("asked", None)
        stop = min(block.count, first + count + limits.RESTORE_NEAR_PAGES)
        if self.image.arrivals is not None and first + count < stop:
            self._near.append((block, first + count, stop))
            if self._room.is_full:
                self._room.wake()
        self.image.announce_pages()

    # --- what is read ahead -------------------------------------------------------------------------------

    def _read_ahead(self, who: str) -> None:
        pause_s = limits.RESTORE_RETRY_MIN_S
        while not self._stopping.is_set():
            if self._room.is_full and not self._near:
                self._room.wait(_ROOM_S)
                continue
            self._step_back()
            with self._planning:
                run = self._next_run()
            if run is None:
                if not self._has_bad:
                    for each in (who, _DAMAGE):
                        self._note_trouble(each, None)
                    return
                self._rest(pause_s)
                pause_s = min(pause_s * 2, limits.RESTORE_RETRY_MAX_S)
                with self._planning:
                    if self._has_bad:  # else another reader has begun the next pass already
                        self._had_bad, self._has_bad = True, False
                        self._runs = self._absent_runs()
                continue
            while not self._read(run, who) and not self._rest(pause_s):
                pause_s = min(pause_s * 2, limits.RESTORE_RETRY_MAX_S)
            pause_s = pause_s if self._has_bad or self._had_bad else limits.RESTORE_RETRY_MIN_S

    def _step_back(self) -> None:
        """Leaves the processor to whoever serves the guest, for as long as that asks page after page; not for ever."""
        until_s = time.monotonic() + limits.RESTORE_STEP_BACK_S
        while not (self._near or self._stopping.is_set()):
            now_s = time.monotonic()
            if now_s >= until_s or now_s - self._asked_s >= limits.RESTORE_QUIET_S:
                return
            self._rest(limits.RESTORE_QUIET_S)

    def _rest(self, pause_s: float) -> bool:
        """Until somebody says `retry`, or the time is over. Whether it is to end."""
        with self._resting:
            if not self._stopping.is_set():
                self._resting.wait(pause_s)
        return self._stopping.is_set()

    def _next_run(self) -> _Run | None:
        while self._near:
            block, first, stop = self._near.popleft()
            unit = block.host_page_pages
            pages = _absent(block, first // unit * unit, min(block.count, -(-stop // unit) * unit))
            if len(pages):
                return _Run(block, pages, first, stop, is_near=True)
        return next(self._runs, None)

    def _read(self, run: _Run, who: str) -> bool:
        """Whether the run is done with: it is here, or what is damaged of it was left out."""
        pages = run.pages[~run.block.have[run.pages]]
        error = self._bring(run.block, pages, who)
        if error is None:
            self._note_trouble(who, None)
            if not (self._has_bad or self._had_bad):
                self._note_trouble(_DAMAGE, None)
            self._arrive(run)
            return True
        if error.retry != "no":
            return False
        began_s = time.thread_time()
        self._take_apart(run.block, pages, who)
        self._arrive(run)  # what is right of it, and the zeros around it, are here
        rest_s = (time.thread_time() - began_s) * (1 / limits.RESTORE_APART_SHARE - 1)
        self._rest(min(rest_s, limits.RESTORE_RETRY_MAX_S))
        return True

    def _bring(self, block: ImageBlock, pages: Numbers, who: str) -> VmferryError | None:
        """Pages into the image; why they did not come."""
        self._reading[who] = time.monotonic()
        try:
            if len(pages):
                self._place(block, pages, self._pages.read_some(block.name, pages))
        except Exception as error:  # noqa: BLE001  as above
            found = _as_ours(error)
            is_damage = found.retry == "no"
            self._has_bad |= is_damage  # whatever becomes of it: it is looked at in another pass before it is over
            self._note_trouble(_DAMAGE if is_damage else who, found)
            return found
        finally:
            self._reading.pop(who, None)
        return None

    def _take_apart(self, block: ImageBlock, pages: Numbers, who: str) -> None:
        """Something of these pages is damaged: what is not is read, in halves; what is waits for another pass."""
        unit = block.host_page_pages
        half = len(pages) // 2 // unit * unit
        if not half or self._stopping.is_set():
            return
        for part in (pages[:half], pages[half:]):
            error = self._bring(block, part, who)
            if error is not None and error.retry == "no":
                self._take_apart(block, part, who)
            elif error is not None:
                self._has_bad = True

    def _arrive(self, run: _Run) -> None:
        arrivals = self.image.arrivals
        if arrivals is not None and run.stop > run.first:
            row = (run.block, run.first, run.stop)
            if run.is_near:
                arrivals.appendleft(row)
            else:
                arrivals.append(row)
        self.image.announce_pages()

    def _all_runs(self, order: Touches | None) -> Iterator[_Run]:
        """Everything once, in the order of the module's text."""
        if order is not None:
            yield from self._ordered(order)
        for block in sorted(self.image, key=lambda each: each.count):
            for begin, end, pieces in self._cut(block):
                first = begin
                for pages in pieces:
                    stop = int(pages[-1]) + 1
                    yield _Run(block, pages, first, stop)
                    first = stop
                if first < end:
                    yield _Run(block, np.empty(0, np.intp), first, end)

    def _absent_runs(self) -> Iterator[_Run]:
        """What has not come yet, when everything was tried."""
        for block in self.image:
            unit = block.host_page_pages
            for _, end, pieces in self._cut(block):
                for pages in pieces:
                    stop = -(-(int(pages[-1]) + 1) // unit) * unit
                    yield _Run(block, pages, int(pages[0]) // unit * unit, min(stop, end))

    def _cut(self, block: ImageBlock) -> Iterator[tuple[int, int, list[Numbers]]]:
        """A block in stretches (first, stop) of whole host pages, and what is absent of each in pieces that are read
        together."""
        unit = block.host_page_pages
        stretch = -(-ARRIVAL_PAGES_MAX // unit) * unit
        length = max(self._run_pages // unit, 1) * unit
        for begin in range(0, block.count, stretch):
            end = min(begin + stretch, block.count)
            absent = _absent(block, begin, end)
            yield begin, end, [absent[at : at + length] for at in range(0, len(absent), length)]

    def _ordered(self, order: Touches) -> Iterator[_Run]:
        """Pages that were touched before, with their neighbours: a snapshot has those in one piece mostly, which is
        inflated for one of them as for all."""
        at_once = max(self._run_pages // _TOGETHER, 1)
        for name, groups in order.first_of_each(_TOGETHER):
            block = self.image.blocks.get(name)
            if block is None or block.host_page_pages != 1:
                continue
            groups = groups[groups < -(-block.count // _TOGETHER)]
            for at in range(0, len(groups), at_once):
                yield from self._groups(block, groups[at : at + at_once].tolist())

    def _groups(self, block: ImageBlock, groups: Sequence[int]) -> Iterator[_Run]:
        parts = [_absent(block, group * _TOGETHER, min((group + 1) * _TOGETHER, block.count)) for group in groups]
        pages = np.unique(np.concatenate(parts))
        if len(pages):
            yield from self._scattered(block, pages)

    def _scattered(self, block: ImageBlock, pages: Numbers) -> Iterator[_Run]:
        """One read, but a row of pages that may leave for each group of neighbours."""
        yield _Run(block, pages, 0, 0)
        edges = np.flatnonzero(np.diff(pages) > 1) + 1
        for group in np.split(pages, edges):
            yield _Run(block, group[:0], int(group[0]), int(group[-1]) + 1)

    # --- into the image -----------------------------------------------------------------------------------

    def _place(self, block: ImageBlock, numbers: Numbers, pages: Pages) -> None:
        store = block.store
        assert isinstance(store, HeldPages | HeldRuns)
        with self._placing:
            absent = ~block.have[numbers] & ~block.sent[numbers]
            if not absent.all():
                numbers, pages = numbers[absent], pages[absent]
            if len(numbers):
                store.put(numbers, pages)
                block.have[numbers] = True

    def _note_trouble(self, who: str, error: VmferryError | None) -> None:
        with self._telling:
            if error is None:
                if self._troubles.pop(who, None) is None:
                    return
            else:
                self._troubles[who] = error
            now, before = self.trouble, self._told
            self._told = now
        is_same = now is not None and before is not None and str(now.error) == str(before.error)
        if not (is_same and now is not None and before is not None and now.guest_waits == before.guest_waits):
            self._on_trouble(now)


def _absent(block: ImageBlock, first: int, stop: int) -> Numbers:
    """Pages of a range that are neither here nor there."""
    return np.flatnonzero(~block.have[first:stop] & ~block.sent[first:stop]) + first


def _as_ours(error: Exception) -> VmferryError:
    """Without its traceback: that holds the frame which keeps the error, and there may be one for every page."""
    if isinstance(error, VmferryError):
        return error.with_traceback(None)
    log.error("result=defect reading a snapshot", exc_info=error)
    return VmferryError(f"a snapshot cannot be read: {type(error).__name__}: {error}", retry="after-fix", cause=error)
