"""Rows and how the one that matches is found."""

from __future__ import annotations

import pytest

from vmferry.core.effects import DestinationEffect
from vmferry.core.table import Outcome, Row, find, pattern
from vmferry.core.view import DestinationView, Halt, Held, Incoming, Ran, Wish

VIEW = DestinationView(Wish.KEEP, Held.NO, Incoming.LOADED, Ran.NO, Halt.NONE)


def row(label: str, **when: Wish | Held | tuple[Wish, ...]) -> Row[DestinationEffect]:
    return Row(label, pattern(**when), None, "Because.")


def test_a_pattern_takes_one_answer_or_several() -> None:
    assert pattern(wish=Wish.KEEP, held=(Held.NO, Held.YES)) == {
        "wish": frozenset({Wish.KEEP}),
        "held": frozenset({Held.NO, Held.YES}),
    }


def test_a_row_matches_when_every_question_has_one_of_its_answers() -> None:
    assert row("both", wish=Wish.KEEP, held=Held.NO).matches(VIEW)
    assert not row("other", wish=Wish.KEEP, held=Held.YES).matches(VIEW)
    assert row("all").matches(VIEW)


def test_the_defaults_of_a_row_say_that_it_waits() -> None:
    waits = row("waits")
    assert (waits.outcome, waits.limit_ms, waits.then, waits.action) == (Outcome.PENDING, None, None, "")


def test_exactly_one_row_is_found() -> None:
    keep, drop = row("keep", wish=Wish.KEEP), row("drop", wish=Wish.DROP)
    assert find((keep, drop), VIEW) is keep
    assert find((keep, drop), VIEW) is keep, "also from the cache"


@pytest.mark.parametrize("rows", [(), (row("a"), row("b"))], ids=["gap", "overlap"])
def test_no_row_or_two_rows_are_our_mistake(rows: tuple[Row[DestinationEffect], ...]) -> None:
    with pytest.raises(AssertionError, match="KEEP"):
        find(rows, VIEW)
