"""Differences of pages."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmferry.wire import xbzrle
from vmferry.wire.errors import WireError


def test_the_example_of_the_protocol() -> None:
    page = bytearray(4096)
    xbzrle.apply(page, b"\x00\x01\xf0")
    assert page == b"\xf0" + bytes(4095)
    assert xbzrle.make(bytes(4096), bytes(page)) == b"\x00\x01\xf0"


@given(st.binary(min_size=300, max_size=300), st.lists(st.tuples(st.integers(0, 299), st.integers(0, 255)), max_size=9))
@example(bytes(300), [(200, 1), (201, 1)])
@example(bytes(300), [(299, 1)])
@example(bytes(300), [(1, 1), (2, 1)])
def test_there_and_back(old: bytes, changes: list[tuple[int, int]]) -> None:
    new = bytearray(old)
    for at, value in changes:
        new[at] = value
    page = bytearray(old)
    xbzrle.apply(page, xbzrle.make(old, bytes(new)))
    assert page == new


@pytest.mark.parametrize(
    "delta",
    [
        b"\x00\x01\xf0\x00\x01\xf0",  # nothing stays, but not at the beginning
        b"\x00\x00",  # nothing new
        b"\x00",
        b"\x80",
        b"\x80\x80\x01",
        b"\x0a\x07" + bytes(7),  # beyond the page
        b"\x00\x05abc",  # fewer bytes than told
    ],
)
def test_what_is_refused(delta: bytes) -> None:
    with pytest.raises(WireError) as caught:
        xbzrle.apply(bytearray(16), delta)
    assert caught.value.reason == "ram-xbzrle"
