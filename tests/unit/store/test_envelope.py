"""Index and manifest objects on the outside: golden bytes, and every length compared with what is there."""

from __future__ import annotations

import os
import struct

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmferry.store.envelope import INDEX, MANIFEST, PREFIX, Opened, head_end, prefix, read_prefix, seal_object
from vmferry.store.errors import Damaged
from vmferry.store.seal import OpenSeal, SecretSeal

SEAL = OpenSeal(b"k" * 16)


def test_golden_bytes_of_version_1() -> None:
    """Without a compressed section, because zstd's bytes are not ours."""
    data = seal_object(SEAL, "index/x", INDEX, {"a": 1}, [])
    head = b'{"head":{"a":1},"sections":[]}'
    assert data[:16] == bytes.fromhex("564d4653 01 02 0000 2e000000 00000000".replace(" ", ""))
    assert data[16:-16] == head
    assert data[-16:].hex() == "4064676fa81a90cffa13cca45bdacce3"


@given(st.sampled_from([SEAL, SecretSeal(b"m" * 32)]), st.lists(st.binary(max_size=500), max_size=4))
@example(SEAL, [b"one", b"", b"three"])
def test_there_and_back(seal: OpenSeal | SecretSeal, sections: list[bytes]) -> None:
    data = seal_object(seal, "index/x", INDEX, {"a": [1, "b"]}, sections)
    opened = Opened(seal, "index/x", INDEX, data, len(data))
    assert opened.head == {"a": [1, "b"]}
    assert opened.count == len(sections)
    for number, section in enumerate(sections):
        assert opened.plain_bytes(number) == len(section)
        assert opened.section(number, len(section)) == section
        if section:
            with pytest.raises(Damaged, match="more than"):
                opened.section(number, len(section) - 1)


def test_a_section_is_tight_or_has_more_bytes_than_it_may() -> None:
    """One that says that it is shorter than what is stored of it would be read for nothing."""
    sections = [b"", b"y" * 5000, os.urandom(5000)]
    data = seal_object(SEAL, "x", INDEX, {}, sections)
    opened = Opened(SEAL, "x", INDEX, data, len(data))
    assert [opened.is_tight(number) for number in range(3)] == [True] * 3
    opened._sections = [*opened._sections[:2], msgspec.structs.replace(opened._sections[2], plain=5)]
    assert [opened.is_tight(number) for number in range(3)] == [True, True, False]


@given(st.binary(max_size=100))
@example(b"too short")
@example(bytes(100))
def test_garbage_is_damage(data: bytes) -> None:
    with pytest.raises(Damaged):
        Opened(SEAL, "index/x", INDEX, data, len(data))


def test_the_beginning_is_enough_for_the_head() -> None:
    data = seal_object(SEAL, "x", INDEX, {"a": 1}, [b"y" * 5000])
    end = head_end("x", data[:16], INDEX, len(data))
    assert Opened(SEAL, "x", INDEX, data[:end], len(data)).head == {"a": 1}
    with pytest.raises(Damaged, match="not all there"):
        Opened(SEAL, "x", INDEX, data[: end - 1], len(data))


@pytest.mark.parametrize("at", range(16))
def test_each_byte_of_the_prefix_counts(at: int) -> None:
    data = bytearray(seal_object(SEAL, "x", INDEX, {}, []))
    data[at] ^= 0x40
    with pytest.raises(Damaged):
        Opened(SEAL, "x", INDEX, bytes(data), len(data))


def test_versions_and_kinds() -> None:
    with pytest.raises(Damaged, match="version 2"):
        read_prefix("x", struct.pack("<4sBBHII", b"VMFS", 2, INDEX, 0, 20, 0), INDEX)
    with pytest.raises(Damaged, match="kind"):
        read_prefix("x", prefix(MANIFEST, 20), INDEX)
    assert read_prefix("x", prefix(INDEX, 20), INDEX) == 20
    for length in (0, 15, 1 << 31):
        with pytest.raises(Damaged, match="its head would have"):
            head_end("x", prefix(INDEX, length), INDEX, 1 << 40)


@pytest.mark.parametrize("lengths", [[[15, 1]], [[16, -1]], [[16, 1], [-16, 1]], [[17, 1]], [["a", 1]], [[1]], 5])
def test_lengths_that_cannot_be(lengths: object) -> None:
    sealed = SEAL.close("x", 0, msgspec.json.encode({"head": {}, "sections": lengths}))
    data = prefix(INDEX, len(sealed)) + sealed + bytes(16)
    with pytest.raises(Damaged):
        Opened(SEAL, "x", INDEX, data, len(data))
    assert PREFIX.size == 16
