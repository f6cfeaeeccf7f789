"""The two questions of a loop: which row, and what now. Read as plays: facts so far -> what is done next."""

from __future__ import annotations

import pytest

from vmferry.core.decide import (
    decide_destination,
    decide_source,
    destination_allows,
    effect_now,
    source_allows,
)
from vmferry.core.effects import DestinationEffect, Effect
from vmferry.core.facts import Fact, FactLog
from vmferry.core.source_rows import ENDING_MS
from vmferry.core.table import Outcome
from vmferry.core.view import Cpus, Incoming, Readings, Source, destination_view, source_view

F = Fact
E = Effect
S = Source
FactOrRound = Fact | tuple[Fact, int]
Scene = tuple[tuple[FactOrRound, ...], Source, str, Effect | None]
STARTED = (F.MIGRATE, F.PREPARE, F.PLANNED, F.PREPARED, F.CONFIGURED, F.STARTED)

PRECOPY: tuple[Scene, ...] = (
    ((F.MIGRATE,), S.IDLE, "P-plan", E.CHECK_PLAN),
    ((F.PLANNED,), S.IDLE, "P-prepare", E.PREPARE),
    ((F.PREPARE, F.PREPARED), S.IDLE, "P-configure", E.CONFIGURE),
    ((F.CONFIGURED,), S.IDLE, "P-start", E.START),
    ((F.STARTED,), S.IDLE, "M-connect", None),
    ((), S.BUSY, "M-memory", None),
    ((F.SETUP_DONE,), S.WAITING, "M-sure", E.MAKE_SURE),
    ((F.TARGET_READY,), S.WAITING, "M-continue", E.CONTINUE),
    ((F.CONTINUE,), S.SWITCHING, "C-commit", E.COMMIT),
    ((F.COMMITTED,), S.SWITCHING, "C-wait-load", None),
    ((F.ALL_SENT,), S.DONE, "C-ask", E.ASK_TARGET),
    ((F.LOADED,), S.DONE, "C-grant", E.SEND_GRANT),
    ((F.GRANT_SENT,), S.DONE, "G-again", E.SEND_GRANT),
    ((F.RUN_ACKED,), S.DONE, "G-ran-retire", E.RETIRE_SOURCE),
    ((F.SOURCE_GONE,), S.DONE, "G-ran-clean", E.CLEAN_UP),
)
POSTCOPY: tuple[Scene, ...] = (
    ((*STARTED, F.START_POSTCOPY), S.BUSY, "M-postcopy", E.START_POSTCOPY),
    ((F.POSTCOPY_TOLD,), S.BUSY, "M-memory", None),
    ((F.TARGET_READY, F.PACKAGE_SENT), S.SWITCHING, "C-commit", E.COMMIT),
    ((F.COMMITTED, F.LOADED, F.PACKAGE_LOADED), S.POSTCOPY, "C-grant", E.SEND_GRANT),
    ((F.GRANT_SENT, F.RUN_ACKED), S.POSTCOPY, "G-ran-pages", None),
    ((F.ALL_SENT,), S.DONE, "G-ran-retire", E.RETIRE_SOURCE),
)
CANCEL: tuple[Scene, ...] = (
    ((*STARTED, F.CANCEL), S.BUSY, "B-cancel", E.CANCEL_SOURCE),
    ((), S.ENDING, "B-ending", None),
    ((), S.BACK, "B-resume", E.RESUME_SOURCE),
)
START_REFUSED: tuple[Scene, ...] = (
    ((*STARTED, F.ALL_SENT, F.COMMITTED, F.LOADED, F.GRANT_SENT), S.DONE, "G-again", E.SEND_GRANT),
    (((F.START_REFUSED, 1),), S.DONE, "G-start-refused", E.NOTE_TARGET_LOST),
    ((F.ERROR,), S.DONE, "G-back-release", E.RELEASE_TARGET),
    ((F.TARGET_GONE,), S.DONE, "G-gone-resume", E.RESUME_SOURCE),
)


