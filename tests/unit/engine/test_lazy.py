"""An image that is filled out of a snapshot while it is sent: order, bounds, trouble."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.engine_conversations import complete, paused, switch_over
from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.engine.held_pages import HeldPages, HeldRuns, Room
from vmferry.engine.image import PAGE_BYTES, Image, Pages
from vmferry.engine.lazy import LazySource, Touches, Trouble, image_of
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.errors import RepositoryError
from vmferry.testing.scripted_destination import WAIT_S, ScriptedDestination, make_image
from vmferry.wire.events import (
    AskBitmap,
    EndOfSections,
    PageRun,
    Pong,
    PostcopyResume,
    RamBlock,
    RequestPages,
    ResumeAck,
    ZeroRun,
)

BLOCKS = {"pc.ram": 3000, "pc.rom": 4}
AT_ONCE = OutgoingOptions(postcopy="at-once", near_pages=4)


class FakeSnapshot:
    """Pages of an image, as a snapshot's reader gives them; reads fail as long as they are told to."""

    def __init__(self, image: Image) -> None:
        self.whole = image
        self.may_read = threading.Event()
        """Runs wait for it; single pages do not."""
        self.may_read.set()
        self.damaged: set[tuple[str, int]] = set()
        self.lost: Exception | None = None
        self.reads: list[tuple[str, list[int]]] = []

    def page(self, block: str, number: int) -> Pages:
        page: Pages = self._give(block, [number])[0]
        return page

    def read_some(self, block: str, pages: Any) -> Pages:
        assert self.may_read.wait(WAIT_S)
        return self._give(block, pages.tolist())

    def is_zero(self, block: str) -> Any:
        return ~self.whole.blocks[block].touched

    def _give(self, block: str, numbers: list[int]) -> Pages:
        if self.lost is not None:
            raise self.lost
        self.reads.append((block, numbers))
        if any((block, number) in self.damaged for number in numbers):
            raise RepositoryError("packs/aa is damaged", retry="no")
        found: Pages = self.whole.blocks[block].store.read_some(np.array(numbers))
        return found


class Bed:
    """A snapshot, what is read of it, and the endpoint that sends it."""

    def __init__(self, peer: ScriptedDestination, **more: Any) -> None:
        self.whole = make_image(BLOCKS)
        self.snapshot = FakeSnapshot(self.whole)
        self.peer = peer
        self.troubles: list[Trouble | None] = []
        self.news = threading.Condition()
        self.sources: list[LazySource] = []
        self.outgoings: list[Outgoing] = []
        self.more = more

    def make(self, *, lazy: bool = True, broken: bool = False, **more: Any) -> Outgoing:
        blocks = [RamBlock(name, pages * PAGE_BYTES) for name, pages in BLOCKS.items()]
        image = image_of(blocks, self.snapshot, is_lazy=lazy)
        image.configuration, image.devices = self.whole.configuration, self.whole.devices
        image.description, image.is_device_state_whole = self.whole.description, True
        self.source = LazySource(image, self.snapshot, on_trouble=self._hear, **{**self.more, **more})
        make = Outgoing.broken if broken else Outgoing
        self.outgoing = make(
            image, options=AT_ONCE if lazy else None, on_absent=self.source.on_absent, on_request=self.source.on_request
        )
        self.sources.append(self.source)
        self.outgoings.append(self.outgoing)
        return self.outgoing

    def _hear(self, trouble: Trouble | None) -> None:
        with self.news:
            self.troubles.append(trouble)
            self.news.notify_all()

    def until(self, is_so: Callable[[], bool]) -> None:
        with self.news:
            assert self.news.wait_for(is_so, WAIT_S), self.troubles

    def start(self, *, ahead: bool = True, **more: Any) -> None:
        self.make(**more)
        self.source.start()
        if ahead:
            self.source.go()
        self.outgoing.start(self.peer.dial)
        self.peer.begin()
        switch_over(self.peer)

    def finish(self) -> None:
        self.peer.read_until(EndOfSections)
        differing = sum(
            int((self.peer.memory[block.name] != block.store.read(0, block.count)).any(axis=1).sum())
            for block in self.whole
        )
        assert differing == 0
        assert all(have.all() for have in self.peer.have.values())

    def close(self) -> None:
        self.snapshot.may_read.set()
        for outgoing in self.outgoings:
            assert outgoing.stop().threads_left == ()
        for source in self.sources:
            assert source.stop() == ()
            source.image.close()
        self.whole.close()


