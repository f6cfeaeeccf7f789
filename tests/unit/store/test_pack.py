"""Packs: golden bytes of version 1, and nothing believed before it adds up."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.store.compression import Compressor
from vmferry.store.errors import Damaged
from vmferry.store.pack import (
    COMPRESSED,
    DIFFERENCES,
    PLAIN,
    Directory,
    Frames,
    inflate_frame,
    pack_begin,
    pack_end,
    pack_name,
    proof_of,
    read_frames,
    read_tail,
    read_whole,
)
from vmferry.store.page_ids import PAGE_BYTES
from vmferry.store.seal import OpenSeal, SecretSeal

SEAL = OpenSeal(b"k" * 16)
ID = bytes(range(16))
NAME = pack_name(ID)


def frames(*each: tuple[int, int, int], bases: int = 0) -> Frames:
    lengths, kinds, counts = zip(*each, strict=True)
    return Frames(
        np.array(lengths, np.uint32), np.array(kinds, np.uint8), np.array(counts, np.uint8),
        np.arange(16 * bases, dtype=np.uint64).astype(np.uint8).reshape(-1, 16),
    )  # fmt: skip


def whole(directory: Directory, body: bytes) -> bytes:
    return pack_begin() + body + pack_end(SEAL, NAME, directory)


def test_golden_bytes_of_version_1() -> None:
    """One page that is not compressed, and one difference."""
    page = bytes(range(256)) * 16
    directory = Directory(b"i" * 16, 7, frames((4096, 0, 1), (4096, 2, 1), bases=1), b"p" * 16)
    data = whole(directory, page + bytes(4096))
    assert NAME == "packs/00/000102030405060708090a0b0c0d0e0f"
    assert data[:16].hex() == "564d4653010100000000000000000000"
    assert data[16:4112] == page
    plain = (
        "69" * 16 + "0700000000000000" + "02000000" + "01000000" + "70" * 16
        + "00100000" * 2 + "0002" + "0101" + "000102030405060708090a0b0c0d0e0f"
    )  # fmt: skip
    assert data[8208:-32].hex() == plain
    assert data[-16:].hex() == "5c00000000000000" + b"VMFSPACK".hex()
    found = read_whole(SEAL, NAME, data)
    assert (found.index, found.first_row, found.proof) == (b"i" * 16, 7, b"p" * 16)
    assert found.frames.to_bytes() == directory.frames.to_bytes()
    assert found.frames.pages == 2


@given(st.binary(max_size=200))
def test_garbage_is_damage(data: bytes) -> None:
    for each in (data, pack_begin() + data, pack_begin() + data + struct.pack("<II8s", len(data), 0, b"VMFSPACK")):
        with pytest.raises(Damaged):
            read_whole(SEAL, NAME, each)


@pytest.mark.parametrize(
    ("tail", "size"),
    [
        (struct.pack("<II8s", 20, 0, b"VMFSPACX"), 1000), (struct.pack("<II8s", 20, 1, b"VMFSPACK"), 1000),
        (struct.pack("<II8s", 15, 0, b"VMFSPACK"), 1000), (struct.pack("<II8s", 969, 0, b"VMFSPACK"), 1000),
        (struct.pack("<II8s", 20, 0, b"VMFSPACK"), 1 << 40), (b"short", 1000),
    ],
)  # fmt: skip
def test_tails_that_cannot_be(tail: bytes, size: int) -> None:
    with pytest.raises(Damaged):
        read_tail(NAME, tail, size)
    assert read_tail(NAME, struct.pack("<II8s", 968, 0, b"VMFSPACK"), 1000) == 968


@pytest.mark.parametrize(
    ("found", "bases"),
    [
        (frames((4096, 4, 1)), 0), (frames((4096, 0, 0)), 0), (frames((4096, 0, 65)), 0), (frames((0, 0, 1)), 0),
        (frames((4113, 0, 1)), 0), (frames((10, 2, 1)), 0), (frames((10, 0, 1), bases=1), 1),
    ],
)  # fmt: skip
def test_frames_that_cannot_be(found: Frames, bases: int) -> None:
    with pytest.raises(Damaged):
        read_frames(NAME, found.to_bytes(), len(found.lengths), bases)


def test_a_directory_speaks_of_the_whole_pack() -> None:
    directory = Directory(b"i" * 16, 0, frames((4096, 0, 1)), bytes(16))
    assert read_whole(SEAL, NAME, whole(directory, bytes(4096))).frames.pages == 1
    for length in (0, 4095, 4097):
        with pytest.raises(Damaged, match="does not speak"):
            read_whole(SEAL, NAME, whole(directory, bytes(length)))
    data = bytearray(whole(directory, bytes(4096)))
    data[8] = 1
    with pytest.raises(Damaged, match="begins with a head"):
        read_whole(SEAL, NAME, bytes(data))
    short = SEAL.close(NAME, 0, b"x")
    with pytest.raises(Damaged, match="too short"):
        read_whole(SEAL, NAME, pack_begin() + short + struct.pack("<II8s", len(short), 0, b"VMFSPACK"))
    with pytest.raises(Damaged, match="do not take"):
        read_frames(NAME, bytes(5), 1, 0)


@pytest.mark.parametrize("seal", [SEAL, SecretSeal(b"m" * 32)])
def test_frames_come_back_as_pages(seal: OpenSeal | SecretSeal) -> None:
    pages = np.arange(2 * PAGE_BYTES, dtype=np.uint64).astype(np.uint8).reshape(2, PAGE_BYTES)
    plain = seal.close_frame(NAME, 4, pages.tobytes())
    packed = seal.close_frame(NAME, 4, Compressor(3).frame(pages.tobytes()))
    assert np.array_equal(inflate_frame(seal, NAME, 3, plain, PLAIN, 2), pages)
    assert np.array_equal(inflate_frame(seal, NAME, 3, packed, COMPRESSED | DIFFERENCES, 2), pages)
    for stored, kind, count in ((plain, PLAIN, 1), (plain, COMPRESSED, 2), (packed, COMPRESSED, 3)):
        with pytest.raises(Damaged):
            inflate_frame(seal, NAME, 3, stored, kind, count)


def test_the_proof_is_of_ids_and_their_order() -> None:
    ids = np.arange(32, dtype=np.uint8).reshape(2, 16)
    other = ids.copy()
    other[1, 3] ^= 1
    assert len({proof_of(ids), proof_of(other), proof_of(other[::-1]), proof_of(ids[:1])}) == 4