@pytest.mark.proves("S6", "S19")
@pytest.mark.parametrize("play", [PRECOPY, POSTCOPY, CANCEL, START_REFUSED], ids=["pre", "post", "cancel", "refused"])
def test_a_play_of_the_source(play: tuple[Scene, ...]) -> None:
    log = FactLog()
    for facts, source, label, effect in play:
        for step in facts:
            fact, round_no = step if isinstance(step, tuple) else (step, 0)
            log = log.with_fact(fact, round_no=round_no)
        readings = Readings(source=source, cpus=Cpus.STOPPED)
        row = decide_source(log, readings)
        assert (row.label, row.do) == (label, effect)
        if effect is not None:
            assert source_allows(effect, source_view(log, readings))


def test_the_commit_is_made_beside_the_device_phase_and_costs_no_pause() -> None:
    log = FactLog()
    for fact in (*STARTED, F.SETUP_DONE, F.SWITCHOVER, F.CONTINUE):
        log = log.with_fact(fact)
    assert decide_source(log, Readings(source=S.SWITCHING)).do is E.COMMIT


def test_a_restart_with_a_commit_counts_the_grant_as_sent_and_only_the_destination_leads_back() -> None:
    log = FactLog()
    for fact in (*STARTED, F.COMMITTED, F.GRANT_SENT, F.CANCEL):
        log = log.with_fact(fact)
    silent = decide_source(log, Readings(source=S.BACK, cpus=Cpus.STOPPED, target_answers=False))
    assert (silent.label, silent.outcome) == ("G-uncertain", Outcome.UNCERTAIN)
    assert decide_source(log, Readings(source=S.BACK, cpus=Cpus.STOPPED)).do is E.RELEASE_TARGET
    gone = log.with_fact(F.TARGET_GONE)
    assert decide_source(gone, Readings(source=S.BACK, cpus=Cpus.STOPPED)).do is E.RESUME_SOURCE


@pytest.mark.proves("S38", "S39")
def test_a_play_of_the_destination() -> None:
    log = FactLog().with_fact(F.PREPARE)
    assert decide_destination(log, Incoming.NONE).do is DestinationEffect.SPAWN
    assert decide_destination(log, Incoming.LOADING).do is None
    early = log.with_fact(F.COMMITTED).with_fact(F.GRANTED, round_no=1)
    assert decide_destination(early, Incoming.LOADING).label == "D-granted-early"
    assert decide_destination(log, Incoming.LOADED).label == "D-wait-grant"
    assert decide_destination(early, Incoming.LOADED).do is DestinationEffect.START_CPUS
    assert destination_allows(DestinationEffect.START_CPUS, destination_view(early, Incoming.LOADED))
    assert not destination_allows(DestinationEffect.START_CPUS, destination_view(log, Incoming.LOADED))
    sent = early.with_fact(F.START_SENT, round_no=1)
    assert decide_destination(sent, Incoming.LOADED).label == "D-in-doubt"
    assert decide_destination(sent, Incoming.RUNNING).do is DestinationEffect.REPORT_RAN


def test_what_is_asked_for_at_the_limit_replaces_what_was_asked_for_before() -> None:
    log = FactLog()
    for fact in (*STARTED, F.CANCEL):
        log = log.with_fact(fact)
    row = decide_source(log, Readings(source=S.ENDING))
    assert effect_now(row, ENDING_MS - 1) is None
    assert effect_now(row, ENDING_MS) is E.CANCEL_SOURCE
    forever = decide_source(log, Readings(source=S.BUSY))
    assert effect_now(forever, 1e9) is E.CANCEL_SOURCE


def test_an_effect_is_refused_in_a_view_that_moved_on() -> None:
    log = FactLog()
    for fact in (*STARTED, F.CANCEL):
        log = log.with_fact(fact)
    stopped = Readings(source=S.BACK, cpus=Cpus.STOPPED)
    assert source_allows(E.RESUME_SOURCE, source_view(log, stopped))
    granted = log.with_fact(F.COMMITTED).with_fact(F.GRANT_SENT)
    assert not source_allows(E.RESUME_SOURCE, source_view(granted, stopped)), "the grant may have arrived"
