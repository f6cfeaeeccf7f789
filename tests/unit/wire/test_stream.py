"""The main channel. Whole recorded streams are in tests/golden."""

from __future__ import annotations

from typing import Any

import pytest

from tests.wire_streams import (
    SIZE,
    bitmaps,
    describe,
    device,
    devices_of_a_pc,
    drain,
    join,
    opening,
    package,
    pages,
    part,
    postcopy,
    precopy,
    setup,
    zeros,
)
from vmferry.wire import limits, mapped_ram
from vmferry.wire.configuration import CAPABILITIES, PAGE_BITS
from vmferry.wire.encode import encode_package
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    DONE,
    NEED_DATA,
    AskBitmap,
    Configuration,
    Description,
    DeviceSection,
    EndOfRam,
    EndOfSections,
    Event,
    Header,
    MappedData,
    MemorySize,
    OpaqueDevices,
    Packaged,
    PackageEnd,
    PageRun,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamBlock,
    SectionFooter,
    SectionPart,
    SectionStart,
)
from vmferry.wire.stream import Section, Settings, StreamDecoder

LENIENT = Settings(end="end-of-input")
HEADER = join([Header()])


BARE = join([*opening(), *part(), EndOfSections(), describe([])])


def decode(data: bytes, settings: Settings | None = None, *, finish: bool = False) -> tuple[StreamDecoder, list[Any]]:
    decoder = StreamDecoder(settings)
    decoder.feed(data)
    found = drain(decoder)
    if finish:
        decoder.finish()
        found += drain(decoder)
    return decoder, found


def refused(data: bytes, settings: Settings | None = None, *, finish: bool = False) -> str:
    decoder = StreamDecoder(settings)
    decoder.feed(data)
    if finish:
        drain(decoder)
        decoder.finish()
    with pytest.raises(WireError) as caught:
        drain(decoder)
    with pytest.raises(WireError) as again:
        decoder.next()
    assert again.value is caught.value
    return caught.value.reason


@pytest.mark.conforms("2")
@pytest.mark.parametrize("slab", [1, 4099, 1 << 20])
@pytest.mark.parametrize(
    "data", [join(precopy()), postcopy(), join([*opening(), *part(), EndOfSections(), describe([])])]
)
def test_whole_streams_there_and_back(data: bytes, slab: int) -> None:
    decoder = StreamDecoder()
    found: list[Event] = []
    for at in range(0, len(data), slab):
        decoder.feed(data[at : at + slab])
        found += drain(decoder)
    assert decoder.next() is DONE
    assert join(found) == data
    assert decoder.offset == len(data)


def test_a_package_comes_whole() -> None:
    data = postcopy()
    end = data.index(join([Ping(4)]))
    decoder, found = decode(data[: end - 1])
    assert not any(isinstance(each, PostcopyListen | DeviceSection | Packaged) for each in found)
    assert not decoder.is_postcopy
    decoder.feed(data[end - 1 : end])
    found = drain(decoder)
    assert found[0] == Packaged(len(join(package())))
    assert found[1:] == [*package(), PackageEnd()]
    assert decoder.is_postcopy


@pytest.mark.conforms("14")
def test_bitmaps_beside_ram() -> None:
    events = [*opening(), *bitmaps()[:4], *part(last=True), *bitmaps()[4:], EndOfSections(), describe([])]
    decoder, found = decode(join(events))
    assert found == events
    assert decoder.next() is DONE


@pytest.mark.conforms("4")
def test_streams_of_old_machines() -> None:
    """No configuration, no footers, and no vmdescription: nothing tells where a device ends."""
    events = [each for each in precopy(description=False) if not isinstance(each, Configuration | SectionFooter)]
    data = join(events)
    _, found = decode(data, LENIENT, finish=True)
    assert isinstance(found[-1], OpaqueDevices)
    assert join(found) == data
    assert refused(data, finish=True) == "truncated"
    described = [*events, describe(events)]
    decoder, found = decode(join(described))
    assert join(found) == join(described)
    assert decoder.next() is DONE


@pytest.mark.parametrize("more", [b"", b"\x06\x00\x00\x00\x02{}"])
def test_the_end_of_the_input_may_end_a_stream(more: bytes) -> None:
    data = join(precopy(description=False)) + more
    decoder, found = decode(data, LENIENT, finish=True)
    assert join(found) == data
    assert sum(isinstance(each, DeviceSection) for each in found) == 4
    assert decoder.next() is DONE
    assert refused(data, finish=True) == "truncated"
    assert refused(data[: len(data) - len(more) - 1] + b"\x01" + more, LENIENT, finish=True) == "truncated"


