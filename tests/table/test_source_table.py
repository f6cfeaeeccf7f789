"""The source's table: safe in every combination of answers. That it is total and exact: test_both_tables."""

from __future__ import annotations

from functools import cache

import pytest

from vmferry.core.effects import Effect
from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Outcome, Row
from vmferry.core.view import Change, Cpus, Grant, Leave, Retry, Source, SourceView, Step, Target, Want
from vmferry.testing.tables import Views, effects_of, views_with

RAN = {Target.RAN, Target.DIED}
ENDS_OR_STARTS = {Effect.RETIRE_SOURCE, Effect.RESUME_SOURCE, Effect.CANCEL_SOURCE, Effect.CLEAN_UP}
by_label = pytest.mark.parametrize("row", SOURCE_ROWS, ids=lambda row: row.label)


@cache
def walk() -> Views[SourceView]:
    return Views(SourceView)


def where(effect: Effect) -> list[SourceView]:
    found = views_with(walk(), SOURCE_ROWS, effect)
    assert found, f"no row asks for {effect}"
    return found


# --- shape: what a row tells people ---------------------------------------------------------------------


@by_label
def test_a_guest_that_is_held_or_in_doubt_comes_with_an_action(row: Row[Effect]) -> None:
    if row.outcome in (Outcome.HELD, Outcome.UNCERTAIN, Outcome.DEGRADED):
        assert row.action


def test_nobody_waits_for_ever_with_the_guest_paused_on_both_sides() -> None:
    """Paused here and never run there: the row acts, has a limit, or names an action.

    The exceptions wait for an answer of QEMU that it gives without being asked by anybody else.
    """
    exceptions = {"B-cpus-unknown", "G-gone-cpus-unknown", "M-unknown-word", "M-memory", "P-copying"}
    for row in SOURCE_ROWS:
        if row.do is not None or row.limit_ms is not None or row.action or row.label in exceptions:
            continue
        views = walk().pick(walk().where(row.when), most=len(walk().views))
        assert all(view.target is Target.RAN for view in views), row.label


# --- safety: who may run the guest ----------------------------------------------------------------------


@pytest.mark.proves("S39", "S46")
def test_the_grant_is_sent_only_when_the_source_gave_everything_away_and_nobody_wants_it_back() -> None:
    """Whoever wants it back cannot have it once the source's process is gone (P29): then forward is the only way."""
    for view in where(Effect.SEND_GRANT):
        assert view.want is Want.GO or view.source is Source.RETIRED
        assert view.source in (Source.POSTCOPY, Source.DONE, Source.RETIRED)
        assert view.target in (Target.LOADED, Target.REFUSED)
        assert view.grant in (Grant.HELD, Grant.SENT), "durable in the journal before it is sent"


def test_the_commit_comes_before_the_grant_and_after_the_start_of_the_switchover() -> None:
    for view in where(Effect.COMMIT):
        assert view.grant is Grant.NONE
        if view.source is Source.RETIRED:
            assert view.target is Target.LOADED
        else:
            assert view.want is Want.GO
            assert view.source in (Source.SWITCHING, Source.POSTCOPY, Source.DONE)


def test_the_source_resumes_only_if_the_destination_cannot_run() -> None:
    for view in where(Effect.RESUME_SOURCE):
        assert view.want is Want.BACK
        assert view.target not in RAN
        assert view.grant is not Grant.SENT or view.target is Target.GONE
        assert view.source in (Source.IDLE, Source.BACK, Source.DONE)
        assert view.cpus is Cpus.STOPPED


def test_a_cancel_before_the_grant_always_ends_with_the_guest_here_or_with_an_action() -> None:
    """With an unsent grant, a living source and a destination that never ran, the table leads back."""
    leads_back = {"P-back-release", "P-back-clean", "B-cancel", "B-ending", "B-resume", "B-release", "B-clean"}
    leads_back |= {"B-unlocked", "B-stuck", "B-postcopy", "B-postcopy-lost", "P-back-drop", "B-drop"}
    waits = {"B-cpus-unknown", "X-early-grant"}
    dead = {Source.GONE, Source.RETIRED}
    for row in SOURCE_ROWS:
        for view in walk().pick(walk().where(row.when), most=len(walk().views)):
            if view.want is Want.BACK and view.grant is not Grant.SENT and view.target not in RAN:
                assert row.label in leads_back | waits or view.source in dead, (row.label, view)


