"""Ids of pages: of content and key, and of nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from vmferry.store.page_ids import PAGE_BYTES, PageIds, halves


def test_an_id_is_the_beginning_of_a_hash_of_key_and_page() -> None:
    key = bytes(range(32))
    pages = np.arange(3 * PAGE_BYTES, dtype=np.uint64).astype(np.uint8).reshape(3, PAGE_BYTES).copy()
    pages[1] = 9
    ids = PageIds(key).of(pages)
    for page, one in zip(pages, ids, strict=True):
        assert one.tobytes() == hashlib.sha256(key + bytes(32) + page.tobytes()).digest()[:16]
        assert PageIds(key).is_page(page, one.tobytes())
        assert not PageIds(bytes(32)).is_page(page, one.tobytes())
    assert not PageIds(key).is_page(pages[0], ids[1].tobytes())
    assert np.array_equal(PageIds(key).of_some(pages, [2, 1]), ids[[2, 1]])


def test_pages_in_any_distance_and_none_at_all() -> None:
    ids = PageIds(bytes(32))
    wide = np.arange(6 * PAGE_BYTES, dtype=np.uint64).astype(np.uint8).reshape(6, PAGE_BYTES)
    assert np.array_equal(ids.of(wide[::2]), ids.of(wide[::2].copy()))
    assert ids.of(wide[:0]).shape == (0, 16)
    with pytest.raises(AssertionError):
        PageIds(b"short")


def test_halves() -> None:
    first, second = halves(np.arange(32, dtype=np.uint8).reshape(2, 16))
    assert first.tolist() == [0x0706050403020100, 0x1716151413121110]
    assert second.tolist() == [0x0F0E0D0C0B0A0908, 0x1F1E1D1C1B1A1918]