def test_without_devices() -> None:
    data = join([*opening(), *part(), EndOfSections()])
    assert decode(data, LENIENT, finish=True)[0].next() is DONE
    assert refused(data, finish=True) == "truncated"
    assert refused(data + b"\x06", LENIENT, finish=True) == "truncated"
    assert refused(data + b"\x06\xff\xff\xff\xff") == "description"
    assert refused(data + b"\x05\x00\x00\x00\x00") == "description"
    decoder, _ = decode(data + b"\x06\x00\x00\x00\x02{")
    assert decoder.next() is NEED_DATA
    decoder.feed(b"}more")
    assert drain(decoder) == [Description(b"{}")]
    assert decoder.unread_bytes == 4


@pytest.mark.conforms("8")
@pytest.mark.parametrize("slab", [1, 1 << 20])
def test_early_devices(slab: int) -> None:
    early = [*device(3, "mem-early", b"\x7e\x00\x00\x00\x03\x00", early=True), *device(4, "b", b"", early=True)]
    late = devices_of_a_pc()
    events = [*opening()[:4], *early, *setup(), *part(last=True), *late, EndOfSections(), describe([*early, *late])]
    data = join(events)
    decoder = StreamDecoder()
    found = []
    for at in range(0, len(data), slab):
        decoder.feed(data[at : at + slab])
        found += drain(decoder)
    assert found == events
    assert decoder.next() is DONE


def test_too_many_early_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECTIONS_MAX", 1)
    early = [*device(3, "a", b"", early=True), *device(4, "b", b"", early=True)]
    assert refused(join([*opening()[:4], *early, *setup()])) == "sections"


def test_recovery_goes_on_with_what_was_known() -> None:
    before, _ = decode(join([*opening(advise=True), *bitmaps()[:4], *part(pages([1]))]))
    resumed = StreamDecoder(resume=before.resume())
    assert resumed.is_postcopy
    events = [AskBitmap("pc.ram"), PostcopyResume(), *part(pages([2]), zeros([3])), *part(last=True), EndOfSections()]
    resumed.feed(join(events))
    assert join(drain(resumed)) == join(events)
    assert resumed.next() is DONE
    # A source that never heard the result says the end of RAM once more.
    again = StreamDecoder(resume=resumed.resume())
    again.feed(join([*part(last=True), EndOfSections()]))
    assert join(drain(again)) == join([*part(last=True), EndOfSections()])
    assert again.next() is DONE
    assert before.resume().sections == {2: Section("ram"), 5: Section("dirty-bitmap")}


@pytest.mark.conforms("6")
def test_the_last_block_is_forgotten_at_a_recovery() -> None:
    before, _ = decode(join([*opening(), *part(pages([1]))]))
    resumed = StreamDecoder(resume=before.resume())
    resumed.feed(join(part(pages([2], named=False))))
    with pytest.raises(WireError) as caught:
        drain(resumed)
    assert caught.value.reason == "ram-continue"


def mapped() -> tuple[bytes, RamBlock]:
    configuration = Configuration("pc", capabilities=("mapped-ram",), order=(CAPABILITIES,))
    head = join([Header(), configuration, SectionStart(2, "ram", 0, 4), MemorySize(2 * SIZE)])
    place = mapped_ram.place(2 * SIZE, file_offset=512 + len(head) + 2 + 8, page_size=SIZE)
    block = RamBlock("m", 2 * SIZE, mapped=place)
    return head + join([block]), block


@pytest.mark.conforms("30")
@pytest.mark.parametrize("jump", [True, False])
def test_mapped_files_at_an_offset(jump: bool) -> None:
    head, block = mapped()
    behind = join([EndOfRam(), SectionFooter(2), SectionPart(2, last=True), EndOfRam(), SectionFooter(2)])
    gap = mapped_ram.gap_end(block) - 512 - len(head)
    decoder, found = decode(head, Settings(file_offset=512))
    assert found[-1] == block
    assert decoder.gap_bytes == gap
    if jump:
        decoder.skip_gap()
    else:
        decoder.feed(bytes(gap - 5))
        assert sum(len(each.data) for each in drain(decoder)) == gap - 5
        decoder.feed(bytes(5) + behind[:1])
        (piece,) = drain(decoder)
        assert isinstance(piece, MappedData)
        assert piece.file_offset == 512 + len(head) + gap - 5
        behind = behind[1:]
    assert decoder.gap_bytes == 0
    decoder.feed(behind)
    assert drain(decoder)[-1] == SectionFooter(2)
    assert decoder.offset == len(head) + gap + len(behind) + (0 if jump else 1)


