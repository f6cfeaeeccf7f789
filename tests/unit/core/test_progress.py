"""Progress never runs backwards; an estimate has bounds or says that it has none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.core.progress import ETA_SAMPLES, Eta, Progress, Sample, eta

samples_strategy = st.lists(
    st.builds(
        Sample,
        elapsed_ms=st.floats(0, 1e6),
        sent_bytes=st.integers(0, 1 << 40),
        remaining_bytes=st.integers(-5, 1 << 40),
        throughput_bytes_per_s=st.floats(0, 1e12),
        dirty_rate_bytes_per_s=st.floats(0, 1e12),
        in_postcopy=st.booleans(),
    ),
    max_size=30,
)


def sample(sent: int, remaining: int, *, postcopy: bool = False, speed: float = 0.0, dirty: float = 0.0) -> Sample:
    return Sample(
        elapsed_ms=0, sent_bytes=sent, remaining_bytes=remaining, throughput_bytes_per_s=speed,
        dirty_rate_bytes_per_s=dirty, in_postcopy=postcopy,
    )  # fmt: skip


@pytest.mark.proves("S101")
@given(samples_strategy)
def test_current_and_percent_never_decrease(samples: list[Sample]) -> None:
    progress = Progress()
    for one in samples:
        after = progress.advance(one)
        assert after.current_bytes >= progress.current_bytes
        assert after.percent >= progress.percent
        assert after.current_bytes <= after.total_bytes
        assert 0 <= after.percent <= 99
        if progress.fixed:
            assert after.fixed
            assert after.total_bytes == progress.total_bytes
        progress = after
    done = progress.finished()
    assert (done.current_bytes, done.percent) == (progress.total_bytes, 100)


@pytest.mark.proves("S102", "S104")
def test_total_is_sent_plus_remaining_and_grows_with_the_guests_writes() -> None:
    first = Progress().advance(sample(100, 900))
    assert (first.current_bytes, first.total_bytes, first.percent) == (100, 1000, 10)
    second = first.advance(sample(500, 1500))
    assert (second.current_bytes, second.total_bytes, second.percent) == (500, 2000, 25)
    third = second.advance(sample(500, 0))
    assert (third.current_bytes, third.total_bytes, third.percent) == (500, 500, 99)
    dirtied = third.advance(sample(500, 500))
    assert (dirtied.current_bytes, dirtied.total_bytes, dirtied.percent) == (500, 1000, 99)


@pytest.mark.proves("S103")
def test_postcopy_fixes_the_total() -> None:
    moved = Progress().advance(sample(600, 400, postcopy=True))
    later = moved.advance(sample(99_999, 100, postcopy=True))
    assert (later.current_bytes, later.total_bytes, later.percent) == (900, 1000, 90)
    back = later.advance(sample(0, 700, postcopy=True))
    assert (back.current_bytes, back.total_bytes) == (900, 1000)


def test_nothing_measured_is_zero_percent() -> None:
    assert Progress().advance(sample(0, 0)).percent == 0


def test_eta_has_bounds() -> None:
    assert eta([]) is None
    assert eta([sample(0, 5)]) is None
    assert eta([sample(0, 1000, speed=100, dirty=50)]) == Eta(10_000, 20_000)
    assert eta([sample(0, 1000, speed=100, dirty=100)]) == Eta(10_000, None)
    assert eta([sample(0, 1000, speed=100, dirty=500, postcopy=True)]) == Eta(10_000, 10_000)
    old = [sample(0, 5, speed=1)] * 3
    assert eta(old + [sample(0, 1000, speed=100)] * ETA_SAMPLES) == Eta(10_000, 10_000)


@given(samples_strategy)
def test_the_lower_bound_is_not_above_the_upper(samples: list[Sample]) -> None:
    bounds = eta(samples)
    if bounds is not None and bounds.high_ms is not None:
        assert 0 <= bounds.low_ms <= bounds.high_ms
