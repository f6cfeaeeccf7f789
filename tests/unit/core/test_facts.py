"""The log of facts: recorded once, in order, with rounds; and which error was the first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.core.facts import (
    ROUNDED,
    Fact,
    FactLog,
    Recorded,
    awaits_leave,
    error_stamp,
    first_error,
    open_round,
    visible_error,
    waits_for_channel,
    wants_pause,
)
from vmferry.core.status import source_status

STEPS = st.lists(
    st.tuples(st.sampled_from([fact for fact in Fact if fact not in ROUNDED]), st.just(0))
    | st.tuples(st.sampled_from(sorted(ROUNDED)), st.integers(1, 3)),
    max_size=30,
)


def log_of(*steps: tuple[Fact, int]) -> FactLog:
    log = FactLog()
    for fact, round_no in steps:
        log = log.with_fact(fact, round_no=round_no, text=f"{fact}#{round_no}")
    return log


@pytest.mark.proves("S2", "S23")
def test_a_fact_is_recorded_once_with_its_time_and_who_saw_it() -> None:
    log = FactLog().with_fact(Fact.MIGRATE, at_s=1.5, by="person", text="first")
    again = log.with_fact(Fact.MIGRATE, at_s=2.5, by="somebody else", text="second")
    assert again is log
    assert log.entry(Fact.MIGRATE) == Recorded(Fact.MIGRATE, 0, "first", 1.5, "person")
    assert list(log) == [log.entries[0]]
    assert len(log) == 1


def test_a_log_is_never_changed_only_continued() -> None:
    first = FactLog().with_fact(Fact.MIGRATE)
    second = first.with_fact(Fact.CANCEL)
    assert Fact.CANCEL not in first
    assert second.stamp(Fact.MIGRATE) == 0
    assert second.stamp(Fact.CANCEL) == 1
    assert second.stamp(Fact.ERROR) is None
    assert second.entry(Fact.ERROR) is None


def test_rounds_are_counted_apart() -> None:
    log = log_of((Fact.LINK_LOST, 1), (Fact.LINK_LOST, 2))
    assert Fact.LINK_LOST in log
    assert Fact.RESUME_ACK not in log
    assert log.last_round(Fact.LINK_LOST) == 2
    assert log.last_round(Fact.RESUME_ACK) == 0
    assert log.stamp(Fact.LINK_LOST, 2) == 1


@pytest.mark.parametrize(("fact", "round_no"), [(Fact.MIGRATE, 1), (Fact.LINK_LOST, 0)])
def test_only_facts_that_repeat_have_a_round(fact: Fact, round_no: int) -> None:
    with pytest.raises(AssertionError):
        FactLog().with_fact(fact, round_no=round_no)


@pytest.mark.proves("S1", "S3", "S83")
@given(STEPS)
def test_replaying_a_log_gives_the_same_statuses(steps: list[tuple[Fact, int]]) -> None:
    log, seen = FactLog(), []
    for fact, round_no in steps:
        log = log.with_fact(fact, round_no=round_no)
        seen.append(source_status(log))
    replayed, again = FactLog(), {}
    for entry in log:
        replayed = replayed.with_fact(entry.fact, round_no=entry.round)
        again[len(replayed)] = source_status(replayed)
    assert replayed == log
    assert not seen or seen[-1] is again[len(log)]


@given(STEPS)
def test_stamps_are_positions(steps: list[tuple[Fact, int]]) -> None:
    log = log_of(*steps)
    for position, entry in enumerate(log):
        assert log.stamp(entry.fact, entry.round) == position
        assert entry.fact in log


def test_the_first_error_is_an_error_or_a_link_lost_before_the_proof() -> None:
    assert first_error(FactLog()) is None
    assert error_stamp(FactLog()) is None
    lost_first = log_of((Fact.LINK_LOST, 1), (Fact.ERROR, 0))
    assert first_error(lost_first) == lost_first.entries[0]
    assert error_stamp(lost_first) == 0
    error_first = log_of((Fact.ERROR, 0), (Fact.LINK_LOST, 1))
    assert first_error(error_first) == error_first.entries[0]


def test_a_link_lost_after_the_proof_is_no_error() -> None:
    assert first_error(log_of((Fact.PACKAGE_LOADED, 0), (Fact.LINK_LOST, 1))) is None
    between = log_of((Fact.LINK_LOST, 1), (Fact.PACKAGE_LOADED, 0), (Fact.LINK_LOST, 2))
    assert first_error(between) == between.entries[0]


def test_a_round_that_was_never_heard_of_is_skipped() -> None:
    assert first_error(log_of((Fact.LINK_LOST, 2))) == Recorded(Fact.LINK_LOST, 2, "link-lost#2")


@pytest.mark.proves("S11", "S15")
def test_an_error_is_a_cause_or_a_consequence_of_the_cancel() -> None:
    assert visible_error(FactLog()) is None
    assert visible_error(log_of((Fact.ERROR, 0))) == ("error#0", "cause")
    assert visible_error(log_of((Fact.ERROR, 0), (Fact.CANCEL, 0))) == ("error#0", "cause")
    assert visible_error(log_of((Fact.CANCEL, 0), (Fact.ERROR, 0))) == ("error#0", "consequence of the cancel")


def test_a_round_is_open_from_its_loss_to_its_acknowledged_resume() -> None:
    lost = log_of((Fact.LINK_LOST, 1))
    assert (open_round(FactLog()), open_round(lost)) == (0, 1)
    healed = lost.with_fact(Fact.RESUME_ACK, round_no=1)
    assert (open_round(healed), open_round(healed.with_fact(Fact.LINK_LOST, round_no=2))) == (0, 2)


def test_a_destination_waits_for_a_channel_until_a_try_is_seen() -> None:
    lost = log_of((Fact.LINK_LOST, 1))
    tried = lost.with_fact(Fact.RESUME_WANTED, round_no=1)
    healed = tried.with_fact(Fact.RESUME_ACK, round_no=1)
    again = tried.with_fact(Fact.LINK_LOST, round_no=2)
    assert [waits_for_channel(log) for log in (FactLog(), lost, tried, healed, again)] == [
        False, True, False, False, True,
    ]  # fmt: skip


def test_a_pause_holds_until_the_same_round_is_over() -> None:
    assert not wants_pause(FactLog())
    paused = FactLog().with_fact(Fact.PAUSE, round_no=1)
    assert wants_pause(paused)
    resumed = paused.with_fact(Fact.PAUSE_OVER, round_no=1)
    assert not wants_pause(resumed)
    assert wants_pause(resumed.with_fact(Fact.PAUSE, round_no=2))


@pytest.mark.proves("S97")
def test_a_leave_is_awaited_from_the_wish_to_give_it_until_it_is_given() -> None:
    held = FactLog().with_fact(Fact.HOLD)
    logs = (FactLog(), held, held.with_fact(Fact.FINALIZE), FactLog().with_fact(Fact.FINALIZE))
    assert [awaits_leave(log) for log in logs] == [False, True, False, False]