@pytest.fixture
def bed(peer: ScriptedDestination) -> Iterator[Bed]:
    made = Bed(peer)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESTORE_RETRY_MIN_S", 0.005)
    monkeypatch.setattr(limits, "RESTORE_RETRY_MAX_S", 0.01)


def test_everything_arrives_once_and_is_what_was_saved(bed: Bed) -> None:
    bed.start()
    bed.finish()


def test_no_more_is_held_than_there_is_room_for(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that reads nothing: what is read ahead waits for room, and goes on with it."""
    monkeypatch.setattr(limits, "RESTORE_PAGES_HELD_MAX", 256)
    bed.start()
    room = bed.source._room
    while not room.is_full:
        threading.Event().wait(0.001)
    assert room.held <= 256 + limits.RESTORE_LAZY_RUN_PAGES
    assert sum(len(numbers) for _, numbers in bed.snapshot.reads) < 2000
    bed.finish()
    assert room.held == 0


def test_what_the_guest_asks_for_does_not_wait_behind_what_is_read_ahead(bed: Bed) -> None:
    bed.snapshot.may_read.clear()
    bed.start()
    bed.peer.say(RequestPages(2000 * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
    while True:
        event = bed.peer.read_until(PageRun, ZeroRun)
        if 2000 * PAGE_BYTES in event.offsets:
            break
    assert isinstance(event, PageRun)
    assert [(name, pages.tolist()) for name, pages in bed.source.touches.first_of_each()] == [("pc.ram", [2000])]
    bed.snapshot.may_read.set()
    bed.finish()


def test_its_neighbourhood_is_read_next_and_then_the_rest(bed: Bed) -> None:
    bed.start(ahead=False)
    bed.peer.say(RequestPages(2001 * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
    while not bed.peer.have["pc.ram"][2001]:
        bed.peer.read_until(PageRun, ZeroRun)
    bed.source.go()
    bed.finish()
    (first, second, third, *_) = bed.snapshot.reads
    assert first == ("pc.ram", [2001])
    assert second[0] == "pc.ram"
    assert all(2001 < number < 2002 + limits.RESTORE_NEAR_PAGES for number in second[1])
    assert third[0] == "pc.rom", "then small blocks first"


def test_a_known_order_of_first_touches_is_read_first(bed: Bed) -> None:
    order = Touches(["gone", "pc.ram"])
    for block, page in (("pc.ram", 900), ("pc.ram", 2400), ("pc.ram", 902), ("gone", 1), ("pc.ram", 9999)):
        order.add(block, page, 1)
    bed.start(order=order)
    bed.finish()
    block, pages = bed.snapshot.reads[0]
    assert block == "pc.ram"
    filled = bed.whole.blocks["pc.ram"].touched
    assert pages == [page for page in (*range(896, 904), *range(2400, 2408)) if filled[page]], "with their neighbours"


def test_a_store_that_is_lost_is_asked_until_it_is_back(bed: Bed) -> None:
    bed.snapshot.lost = RepositoryError("the store does not answer", retry="yes")
    bed.start()
    bed.peer.say(RequestPages(2000 * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
    bed.until(lambda: bool(bed.troubles) and bed.troubles[-1] is not None and bed.troubles[-1].guest_waits)
    trouble = bed.source.trouble
    assert trouble is not None
    assert "does not answer" in str(trouble.error)
    bed.snapshot.lost = None
    bed.source.retry()
    bed.finish()
    bed.until(lambda: bed.troubles[-1] is None)
    assert bed.source.trouble is None


def test_a_read_that_hangs_is_told_while_it_does(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESTORE_STALL_S", 0.01)
    bed.snapshot.may_read.clear()
    bed.start()
    while bed.source.stalled() is None:
        threading.Event().wait(0.001)
    trouble = bed.source.stalled()
    assert trouble is not None
    assert not trouble.guest_waits
    bed.snapshot.may_read.set()
    bed.finish()
    assert bed.source.stalled() is None


def test_a_damaged_page_is_named_and_only_that_one_is_missing(bed: Bed) -> None:
    bed.snapshot.damaged = {("pc.ram", 1500)}
    bed.start()
    while int(np.count_nonzero(~bed.peer.have["pc.ram"])) + int(np.count_nonzero(~bed.peer.have["pc.rom"])) > 1:
        bed.peer.read_until(PageRun, ZeroRun)
    assert not bed.peer.have["pc.ram"][1500]
    bed.until(lambda: bool(bed.troubles) and bed.troubles[-1] is not None)
    assert bed.troubles[-1] is not None
    assert not bed.troubles[-1].guest_waits
    bed.peer.say(RequestPages(1500 * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
    bed.until(lambda: bed.troubles[-1] is not None and bed.troubles[-1].guest_waits)
    bed.snapshot.damaged.clear()
    bed.finish()


class GoneSnapshot:
    """A snapshot of which nothing can be read any more, and that counts how often all of it was tried."""

    def __init__(self, pages: int) -> None:
        self.pages, self.passes, self.reads = pages, 0, 0
        self.changed = threading.Condition()

    def page(self, block: str, number: int) -> Pages:
        raise RepositoryError("packs/aa is damaged: it is missing", retry="no")

    def read_some(self, block: str, pages: Any) -> Pages:
        with self.changed:
            self.reads += 1
            if len(pages) == 1 and int(pages[0]) == self.pages - 1:
                self.passes += 1
                self.changed.notify_all()
        raise RepositoryError("packs/aa is damaged: it is missing", retry="no")

    def is_zero(self, block: str) -> Any:
        return np.zeros(self.pages, np.bool_)

    def until_passes(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.passes >= count, WAIT_S), (self.passes, self.reads)


def test_what_is_known_of_damage_does_not_grow_with_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its packs gone all of a guest's pages are damaged ones."""
    monkeypatch.setattr(limits, "RESTORE_APART_SHARE", 1.0)
    gone = GoneSnapshot(20_000)
    image = image_of([RamBlock("pc.ram", gone.pages * PAGE_BYTES)], gone, is_lazy=True)
    source = LazySource(image, gone)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        source.start()
        source.go()
        gone.until_passes(1)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        assert source.stop() == ()
        image.close()
    assert grown < 5 * gone.pages, "no object for each: what grows is what is told to the sender, which takes that"
    assert source.trouble is not None


def test_whoever_takes_damage_apart_leaves_the_processor_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = GoneSnapshot(600)
    image = image_of([RamBlock("pc.ram", gone.pages * PAGE_BYTES)], gone, is_lazy=True)
    source = LazySource(image, gone)
    monkeypatch.setattr(limits, "RESTORE_RETRY_MIN_S", 0.1)
    monkeypatch.setattr(limits, "RESTORE_RETRY_MAX_S", 2.0)
    now_s: list[float] = [0.0]
    rests: list[float] = []

    def thread_time() -> float:
        now_s[0] += 0.004
        return now_s[0]

    def rest(pause_s: float) -> bool:
        rests.append(pause_s)
        return source._stopping.is_set()

    monkeypatch.setattr(time, "thread_time", thread_time)
    monkeypatch.setattr(source, "_rest", rest)
    source.start()
    source.go()
    gone.until_passes(3)
    assert source.stop() == ()
    image.close()
    apart = [pause_s for pause_s in rests if pause_s == pytest.approx(0.036)]
    between = [pause_s for pause_s in rests if pause_s >= limits.RESTORE_RETRY_MIN_S]
    assert len(apart) >= 3 * -(-gone.pages // limits.RESTORE_LAZY_RUN_PAGES) - 1, (
        "nine times what a run took, after each"
    )
    assert between[:2] == [0.1, 0.2], "and longer and longer pauses between passes"


def test_trouble_is_over_only_when_everything_is_there(bed: Bed) -> None:
    """A pass that finds some of the damage mended and some not is no end of it."""
    first, last = np.flatnonzero(bed.whole.blocks["pc.ram"].touched)[[100, -100]].tolist()
    bed.snapshot.damaged = {("pc.ram", first), ("pc.ram", last)}
    bed.start()
    while sum(int(np.count_nonzero(~have)) for have in bed.peer.have.values()) > 2:
        bed.peer.read_until(PageRun, ZeroRun)
    bed.until(lambda: bool(bed.troubles) and bed.troubles[-1] is not None)
    bed.snapshot.damaged = {("pc.ram", last)}
    while not bed.peer.have["pc.ram"][first]:
        bed.peer.read_until(PageRun, ZeroRun)
    assert bed.source.trouble is not None
    assert None not in bed.troubles
    bed.snapshot.damaged = set()
    bed.finish()
    bed.until(lambda: bed.troubles[-1] is None)


def test_two_readers_that_come_to_the_end_together_begin_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. both have rested after a pass  2. one begins the next  3. the other takes that one's runs, and its trouble."""
    gone = GoneSnapshot(64)
    image = image_of([RamBlock("pc.ram", gone.pages * PAGE_BYTES)], gone, is_lazy=False)
    source = LazySource(image, gone, readers=2, run_pages=8)
    together, begun = threading.Barrier(2), threading.Event()
    passes: list[bool] = []
    absent_runs = source._absent_runs

    def rest(pause_s: float) -> bool:
        if pause_s == limits.RESTORE_RETRY_MIN_S and not begun.is_set():
            together.wait(WAIT_S)
        return source._stopping.is_set()

    def next_pass() -> Any:
        begun.set()
        passes.append(source._had_bad)
        assert source._planning.locked()
        return absent_runs()

    monkeypatch.setattr(limits, "RESTORE_APART_SHARE", 1.0)
    monkeypatch.setattr(source, "_rest", rest)
    monkeypatch.setattr(source, "_absent_runs", next_pass)
    source.start()
    source.go()
    gone.until_passes(3)
    assert source.stop() == ()
    image.close()
    assert all(passes), "whoever begins a pass has found damage in the one before"
    assert source.trouble is not None


class MendedSnapshot(GoneSnapshot):
    """One damaged page, until it was tried alone with its host page."""

    def read_some(self, block: str, pages: Any) -> Pages:
        with self.changed:
            self.reads += 1
            if self.passes < 2 and 301 in pages:
                self.passes += len(pages) == 4
                raise RepositoryError("packs/aa is damaged", retry="no")
        return np.ones((len(pages), PAGE_BYTES), np.uint8)


def test_damage_is_taken_apart_in_whole_host_pages() -> None:
    mended = MendedSnapshot(600)
    image = image_of([RamBlock("pc.ram", 600 * PAGE_BYTES, 4 * PAGE_BYTES)], mended, is_lazy=True)
    over: list[Trouble | None] = []
    is_over = threading.Event()

    def hear(trouble: Trouble | None) -> None:
        over.append(trouble)
        if trouble is None:
            is_over.set()

    source = LazySource(image, mended, on_trouble=hear)
    source.start()
    source.go()
    assert is_over.wait(WAIT_S)
    assert source.stop() == ()
    assert over[0] is not None
    assert image.blocks["pc.ram"].have.all()
    assert image.arrivals is not None
    rows = [(first, stop) for _, first, stop in image.arrivals]
    assert all(first % 4 == 0 and stop % 4 == 0 for first, stop in rows)
    assert (300, 304) in rows, "as soon as it is mended"
    image.close()


def test_what_is_asked_for_comes_before_what_failed_before(bed: Bed) -> None:
    """1. three pages fail  2. the next try of one hangs  3. a page that is sound is asked for: it comes before the
    tries of the others, each of which may hang for a minute."""
    *bad, good = (np.flatnonzero(bed.whole.blocks["pc.ram"].touched[1000:])[:4] + 1000).tolist()
    bed.snapshot.damaged = {("pc.ram", number) for number in bad}
    tried: list[int] = []
    is_armed, hangs, may_go_on = threading.Event(), threading.Event(), threading.Event()
    read = bed.snapshot.page

    def page(block: str, number: int) -> Pages:
        tried.append(number)
        if is_armed.is_set() and number in bad and not hangs.is_set():
            tried.clear()
            hangs.set()
            assert may_go_on.wait(WAIT_S)
        return read(block, number)

    bed.snapshot.page = page  # type: ignore[method-assign]
    bed.start(ahead=False)
    for number in bad:
        bed.peer.say(RequestPages(number * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
    while not set(bad) <= set(tried):
        threading.Event().wait(0.001)
    is_armed.set()
    assert hangs.wait(WAIT_S)
    bed.peer.say(RequestPages(good * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
    while not bed.source._asked:
        threading.Event().wait(0.001)
    may_go_on.set()
    while not bed.peer.have["pc.ram"][good]:
        bed.peer.read_until(PageRun, ZeroRun)
    assert tried[0] == good, tried
    bed.snapshot.damaged.clear()
    bed.source.go()
    bed.finish()


def test_a_defect_of_the_reader_is_told_and_not_the_end(bed: Bed) -> None:
    bed.snapshot.lost = KeyError("a defect")
    bed.start()
    bed.until(lambda: bool(bed.troubles))
    assert bed.troubles[-1] is not None
    assert "KeyError" in str(bed.troubles[-1].error)
    bed.snapshot.lost = None
    bed.finish()


def test_what_a_broken_postcopy_lacks_is_sent_by_another_source(bed: Bed) -> None:
    bed.start()
    while np.count_nonzero(bed.peer.have["pc.ram"]) < 500:
        bed.peer.read_until(PageRun, ZeroRun)
    bed.peer.close()
    paused(bed.outgoing)
    bed.source.stop()
    outgoing = bed.make(broken=True)
    bed.source.start()
    outgoing.recover(bed.peer.dial)
    bed.peer.begin(is_recovery=True)
    for _ in BLOCKS:
        bed.peer.say_bitmap(bed.peer.read_until(AskBitmap).block)
    bed.peer.read_until(PostcopyResume)
    bed.peer.say(ResumeAck(1), RequestPages(2900 * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
    assert outgoing.ledger.wait(Fact.RESUME_ACK, timeout_s=WAIT_S, round_no=1)
    bed.source.go()
    bed.finish()


def test_a_full_restore_is_a_precopy(bed: Bed) -> None:
    outgoing = bed.make(lazy=False, readers=2, run_pages=512)
    bed.source.start()
    bed.source.go()
    outgoing.start(bed.peer.dial)
    bed.peer.begin()
    bed.peer.say(Pong(1))
    bed.finish()


def test_a_full_restore_says_when_it_is_over(bed: Bed) -> None:
    bed.start()
    bed.finish()
    image, bed.outgoing.image = bed.outgoing.image, bed.whole
    complete(bed.peer, bed.outgoing)
    bed.outgoing.image = image


@pytest.mark.parametrize("steps", [(), ("start",), ("go",), ("start", "go"), ("go", "start")])
def test_a_stop_ends_it_whatever_has_begun_and_nothing_begins_afterwards(bed: Bed, steps: tuple[str, ...]) -> None:
    bed.make()
    for step in steps:
        getattr(bed.source, step)()
    assert bed.source.stop() == ()
    begun = len(bed.source._threads)
    assert begun == len(steps)
    bed.source.start()
    bed.source.go()
    assert len(bed.source._threads) == begun
    assert bed.source.stop() == ()


def test_a_stop_before_a_reader_waits_is_not_missed(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. the reader sees that it is to go on  2. it is stopped  3. it waits for somebody who asks for a page."""
    bed.make()
    is_set, looking, go = threading.Event.is_set, threading.Event(), threading.Event()
    stopping = bed.source._stopping

    def slow(self: threading.Event) -> bool:
        answer = is_set(self)
        if self is stopping and threading.current_thread().name.endswith("-asked") and not is_set(looking):
            looking.set()
            go.wait()
        return answer

    monkeypatch.setattr(threading.Event, "is_set", slow)
    bed.source.start()
    looking.wait()
    assert bed.source.stop(timeout_s=0) == ("restore-asked",)
    go.set()
    assert bed.source.stop() == ()


def test_held_pages_are_given_once() -> None:
    room = Room(2)
    store = HeldPages(room)
    pages = np.arange(3 * PAGE_BYTES, dtype=np.uint64).astype(np.uint8).reshape(3, PAGE_BYTES)
    store.put(np.array([7, 8, 9]), pages)
    assert room.is_full
    assert (store.read(8, 1) == pages[1]).all()
    assert (store.read_some(np.array([9, 7])) == pages[[2, 0]]).all()
    assert room.held == 0
    for numbers in (np.array([7]), np.array([8, 9])):
        with pytest.raises(OSError, match="is not here"):
            store.read_some(numbers)
    with pytest.raises(OSError, match="page 8 is not here"):
        store.read(8, 1)
    store.put(np.array([1]), pages[:1])
    store.close()
    with pytest.raises(OSError, match="is not here"):
        store.read(1, 1)


def test_held_runs_are_given_once() -> None:
    room = Room(6)
    store = HeldRuns(room)
    pages = np.arange(7 * PAGE_BYTES, dtype=np.uint64).astype(np.uint8).reshape(7, PAGE_BYTES)
    pages[:, 0] = range(7)
    store.put(np.array([10, 11, 14, 20]), pages[:4])
    store.put(np.array([12, 13, 30]), pages[4:])
    assert room.is_full
    assert np.shares_memory(found := store.read(10, 2), pages), "no copy of what came together"
    assert (found == pages[:2]).all()
    assert (store.read_some(np.array([12, 14])) == pages[[4, 2]]).all(), "out of both"
    for numbers in (np.array([10]), np.array([13, 14, 15]), np.array([99])):
        with pytest.raises(OSError, match=f"page {10 if numbers[0] == 10 else 14 if numbers[0] == 13 else 99} is not"):
            store.read_some(numbers)
    assert (store.read_some(np.array([30])) == pages[[6]]).all()
    assert (store.read(20, 1) == pages[3]).all()
    assert room.held == 0
    store.put(np.array([1, 2, 3, 4]), pages[:4])
    assert (store.read_some(np.array([1, 3])) == pages[[0, 2]]).all()
    store.close()
    with pytest.raises(OSError, match="is not here"):
        store.read(2, 1)
