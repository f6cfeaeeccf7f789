"""The destination's table over every combination of answers: total, exact, and safe in every single view."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest

from vmferry.core.destination_rows import DESTINATION_ROWS
from vmferry.core.effects import DESTINATION_GUARDS, DestinationEffect
from vmferry.core.table import Outcome, Row
from vmferry.core.view import DestinationView, Held, Incoming, Ran, Wish
from vmferry.testing.tables import Views, check, effects_of, narrowed, views_with, widened

ROWS = {row.label: row for row in DESTINATION_ROWS}
PATTERNS = [row.when for row in DESTINATION_ROWS]
by_label = pytest.mark.parametrize("row", DESTINATION_ROWS, ids=lambda row: row.label)


@cache
def walk() -> Views[DestinationView]:
    return Views(DestinationView)


def where(effect: DestinationEffect) -> list[DestinationView]:
    found = views_with(walk(), DESTINATION_ROWS, effect)
    assert found, f"no row asks for {effect}"
    return found


def test_the_walk_has_every_combination_of_four_answers() -> None:
    sizes = [len(kind) for kind in (Wish, Held, Incoming, Ran)]
    assert len(set(walk().views)) == len(walk().views) == prod(sizes) >= 84


@pytest.mark.proves("S1", "S29", "S37")
def test_every_combination_has_exactly_one_row() -> None:
    found = check(walk(), PATTERNS)
    assert walk().pick(found.gaps) == []
    assert walk().pick(found.overlaps) == []


@pytest.mark.parametrize("view", walk().views, ids=str)
def test_the_sets_of_views_are_those_that_a_row_itself_matches(view: DestinationView) -> None:
    number = walk().views.index(view)
    by_bits = [row.label for row in DESTINATION_ROWS if walk().where(row.when) >> number & 1]
    assert by_bits == [row.label for row in DESTINATION_ROWS if row.matches(view)]


@by_label
def test_no_row_is_dead(row: Row[DestinationEffect]) -> None:
    assert walk().where(row.when)


def test_labels_are_unique_and_every_effect_is_used() -> None:
    assert len(ROWS) == len(DESTINATION_ROWS)
    assert {effect for row in DESTINATION_ROWS for effect in effects_of(row)} == set(DestinationEffect)


@by_label
def test_every_effect_is_allowed_by_its_guard_in_every_view_of_its_row(row: Row[DestinationEffect]) -> None:
    for effect in effects_of(row):
        refused = walk().where(row.when) & ~walk().allowed(DESTINATION_GUARDS[effect])
        assert walk().pick(refused) == [], effect


@by_label
def test_a_row_that_is_dropped_or_doubled_is_caught(row: Row[DestinationEffect]) -> None:
    others = [other.when for other in DESTINATION_ROWS if other is not row]
    assert check(walk(), others).gaps
    assert check(walk(), [*PATTERNS, row.when]).overlaps


@by_label
def test_a_pattern_one_answer_wider_or_narrower_is_caught(row: Row[DestinationEffect]) -> None:
    others = [other.when for other in DESTINATION_ROWS if other is not row]
    tried = 0
    for name, answer, pattern in widened(walk(), row.when):
        assert check(walk(), [*others, pattern]).overlaps, (name, answer)
        tried += 1
    for name, answer, pattern in narrowed(row.when):
        assert check(walk(), [*others, pattern]).gaps, (name, answer)
        tried += 1
    assert tried


@by_label
def test_a_row_that_only_waits_says_for_what_or_what_a_person_can_do(row: Row[DestinationEffect]) -> None:
    assert row.why.endswith(".")
    assert (row.limit_ms is None) == (row.then is None)
    if row.do is None and row.limit_ms is None:
        assert row.action or row.outcome in (Outcome.PENDING, Outcome.DESTINATION)


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
            assert row.do in (DestinationEffect.REPORT_RAN, DestinationEffect.REPORT_DIED), view


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
