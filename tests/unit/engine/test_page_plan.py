"""Which pages go next: by properties over any maps and any order of requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry import limits
from vmferry.engine.image import PAGE_BYTES, ImageBlock
from vmferry.engine.page_plan import (
    RANGES_PER_DISCARD,
    WINDOW_PAGES,
    Chunk,
    PageService,
    discards,
    pages_due,
    ranges_of,
    round_windows,
    whole_units,
)
from vmferry.wire.events import RamBlock

HUGE = 512
UNITS = st.sampled_from([1, 1, 4, HUGE])


def block_of(pages: int, unit: int = 1, *, name: str = "ram", have: bool = True) -> ImageBlock:
    block = ImageBlock(RamBlock(name, pages * PAGE_BYTES, None if unit == 1 else unit * PAGE_BYTES))
    block.have[:] = have
    return block


@st.composite
def blocks_with_marks(draw: st.DrawFn) -> list[ImageBlock]:
    """One to three blocks; pages here, sent and dirty in any combination."""
    blocks = []
    for number in range(draw(st.integers(1, 3))):
        unit = draw(UNITS)
        block = block_of(unit * draw(st.integers(1, 6 if unit > 1 else 90)), unit, name=f"ram{number}")
        random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
        for marks in (block.have, block.sent, block.dirty):
            marks[:] = random.random(block.count) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
        blocks.append(block)
    return blocks


@given(st.lists(st.booleans(), max_size=60))
def test_ranges_are_the_rows_of_marks(marks: list[bool]) -> None:
    again = np.zeros(len(marks), np.bool_)
    rows = ranges_of(np.array(marks, np.bool_))
    for first, count in rows:
        assert count > 0
        assert not again[max(first - 1, 0) : first + count].any()  # apart from the row before, or it would be one
        again[first : first + count] = True
    assert again.tolist() == marks


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 9), st.booleans())
def test_units_are_whole(marks: list[bool], unit: int, need_all: bool) -> None:
    found = whole_units(np.array(marks, np.bool_), unit, need_all=need_all).tolist()
    for start in range(0, len(marks), unit):
        part = marks[start : start + unit]
        assert found[start : start + unit] == [all(part) if need_all else any(part)] * len(part)
    assert len(found) == len(marks)


# --- rounds ---------------------------------------------------------------------------------------------------


@given(blocks_with_marks())
def test_a_round_sends_what_is_here_and_new_or_changed(blocks: list[ImageBlock]) -> None:
    for block in blocks:
        due = block.have & (block.dirty | ~block.sent)
        dirty_elsewhere = block.dirty & ~due
        assert pages_due(block) == np.count_nonzero(due)
        windows = list(round_windows(block))
        found = np.concatenate(windows) if windows else np.empty(0, np.intp)
        assert found.tolist() == np.flatnonzero(due).tolist()
        assert pages_due(block) == 0
        assert (block.dirty == dirty_elsewhere).all()


def test_a_change_in_a_later_window_goes_with_the_same_round_and_one_before_with_the_next() -> None:
    block = block_of(2 * WINDOW_PAGES)
    block.sent[:] = True
    block.dirty[0] = True
    windows = round_windows(block)
    assert next(windows).tolist() == [0]
    block.dirty[[1, WINDOW_PAGES]] = True
    assert next(windows).tolist() == [WINDOW_PAGES]
    assert next(windows, None) is None
    assert [each.tolist() for each in round_windows(block)] == [[1]]


# --- discards -------------------------------------------------------------------------------------------------


@pytest.mark.conforms("35")
@given(blocks_with_marks())
def test_discards_cover_exactly_what_will_be_sent(blocks: list[ImageBlock]) -> None:
    stale = [~block.sent | block.dirty | ~block.have for block in blocks]
    commands = discards(blocks)
    assert commands  # QEMU 11 hangs without any
    covered = {block.name: np.zeros(block.count, np.int64) for block in blocks}
    for command in commands:
        assert 0 < len(command.ranges) <= RANGES_PER_DISCARD
        for start, length in command.ranges:
            assert length > 0
            covered[command.block][start // PAGE_BYTES : (start + length) // PAGE_BYTES] += 1
    for block, marks in zip(blocks, stale, strict=True):
        wanted = whole_units(marks, block.host_page_pages, need_all=False)
        if not any(each.any() for each in stale) and block is blocks[-1]:
            wanted = whole_units(np.arange(block.count) == block.count - 1, block.host_page_pages, need_all=False)
        assert covered[block.name].tolist() == wanted.astype(int).tolist()
        assert (~block.sent).tolist() == wanted.tolist()
        assert not (block.dirty & wanted).any()


def test_a_page_that_its_source_took_back_after_it_was_sent_is_discarded() -> None:
    """Its copy at the destination is an old one, although nothing here has changed since."""
    block = block_of(8)
    block.sent[:] = True
    block.discard(3 * PAGE_BYTES, PAGE_BYTES)
    assert [command.ranges for command in discards([block])] == [((3 * PAGE_BYTES, PAGE_BYTES),)]


# --- the service ----------------------------------------------------------------------------------------------

Step = tuple[str, int, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "urgent", "near", "background", "come", "look"]),
        st.integers(0, 2),
        st.integers(0, 4000),
        st.sampled_from([1, 1, 1, 3, 40, 1024]),
    ),
    max_size=60,
)


class Judge:
    """Takes chunks, and knows whether they may go."""

    def __init__(self, blocks: list[ImageBlock]) -> None:
        self.sent = {block.name: block.sent.copy() for block in blocks}
        self.order: list[tuple[str, int]] = []

    def take(self, chunk: Chunk) -> None:
        block, unit = chunk.block, chunk.block.host_page_pages
        part = slice(chunk.first, chunk.first + chunk.pages)
        assert chunk.pages > 0
        assert chunk.first % unit == chunk.pages % unit == 0, "part of a host page"
        assert not self.sent[block.name][part].any(), "twice"
        assert block.have[part].all(), "not here"
        self.sent[block.name][part] = True
        self.order.append((block.name, chunk.first))


@pytest.mark.conforms("36")
@settings(max_examples=100, deadline=None)
@given(blocks_with_marks(), STEPS, st.integers(0, 20), st.integers(1, 20))
def test_every_page_goes_exactly_once_in_whole_host_pages_whatever_is_asked(
    blocks: list[ImageBlock], steps: list[Step], near: int, chunk: int
) -> None:
    discards(blocks)
    judge = Judge(blocks)
    service = PageService(blocks, near_pages=near, chunk_pages=chunk)
    takes: dict[str, Callable[[], Chunk | None]] = {
        "urgent": service.next_urgent, "near": service.next_near, "background": service.next_background
    }  # fmt: skip
    for what, number, at, count in steps:
        block = blocks[number % len(blocks)]
        first = at % block.count
        count = min(count, block.count - first)
        if what == "ask":
            for page, pages in service.ask(block, first, count, at_s=0.0):
                assert pages > 0
                assert not block.have[page : page + pages].all()
        elif what == "come":
            block.have[first : first + count] = True
        elif what == "look":
            service.look_again()
        elif (found := takes[what]()) is not None:
            judge.take(found)
    for block in blocks:
        block.have[:] = True
    service.look_again()
    while (found := service.next_urgent() or service.next_near() or service.next_background()) is not None:
        judge.take(found)
    assert service.left == 0
    assert all(marks.all() for marks in judge.sent.values())


def all_of(take: Callable[[], Chunk | None]) -> list[tuple[int, int]]:
    found = []
    while (chunk := take()) is not None:
        found.append((chunk.first, chunk.pages))
    return found


def service_of(*blocks: ImageBlock, **more: Any) -> PageService:
    return PageService(list(blocks), **{"near_pages": 4, "chunk_pages": 4, **more})


def test_what_was_asked_for_goes_first_then_what_lies_behind_it_then_the_rest() -> None:
    block = block_of(20)
    service = service_of(block)
    assert not service.ask(block, 10, 1, at_s=7.0)
    first = service.next_urgent()
    assert first is not None
    assert (first.first, first.pages, first.asked_s) == (10, 1, 7.0)
    assert service.next_urgent() is None
    assert all_of(service.next_near) == [(11, 4)]
    assert all_of(service.next_background) == [(0, 4), (4, 4), (8, 2), (15, 4), (19, 1)]


def test_a_request_of_many_pages_goes_in_chunks_without_what_is_on_its_way() -> None:
    block = block_of(20)
    block.sent[5] = True
    service = service_of(block, near_pages=0)
    service.ask(block, 2, 8, at_s=0.0)
    assert all_of(service.next_urgent) == [(2, 3), (6, 4)]


@pytest.mark.conforms("38")
def test_what_is_asked_for_twice_is_told_and_sent_once() -> None:
    block = block_of(8)
    block.have[3] = False
    service = service_of(block, near_pages=0)
    assert [service.ask(block, 3, 1, at_s=0.0) for _ in range(3)] == [[(3, 1)], (), ()]
    assert service.ask(block, 2, 3, at_s=0.0) == []
    assert service.is_waiting
    assert all_of(service.next_urgent) == [(2, 1), (4, 1)]
    block.have[3] = True
    service.look_again()
    assert not service.is_waiting
    assert all_of(service.next_urgent) == [(3, 1)]


def test_a_million_requests_take_no_more_room_than_the_queue_and_each_page_still_goes() -> None:
    pages = 3 * limits.ENGINE_SERVICE_QUEUE_MAX
    block = block_of(pages)
    block.have[pages // 2 :] = False
    service = service_of(block, near_pages=0, chunk_pages=1)
    absent = 0
    for _ in range(3):
        for page in range(0, pages, 2):
            absent += len(service.ask(block, page, 1, at_s=0.0))
    assert absent == pages // 4
    assert len(service._urgent) <= limits.ENGINE_SERVICE_QUEUE_MAX
    assert len(service._absent) <= limits.ENGINE_SERVICE_QUEUE_MAX
    assert {first for first, _ in all_of(service.next_urgent)} == set(range(0, pages // 2, 2))
    block.have[:] = True
    service.look_again()
    assert {first for first, _ in all_of(service.next_urgent)} == set(range(pages // 2, pages, 2))
    assert not service.is_waiting


def test_more_absent_pages_than_the_queue_holds_are_found_by_their_marks() -> None:
    pages = 2 * limits.ENGINE_SERVICE_QUEUE_MAX
    block = block_of(pages, have=False)
    service = service_of(block, near_pages=0, chunk_pages=64)
    assert service.ask(block, 0, pages, at_s=0.0) == [(0, pages)]
    assert len(service._absent) == limits.ENGINE_SERVICE_QUEUE_MAX
    block.have[pages - 3 :] = True
    service.look_again()
    assert all_of(service.next_urgent) == [(pages - 3, 3)]
    assert service.is_waiting


def test_a_part_of_a_host_page_that_came_waits_for_the_rest() -> None:
    block = block_of(2 * HUGE, HUGE)
    block.have[5] = False
    service = service_of(block)
    assert service.ask(block, 7, 1, at_s=0.0) == [(0, HUGE)]
    assert all_of(service.next_background) == [(HUGE, HUGE)]
    block.have[5] = True
    service.look_again()
    assert all_of(service.next_urgent) == [(0, HUGE)]


def test_the_neighbourhood_of_a_huge_page_is_a_huge_page() -> None:
    block = block_of(3 * HUGE, HUGE)
    service = service_of(block)
    service.ask(block, 0, HUGE, at_s=0.0)
    assert all_of(service.next_urgent) == [(0, HUGE)]
    assert all_of(service.next_near) == [(HUGE, HUGE)]


def test_host_pages_that_are_larger_than_a_look_are_found() -> None:
    unit = 2 * 4096
    block = block_of(2 * unit, unit)
    assert all_of(service_of(block).next_background) == [(0, unit), (unit, unit)]


def test_old_neighbourhoods_are_forgotten() -> None:
    block = block_of(4 * limits.ENGINE_SERVICE_NEAR_MAX)
    service = service_of(block, near_pages=1)
    for page in range(0, block.count, 2):
        service.ask(block, page, 1, at_s=0.0)
    all_of(service.next_urgent)
    assert len(all_of(service.next_near)) == limits.ENGINE_SERVICE_NEAR_MAX
    assert service.left == limits.ENGINE_SERVICE_NEAR_MAX


def test_what_waits_may_be_sent_by_the_background_first() -> None:
    block = block_of(8)
    block.have[3] = False
    service = service_of(block, near_pages=0, chunk_pages=8)
    service.ask(block, 3, 1, at_s=0.0)
    service.ask(block, 5, 1, at_s=0.0)
    service.ask(block, 6, 2, at_s=0.0)
    block.have[3] = True
    assert all_of(service.next_background) == [(0, 8)]
    service.look_again()
    assert all_of(service.next_urgent) == []
    assert not service.is_waiting


def test_marks_that_were_asked_for_and_sent_meanwhile_are_not_searched_again() -> None:
    pages = 2 * limits.ENGINE_SERVICE_QUEUE_MAX
    block, other = block_of(pages), block_of(4, name="other")
    service = service_of(block, other, near_pages=0, chunk_pages=pages)
    for page in range(0, pages, 2):
        service.ask(block, page, 1, at_s=0.0)
    service.ask(other, 0, 1, at_s=0.0)
    assert sum(count for _, count in all_of(service.next_background)) == pages + 4
    assert all_of(service.next_urgent) == []


def test_the_background_looks_far_for_the_last_page() -> None:
    pages = 3 * 4096
    block = block_of(pages)
    block.sent[:-1] = True
    assert all_of(service_of(block).next_background) == [(pages - 1, 1)]


def test_a_row_of_discards_begins_at_the_last_page_if_everything_was_sent() -> None:
    """QEMU 11 hangs when postcopy begins without any discard."""
    block = block_of(4)
    block.sent[:] = True
    assert [(each.block, each.ranges) for each in discards([block])] == [("ram", ((3 * PAGE_BYTES, PAGE_BYTES),))]
