"""Recorded streams of real QEMUs: each decodes to what its oracle says, and encodes to the same bytes again."""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmferry.wire import description, mapped_ram, ram, xbzrle
from vmferry.wire.encode import encode
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    DONE,
    NEED_DATA,
    AskBitmap,
    BitmapEnd,
    CompressedPage,
    Configuration,
    Description,
    DeviceSection,
    Discard,
    EndOfRam,
    EndOfSections,
    Event,
    MappedData,
    MemorySize,
    MultifdFlush,
    MultifdInit,
    MultifdPacket,
    MultifdPages,
    MultifdPayload,
    OpaqueDevices,
    OpenReturnPath,
    Packaged,
    PageRun,
    Ping,
    Pong,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamBlock,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    SectionStart,
    Shut,
    SwitchoverAck,
    SwitchoverStart,
    XbzrlePage,
    ZeroRun,
)
from vmferry.wire.multifd import SYNC, MultifdDecoder, PageInflater
from vmferry.wire.preempt import PreemptDecoder
from vmferry.wire.return_path import ReturnPathDecoder, check_request
from vmferry.wire.stream import Settings, StreamDecoder

SAMPLES = Path(__file__).parent / "samples"
EXPECTED: dict[str, Any] = json.loads((SAMPLES / "expected.json").read_text())
NAMES = sorted(EXPECTED)
MAPPED = "mapped-ram-q111-m111.file.xz"
SLAB = 1 << 20
# What a recovery goes on from.
FIRST = {each: each.replace("-r.rec.xz", ".rec.xz") for each in NAMES if each.endswith("-r.rec.xz")}


@lru_cache(maxsize=2)
def channels(name: str) -> dict[str, bytes]:
    """The bytes of a recording, by connection and direction (`0>`, `0<`, `1>`)."""
    raw = lzma.decompress((SAMPLES / name).read_bytes())
    found: dict[str, bytearray] = {}
    at = 0
    while at < len(raw):
        _time, connection, direction, length = struct.unpack_from("<dBBI", raw, at)
        at += 14
        if direction < 2:
            found.setdefault(f"{connection}{'><'[direction]}", bytearray()).extend(raw[at : at + length])
        at += length
    return {key: bytes(value) for key, value in found.items()}


def new_decoder(name: str) -> StreamDecoder:
    settings = Settings(compress=name.startswith("compress"), end="end-of-input")
    if name not in FIRST:
        if name.startswith(("suppress-vmdesc", "nofooter")):
            return StreamDecoder(settings)
        return StreamDecoder(Settings(compress=name.startswith("compress")))
    before = new_decoder(FIRST[name])
    list(events_of(before, channels(FIRST[name])["0>"], finish=False))
    return StreamDecoder(settings, resume=before.resume())


def events_of(decoder: Any, data: bytes, *, slab: int = SLAB, finish: bool = True) -> Iterator[Event]:
    """Every event of `data`; the slabs are overwritten after use, so that a view kept too long is noticed."""
    for at in range(0, len(data), slab):
        piece = bytearray(data[at : at + slab])
        decoder.feed(piece)
        yield from drain(decoder)
        piece[:] = b"\xee" * len(piece)
    if finish and hasattr(decoder, "finish"):
        decoder.finish()
        yield from drain(decoder)


def drain(decoder: Any) -> Iterator[Event]:
    while True:
        event = decoder.next()
        if event is NEED_DATA or event is DONE:
            return
        yield event


def encoded(event: Event) -> bytes:
    return b"".join(bytes(each) for each in encode(event))


