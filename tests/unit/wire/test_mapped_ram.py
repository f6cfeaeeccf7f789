"""Files with RAM at fixed places. Whole files are in tests/golden."""

from __future__ import annotations

import numpy as np
import pytest

from vmferry.wire import mapped_ram
from vmferry.wire.errors import WireError
from vmferry.wire.events import MappedHeader, RamBlock


def decode(header: MappedHeader, *, file_offset: int = 100) -> MappedHeader:
    raw = mapped_ram.encode_header(header)
    return mapped_ram.decode_header(raw, used_length=1 << 20, file_offset=file_offset, page_size=4096, offset=7)


def test_there_and_back() -> None:
    header = mapped_ram.place(1 << 20, file_offset=100, page_size=4096)
    assert header == MappedHeader(4096, 128, 1 << 20)
    assert decode(header) == header
    assert mapped_ram.gap_end(RamBlock("m", 1 << 20, mapped=header)) == 2 << 20


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (MappedHeader(2048, 128, 1 << 20), "mapped-version"),
        (MappedHeader(4096, 129, 1 << 20), "mapped-offset"),
        (MappedHeader(4096, 128, 0), "mapped-offset"),
        (MappedHeader(4096, 128, (1 << 20) + 1), "mapped-offset"),
    ],
)
def test_what_is_refused(header: MappedHeader, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        decode(header)
    assert caught.value.reason == reason


@pytest.mark.conforms("30")
def test_bitmaps() -> None:
    block = RamBlock("m", 70 * 4096, mapped=mapped_ram.place(70 * 4096, file_offset=0, page_size=4096))
    truth = np.zeros(70, np.bool_)
    truth[[0, 9, 69]] = True
    bitmap = mapped_ram.make_bitmap(truth)
    assert bitmap[:2] == b"\x01\x02"
    assert len(bitmap) == mapped_ram.bitmap_bytes(block.used_length, 4096) == 16
    assert mapped_ram.present_pages(bitmap, block).tolist() == [0, 9, 69]
