"""The destination's table: safe in every combination of answers. That it is total and exact: test_both_tables."""

from __future__ import annotations

from functools import cache

import pytest

from vmferry.core.destination_rows import DESTINATION_ROWS
from vmferry.core.effects import DestinationEffect
from vmferry.core.table import Outcome, Row
from vmferry.core.view import DestinationView, Halt, Held, Incoming, Ran, Wish
from vmferry.testing.tables import Views, effects_of, views_with

by_label = pytest.mark.parametrize("row", DESTINATION_ROWS, ids=lambda row: row.label)


@cache
def walk() -> Views[DestinationView]:
    return Views(DestinationView)


def where(effect: DestinationEffect) -> list[DestinationView]:
    found = views_with(walk(), DESTINATION_ROWS, effect)
    assert found, f"no row asks for {effect}"
    return found


# --- safety ---------------------------------------------------------------------------------------------


@pytest.mark.proves("S39", "S45")
def test_cpus_start_once_with_an_order_that_is_durable_here_and_only_after_the_load() -> None:
    for view in where(DestinationEffect.START_CPUS):
        assert view.held is Held.YES
        assert view.incoming is Incoming.LOADED, "never before the load: a promise would have no result"
        assert view.ran is Ran.NO
        assert view.wish is Wish.KEEP


def test_the_place_is_given_up_only_with_the_proof_that_the_guest_never_ran() -> None:
    for view in where(DestinationEffect.RENOUNCE):
        assert view.ran is Ran.NO
        assert view.incoming is not Incoming.RUNNING


def test_a_qemu_is_started_only_once_and_only_while_the_place_is_wanted() -> None:
    for view in where(DestinationEffect.SPAWN):
        assert view.wish is Wish.KEEP
        assert view.incoming is Incoming.NONE
        assert view.ran is Ran.NO


@pytest.mark.proves("S44")
def test_running_is_reported_only_when_it_was_seen() -> None:
    for view in where(DestinationEffect.REPORT_RAN):
        assert view.ran is Ran.YES or view.incoming is Incoming.RUNNING


def test_an_order_without_an_answer_is_neither_repeated_nor_given_up() -> None:
    for view in walk().views:
        if view.ran is Ran.UNKNOWN:
            row = next(row for row in DESTINATION_ROWS if row.matches(view))
            assert not {DestinationEffect.START_CPUS, DestinationEffect.RENOUNCE} & set(effects_of(row)), view


def test_a_guest_that_ran_here_is_never_given_up_whatever_the_source_wants() -> None:
    for view in walk().views:
        if view.ran is Ran.YES:
            row = next(row for row in DESTINATION_ROWS if row.matches(view))
            harmless = (DestinationEffect.REPORT_RAN, DestinationEffect.FREEZE, DestinationEffect.THAW)
            assert row.do in (*harmless, DestinationEffect.REPORT_DIED), view


@by_label
def test_a_row_in_doubt_keeps_the_qemu(row: Row[DestinationEffect]) -> None:
    if row.outcome in (Outcome.UNCERTAIN, Outcome.HELD):
        assert effects_of(row) == ()


@pytest.mark.proves("S46")
def test_a_guest_that_runs_without_an_order_is_reported_as_in_doubt_and_left_alone() -> None:
    for view in walk().views:
        if view.incoming is Incoming.RUNNING and view.ran is Ran.NO:
            row = next(row for row in DESTINATION_ROWS if row.matches(view))
            assert row.label == "X-runs-ungranted"
            assert row.do is None


@pytest.mark.proves("S117", "S119", "S127")
def test_cpus_are_frozen_only_where_the_policy_wants_it_and_let_go_when_it_does_not_any_more() -> None:
    for view in where(DestinationEffect.FREEZE):
        assert (view.halt, view.ran) == (Halt.WANTED, Ran.YES)
    for view in where(DestinationEffect.THAW):
        assert view.halt is Halt.OVER
