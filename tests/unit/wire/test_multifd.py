"""Multifd channels."""

from __future__ import annotations

import struct
import zlib
from typing import Literal

import numpy as np
import pytest
from backports.zstd import CompressionParameter, ZstdCompressor

from tests.wire_streams import BLOCK, BLOCKS, drain, join, multifd, multifd_compressed, pages
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    NEED_DATA,
    Event,
    MultifdInit,
    MultifdPacket,
    MultifdPages,
    MultifdPayload,
    RamBlock,
)
from vmferry.wire.multifd import SYNC, ZLIB, ZSTD, MultifdDecoder, PageInflater, make_packet, make_sync

NONE = np.zeros(0, np.uint64)
INIT = join([MultifdInit(0)])
OFFSETS, PAGES = pages([1, 2]).offsets, pages([1, 2]).pages


def decode(data: bytes, slab: int = 1 << 20) -> list[Event]:
    decoder = MultifdDecoder(BLOCKS)
    found: list[Event] = []
    for at in range(0, len(data), slab):
        decoder.feed(data[at : at + slab])
        found += drain(decoder)
    assert decoder.is_between
    assert decoder.next() is NEED_DATA
    return found


def refused(data: bytes) -> str:
    decoder = MultifdDecoder(BLOCKS)
    decoder.feed(data)
    for _ in range(2):
        with pytest.raises(WireError) as caught:
            drain(decoder)
    return caught.value.reason


@pytest.mark.parametrize("slab", [1, 1000, 4097, 9000, 1 << 20])
def test_there_and_back_however_it_is_cut(slab: int) -> None:
    data = join(multifd())
    found = decode(data, slab)
    assert join(found) == data
    packet, sync = (each for each in found if isinstance(each, MultifdPacket))
    assert packet.normal_offsets.tolist() == [0, 4096, 8192, 12288, 16384]
    assert packet.zero_offsets.tolist() == [9 * 4096, 10 * 4096]
    assert (sync.flags, sync.pages_alloc, sync.block) == (SYNC, 0, None)
    content = np.concatenate([each.pages for each in found if isinstance(each, MultifdPages)])
    assert content[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert len(decode(INIT)) == 1


def test_a_packet_of_zero_pages_only() -> None:
    packet = make_packet(BLOCK, NONE, OFFSETS, number=1)
    data = INIT + join([packet])
    (_, found) = decode(data)
    assert isinstance(found, MultifdPacket)
    assert (found.normal, found.zero_offsets.tolist()) == (0, [4096, 8192])


@pytest.mark.conforms("24")
def test_leftovers_of_an_old_qemu_are_kept() -> None:
    """A claimed payload without pages, and offsets of the packet before."""
    packet = make_packet(BLOCK, NONE, NONE, number=3, payload_bytes=8192)
    packet.offsets[5] = 0xDEADBEEF
    data = INIT + join([packet, make_sync(number=4)])
    assert join(decode(data)) == data


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
@pytest.mark.parametrize("slab", [1, 50, 1 << 20])
def test_compressed_pages_of_an_endless_stream(kind: int, slab: int) -> None:
    data = join(multifd_compressed(kind))
    inflater = PageInflater()
    found: list[list[int]] = []
    for event in decode(data, slab):
        if isinstance(event, MultifdPacket):
            inflater.begin(event)
        elif isinstance(event, MultifdPayload):
            done = inflater.feed(event)
            if done is not None:
                found.append(done[:, 17].tolist())
    assert found == [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6]]


def head(**fields: int) -> bytes:
    values = {"magic": 0x11223344, "version": 1, "flags": 0, "alloc": 128, "normal": 1, "size": 4096, "zero": 0}
    values |= fields
    raw = struct.pack(
        ">IIIIIIQI28s256s", values["magic"], values["version"], values["flags"], values["alloc"], values["normal"],
        values["size"], 1, values["zero"], bytes(28), b"pc.ram",
    )  # fmt: skip
    return INIT + raw + struct.pack(">Q", fields.get("offset", 0)) + bytes(127 * 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"QEVM" + bytes(60), "multifd-init"),
        (INIT[:7] + b"\x02" + INIT[8:], "multifd-init"),
        (INIT[:-1] + b"x", "multifd-init"),
        (head(magic=0x51455648), "multifd-magic"),
        (head(version=2), "multifd-magic"),
        (head(flags=0x40), "multifd-flags"),
        (head(flags=0x08), "multifd-flags"),
        (head(flags=0x06), "multifd-flags"),
        (head(alloc=127), "multifd-pages"),
        (head(normal=128, zero=1), "multifd-pages"),
        (head(offset=100), "multifd-range"),
        (head(offset=1 << 40), "multifd-range"),
        (head(size=4095), "multifd-payload"),
        (head(size=0, flags=ZLIB), "multifd-payload"),
        (head(size=1 << 21, flags=ZSTD), "multifd-payload"),
        (head().replace(b"pc.ram", b"pc.rum"), "multifd-block"),
        (head().replace(b"pc.ram\0", b"pc.ram\0x"), "multifd-head"),
    ],
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    assert refused(data) == reason