class Guest:
    """What a correct receiver would end up with, and counts of how it got there."""

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}
        self.blocks: list[list[Any]] = []
        self.counts: Counter[str] = Counter(
            dict.fromkeys(("normal", "zero", "xbzrle", "zlibpage", "eos", "flush", "mem_size"), 0)
        )
        self.commands: list[str] = []
        self.devices: list[list[Any]] = []
        self.bodies: dict[tuple[str, int], bytes] = {}
        self.configuration: Configuration | None = None
        self.description: bytes | None = None
        self.discards = 0
        self.opaque = 0
        self.sections: list[str] = []

    def pages(self, block: RamBlock) -> Any:
        return self.memory.setdefault(block.name, np.zeros((block.used_length // 4096, 4096), np.uint8))

    def load(self, event: Event) -> None:
        match event:
            case PageRun(block, offsets, pages, _):
                self.pages(block)[offsets >> np.uint64(12)] = pages
                self.counts["normal"] += len(offsets)
            case ZeroRun(block, offsets, _):
                self.pages(block)[offsets >> np.uint64(12)] = 0
                self.counts["zero"] += len(offsets)
            case XbzrlePage(block, offset, delta, _):
                page = self.pages(block)[offset >> 12]
                content = bytearray(page.tobytes())
                xbzrle.apply(content, delta)
                page[:] = np.frombuffer(content, np.uint8)
                self.counts["xbzrle"] += 1
            case CompressedPage(block, offset, _, _):
                self.pages(block)[offset >> 12] = np.frombuffer(ram.inflate_page(event, 4096), np.uint8)
                self.counts["zlibpage"] += 1
            case EndOfRam():
                self.counts["eos"] += 1
            case MultifdFlush():
                self.counts["flush"] += 1
            case MemorySize():
                self.counts["mem_size"] += 1
            case RamBlock(name, used_length):
                self.blocks.append([name, used_length])
                self.pages(event)
            case _:
                self.load_other(event)

    def load_other(self, event: Event) -> None:
        match event:
            case Discard(block, ranges):
                self.discards += len(ranges)
                for start, length in ranges:
                    self.memory[block][start >> 12 : (start + length) >> 12] = 0
            case DeviceSection():
                self.devices.append([event.idstr, event.instance, len(event.body)])
                self.bodies[event.idstr, event.instance] = event.body
            case Configuration():
                self.configuration = event
            case Description(text):
                self.description = text
            case OpaqueDevices(data):
                self.opaque = len(data)
            case SectionStart():
                self.sections.append(event.idstr)
            case _:
                name = command_name(event)
                if name is not None:
                    self.commands.append(name)


def command_name(event: Event) -> str | None:
    """As the oracle writes it."""
    match event:
        case Ping(value):
            return f"PING {value:#x}"
        case OpenReturnPath():
            return "OPEN_RETURN_PATH"
        case PostcopyAdvise():
            return "POSTCOPY_ADVISE"
        case PostcopyListen():
            return "POSTCOPY_LISTEN"
        case PostcopyRun():
            return "POSTCOPY_RUN"
        case Packaged():
            return "PACKAGED"
        case PostcopyResume():
            return "POSTCOPY_RESUME"
        case AskBitmap():
            return "RECV_BITMAP"
        case SwitchoverStart():
            return "SWITCHOVER_START"
        case _:
            return None


def decode_main(name: str, *, slab: int = SLAB, on_barrier: Callable[[Guest], None] | None = None) -> Guest:
    """Decodes and re-encodes the main channel."""
    data = channels(name)["0>"]
    decoder = new_decoder(name)
    guest = Guest()
    at = 0
    is_old = "-m111" not in name
    finish = not ("recover" in name and name not in FIRST)  # those were cut in the middle
    for event in events_of(decoder, data, slab=slab, finish=finish):
        out = encoded(event)
        assert data[at : at + len(out)] == out, (at, event)
        at += len(out)
        guest.load(event)
        if on_barrier is not None and isinstance(event, EndOfRam if is_old else MultifdFlush):
            on_barrier(guest)
    assert at == len(data) == decoder.offset
    assert decoder.unread_bytes == 0
    return guest


class Channel:
    """One multifd channel, read up to its next SYNC at a time, as a destination must."""

    def __init__(self, data: bytes, blocks: dict[str, RamBlock]) -> None:
        self.data = data
        self.at = 0
        self.decoder = MultifdDecoder(blocks)
        self.inflater = PageInflater()
        self.counts: Counter[str] = Counter()
        self.channel: int | None = None
        self.compression = 0
        self.payload = 0
        self._events = events_of(self.decoder, data, slab=100_000)

    def read(self, guest: Guest, *, to_sync: bool) -> None:
        packet: MultifdPacket | None = None
        syncing = False
        left = 0
        for event in self._events:
            out = encoded(event)
            assert self.data[self.at : self.at + len(out)] == out
            self.at += len(out)
            match event:
                case MultifdInit(channel, _):
                    self.channel = channel
                case MultifdPacket():
                    packet = event
                    syncing = self.on_packet(event, guest)
                    left = event.payload_claimed if event.normal else 0
                case MultifdPages(block, offsets, pages):
                    guest.pages(block)[offsets >> np.uint64(12)] = pages
                    left -= pages.nbytes
                case MultifdPayload(data, _):
                    assert packet is not None
                    left -= len(data)
                    done = self.inflater.feed(event)
                    if done is not None:
                        assert packet.block is not None
                        guest.pages(packet.block)[packet.normal_offsets >> np.uint64(12)] = done
            if to_sync and syncing and not left:
                return

    def on_packet(self, packet: MultifdPacket, guest: Guest) -> bool:
        self.counts["packets"] += 1
        self.counts["normal"] += packet.normal
        self.counts["zero"] += packet.zero
        syncing = bool(packet.flags & SYNC)
        self.counts["sync"] += syncing
        self.counts["sync_with_data"] += syncing and packet.normal > 0
        self.counts["empty_packets"] += not syncing and packet.normal + packet.zero == 0
        if packet.zero:
            assert packet.block is not None
            guest.pages(packet.block)[packet.zero_offsets >> np.uint64(12)] = 0
        if packet.normal:
            self.payload += packet.payload_claimed
            self.compression = packet.flags & 0x3E
            if self.compression:
                self.inflater.begin(packet)
        return syncing


def check_guest(name: str, guest: Guest) -> None:
    want = EXPECTED[name]
    assert guest.commands == want["commands"]
    assert guest.discards == want["discard_ranges"]
    assert {key: guest.counts[key] for key in want["ram"]} == want["ram"]
    assert [each[:2] for each in guest.blocks] == want["blocks"]
    if name.startswith("nofooter"):
        assert guest.opaque == want["consumed"][1] - want["consumed"][0] + 19  # the oracle stops behind a head
        assert guest.configuration is None
    else:
        assert guest.devices == want["devices"]
    if want["config"]:
        assert guest.configuration is not None
        assert f"machine=b'{guest.configuration.machine}'" in want["config"]
    if want["vmdesc"]:
        check_description(guest, want["vmdesc"])
    if want["ram_sha256"] is not None:
        found = {block: hashlib.sha256(pages.tobytes()).hexdigest() for block, pages in guest.memory.items()}
        assert found == want["ram_sha256"]


def check_description(guest: Guest, want: dict[str, Any]) -> None:
    assert guest.description is not None
    described = description.parse(guest.description)
    assert described is not None
    assert list(json.loads(guest.description)) == want["keys"]
    assert len(described.devices) == want["devices"]
    for device in described.devices:
        body = guest.bodies[device.name, device.instance]
        assert len(body) == device.size
        assert sum(len(each.data) for each in description.fields(device, body)) <= device.size


@pytest.mark.conforms("2", "3", "4", "6", "7", "8", "9", "11", "14")
@pytest.mark.parametrize("name", [each for each in NAMES if not each.startswith("multifd")])
def test_a_sample_decodes_to_its_oracle_and_encodes_to_the_same_bytes(name: str) -> None:
    data = channels(name)
    assert {key: len(value) for key, value in data.items()} == EXPECTED[name]["bytes"]
    guest = decode_main(name)
    if "1>" in data:
        check_preempt(name, guest, data["1>"])
    check_guest(name, guest)


def check_preempt(name: str, guest: Guest, data: bytes) -> None:
    before = dict(guest.counts)
    decoder = new_decoder(name)
    list(events_of(decoder, channels(name)["0>"], finish=False))
    preempt = PreemptDecoder(decoder.ram.blocks)
    at = 0
    for event in events_of(preempt, data, slab=65536):
        out = encoded(event)
        assert data[at : at + len(out)] == out
        at += len(out)
        guest.load(event)
    assert at == len(data)
    assert (
        guest.counts["normal"] + guest.counts["zero"] - before["normal"] - before["zero"]
        == (EXPECTED[name]["preempt_pages"])
    )
    assert (preempt.next() is DONE) == EXPECTED[name].get("preempt_eos", False)
    guest.counts = Counter(before)


@pytest.mark.conforms("23", "24")
@pytest.mark.parametrize("name", [each for each in NAMES if each.startswith("multifd")])
def test_a_multifd_sample_with_its_channels(name: str) -> None:
    data = channels(name)
    probe = new_decoder(name)
    list(events_of(probe, data["0>"]))
    multifd = {key[:-1]: Channel(data[key], probe.ram.blocks) for key in data if key not in ("0>", "0<")}

    def on_barrier(guest: Guest) -> None:
        if not guest.commands or guest.commands[-1] != "PING 0x4":  # in postcopy the channels are silent
            for each in multifd.values():
                each.read(guest, to_sync=True)

    guest = decode_main(name, on_barrier=on_barrier)
    for each in multifd.values():
        each.read(guest, to_sync=False)
        assert each.decoder.is_between
    check_guest(name, guest)
    kinds = {0: "none", 2: "zlib", 4: "zstd"}
    for key, want in EXPECTED[name]["multifd"].items():
        each = multifd[key]
        found = {key: each.counts[key] for key in ("packets", "sync", "normal", "zero")}
        found |= {key: each.counts[key] for key in ("sync_with_data", "empty_packets")}
        assert {
            **found, "id": each.channel, "payload": each.payload, "compression": kinds[each.compression]
        } == want  # fmt: skip


@pytest.mark.conforms("16", "22", "28")
@pytest.mark.parametrize("name", [each for each in NAMES if "0<" in EXPECTED[each]["bytes"]])
@pytest.mark.parametrize("slab", [1, SLAB])
def test_the_return_path_of_a_sample(name: str, slab: int) -> None:
    data = channels(name)["0<"]
    blocks: dict[str, RamBlock] = {}
    if EXPECTED[name]["blocks"]:
        blocks = {block: RamBlock(block, length) for block, length in EXPECTED[name]["blocks"]}
    counts: Counter[str] = Counter()
    decoder = ReturnPathDecoder()
    out = bytearray()
    last: str | None = None
    for event in events_of(decoder, data, slab=slab):
        out += encoded(event)
        match event:
            case Pong(value):
                counts[f"PONG {value:#x}"] += 1
            case Shut(value):
                counts[f"SHUT {value:#x}"] += 1
            case ResumeAck(value):
                counts[f"RESUME_ACK {value:#x}"] += 1
            case SwitchoverAck():
                counts["SWITCHOVER_ACK"] += 1
            case ReceivedBitmap():
                counts["RECV_BITMAP"] += 1
            case RequestPages(_, _, block):
                counts["REQ_PAGES" if block is None else "REQ_PAGES_ID"] += 1
                last = last if block is None else block
                if blocks:
                    check_request(event, blocks, last, page_size=4096)
            case BitmapEnd():
                assert counts["RECV_BITMAP"]
    assert bytes(out) == data
    assert decoder.is_between
    assert dict(counts) == EXPECTED[name]["return_path"]


def shape(event: Event) -> Any:
    """An event without its payload: what must not depend on how the bytes were cut."""
    match event:
        case PageRun() | ZeroRun():
            return None  # the borders of runs may move; their bytes are compared
        case MappedData():
            return None
        case _:
            return event


def shapes_and_bytes(decoder: StreamDecoder, pieces: list[bytes]) -> tuple[list[Any], bytes]:
    shapes: list[Any] = []
    out = bytearray()
    for piece in pieces:
        decoder.feed(piece)
        for event in drain(decoder):
            out += encoded(event)
            if shape(event) is not None:
                shapes.append(shape(event))
    return shapes, bytes(out)


SMALL = [each for each in NAMES if EXPECTED[each]["bytes"]["0>"] < 400_000]


@pytest.mark.conforms("10")
@pytest.mark.parametrize("name", SMALL[:1] + SMALL[-1:])
def test_one_byte_at_a_time(name: str) -> None:
    data = channels(name)["0>"]
    whole = shapes_and_bytes(new_decoder(name), [data])
    assert whole[1] == data
    assert shapes_and_bytes(new_decoder(name), [data[at : at + 1] for at in range(len(data))]) == whole


@pytest.mark.deep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_one_byte_at_a_time_all(name: str) -> None:
    data = channels(name)["0>"]
    whole = shapes_and_bytes(new_decoder(name), [data])
    assert shapes_and_bytes(new_decoder(name), [data[at : at + 1] for at in range(len(data))]) == whole


@pytest.mark.conforms("10")
@pytest.mark.parametrize("name", [each for each in NAMES if not each.startswith("recover")])
def test_small_slabs_of_odd_sizes(name: str) -> None:
    """Sizes that are no multiple of anything, so that every kind of border moves through every slab border."""
    data = channels(name)["0>"]
    whole = shapes_and_bytes(new_decoder(name), [data])
    assert shapes_and_bytes(new_decoder(name), [data[at : at + 8209] for at in range(0, len(data), 8209)]) == whole


@pytest.mark.conforms("10")
@pytest.mark.parametrize("name", [SMALL[0], "postcopy-q111-m111.rec.xz", "dirty-bitmaps-precopy-q72.rec.xz"])
def test_split_at_every_boundary_of_an_event(name: str) -> None:
    """And one byte before and behind it."""
    data = channels(name)["0>"]
    whole = shapes_and_bytes(new_decoder(name), [data])
    edges = [0]
    for event in events_of(new_decoder(name), data):
        edges.append(edges[-1] + len(encoded(event)))
    cuts = sorted({edge + more for edge in edges[:400] + edges[-200:] for more in (-1, 0, 1)} & set(range(len(data))))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert shapes_and_bytes(new_decoder(name), pieces) == whole


@pytest.mark.conforms("10")
@pytest.mark.parametrize("name", [each for each in NAMES if EXPECTED[each]["end"] == "eof"])
def test_the_end_is_found_at_the_right_byte_and_what_follows_is_left_alone(name: str) -> None:
    if name.startswith("suppress-vmdesc"):
        pytest.skip("nothing but the end of the input ends it")
    data = channels(name)["0>"]
    trailing = b"\x00\x06\x00\x00\x00\x02{}QEVM"
    decoder = new_decoder(name)
    decoder.feed(data[:-1])
    assert not any(isinstance(each, Description) for each in drain(decoder))
    assert decoder.next() is NEED_DATA
    decoder.feed(data[-1:] + trailing)
    last = list(drain(decoder))[-1]
    assert isinstance(last, EndOfSections | Description)
    assert decoder.next() is DONE
    assert decoder.unread_bytes == len(trailing)
    assert decoder.offset == len(data)


@pytest.mark.conforms("12")
@pytest.mark.parametrize("name", ["suppress-vmdesc-q72.rec.xz", "nofooter-noconfig-q72-pc22.rec.xz"])
def test_a_stream_without_vmdescription_is_refused_unless_allowed(name: str) -> None:
    decoder = StreamDecoder()
    with pytest.raises(WireError) as caught:
        list(events_of(decoder, channels(name)["0>"]))
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("name", ["precopy-rp-q111-m111.rec.xz", "postcopy-q72.rec.xz"])
@pytest.mark.parametrize("share", [0.0001, 0.5, 0.9999])
def test_a_truncated_stream_is_an_error(name: str, share: float) -> None:
    data = channels(name)["0>"]
    decoder = StreamDecoder()
    with pytest.raises(WireError) as caught:
        list(events_of(decoder, data[: int(len(data) * share)]))
    assert caught.value.reason == "truncated"


@pytest.mark.conforms("30")
@pytest.mark.parametrize("jump", [False, True])
def test_the_mapped_ram_file(jump: bool) -> None:
    data = lzma.decompress((SAMPLES / MAPPED).read_bytes())
    decoder = StreamDecoder()
    out = bytearray()
    blocks: list[RamBlock] = []
    sections: list[str] = []
    at = 0
    while at < len(data):
        piece = data[at : at + 4096] if jump else data[at : at + SLAB]
        at += len(piece)
        decoder.feed(piece)
        for event in drain(decoder):
            if isinstance(event, MappedData):
                assert event.file_offset == decoder.offset - len(event.data)
            out += encoded(event)
            if isinstance(event, RamBlock):
                blocks.append(event)
            if isinstance(event, DeviceSection):
                sections.append(event.idstr)
        if jump and decoder.gap_bytes:
            out += data[at : at + decoder.gap_bytes]
            at += decoder.gap_bytes
            decoder.skip_gap()
    assert decoder.next() is DONE
    assert bytes(out) == data
    assert blocks[0].name == "pc.ram"
    assert len(sections) == 31
    check_mapped(data, blocks[0])


def check_mapped(data: bytes, block: RamBlock) -> None:
    mapped = block.mapped
    assert mapped is not None
    assert (mapped.bitmap_offset, mapped.pages_offset) == (0x8E, 0x100000)
    size = mapped_ram.bitmap_bytes(block.used_length, 4096)
    bitmap = data[mapped.bitmap_offset : mapped.bitmap_offset + size]
    present = mapped_ram.present_pages(bitmap, block)
    truth = np.zeros(block.used_length // 4096, np.bool_)
    truth[present] = True
    assert mapped_ram.make_bitmap(truth) == bitmap
    tagged = 0
    for page in present[(present >= 256) & (present < 3072) & (present % 4 != 3)]:
        at = mapped.pages_offset + int(page) * 4096
        tagged += int.from_bytes(data[at + 16 : at + 20], "little") == int(page) * 4096
    assert tagged == 2112
    place = mapped_ram.place(block.used_length, file_offset=mapped.bitmap_offset - 28, page_size=4096)
    assert place == mapped
