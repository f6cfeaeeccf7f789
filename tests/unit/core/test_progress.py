"""Progress never runs backwards; an estimate has bounds or says that it has none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.core.progress import ETA_SAMPLES, Eta, Forecast, Progress, Sample, Whole, eta

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


@pytest.mark.proves("S101")
@given(samples_strategy)
def test_a_percentage_comes_with_its_error_and_the_earliest_end_is_never_taken_back(samples: list[Sample]) -> None:
    progress, forecast = Progress(), Forecast()
    for number, one in enumerate(samples, 1):
        progress, before = progress.advance(one), forecast
        assert 0 <= progress.percent_error <= 100
        assert not progress.fixed or progress.percent_error == 0
        forecast = forecast.advance(samples[:number])
        assert (forecast.earliest_ms or 0.0) >= (before.earliest_ms or 0.0)
        low, high = forecast.left_ms(one.elapsed_ms)
        assert high is None or (low is not None and 0 <= low <= high)


@st.composite
def query_migrate(draw: st.DrawFn) -> list[Sample]:
    """What a QEMU can say: it sends, the guest writes, and from some moment on the guest writes no more."""
    sent, remaining, readings = 0, draw(st.integers(1, 1 << 36)), []
    calls = draw(st.integers(1, 20))
    postcopy_from = draw(st.integers(0, 25))
    for number in range(calls):
        moved = draw(st.integers(0, remaining))
        dirtied = draw(st.integers(0, 1 << 34)) if number < postcopy_from else 0
        sent, remaining = sent + moved, remaining - moved + dirtied
        readings.append(sample(sent, remaining, postcopy=number >= postcopy_from, speed=moved, dirty=dirtied))
    return readings


@pytest.mark.proves("S101", "S102", "S103", "S104")
@given(query_migrate())
def test_what_a_qemu_says_gives_what_is_sent_and_all_that_is_left(samples: list[Sample]) -> None:
    progress = Progress()
    for one in samples:
        was, progress = progress, progress.advance(one)
        if not was.fixed:
            assert (progress.current_bytes, progress.total_bytes) == (
                one.sent_bytes, one.sent_bytes + one.remaining_bytes,
            )  # fmt: skip
            assert progress.total_bytes >= was.total_bytes, "nothing is forgotten: it grows by what the guest writes"
        else:
            assert progress.total_bytes == was.total_bytes
            assert progress.total_bytes - progress.current_bytes <= one.remaining_bytes


def test_the_error_is_how_much_the_newest_totals_differ() -> None:
    steady = Progress().advance(sample(100, 900)).advance(sample(200, 800))
    assert (steady.percent, steady.percent_error) == (20, 0)
    grown = steady.advance(sample(200, 1800))
    assert (grown.percent, grown.percent_error) == (20, 10), "20 of 1000 or of 2000: 20 or 10 %"
    assert grown.advance(sample(200, 1800, postcopy=True)).percent_error == 0
    assert grown.finished().percent_error == 0
    assert Progress().percent_error == 0


def test_a_forecast_needs_a_speed_and_may_have_no_end() -> None:
    assert Forecast().advance([sample(0, 5)]) == Forecast()
    assert Forecast().left_ms(3.0) == (None, None)
    busy = Forecast().advance([sample(0, 1000, speed=100, dirty=200)])
    assert busy.left_ms(0) == (10_000, None)
    calm = busy.advance([sample(500, 500, speed=1000)])
    assert (calm.earliest_ms, calm.latest_ms) == (10_000, 10_000), "what was told as the earliest end stays"
    assert calm.left_ms(12_000) == (0.0, 0.0)


def test_disks_count_with_the_memory_that_goes_after_them() -> None:
    def at(whole: Whole, memory: Progress, disks: tuple[int, int]) -> Whole:
        return whole.advance(memory, disks_current=disks[0], disks_total=disks[1], guest_bytes=1000)

    copying = at(Whole(), Progress(), (1500, 3000))
    assert copying == Whole(1500, 4000, 37, 0), "the memory is still to come"
    grown = at(copying, Progress(), (3000, 5000))
    assert grown == Whole(3000, 6000, 50, 0), "what the guest writes is to be copied again"
    memory = Progress().advance(sample(400, 400))
    moving = at(grown, memory, (5000, 5000))
    assert moving == Whole(5400, 5800, 93, 0)
    assert at(moving, memory, (5000, 9000)).percent == 93, "it never runs backwards"
    assert at(moving, memory.finished(), (5000, 5000)) == Whole(5800, 5800, 100, 0)


def test_without_disks_the_whole_is_the_memory() -> None:
    memory = Progress().advance(sample(100, 900)).advance(sample(200, 1800))
    whole = Whole().advance(memory, disks_current=0, disks_total=0, guest_bytes=1000)
    assert whole == Whole(200, 2000, memory.percent, memory.percent_error)


@pytest.mark.proves("S101")
@given(samples_strategy, st.data())
def test_the_whole_never_runs_backwards_whatever_is_said_of_disks(samples: list[Sample], data: st.DataObject) -> None:
    """Between two rounds, and once their results are dismissed, QEMU has no job of a disk: nothing is said of it
    then."""
    memory, whole = Progress(), Whole()
    for each in samples:
        memory = memory.advance(each)
        current, total = data.draw(st.sampled_from([(0, 0), (0, 1 << 30), (1 << 20, 1 << 30), (1 << 30, 1 << 30)]))
        before = whole
        whole = whole.advance(memory, disks_current=current, disks_total=total, guest_bytes=1 << 20)
        assert whole.current_bytes >= before.current_bytes
        assert whole.percent >= before.percent
        assert whole.total_bytes >= whole.current_bytes
        assert 0 <= whole.percent_error <= 100
    done = whole.advance(memory.finished(), disks_current=0, disks_total=0, guest_bytes=1 << 20)
    assert (done.percent, done.current_bytes) == (100, done.total_bytes)
    assert done.current_bytes >= whole.current_bytes


def test_disks_of_which_nothing_is_said_count_as_they_were_last() -> None:
    memory = Progress().advance(sample(100, 900))
    with_disks = Whole().advance(memory, disks_current=2000, disks_total=3000, guest_bytes=1000)
    silent = with_disks.advance(memory, disks_current=0, disks_total=0, guest_bytes=1000)
    assert silent == with_disks == Whole(2100, 4000, 52, 0)
    later = silent.advance(memory.advance(sample(400, 600)), disks_current=0, disks_total=0, guest_bytes=1000)
    assert (later.current_bytes, later.total_bytes) == (2400, 4000)