def test_reserved_bytes_are_refused() -> None:
    data = bytearray(head())
    data[64 + 40] = 1
    assert refused(bytes(data)) == "multifd-head"


def test_a_cut_packet_is_not_between() -> None:
    decoder = MultifdDecoder(BLOCKS)
    decoder.feed(join(multifd())[:3000])
    drain(decoder)
    assert not decoder.is_between


def inflated(kind: int, payload: bytes, *, normal: int = 2) -> str:
    inflater = PageInflater()
    inflater.begin(make_packet(BLOCK, OFFSETS[:normal], NONE, number=1, flags=kind, payload_bytes=len(payload)))
    with pytest.raises(WireError) as caught:
        inflater.feed(MultifdPayload(memoryview(payload), last=True))
    return caught.value.message


def deflated(plain: bytes) -> bytes:
    stream = zlib.compressobj()
    return stream.compress(plain) + stream.flush(zlib.Z_SYNC_FLUSH)


def zstded(plain: bytes, mode: Literal[0, 1, 2] = ZstdCompressor.FLUSH_BLOCK) -> bytes:
    return ZstdCompressor().compress(plain, mode)


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_payloads_that_do_not_inflate_to_their_pages(kind: int) -> None:
    make = deflated if kind == ZLIB else zstded
    assert "fewer pages" in inflated(kind, make(bytes(8191)))
    assert "more pages" in inflated(kind, make(bytes(8193)))
    assert "more pages" in inflated(kind, make(bytes(50 << 20)))  # without inflating all of it
    assert inflated(kind, b"\xff" * 50)


def test_a_window_of_much_memory_is_refused() -> None:
    """A frame that asks for 128 MiB, before it has sent anything."""
    options: dict[int, int] = {CompressionParameter.window_log: 27}
    stream = ZstdCompressor(options=options)
    payload = stream.compress(bytes(8192), ZstdCompressor.FLUSH_BLOCK)
    assert "memory" in inflated(ZSTD, payload)


def test_an_endless_stream_has_no_end() -> None:
    assert "has an end" in inflated(ZLIB, zlib.compress(bytes(8192)))
    assert "has an end" in inflated(ZSTD, zstded(bytes(8192), ZstdCompressor.FLUSH_FRAME))


def test_the_compression_of_a_channel_stays() -> None:
    inflater = PageInflater()
    inflater.begin(make_packet(BLOCK, OFFSETS, NONE, number=1, flags=ZLIB, payload_bytes=9))
    with pytest.raises(WireError, match="changed"):
        inflater.begin(make_packet(BLOCK, OFFSETS, NONE, number=2, flags=ZSTD, payload_bytes=9))


def test_a_reader_may_put_plain_pages_in_their_place_itself() -> None:
    data = join(multifd())
    decoder, at, direct = MultifdDecoder(BLOCKS), 0, 0
    found: list[Event] = []
    wanted: list[int] = []
    while at < len(data):
        wanted.append(decoder.wanted_bytes)
        plain = decoder.plain_pages()
        if plain is not None:
            block, offsets = plain
            count = min(2, len(offsets))
            assert block is BLOCK
            assert offsets[0] == direct * 4096
            decoder.skip_pages(count)
            direct += count
            at += count * 4096
        else:
            decoder.feed(data[at : at + decoder.wanted_bytes])
            at += wanted[-1]
            found += drain(decoder)
    assert wanted == [64, 1344, 5 * 4096, 3 * 4096, 4096, 1344]
    assert direct == 5
    assert [type(each).__name__ for each in found] == ["MultifdInit", "MultifdPacket", "MultifdPacket"]
    assert decoder.is_between


def test_what_is_wanted_ends_where_no_copy_is_needed() -> None:
    data = join(multifd())
    decoder = MultifdDecoder(BLOCKS)
    for size, wanted in ((10, 54), (54, 1344), (1344, 5 * 4096), (100, 3996), (3996, 4 * 4096)):
        decoder.feed(data[:size])
        drain(decoder)
        data = data[size:]
        assert decoder.wanted_bytes == wanted
        assert (decoder.plain_pages() is None) == (wanted in (54, 1344, 3996))