@pytest.mark.proves("S36", "S41", "S59")
def test_a_source_is_led_out_of_postcopy_only_for_a_destination_that_never_ran_and_never_will() -> None:
    for effect in (Effect.BRING_BACK, Effect.THROW_AWAY):
        for view in where(effect):
            assert view.want is Want.BACK
            assert view.target not in RAN
            assert view.grant is not Grant.SENT or view.target is Target.GONE


@pytest.mark.proves("S36")
def test_a_destination_that_is_silent_after_the_grant_is_never_given_up_without_a_fence() -> None:
    for view in where(Effect.FENCE_TARGET):
        assert (view.grant, view.target) == (Grant.SENT, Target.UNKNOWN)


@pytest.mark.proves("S47")
def test_a_refused_start_goes_back_again_or_waits_for_a_person_as_the_policy_says() -> None:
    expected = {Retry.BACK: Effect.NOTE_TARGET_LOST, Retry.AGAIN: Effect.SEND_GRANT, Retry.ASK: None}
    for retry, effect in expected.items():
        for source in (Source.POSTCOPY, Source.DONE):
            view = SourceView(
                Want.GO, Step.STARTED, source, Cpus.STOPPED, Target.REFUSED, Grant.SENT, Change.NONE, retry
            )
            row = next(row for row in SOURCE_ROWS if row.matches(view))
            assert row.do is effect
            assert effect is not None or "vmferry cancel NAME" in row.action


@pytest.mark.proves("S97", "S106")
def test_a_switchover_that_waits_for_a_persons_leave_goes_on_by_nothing_else_and_goes_back_in_the_end() -> None:
    for effect in (Effect.CONTINUE, Effect.DRAIN_MIRRORS):
        assert {view.leave for view in where(effect)} == {Leave.GIVEN}
    held = [row for row in SOURCE_ROWS if Leave.AWAITED in row.when.get("leave", ())]
    assert [row.label for row in held] == ["M-hold"]
    (row,) = held
    assert (row.do, row.then, row.outcome) == (None, Effect.NOTE_TIMEOUT, Outcome.HELD)
    assert row.limit_ms is not None
    for word in ("finalize", "cancel"):
        assert word in row.action


@pytest.mark.proves("S99")
def test_pages_are_paused_only_while_the_destination_runs_and_asks_for_them() -> None:
    for view in where(Effect.PAUSE_PAGES):
        assert (view.source, view.target, view.grant) == (Source.POSTCOPY, Target.RAN, Grant.SENT)
        assert view.change is Change.PAUSE
    for view in where(Effect.RECONNECT):
        assert view.target is not Target.RAN or view.retry is Retry.AGAIN, "a person's pause is not undone by itself"


@pytest.mark.proves("S36")
def test_nobody_is_connected_to_a_destination_that_is_not_known_to_live() -> None:
    """Before the grant a silent one is not even tried: the guest goes back. After it the try itself asks, on both ways,
    and no order to resume comes before the answer (`test_standing_with_fakes`)."""
    views = where(Effect.RECONNECT)
    assert Target.GONE not in {view.target for view in views}
    silent = [view for view in views if view.target is Target.UNKNOWN]
    assert {view.grant for view in silent} == {Grant.SENT}
    assert {view.retry for view in silent} == {Retry.AGAIN}


def test_the_source_is_cancelled_only_before_the_grant_or_after_the_destination_renounced() -> None:
    for view in where(Effect.CANCEL_SOURCE):
        assert view.want is Want.BACK
        assert view.grant is not Grant.SENT or view.target is Target.GONE


def test_the_source_ends_only_after_the_destination_ran_and_has_every_page() -> None:
    for view in where(Effect.RETIRE_SOURCE):
        assert view.target is Target.RAN
        assert view.source is Source.DONE
        assert view.grant is Grant.SENT


def test_the_source_is_stopped_only_because_the_destination_runs_or_it_lost_its_disks() -> None:
    for view in where(Effect.STOP_SOURCE):
        assert view.cpus in (Cpus.AS_BEFORE, Cpus.UNLOCKED)
        assert view.target is Target.RAN or (view.want, view.cpus) == (Want.BACK, Cpus.UNLOCKED)


