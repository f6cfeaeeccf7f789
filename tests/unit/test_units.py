"""Sizes, times and rates as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.units import GIB, KIB, MIB, format_ms, format_size, parse_size_bytes, parse_time_ms


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096), ("0", 0), ("512M", 512 * MIB), ("2G", 2 * GIB), ("1.5GiB", 3 * GIB // 2), (" 1 kb ", KIB),
        ("1T", 1024 * GIB), ("7B", 7),
    ],
)  # fmt: skip
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "M", "-1", "1,5G", "1X", "one"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size_bytes(text)


@pytest.mark.parametrize(
    ("text", "time_ms"), [("200ms", 200), ("200", 200), ("1.5s", 1500), ("2m", 120_000), ("2 min", 120_000),
                          ("1h", 3_600_000), ("1500us", 2)],
)  # fmt: skip
def test_times(text: str, time_ms: int) -> None:
    assert parse_time_ms(text) == time_ms


def test_a_bare_number_counts_as_the_unit_that_is_asked_for() -> None:
    assert parse_time_ms("3", bare_unit="s") == 3000


@pytest.mark.parametrize("text", ["", "ms", "-1s", "1 day"])
def test_what_is_not_a_time(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_time_ms(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * MIB, "1.5 GiB"), (200 * MIB, "200 MiB"),
        (2048 * GIB, "2.0 TiB"), (-2048, "-2.0 KiB"),
    ],
)  # fmt: skip
def test_sizes_for_people(size_bytes: float, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("time_ms", "text"),
    [(12.34, "12.3 ms"), (999, "999 ms"), (1234, "1.23 s"), (90_000, "1 min 30 s"), (3_600_000, "60 min 0 s")],
)
def test_times_for_people(time_ms: float, text: str) -> None:
    assert format_ms(time_ms) == text


@given(st.integers(0, 1 << 50))
def test_a_plain_number_of_bytes_is_read_as_it_is(size_bytes: int) -> None:
    if size_bytes < 1 << 53:
        assert parse_size_bytes(str(size_bytes)) == size_bytes
    assert format_size(size_bytes)