@pytest.mark.conforms("2", "44")
def test_page_bits_and_page_sizes() -> None:
    configuration = Configuration("virt", page_bits=14, order=(PAGE_BITS,))
    decoder, _ = decode(join([Header(), configuration, PostcopyAdvise(16384 | 1 << 21, 16384)]))
    assert decoder.ram.page_size == 16384
    assert decoder.ram.has_page_sizes
    for advise in (PostcopyAdvise(), PostcopyAdvise(SIZE, SIZE)):
        decoder, _ = decode(join([Header(), Configuration("pc"), advise]))
        assert not decoder.ram.has_page_sizes


START = join(opening())
LISTENING = postcopy()[: postcopy().index(join([Ping(4)]))]


def packaged(*events: Event) -> bytes:
    return START + b"".join(bytes(each) for each in encode_package(list(events)))


@pytest.mark.conforms("1", "4", "15")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"QEVN\x00\x00\x00\x03", "magic"),
        (b"QEVM\x00\x00\x00\x02", "version"),
        (b"QEVM\x00\x00\x00\x04", "version"),
        (HEADER + b"\x09", "tag"),
        (START + b"\x05", "tag"),
        (START + b"\x06", "tag"),
        (START + b"\x07", "tag"),
        (START + b"\x7e", "tag"),
        (HEADER + join([SectionStart(2, "ram", 0, 3)]), "section-version"),
        (HEADER + join([SectionStart(9, "0000:00:02.0/vfio", 0, 1)]), "section-unknown"),
        (START + join([SectionStart(2, "dirty-bitmap", 0, 1)]), "section-twice"),
        (START + join([SectionStart(3, "ram", 0, 4)]), "section-twice"),
        (START + join([SectionPart(3, last=False)]), "section-id"),
        (START + join([*part(last=True), *part()]), "section-id"),
        (START + join([SectionPart(2, last=False), EndOfRam(), SectionFooter(3)]), "footer"),
        (START + join([SectionPart(2, last=False), EndOfRam()]) + bytes(5), "footer"),
        (START + b"\x08\x00\x0c\x00\x00", "command-unknown"),
        (START + join([PostcopyListen()]), "command-place"),
        (START + join([PostcopyRun()]), "command-place"),
        (START + join([PostcopyResume()]), "command-place"),
        (START + join([AskBitmap("m")]), "command-place"),
        (LISTENING + join([Packaged(9)]), "command-place"),
        (LISTENING + join(device(9, "x", b"")), "section-place"),
        (packaged(Ping(1)), "package"),
        (packaged(PostcopyListen(), Header()), "package"),
        (packaged(PostcopyListen(), Packaged(7)), "command-place"),
        (packaged(PostcopyListen(), PostcopyAdvise()), "command-place"),
    ],
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    assert refused(data) == reason


EARLY = join([*opening()[:4], *device(3, "e", b"")])


@pytest.mark.parametrize(
    "data", [b"", HEADER, HEADER + b"\x01", START + b"\x02", START + b"\x08", LISTENING[:-1], EARLY]
)
def test_truncations(data: bytes) -> None:
    assert refused(data, LENIENT, finish=True) == "truncated"


def test_a_page_that_is_cut_is_read_with_the_rest_of_its_run_where_there_is_room_for_its_beginning() -> None:
    room, stride = 2 * SIZE, 8 + SIZE
    count, at = 20, 0
    data = join([pages(range(count), named=False)])
    slab = memoryview(bytearray(room + 10_000))
    decoder = StreamDecoder()
    decoder.feed(join([*opening(), SectionPart(2, last=False), pages([63])]))
    drain(decoder)
    found: list[int] = []
    while at < len(data):
        piece = data[at : at + 10_000]
        at += len(piece)
        slab[room : room + len(piece)] = piece
        decoder.feed_behind(slab, room, room + len(piece))
        runs = [each for each in drain(decoder) if isinstance(each, PageRun)]
        found += [int(each) for run in runs for each in run.offsets]
        assert len(runs) == 1
        assert len(found) == at // stride  # nothing waits but what has not come whole
        assert runs[0].is_row
    assert found == [SIZE * number for number in range(count)]
    assert decoder.unread_bytes == 0