def test_a_guest_that_went_back_and_runs_without_its_locks_is_stopped() -> None:
    """QEMU 7.2 starts it although its disks' locks were refused."""
    asked = {
        "want": frozenset({Want.BACK}),
        "step": frozenset({Step.STARTED}),
        "source": frozenset({Source.IDLE, Source.BACK, Source.DONE}),
        "cpus": frozenset({Cpus.UNLOCKED}),
    }
    never_told = {"grant": frozenset({Grant.NONE, Grant.HELD}), "target": frozenset(Target) - RAN}
    gone = {"grant": frozenset({Grant.SENT}), "target": frozenset({Target.GONE})}
    stopped = 0
    for row in SOURCE_ROWS:
        if row.do is Effect.STOP_SOURCE:
            stopped |= walk().where(row.when)
    for more in (never_told, gone):
        views = walk().where({**asked, **more})
        assert views
        assert not walk().pick(views & ~stopped)


def test_a_source_that_died_is_no_failure_before_the_destination_was_asked() -> None:
    """What it had sent may be all that the destination needs."""
    sent = {"step": frozenset({Step.STARTED}), "source": frozenset({Source.GONE, Source.RETIRED})}
    may_hold = frozenset({Target.PREPARED, Target.READY, Target.LOADED, Target.UNKNOWN})
    views = walk().where({**sent, "target": may_hold})
    at_once = [row.label for row in SOURCE_ROWS if row.do is Effect.NOTE_QEMU_ERROR and walk().where(row.when) & views]
    assert at_once == []


@pytest.mark.proves("S42")
@by_label
def test_a_row_in_doubt_keeps_both_qemus_and_starts_nothing(row: Row[Effect]) -> None:
    if row.outcome is Outcome.UNCERTAIN:
        assert not (ENDS_OR_STARTS | {Effect.SEND_GRANT}) & set(effects_of(row))


@pytest.mark.proves("S42")
def test_while_the_destination_runs_and_pages_are_here_the_source_is_kept() -> None:
    both_needed = {Source.POSTCOPY, Source.BROKEN, Source.SWITCHING, Source.ENDING, Source.BACK}
    for row in SOURCE_ROWS:
        for view in walk().pick(walk().where(row.when), most=len(walk().views)):
            if view.grant is Grant.SENT and view.target is Target.RAN and view.source in both_needed:
                assert not ENDS_OR_STARTS & set(effects_of(row)), (row.label, view)


def test_an_unknown_word_of_qemu_or_a_silent_qemu_never_starts_or_ends_a_guest() -> None:
    harmful = {Effect.RESUME_SOURCE, Effect.RETIRE_SOURCE, Effect.SEND_GRANT, Effect.CONTINUE, Effect.COMMIT}
    for effect in harmful:
        assert not {view.source for view in where(effect)} & {Source.UNKNOWN, Source.SILENT}


def test_an_unknown_destination_never_leads_to_a_start_after_the_grant() -> None:
    for view in walk().views:
        if view.target is Target.UNKNOWN and view.grant is Grant.SENT and view.step is Step.STARTED:
            row = next(row for row in SOURCE_ROWS if row.matches(view))
            assert row.label in ("G-uncertain", "G-uncertain-broken", "G-uncertain-hold")
            assert row.do in (Effect.ASK_TARGET, Effect.RECONNECT)
            assert row.then is Effect.FENCE_TARGET


def test_the_attempt_is_cleaned_up_only_when_it_is_settled_where_the_guest_is() -> None:
    for row in SOURCE_ROWS:
        if Effect.CLEAN_UP in effects_of(row):
            assert row.outcome in (Outcome.SOURCE, Outcome.DESTINATION, Outcome.LOST), row.label


def test_lost_is_said_only_when_a_process_is_gone() -> None:
    for row in SOURCE_ROWS:
        if row.outcome is Outcome.LOST:
            for view in walk().pick(walk().where(row.when), most=len(walk().views)):
                assert view.source in (Source.GONE, Source.RETIRED) or view.target is Target.DIED, (row.label, view)


def test_nothing_is_changed_before_both_hosts_were_asked() -> None:
    assert {view.step for view in where(Effect.CHECK_PLAN)} == {Step.NEW}
    assert {view.step for view in where(Effect.PREPARE)} == {Step.PLANNED}
    assert {view.step for view in where(Effect.CONFIGURE)} == {Step.PREPARED}
    assert {view.step for view in where(Effect.START)} == {Step.CONFIGURED}


def test_postcopy_begins_only_because_it_was_asked_for_and_while_memory_moves() -> None:
    for view in where(Effect.START_POSTCOPY):
        assert view.change is Change.POSTCOPY
        assert view.source is Source.BUSY
        assert view.want is Want.GO


def test_the_pause_before_the_switchover_ends_only_when_the_destination_answered_in_it() -> None:
    for view in where(Effect.CONTINUE):
        assert view.target is Target.READY
        assert view.want is Want.GO
