"""RAM records, one by one and in runs."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest

from tests.wire_streams import BLOCK, BLOCKS, ROM, SIZE, join, pages, zeros
from vmferry.wire import limits, mapped_ram, ram
from vmferry.wire.buffer import Buffer
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    NEED_DATA,
    CompressedPage,
    EndOfRam,
    Event,
    MappedData,
    MemorySize,
    MultifdFlush,
    PageRun,
    RamBlock,
    XbzrlePage,
    ZeroRun,
)
from vmferry.wire.ram import RamReader


def reader(**more: Any) -> RamReader:
    return RamReader(page_size=SIZE, blocks=dict(BLOCKS), **more)


def read(target: RamReader, data: bytes, *, slab: int = 1 << 20) -> list[Any]:
    buffer = Buffer()
    found: list[Any] = []
    for at in range(0, len(data), slab):
        buffer.feed(data[at : at + slab])
        while (event := target.next(buffer)) is not NEED_DATA:
            found.append(event)
        buffer.release()
    return found


def refused(data: bytes, target: RamReader | None = None) -> str:
    with pytest.raises(WireError) as caught:
        read(reader() if target is None else target, data)
    return caught.value.reason


MIXED: list[Event] = [
    pages([5]),
    pages(range(6, 60), named=False),
    zeros(range(3)),
    pages([1, 2], block=ROM),
    zeros([3], block=ROM),
    zeros([60], block=BLOCK, named=True),
    XbzrlePage(BLOCK, 6 * SIZE, b"\x00\x01\xf0", named=False),
    XbzrlePage(ROM, 0, b"", named=True),
    MultifdFlush(),
    EndOfRam(),
]


@pytest.mark.parametrize("slab", [1, 9, 4104, 4105, 10_000, 1 << 20])
def test_there_and_back_however_it_is_cut(slab: int) -> None:
    data = join(MIXED)
    found = read(reader(), data, slab=slab)
    assert join(found) == data
    memory = {name: np.zeros((each.used_length // SIZE, SIZE), np.uint8) for name, each in BLOCKS.items()}
    for event in found:
        if isinstance(event, PageRun):
            memory[event.block.name][event.offsets // SIZE] = event.pages
    assert memory["pc.ram"][:60, 7].tolist() == [0] * 5 + list(range(5, 60))
    assert memory["pc.rom"][:, 7].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 255, 256, 264, 265, 5000])
def test_runs_of_every_length_end_where_they_end(count: int) -> None:
    """Around the numbers at which the way of looking changes."""
    block = RamBlock("big", 8192 * SIZE)
    target = RamReader(page_size=SIZE, blocks={"big": block})
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(SIZE)
    first = ZeroRun(block, offsets[:1], named=True)
    run = ZeroRun(block, offsets, named=False)
    for behind in (EndOfRam(), pages([3], block=block, named=False)):
        found = read(target, join([first, run, behind]))
        assert len(found) == 3
        assert found[1].offsets.tolist() == offsets.tolist()
    found = read(target, join([first, run]))
    assert len(found) == 2


def test_a_run_of_pages_is_a_view_of_the_slab() -> None:
    data = bytearray(join([pages([0]), pages(range(1, 40), named=False)]))
    buffer = Buffer()
    buffer.feed(data)
    target = reader()
    target.next(buffer)
    run = target.next(buffer)
    assert isinstance(run, PageRun)
    assert len(run.offsets) == 39
    data[-1] = 77
    assert run.pages[-1, -1] == 77
    assert ram.page_heads(run).tobytes()[:8] == struct.pack(">Q", SIZE | ram.PAGE | ram.CONTINUE)


@pytest.mark.parametrize("first", [0, 1, 900, 1023, 1024, 2047, 3000])
def test_pages_side_by_side_are_known_as_such_up_to_the_end_of_their_block(first: int) -> None:
    block = RamBlock("big", 3100 * SIZE)
    target = RamReader(page_size=SIZE, blocks={"big": block})
    read(target, join([pages([0], block=block)]))
    buffer = Buffer()
    numbers = list(range(first, min(first + 1500, 3100)))
    buffer.feed(join([pages(numbers, block=block, named=False)]))
    found: list[int] = []
    while len(buffer):
        run = target.next(buffer)
        assert isinstance(run, PageRun)
        assert run.is_row
        assert run.pages[:, 7].tolist() == [each & 0xFF for each in numbers[len(found) : len(found) + len(run.pages)]]
        found += (run.offsets // SIZE).tolist()
    assert found == numbers


@pytest.mark.parametrize("numbers", [[1, 2, 4, 5], [1, 2, 2, 3], [3, 2, 1, 0], [1, 2, 3, 5], [1, *range(3, 60)]])
def test_pages_that_do_not_lie_side_by_side_are_not_taken_for_such(numbers: list[int]) -> None:
    target = reader()
    read(target, join([pages([0])]))
    buffer = Buffer()
    buffer.feed(join([pages(numbers, named=False)]))
    run = target.next(buffer)
    assert isinstance(run, PageRun)
    assert not run.is_row
    assert (run.offsets // SIZE).tolist() == numbers


def test_the_last_pages_of_a_block_end_where_another_block_begins() -> None:
    target = reader()
    buffer = Buffer()
    buffer.feed(join([pages([0]), pages(range(60, 64), named=False), pages(range(6), block=ROM)]))
    target.next(buffer)
    run = target.next(buffer)
    assert isinstance(run, PageRun)
    assert (run.offsets // SIZE).tolist() == [60, 61, 62, 63]
    after = target.next(buffer)
    assert isinstance(after, PageRun)
    assert after.block == ROM


def test_a_run_ends_before_a_page_outside_of_its_block() -> None:
    for kind in (pages, zeros):
        target = reader()
        data = join([pages([0]), kind([*range(50), 64], named=False)])
        buffer = Buffer()
        buffer.feed(data)
        target.next(buffer)
        run = target.next(buffer)
        assert isinstance(run, PageRun | ZeroRun)
        assert len(run.offsets) == 50
        with pytest.raises(WireError) as caught:
            target.next(buffer)
        assert caught.value.reason == "ram-range"


@pytest.mark.parametrize("at", [0, 3, 20])
def test_a_page_filled_with_something_is_refused(at: int) -> None:
    filled = bytearray(join([zeros(range(30))]))
    filled[9 * at + 8] = 1
    assert refused(join([pages([0])]) + bytes(filled)) == "ram-fill"


@pytest.mark.conforms("15")
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (0x400, "ram-flags"),
        (0x001, "ram-flags"),
        (0x080, "ram-flags"),
        (0x102, "ram-flags"),
        (0x108, "ram-flags"),
        (0x100, "ram-flags"),
        (0x00A, "ram-flags"),
        (0x000, "ram-flags"),
        (0x1010, "ram-flags"),
        (0x030, "ram-flags"),
        (0x1004, "ram-flags"),
        (0x1200, "ram-flags"),
        (0x028, "ram-continue"),
    ],
)
def test_words_that_are_refused(word: int, reason: str) -> None:
    assert refused(struct.pack(">Q", word) + bytes(5000)) == reason


@pytest.mark.parametrize("word", [0x200, 0x040, 0x004])
def test_what_postcopy_and_preempt_refuse(word: int) -> None:
    data = struct.pack(">Q", word) + b"\x06pc.ram\x01\x00\x00"
    for kind in ("is_postcopy", "is_preempt"):
        target = reader()
        setattr(target, kind, True)
        assert refused(data, target) == "ram-flags"


def test_blocks_that_are_refused() -> None:
    assert refused(struct.pack(">Q", 8) + b"\x03vga" + bytes(SIZE)) == "ram-block"
    assert refused(struct.pack(">Q", 8 | 64 * SIZE) + b"\x06pc.ram" + bytes(SIZE)) == "ram-range"


def test_xbzrle_heads() -> None:
    head = struct.pack(">Q", 0x40) + b"\x06pc.ram"
    assert refused(head + b"\x02\x00\x01") == "ram-xbzrle"
    assert refused(head + b"\x01\x10\x01") == "ram-xbzrle"


def test_compressed_pages() -> None:
    content = bytes(range(256)) * 16
    good = CompressedPage(BLOCK, 0, zlib.compress(content), named=True)
    more = CompressedPage(BLOCK, SIZE, zlib.compress(content), named=False)
    data = join([good, more])
    for slab in (1, 1 << 20):
        found = read(reader(compress=True), data, slab=slab)
        assert found == [good, more]
    assert ram.inflate_page(good, SIZE) == content
    long = struct.pack(">Q", 0x100) + b"\x06pc.ram" + struct.pack(">I", 6000)
    assert refused(long, reader(compress=True)) == "ram-compressed"


@pytest.mark.parametrize(
    "data", [b"no zlib", zlib.compress(bytes(4095)), zlib.compress(bytes(4097)), zlib.compress(bytes(4096)) + b"x"]
)
def test_compressed_pages_that_are_no_page(data: bytes) -> None:
    with pytest.raises(WireError) as caught:
        ram.inflate_page(CompressedPage(BLOCK, 0, data, named=True), SIZE)
    assert caught.value.reason == "ram-compressed"


# --- the block list -----------------------------------------------------------------------------------------


def listed(*blocks: RamBlock) -> bytes:
    return join([MemorySize(sum(each.used_length for each in blocks)), *blocks, EndOfRam()])


@pytest.mark.conforms("44")
@pytest.mark.parametrize("slab", [1, 1000])
@pytest.mark.parametrize(
    ("flags", "blocks"),
    [
        ({}, [BLOCK, ROM]),
        ({"ignore_shared": True}, [RamBlock("m0", SIZE, address=1 << 32), RamBlock("m1", SIZE, address=0)]),
        ({"has_page_sizes": True}, [RamBlock("huge", 2 << 20, page_size=2 << 20), ROM]),
        ({"has_page_sizes": True}, [ROM, RamBlock("huge", 2 << 20, page_size=2 << 20)]),
    ],
)
def test_block_lists(slab: int, flags: dict[str, bool], blocks: list[RamBlock]) -> None:
    target = RamReader(page_size=SIZE)
    for name, value in flags.items():
        setattr(target, name, value)
    found = read(target, listed(*blocks), slab=slab)
    assert found[1:-1] == blocks
    assert found[0] == MemorySize(ram.total_bytes(target.blocks))
    assert refused(listed(BLOCK), target) == "ram-flags"  # only once


def test_block_lists_of_mapped_files() -> None:
    target = RamReader(page_size=SIZE, mapped=True)
    at = 8 + 1 + 6 + 8
    block = RamBlock("pc.ram", SIZE, mapped=mapped_ram.place(SIZE, file_offset=at, page_size=SIZE))
    found = read(target, join([MemorySize(SIZE), block, EndOfRam()]))
    assert found == [MemorySize(SIZE), block, EndOfRam()]
    assert join([MappedData(0, memoryview(b"abc"))]) == b"abc"
    for word in (0x008, 0x028, 0x022, 0x200):
        assert refused(struct.pack(">Q", word) + b"\x06pc.ram" + bytes(SIZE), target) == "ram-flags"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack(">Q", 4), "ram-size"),
        (struct.pack(">Q", limits.RAM_BYTES_MAX + SIZE | 4), "ram-size"),
        (listed(RamBlock("a", SIZE), RamBlock("a", SIZE)), "ram-block"),
        (listed(RamBlock("", SIZE)), "ram-block"),
        (listed(RamBlock("a", 0), RamBlock("b", SIZE)), "ram-block-size"),
        (struct.pack(">Q", SIZE | 4) + b"\x01a" + struct.pack(">Q", 2 * SIZE), "ram-block-size"),
        (struct.pack(">Q", SIZE | 4) + b"\x01a" + struct.pack(">Q", 100), "ram-block-size"),
    ],
)
def test_block_lists_that_are_refused(data: bytes, reason: str) -> None:
    assert refused(data, RamReader(page_size=SIZE)) == reason


def test_a_page_size_that_is_none() -> None:
    target = RamReader(page_size=SIZE)
    target.has_page_sizes = True
    assert refused(listed(RamBlock("a", 6 * SIZE, page_size=3 * SIZE)), target) == "ram-page-size"


def test_other_page_sizes() -> None:
    target = RamReader(page_size=SIZE)
    target.set_page_size(16384)
    block = RamBlock("m", 64 * 16384)
    run = pages(range(12), block=block, size=16384)
    data = join([MemorySize(block.used_length), block, run, EndOfRam()])
    found = read(target, data)
    assert join(found) == data
    assert [len(each.offsets) for each in found if isinstance(each, PageRun)] == [1, 11]
