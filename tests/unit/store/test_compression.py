"""zstd with an end: what comes out has exactly the length that was expected."""

from __future__ import annotations

import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmferry.store.compression import Compressor, inflate
from vmferry.store.errors import Damaged

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@given(st.binary(max_size=20_000))
@example(b"")
@example(b"page" * 1024)
def test_there_and_back(data: bytes) -> None:
    compressor = Compressor(3)
    for _ in range(2):  # the same context again
        assert inflate("x", compressor.frame(data), len(data)) == data


@given(st.binary(max_size=200), st.integers(0, 300))
@example(b"no frame at all", 15)
@example(b"", 0)
def test_garbage_and_wrong_lengths_are_damage(data: bytes, length: int) -> None:
    with pytest.raises(Damaged, match="x is damaged"):
        inflate("x", data, length)


@pytest.mark.parametrize("length", [0, 1, 99, 101, 1 << 40])
def test_another_length_is_damage(length: int) -> None:
    frame = Compressor(1).frame(bytes(100))
    with pytest.raises(Damaged):
        inflate("x", frame, length)


def test_cut_doubled_and_followed_frames_are_damage() -> None:
    frame = Compressor(3).frame(b"abc" * 1000)
    for data in (frame[:-1], frame + frame, frame + b"x"):
        with pytest.raises(Damaged):
            inflate("x", data, 3000)


def test_a_frame_that_wants_a_large_window_is_refused() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    one = zstd.ZstdCompressor(options=options)
    frame = one.compress(b"x" * 100) + one.flush()
    with pytest.raises(Damaged, match="cannot be inflated"):
        inflate("x", frame, 100)