def after_a_packet() -> MultifdDecoder:
    """A decoder that knows a block from the packet before."""
    decoder = MultifdDecoder(BLOCKS)
    decoder.feed(INIT + join([make_packet(BLOCK, OFFSETS, NONE, number=0), MultifdPages(BLOCK, OFFSETS, PAGES)]))
    drain(decoder)
    return decoder


def test_a_row_is_taken_without_the_decoder_only_if_it_would_say_the_same() -> None:
    """Every byte of a head, changed in every bit: never a row that is something else, and a row of most."""
    row = (np.arange(5, 25) * 4096).astype(np.uint64)
    good = join([make_packet(BLOCK, row, NONE, number=7)])
    assert after_a_packet().take_row(good) == (BLOCK, 5, 20)
    rows = 0
    for at in range(len(good)):
        for bit in range(8):
            head = bytearray(good)
            head[at] ^= 1 << bit
            decoder = after_a_packet()
            found = decoder.take_row(head)
            if found is None:
                continue
            rows += 1
            slow = after_a_packet()
            slow.feed(bytes(head))
            (packet,) = drain(slow)
            assert (packet.block, packet.flags, packet.normal, packet.zero) == (BLOCK, 0, 20, 0)
            assert packet.normal_offsets.tolist() == row.tolist()
            slow.skip_pages(20)
            for each in (decoder, slow):  # both stand behind the packet
                each.feed(bytes(12))
            errors = []
            for each in (decoder, slow):
                with pytest.raises(WireError) as caught:
                    each.next()
                errors.append((caught.value.offset, caught.value.reason))
            assert errors[0] == errors[1]
    assert rows == 8 * (8 + 8 * (128 - 20)) + 1  # its number, leftovers of the table, and a table of size 0


@pytest.mark.parametrize(
    "numbers", [range(60, 64), range(4), [1], [2, 4], [3, 2]], ids=["last", "first", "one", "gap", "down"]
)
def test_what_is_a_row(numbers: list[int]) -> None:
    offsets = np.array(numbers, np.uint64) * np.uint64(4096)
    head = join([make_packet(BLOCK, offsets, NONE, number=1)])
    found = after_a_packet().take_row(head)
    assert found == (None if list(numbers) in ([2, 4], [3, 2]) else (BLOCK, numbers[0], len(numbers)))


def test_what_is_no_row() -> None:
    head = join([make_packet(BLOCK, OFFSETS, NONE, number=1)])
    fresh = MultifdDecoder(BLOCKS)
    fresh.feed(INIT)
    drain(fresh)
    assert fresh.take_row(head) is None  # no packet has named a block
    assert after_a_packet().take_row(head[:-1]) is None
    assert after_a_packet().take_row(join([make_sync(number=1)])) is None
    assert after_a_packet().take_row(join([make_packet(BLOCK, OFFSETS, NONE, number=1, flags=SYNC)])) is None
    assert after_a_packet().take_row(join([make_packet(BLOCK, OFFSETS, OFFSETS + 4096 * 9, number=1)])) is None
    beyond = join([make_packet(BLOCK, (np.arange(63, 65) * 4096).astype(np.uint64), NONE, number=1)])
    assert after_a_packet().take_row(beyond) is None
    torn = after_a_packet()
    torn.feed(head[:10])
    drain(torn)
    assert torn.take_row(head) is None
    with_payload = after_a_packet()
    with_payload.feed(head)
    drain(with_payload)
    assert with_payload.take_row(head) is None


def test_rows_of_a_large_block() -> None:
    """The table that they are compared with is made again where they leave it."""
    large = RamBlock("pc.ram", 1 << 40)
    decoder = MultifdDecoder({"pc.ram": large})
    decoder.feed(INIT + join([make_packet(large, OFFSETS, NONE, number=0), MultifdPages(large, OFFSETS, PAGES)]))
    drain(decoder)
    for first in (4090, 4096, 4200, 0, 8191, (1 << 28) - 128):
        offsets = (np.arange(first, first + 128, dtype=np.uint64)) * np.uint64(4096)
        head = join([make_packet(large, offsets, NONE, number=1)])
        assert decoder.take_row(head) == (large, first, 128)


def test_compressed_pages_have_no_place_of_their_own() -> None:
    decoder = MultifdDecoder(BLOCKS)
    decoder.feed(join(multifd_compressed(ZLIB)[:2]))
    packet = drain(decoder)[-1]
    assert isinstance(packet, MultifdPacket)
    assert decoder.plain_pages() is None
    assert decoder.wanted_bytes == packet.payload_claimed


def test_a_head_comes_next_only_where_one_begins() -> None:
    decoder = MultifdDecoder(BLOCKS)
    assert not decoder.is_at_head, "a channel introduces itself first"
    assert after_a_packet().is_at_head
