"""Page requests: each is made, whole host pages, and made again when that was asked for."""

from __future__ import annotations

import numpy as np

from vmferry import limits
from vmferry.engine.image import Image
from vmferry.engine.wants import Want, Wants, requests
from vmferry.wire.events import RamBlock

SIZE = 4096


def some() -> tuple[Image, Wants]:
    image = Image()
    image.add_block(RamBlock("a", 64 * SIZE))
    image.add_block(RamBlock("huge", 1024 * SIZE, page_size=512 * SIZE))
    return image, Wants()


def taken(wants: Wants, image: Image) -> list[tuple[str, int, int]]:
    found = []
    while (want := wants.take(image)) is not None:
        found.append((want.block.name, want.first, want.count))
    return found


def test_in_their_order_and_widened_to_host_pages() -> None:
    image, wants = some()
    wants.add(image.blocks["a"], 5, 2)
    wants.add(image.blocks["huge"], 600, 1)
    wants.add(image.blocks["a"], 1, 1)
    assert taken(wants, image) == [("a", 5, 2), ("huge", 512, 512), ("a", 1, 1)]
    assert taken(wants, image) == []
    image.close()


def test_what_has_come_meanwhile_is_not_asked_for() -> None:
    image, wants = some()
    a = image.blocks["a"]
    for page in (1, 2, 3):
        wants.add(a, page, 1)
    a.write_zeros(np.array([2 * SIZE], np.uint64))
    assert taken(wants, image) == [("a", 1, 1), ("a", 3, 1)]
    wants.again(image)
    assert taken(wants, image) == [("a", 1, 1), ("a", 3, 1)]
    a.write_zeros(np.array([SIZE], np.uint64))
    wants.again(image)
    assert taken(wants, image) == [("a", 3, 1)]
    image.close()


def test_again_asks_for_ranges_of_whole_host_pages() -> None:
    image, wants = some()
    huge = image.blocks["huge"]
    wants.add(huge, 0, 1024)
    huge.write_zeros(np.arange(100, 200, dtype=np.uint64) * np.uint64(SIZE))
    wants.again(image)
    assert taken(wants, image) == [("huge", 0, 512), ("huge", 512, 512)]
    image.close()


def test_a_queue_that_is_full_falls_back_to_the_map() -> None:
    image, wants = some()
    for index in range(limits.ENGINE_REQUESTS_MAX + 5):
        wants.add(image.blocks["a"], index % 60, 1)
    assert len(wants) == limits.ENGINE_REQUESTS_MAX
    assert taken(wants, image) == [("a", 0, 60)]
    image.close()


def test_a_request_is_no_longer_than_sources_take() -> None:
    image, _ = some()
    most = limits.ENGINE_REQUEST_BYTES_MAX
    image.add_block(RamBlock("big", 600 * SIZE))
    found = list(requests(Want(image.blocks["big"], 10, 590)))
    assert [start for start, _ in found] == [10 * SIZE, 10 * SIZE + most, 10 * SIZE + 2 * most]
    assert sum(length for _, length in found) == 590 * SIZE
    assert list(requests(Want(image.blocks["huge"], 512, 512))) == [(512 * SIZE, 512 * SIZE)]
    image.close()
