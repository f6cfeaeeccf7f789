"""The guest image: pages, their marks, and the memory behind them."""

from __future__ import annotations

import os

import numpy as np
import pytest

from vmferry.engine.image import ForeignMemory, Image, ImageBlock, MemoryFile, leading_run
from vmferry.wire.events import RamBlock

SIZE = 4096


def offsets(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(numbers, np.uint64) * np.uint64(SIZE)


def content(*values: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.repeat(np.array(values, np.uint8)[:, None], SIZE, axis=1)


def block(pages: int = 8, page_size: int | None = None) -> ImageBlock:
    return ImageBlock(RamBlock("ram", pages * SIZE, page_size))


def firsts(it: ImageBlock) -> list[int]:
    return [int(each) for each in it.pages[:, 0]]


@pytest.mark.parametrize("order", [(2, 3, 4), (4, 2, 3), (2,)])
def test_pages_are_stored_in_any_order(order: tuple[int, ...]) -> None:
    it = block()
    it.write(offsets(*order), content(*order))
    assert [firsts(it)[each] for each in order] == list(order)
    for marks in (it.have, it.touched, it.dirty):
        assert np.flatnonzero(marks).tolist() == sorted(order)


def test_zeros_overwrite_only_what_was_written() -> None:
    it = block()
    it.write(offsets(1, 2), content(1, 2))
    it.write_zeros(offsets(2, 3))
    assert firsts(it) == [0, 1, 0, 0, 0, 0, 0, 0]
    assert np.flatnonzero(it.have).tolist() == [1, 2, 3]
    assert np.flatnonzero(it.touched).tolist() == [1]


def test_what_is_here_is_not_written_again_in_postcopy() -> None:
    it = block()
    it.write(offsets(1), content(9))
    assert it.write_missing(offsets(0, 1, 2), content(5, 5, 5)) == 2
    assert it.write_missing(offsets(0, 1), content(6, 6)) == 0
    assert it.write_missing_zeros(offsets(1, 3)) == 1
    assert firsts(it)[:4] == [5, 9, 5, 0]
    assert np.flatnonzero(it.have).tolist() == [0, 1, 2, 3]


def test_what_was_taken_back_is_owed_until_it_comes() -> None:
    image = Image()
    it = image.add_block(RamBlock("ram", 8 * SIZE))
    it.write(offsets(1), content(9))
    it.discard(SIZE, 2 * SIZE)
    assert (image.owed_pages(), image.missing_pages()) == (2, 8)
    it.write_missing(offsets(1), content(7))
    assert image.owed_pages() == 1
    it.write_missing_zeros(offsets(2))
    assert image.owed_pages() == 0
    it.assume_zeros()
    assert image.has_all_pages
    assert firsts(it)[:3] == [0, 7, 0]
    image.close()


def test_a_page_that_never_came_is_zero_at_the_end_whatever_it_was() -> None:
    it = block()
    it.write(offsets(1), content(9))
    it.discard(SIZE, SIZE)
    it.assume_zeros()
    assert firsts(it) == [0] * 8


def test_a_part_of_a_host_page_does_not_count() -> None:
    it = block(1024, page_size=512 * SIZE)
    it.write(offsets(*range(512), 600), content(*[1] * 513))
    it.forget_parts()
    assert np.flatnonzero(it.have).tolist() == list(range(512))


def test_pages_can_be_read_to_their_place() -> None:
    it = block()
    it.place(2, 2)[:] = b"\7" * 2 * SIZE
    assert not it.have.any()
    it.placed(2, 2)
    assert firsts(it)[1:5] == [0, 7, 7, 0]
    assert np.flatnonzero(it.have & it.touched & it.dirty).tolist() == [2, 3]


@pytest.mark.parametrize(("numbers", "count"), [((3,), 1), ((3, 4, 5), 3), ((3, 4, 9, 10), 2), ((3, 2), 1)])
def test_how_many_pages_lie_side_by_side(numbers: tuple[int, ...], count: int) -> None:
    assert leading_run(offsets(*numbers)) == count


def test_memory_that_there_is_not_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="allocate memory"):
        MemoryFile("too much", 1 << 50)
    assert os.listdir("/proc/self/fd") == before


def test_a_long_name_is_no_obstacle() -> None:
    memory = MemoryFile("x" * 255, SIZE)
    assert memory.read(0, 1).shape == (1, SIZE)
    memory.close()


def test_memory_of_others_is_read_at_its_place() -> None:
    fd = os.memfd_create("other")
    os.write(fd, b"\1" * SIZE + b"\2" * SIZE + b"\3" * SIZE)
    memory = ForeignMemory(fd, SIZE)
    assert memory.read(0, 2)[:, 0].tolist() == [2, 3]
    with pytest.raises(OSError, match="memory ends"):
        memory.read(1, 2)
    memory.close()


def test_who_waits_for_pages_is_woken() -> None:
    image, heard = Image(), []
    image.on_pages(lambda: heard.append(1))
    image.announce_pages()
    assert heard == [1]
    assert image.machine == ""
