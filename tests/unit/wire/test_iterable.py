"""Iterable sections beside RAM."""

from __future__ import annotations

import pytest

from tests.wire_streams import bitmaps, join
from vmferry.wire import iterable
from vmferry.wire.buffer import Buffer
from vmferry.wire.errors import WireError
from vmferry.wire.events import NEED_DATA, BitmapChunk

CHUNKS = [each for each in bitmaps() if isinstance(each, BitmapChunk)]


def decode(data: bytes) -> object:
    buffer = Buffer()
    buffer.feed(data)
    return iterable.next_chunk(buffer)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_there_and_back_however_it_is_cut(chunk: BitmapChunk) -> None:
    data = join([chunk])
    assert decode(data) == chunk
    for end in range(len(data)):
        assert decode(data[:end]) is NEED_DATA


@pytest.mark.parametrize("flags", [0x80, 0x11, 0x02, 0x30, 0x09, 0x60])
def test_flags_that_are_refused(flags: int) -> None:
    with pytest.raises(WireError) as caught:
        decode(bytes([flags]) + bytes(40))
    assert (caught.value.reason, caught.value.section) == ("bitmap-chunk", "dirty-bitmap")


def test_a_long_bitmap_is_refused_before_it_comes() -> None:
    with pytest.raises(WireError, match="10241 bytes"):
        decode(b"\x40" + bytes(12) + (10241).to_bytes(8, "big"))


@pytest.mark.conforms("13")
@pytest.mark.parametrize("idstr", ["0000:00:05.0/vfio", "block", "slirp"])
def test_unknown_sections_are_refused_by_name(idstr: str) -> None:
    with pytest.raises(WireError, match=idstr) as caught:
        iterable.check_known(idstr, 0, 1, 9)
    assert caught.value.reason == "section-unknown"


@pytest.mark.parametrize(("instance", "version"), [(1, 4), (0, 3)])
def test_other_versions_are_refused(instance: int, version: int) -> None:
    iterable.check_known("ram", 0, 4, 0)
    with pytest.raises(WireError) as caught:
        iterable.check_known("ram", instance, version, 9)
    assert caught.value.reason == "section-version"
