"""Small streams of every kind, made with the encoder: for tests of the wire and as seeds of its fuzzers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from backports.zstd import ZstdCompressor

from vmferry.wire import iterable
from vmferry.wire.encode import encode, encode_package
from vmferry.wire.events import (
    DONE,
    NEED_DATA,
    BitmapChunk,
    Configuration,
    Description,
    DeviceSection,
    Discard,
    EndOfRam,
    EndOfSections,
    Event,
    Header,
    MemorySize,
    MultifdFlush,
    MultifdInit,
    MultifdPages,
    MultifdPayload,
    OpenReturnPath,
    PageRun,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamBlock,
    SectionFooter,
    SectionPart,
    SectionStart,
    SwitchoverStart,
    XbzrlePage,
    ZeroRun,
)
from vmferry.wire.multifd import ZLIB, make_packet, make_sync

SIZE = 4096
BLOCK = RamBlock("pc.ram", 64 * SIZE)
ROM = RamBlock("pc.rom", 4 * SIZE)
BLOCKS = {each.name: each for each in (BLOCK, ROM)}


def join(events: Iterable[Event]) -> bytes:
    """The bytes of these events."""
    return b"".join(bytes(part) for event in events for part in encode(event))


def drain(decoder: Any) -> list[Any]:
    """Events up to NEED_DATA or DONE."""
    found: list[Any] = []
    while (event := decoder.next()) is not NEED_DATA and event is not DONE:
        found.append(event)
    return found


def pages(numbers: Iterable[int], *, block: RamBlock = BLOCK, named: bool = True, size: int = SIZE) -> PageRun:
    """Pages with these numbers, each filled with its number."""
    each = np.array(list(numbers), np.uint64)
    content = np.repeat(each.astype(np.uint8)[:, None], size, axis=1)
    return PageRun(block, each * np.uint64(size), content, named)


def zeros(numbers: Iterable[int], *, block: RamBlock = BLOCK, named: bool = False, size: int = SIZE) -> ZeroRun:
    """Zero pages with these numbers."""
    return ZeroRun(block, np.array(list(numbers), np.uint64) * np.uint64(size), named)


def device(section_id: int, name: str, body: bytes, *, instance: int = 0, early: bool = False) -> list[Event]:
    """A device section with its footer."""
    return [DeviceSection(section_id, name, instance, 1, body, early), SectionFooter(section_id)]


def describe(sections: Iterable[Event], **more: Any) -> Description:
    """The vmdescription of these device sections."""
    devices = [
        {
            "name": each.idstr,
            "instance_id": each.instance,
            "vmsd_name": each.idstr,
            "version": each.version,
            "fields": [{"name": "state", "type": "buffer", "size": len(each.body)}],
        }
        for each in sections
        if isinstance(each, DeviceSection)
    ]
    return Description(json.dumps({"page_size": SIZE, "devices": devices, **more}).encode())


def opening(machine: str = "pc-i440fx-11.1", *, advise: bool = False) -> list[Event]:
    """Everything up to RAM's block list."""
    events: list[Event] = [Header(), Configuration(machine), OpenReturnPath(), Ping(1)]
    if advise:
        events.append(PostcopyAdvise(SIZE, SIZE))
    return [*events, *setup()]


def setup() -> list[Event]:
    """RAM's START."""
    total = BLOCK.used_length + ROM.used_length
    return [
        SectionStart(2, "ram", 0, 4), MemorySize(total), BLOCK, ROM, MultifdFlush(), EndOfRam(), SectionFooter(2),
    ]  # fmt: skip


def part(*records: Event, last: bool = False, section_id: int = 2) -> list[Event]:
    """A body of RAM with its frame."""
    return [SectionPart(section_id, last), *records, EndOfRam(), SectionFooter(section_id)]


def bitmaps() -> list[Event]:
    """Dirty bitmaps: introduced, filled and ended."""
    names = iterable.DEVICE_NAME | iterable.BITMAP_NAME
    return [
        SectionStart(5, "dirty-bitmap", 0, 1),
        BitmapChunk(names | iterable.START, "node", "bm0", 65536, 1),
        BitmapChunk(iterable.EOS),
        SectionFooter(5),
        SectionPart(5, last=True),
        BitmapChunk(iterable.BITS | iterable.BITMAP_NAME, None, "bm0", first_sector=0, sectors=128, data=bytes(32)),
        BitmapChunk(iterable.BITS | iterable.ZEROES, first_sector=128, sectors=128),
        BitmapChunk(iterable.COMPLETE),
        BitmapChunk(iterable.EOS),
        SectionFooter(5),
    ]


def devices_of_a_pc() -> list[Event]:
    """With a body that holds its own footer, and one that looks like a vmdescription."""
    return [
        *device(0, "timer", b"\x7e\x00\x00\x00\x00\x00" + bytes(18)),
        *device(7, "apic", b"\x00\x06\x00\x00\x00\x04{\"x\"" + bytes(30)),
        *device(8, "dma", b"\x09" * 75, instance=1),
        *device(9, "empty", b""),
    ]  # fmt: skip


def precopy(*, description: bool = True) -> list[Event]:
    """A whole precopy stream."""
    devices = devices_of_a_pc()
    events = [
        *opening(),
        *part(pages(range(20)), zeros(range(20, 40)), pages([41], named=False)),
        *part(),
        *part(pages([1], named=False), XbzrlePage(BLOCK, SIZE, b"\x00\x01\xf0", named=False), MultifdFlush()),
        SwitchoverStart(),
        *part(pages([0, 1], block=ROM), last=True),
        *devices,
        EndOfSections(),
    ]
    return [*events, describe(devices)] if description else events


def package() -> list[Event]:
    """What a switchover package holds."""
    return [PostcopyListen(), *devices_of_a_pc(), Ping(3), Ping(0x42), PostcopyRun()]


def postcopy() -> bytes:
    """A whole postcopy stream."""
    before = [
        *opening(advise=True),
        *part(pages(range(4))),
        *part(),
        SwitchoverStart(),
        Discard("pc.ram", ((0, 8 * SIZE), (16 * SIZE, SIZE))),
        Ping(2),
    ]
    behind = [Ping(4), *part(pages([3, 1]), zeros([2])), *part(last=True), EndOfSections()]
    return join(before) + b"".join(bytes(each) for each in encode_package(package())) + join(behind)


def multifd() -> list[Event]:
    """A channel with plain pages, zero pages and a SYNC."""
    run = pages(range(5))
    packet = make_packet(BLOCK, run.offsets, zeros([9, 10]).offsets, number=1)
    return [MultifdInit(1), packet, MultifdPages(BLOCK, run.offsets, run.pages), make_sync(number=2)]


def multifd_compressed(kind: int) -> list[Event]:
    """A channel with two compressed packets (2 zlib, 4 zstd), one endless stream."""
    events: list[Event] = [MultifdInit(0)]
    zlib_stream, zstd_stream = zlib.compressobj(), ZstdCompressor()
    for number in (1, 2):
        run = pages(range(number, number + 5))
        plain = run.pages.tobytes()
        if kind == ZLIB:
            data = zlib_stream.compress(plain) + zlib_stream.flush(zlib.Z_SYNC_FLUSH)
        else:
            data = zstd_stream.compress(plain, ZstdCompressor.FLUSH_BLOCK)
        none = np.zeros(0, np.uint64)
        packet = make_packet(BLOCK, run.offsets, none, number=number, flags=kind, payload_bytes=len(data))
        events += [packet, MultifdPayload(memoryview(data), last=True)]
    return events
