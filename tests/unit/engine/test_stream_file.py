"""A kept guest as a plain stream file: what the wire's own decoder reads out of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmferry.engine.frozen import FrozenState
from vmferry.engine.image import PAGE_BYTES, Pages
from vmferry.engine.stream_file import RUN_PAGES, stream, was_running
from vmferry.wire.events import DONE, NEED_DATA, Configuration, DeviceSection, PageRun, ZeroRun
from vmferry.wire.stream import Settings, StreamDecoder

DESCRIPTION = (
    b'{"page_size":4096,"devices":['
    b'{"name":"cpu","instance_id":7,"version":12,"fields":[{"name":"data","type":"buffer","size":5}]}]}'
)
STATE = FrozenState(
    Configuration("pc-q35-7.2", page_bits=12, capabilities=("mapped-ram",),
                  order=("configuration/capabilities", "configuration/target-page-bits")),
    (DeviceSection(30, "cpu", 7, 12, b"state"),),
    DESCRIPTION,
    ram_section_id=2,
)  # fmt: skip


def written(state: FrozenState, guests: dict[str, Pages]) -> bytes:
    reads: list[tuple[str, int, int]] = []

    def read(block: str, first: int, count: int) -> Pages:
        reads.append((block, first, count))
        return guests[block][first : first + count]

    def zeros(block: str) -> npt.NDArray[np.bool_]:
        return np.asarray(~guests[block].any(axis=1))

    blocks = [(name, len(pages) * PAGE_BYTES) for name, pages in guests.items()]
    data = b"".join(bytes(part) for parts in stream(state, blocks, read, zeros) for part in parts)
    assert len(reads) == len(set(reads))
    assert all(count <= RUN_PAGES for _, _, count in reads)
    return data


def read_back(data: bytes) -> tuple[dict[str, dict[int, bytes]], list[Any]]:
    decoder = StreamDecoder(Settings())
    decoder.feed(data)
    found: dict[str, dict[int, bytes]] = {}
    others = []
    while (event := decoder.next()) is not DONE:
        assert event is not NEED_DATA, "the stream is whole"
        if isinstance(event, PageRun):
            for offset, page in zip(event.offsets.tolist(), event.pages, strict=True):
                found.setdefault(event.block.name, {})[offset // PAGE_BYTES] = page.tobytes()
        elif isinstance(event, ZeroRun):
            for offset in event.offsets.tolist():
                found.setdefault(event.block.name, {})[offset // PAGE_BYTES] = bytes(PAGE_BYTES)
        else:
            others.append(event)
    return found, others


values = st.lists(st.sampled_from([0, 0, 0, 1, 2, 255]), min_size=1, max_size=20)


@given(values, values)
@example([0, 1, 0, 2], [0])
@example([1, 1], [0, 1])
def test_every_page_is_there_once_and_right(first: list[int], second: list[int]) -> None:
    guests = {
        name: np.repeat(np.array(each, np.uint8)[:, None], PAGE_BYTES, axis=1)
        for name, each in (("pc.ram", first), ("pc.bios", second))
    }
    found, others = read_back(written(STATE, guests))
    assert found == {
        name: {number: page.tobytes() for number, page in enumerate(pages)} for name, pages in guests.items()
    }
    assert DeviceSection(30, "cpu", 7, 12, b"state") in others
    assert Configuration("pc-q35-7.2", page_bits=12, order=("configuration/target-page-bits",)) in others


def test_a_large_block_comes_in_runs() -> None:
    count = 2 * RUN_PAGES + 3
    pages = np.repeat((np.arange(count) % 3).astype(np.uint8)[:, None], PAGE_BYTES, axis=1)
    found, _ = read_back(written(STATE, {"pc.ram": pages}))
    assert [found["pc.ram"][number][0] for number in range(count)] == [number % 3 for number in range(count)]


def test_a_stream_without_configuration_and_with_early_devices() -> None:
    early = DeviceSection(1, "early", 0, 3, b"\x01", early=True)
    description = DESCRIPTION.replace(b'[{"name":"cpu"', b'[{"name":"early","instance_id":0,"size":1},{"name":"cpu"')
    state = FrozenState(None, (early, *STATE.devices), description, ram_section_id=2)
    pages = np.zeros((1, PAGE_BYTES), np.uint8)
    data = written(state, {"pc.ram": pages})
    assert data.index(b"early") < data.index(b"pc.ram") < data.index(b"cpu")
    assert written(FrozenState(None, (), None, has_footers=False), {"pc.ram": pages}).endswith(b"{}")


@pytest.mark.parametrize(
    ("body", "runs"), [(b"running", True), (b"paused", False), (b"postmigrate", False)]
)  # fmt: skip
def test_whether_the_guest_ran(body: bytes, runs: bool) -> None:
    section = DeviceSection(9, "globalstate", 0, 1, b"\0\0\0\x08" + body.ljust(100, b"\0"))
    assert was_running(FrozenState(None, (*STATE.devices, section), None)) is runs


def test_without_a_word_it_ran() -> None:
    assert was_running(STATE)
