"""From facts and readings to the questions of the tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmferry.core.facts import Fact, FactLog
from vmferry.core.migration_status import MigrationStatus
from vmferry.core.view import (
    SOURCE_WORDS,
    Change,
    Cpus,
    DestinationView,
    Disks,
    Grant,
    Halt,
    Held,
    Incoming,
    Leave,
    Ran,
    Readings,
    Retry,
    Served,
    Source,
    SourceView,
    Step,
    Target,
    Want,
    Wish,
    answers,
    cpus_from,
    destination_view,
    source_view,
    source_word,
)

F = Fact
FactOrRound = Fact | tuple[Fact, int]


def log_of(*steps: FactOrRound) -> FactLog:
    log = FactLog()
    for step in steps:
        fact, round_no = step if isinstance(step, tuple) else (step, 0)
        log = log.with_fact(fact, round_no=round_no)
    return log


@pytest.mark.proves("S29", "S64")
def test_every_word_of_qemu_is_translated() -> None:
    assert set(SOURCE_WORDS) == {status.value for status in MigrationStatus}


def test_a_word_that_nobody_has_heard_of_is_unknown_and_no_word_is_idle() -> None:
    assert source_word("multiplying") is Source.UNKNOWN
    assert source_word(None) is Source.IDLE
    assert source_word("postcopy-recover") is Source.BROKEN


@pytest.mark.parametrize(
    ("run_state", "running_before", "source", "expected"),
    [
        (None, True, Source.BACK, Cpus.UNKNOWN),
        ("running", True, Source.BACK, Cpus.AS_BEFORE),
        ("running", False, Source.BACK, Cpus.AS_BEFORE),
        ("finish-migrate", True, Source.BACK, Cpus.STUCK),
        ("finish-migrate", True, Source.SWITCHING, Cpus.STOPPED),
        ("paused", False, Source.BACK, Cpus.AS_BEFORE),
        ("prelaunch", False, Source.IDLE, Cpus.AS_BEFORE),
        ("postmigrate", False, Source.DONE, Cpus.RESTING),
        ("paused", True, Source.BACK, Cpus.STOPPED),
        ("postmigrate", True, Source.DONE, Cpus.STOPPED),
        ("io-error", True, Source.BACK, Cpus.STOPPED),
    ],
)
def test_the_cpus_against_what_their_owner_wanted(
    run_state: str | None, running_before: bool, source: Source, expected: Cpus
) -> None:
    assert cpus_from(run_state, running_before=running_before, source=source) is expected
    without = Cpus.UNLOCKED if run_state == "running" else expected
    assert cpus_from(run_state, running_before=running_before, source=source, has_locks=False) is without


def test_a_new_attempt_wants_to_go_and_knows_nothing() -> None:
    assert source_view(FactLog(), Readings()) == SourceView(
        Want.GO, Step.NEW, Source.IDLE, Cpus.UNKNOWN, Target.ABSENT, Grant.NONE, Change.NONE, Retry.AGAIN
    )


@pytest.mark.parametrize(
    ("facts", "step"),
    [
        ((F.PLANNED,), Step.PLANNED),
        ((F.PLANNED, F.PREPARED), Step.PREPARED),
        ((F.PLANNED, F.PREPARED, F.CONFIGURED), Step.CONFIGURED),
        ((F.STARTED,), Step.STARTED),
    ],
)
def test_how_far_the_set_up_got(facts: tuple[Fact, ...], step: Step) -> None:
    assert source_view(log_of(*facts), Readings()).step is step


@pytest.mark.parametrize("fact", [F.CANCEL, F.ERROR])
def test_a_cancel_and_an_error_both_lead_back(fact: Fact) -> None:
    assert source_view(log_of(fact), Readings()).want is Want.BACK


@pytest.mark.parametrize(
    ("facts", "target"),
    [
        ((), Target.ABSENT),
        ((F.PREPARE,), Target.PREPARED),
        ((F.PREPARE, F.TARGET_READY), Target.READY),
        ((F.PREPARE, F.TARGET_READY, F.LOADED), Target.LOADED),
        ((F.PREPARE, F.LOADED, (F.START_REFUSED, 1)), Target.REFUSED),
        ((F.PREPARE, F.LOADED, F.RUN_ACKED), Target.RAN),
        ((F.PREPARE, F.TARGET_GONE), Target.GONE),
        ((F.PREPARE, F.RUN_ACKED, F.TARGET_DIED), Target.DIED),
        ((F.GRANT_SENT,), Target.PREPARED),
    ],
)
def test_what_is_known_of_the_destination(facts: tuple[FactOrRound, ...], target: Target) -> None:
    assert source_view(log_of(*facts), Readings()).target is target


def test_proofs_outlive_silence_and_nothing_else_does() -> None:
    silent = Readings(target_answers=False)
    for proof in (F.RUN_ACKED, F.TARGET_GONE, F.TARGET_DIED):
        spoken = source_view(log_of(F.PREPARE, proof), Readings())
        assert source_view(log_of(F.PREPARE, proof), silent) == spoken
    assert source_view(log_of(F.PREPARE, F.LOADED), silent).target is Target.UNKNOWN
    assert source_view(log_of(F.GRANT_SENT), silent).target is Target.UNKNOWN
    assert source_view(FactLog(), silent).target is Target.ABSENT


def test_the_grant_is_held_when_durable_and_sent_when_it_may_have_arrived() -> None:
    assert source_view(log_of(F.COMMITTED), Readings()).grant is Grant.HELD
    assert source_view(log_of(F.COMMITTED, F.GRANT_SENT), Readings()).grant is Grant.SENT


def test_a_postcopy_that_was_asked_for_is_due_until_qemu_took_the_order() -> None:
    assert source_view(log_of(F.START_POSTCOPY), Readings()).change is Change.POSTCOPY
    assert source_view(log_of(F.START_POSTCOPY, F.POSTCOPY_TOLD), Readings()).change is Change.NONE


def test_a_source_that_is_gone_had_given_everything_away_or_not() -> None:
    reading = Readings(source=Source.POSTCOPY, cpus=Cpus.STOPPED)
    gone = source_view(log_of(F.SOURCE_GONE), reading)
    assert (gone.source, gone.cpus) == (Source.GONE, Cpus.UNKNOWN)
    retired = source_view(log_of(F.ALL_SENT, F.SOURCE_GONE), reading)
    assert (retired.source, retired.cpus) == (Source.RETIRED, Cpus.UNKNOWN)
    assert source_view(FactLog(), reading).source is Source.POSTCOPY


@pytest.mark.parametrize("source", Source)
def test_a_source_whose_pages_a_stand_in_served_has_given_everything_away(source: Source) -> None:
    """Its QEMU goes on saying that it failed or is paused."""
    for whole in (F.ALL_SENT, F.TARGET_WHOLE):
        served = source_view(log_of(whole, F.RUN_ACKED), Readings(source=source)).source
        assert served is (Source.DONE if source in (Source.BACK, Source.BROKEN, Source.POSTCOPY) else source)
    assert source_view(FactLog(), Readings(source=source)).source is source


@pytest.mark.proves("S55")
@pytest.mark.parametrize("source", Source)
def test_a_destination_that_is_whole_and_never_ran_does_not_make_a_source_that_went_back_a_completed_one(
    source: Source,
) -> None:
    """1. the last page arrives  2. the channel breaks before the result  3. the source's QEMU fails and runs its guest
    again, or stands still without a channel."""
    found = source_view(log_of(F.TARGET_WHOLE), Readings(source=source)).source
    assert found is (Source.POSTCOPY if source is Source.BROKEN else source)


@pytest.mark.proves("S26", "S54", "S59")
def test_what_a_stand_in_took_is_not_what_the_destination_has() -> None:
    """1. the source was led out of postcopy behind a fence  2. the fence was given back  3. an order to start that had
    hung over there took the disks: that guest lacks pages, and the source must not end as one that gave all away."""
    done = Readings(source=Source.DONE)
    led_out = log_of(F.GRANT_SENT, F.STAND_IN)
    assert source_view(led_out, done).source is Source.BACK
    assert source_view(log_of(F.GRANT_SENT, F.STAND_IN, F.RUN_ACKED), done).source is Source.BACK
    assert source_view(log_of(F.GRANT_SENT, F.STAND_IN, F.RUN_ACKED, F.TARGET_WHOLE), done).source is Source.DONE
    assert source_view(log_of(F.STAND_IN, F.SOURCE_GONE), done).source is Source.GONE


@pytest.mark.proves("S53")
def test_a_source_whose_process_died_with_a_whole_destination_had_given_everything_away() -> None:
    assert source_view(log_of(F.SOURCE_GONE, F.TARGET_WHOLE), Readings()).source is Source.RETIRED
    # What the destination has is of before, unless it ran the guest itself.
    went_on = (F.SOURCE_RESUMED, F.SOURCE_GONE, F.TARGET_WHOLE)
    assert source_view(log_of(*went_on), Readings()).source is Source.GONE
    assert source_view(log_of(F.RUN_ACKED, *went_on), Readings()).source is Source.RETIRED


@pytest.mark.proves("S36")
def test_a_fence_makes_a_silent_destination_gone_until_it_is_known_to_be_broken() -> None:
    up = log_of(F.PREPARE, F.GRANT_SENT).with_fact(F.FENCED, round_no=1)
    silent = Readings(target_answers=False)
    assert source_view(log_of(F.PREPARE, F.GRANT_SENT), silent).target is Target.UNKNOWN
    assert (source_view(up, silent).target, source_view(up, silent).want) == (Target.GONE, Want.BACK)
    broken = up.with_fact(F.FENCE_BROKEN, round_no=1)
    assert (source_view(broken, silent).target, source_view(broken, silent).want) == (Target.UNKNOWN, Want.GO)
    again = source_view(broken.with_fact(F.FENCED, round_no=2), silent)
    assert again.target is Target.GONE


@pytest.mark.proves("S47")
@pytest.mark.parametrize("policy", Retry)
def test_what_the_policy_says_of_a_refused_start(policy: Retry) -> None:
    refused = log_of(F.PREPARE, F.GRANT_SENT).with_fact(F.START_REFUSED, round_no=1)
    readings = Readings(source=Source.DONE, on_refused_start=policy)
    assert source_view(refused, readings).retry is policy
    told = refused.with_fact(F.TRY_AGAIN, round_no=1)
    assert source_view(told, readings).retry is (Retry.AGAIN if policy is Retry.ASK else policy)
    assert source_view(told.with_fact(F.START_REFUSED, round_no=2), readings).retry is policy


@pytest.mark.proves("S118")
def test_a_broken_channel_is_tried_again_for_as_long_as_the_policy_says() -> None:
    for patient, retry in ((True, Retry.AGAIN), (False, Retry.ASK)):
        assert source_view(FactLog(), Readings(source=Source.BROKEN, is_patient=patient)).retry is retry
    assert source_view(FactLog(), Readings(source=Source.BUSY, is_patient=False)).retry is Retry.AGAIN


@pytest.mark.parametrize(
    ("facts", "ran"),
    [
        ((), Ran.NO),
        (((F.START_SENT, 1),), Ran.UNKNOWN),
        (((F.START_SENT, 1), (F.START_REFUSED, 1)), Ran.NO),
        (((F.START_SENT, 1), (F.START_REFUSED, 1), (F.START_SENT, 2)), Ran.UNKNOWN),
        (((F.START_SENT, 1), F.TARGET_RAN), Ran.YES),
        ((F.TARGET_RAN,), Ran.YES),
    ],
)
def test_whether_the_guest_ever_ran_on_the_destination(facts: tuple[FactOrRound, ...], ran: Ran) -> None:
    assert destination_view(log_of(*facts), Incoming.LOADED).ran is ran


@pytest.mark.parametrize(
    ("facts", "held"),
    [
        ((), Held.NO),
        (((F.GRANTED, 1),), Held.NO),
        ((F.COMMITTED, (F.GRANTED, 1)), Held.YES),
        ((F.COMMITTED, (F.GRANTED, 1), (F.START_REFUSED, 1)), Held.NO),
        ((F.COMMITTED, (F.GRANTED, 1), (F.START_REFUSED, 1), (F.GRANTED, 2)), Held.YES),
    ],
)
def test_an_order_needs_a_durable_commit_and_is_used_up_by_a_refusal(
    facts: tuple[FactOrRound, ...], held: Held
) -> None:
    assert destination_view(log_of(*facts), Incoming.LOADED).held is held


def test_what_the_source_wants_of_the_destination() -> None:
    assert destination_view(FactLog(), Incoming.NONE) == DestinationView(
        Wish.KEEP, Held.NO, Incoming.NONE, Ran.NO, Halt.NONE
    )
    assert destination_view(log_of(F.RELEASE), Incoming.NONE).wish is Wish.DROP


def test_answers_lists_every_answer_and_knows_no_other_question() -> None:
    assert answers(SourceView, "target") == tuple(Target)
    assert answers(DestinationView, "wish") == (Wish.KEEP, Wish.DROP)
    with pytest.raises(AssertionError, match="no question weather"):
        answers(SourceView, "weather")


def test_readings_are_replaced_whole() -> None:
    assert replace(Readings(), source=Source.DONE) == Readings(source=Source.DONE)


@pytest.mark.proves("S17", "S124")
def test_a_channel_that_only_the_destination_knows_to_be_lost_is_broken() -> None:
    for cut_off, source in ((False, Source.POSTCOPY), (True, Source.BROKEN)):
        readings = Readings(source=Source.POSTCOPY, target_is_cut_off=cut_off)
        assert source_view(FactLog(), readings).source is source
    assert source_view(FactLog(), Readings(source=Source.BUSY, target_is_cut_off=True)).source is Source.BUSY


@pytest.mark.proves("S117", "S119")
@pytest.mark.parametrize(
    ("is_lost", "pauses", "is_frozen", "halt"),
    [
        (True, True, False, Halt.WANTED),
        (True, True, True, Halt.KEPT),
        (False, True, True, Halt.OVER),
        (True, False, True, Halt.OVER),
        (True, False, False, Halt.NONE),
    ],
)
def test_when_the_cpus_are_stopped_from_outside(is_lost: bool, pauses: bool, is_frozen: bool, halt: Halt) -> None:
    log = log_of((F.LINK_LOST, 1)) if is_lost else FactLog()
    found = destination_view(log, Incoming.RUNNING, pauses=pauses, is_frozen=is_frozen)
    assert found.halt is halt
    whole = destination_view(log.with_fact(F.ALL_SENT), Incoming.RUNNING, pauses=pauses, is_frozen=is_frozen)
    assert whole.halt in (Halt.NONE, Halt.OVER)


def test_pages_that_were_held_back_may_go_once_the_guest_runs_there() -> None:
    slow = log_of(F.SLOWED)
    assert source_view(slow, Readings()).change is Change.NONE
    ran = slow.with_fact(F.RUN_ACKED)
    assert source_view(ran, Readings()).change is Change.PACE
    assert source_view(ran.with_fact(F.PACED), Readings()).change is Change.NONE


@pytest.mark.parametrize(
    ("facts", "disks"),
    [
        ((F.DISKS_STARTED, F.DISKS_READY, F.DISK_FAILED), Disks.SETTLED),  # none are wanted
        ((F.DISKS_WANTED,), Disks.TODO),
        ((F.DISKS_WANTED, F.DISKS_STARTED), Disks.COPYING),
        ((F.DISKS_WANTED, F.DISKS_STARTED, (F.DISK_READY, 1)), Disks.COPYING),
        ((F.DISKS_WANTED, F.DISKS_STARTED, F.DISKS_READY), Disks.READY),
        ((F.DISKS_WANTED, F.DISKS_STARTED, F.DISKS_READY, F.DISK_FAILED), Disks.FAILED),
        ((F.DISKS_WANTED, F.DISK_FAILED, F.DISKS_DROPPED), Disks.SETTLED),
        ((F.DISKS_WANTED, F.DISKS_STARTED, F.DISKS_DRAINED), Disks.SETTLED),
        ((F.DISKS_WANTED, F.DISKS_STARTED, F.COMMITTED), Disks.SETTLED),
    ],
)
def test_how_it_stands_with_the_disks(facts: tuple[FactOrRound, ...], disks: Disks) -> None:
    assert source_view(log_of(*facts), Readings()).disks is disks


@pytest.mark.parametrize(
    ("facts", "served"),
    [
        ((), Served.NO),
        ((F.DISKS_SERVED,), Served.YES),
        ((F.DISKS_SERVED, F.DISKS_CLOSED), Served.NO),
    ],
)
def test_whether_the_network_can_write_to_the_disks(facts: tuple[Fact, ...], served: Served) -> None:
    assert destination_view(log_of(*facts), Incoming.LOADED).served is served


@pytest.mark.proves("S97")
def test_leave_is_awaited_only_where_it_was_asked_for_and_not_given() -> None:
    assert source_view(log_of(F.MIGRATE), Readings()).leave is Leave.GIVEN
    assert source_view(log_of(F.MIGRATE, F.HOLD), Readings()).leave is Leave.AWAITED
    assert source_view(log_of(F.MIGRATE, F.HOLD, F.FINALIZE), Readings()).leave is Leave.GIVEN


def test_a_pause_is_a_change_that_stays_and_a_broken_channel_is_then_left_alone() -> None:
    paused = log_of(F.MIGRATE).with_fact(F.PAUSE, round_no=1)
    running, broken = (source_view(paused, Readings(source=s)) for s in (Source.POSTCOPY, Source.BROKEN))
    assert (running.change, running.retry) == (Change.PAUSE, Retry.AGAIN)
    assert broken.retry is Retry.ASK
    over = source_view(paused.with_fact(F.PAUSE_OVER, round_no=1), Readings(source=Source.BROKEN))
    assert (over.change, over.retry) == (Change.NONE, Retry.AGAIN)
