"""Both tables over every combination of answers: total, exact, allowed by the guards, and without a dead row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from math import prod
from typing import Any

import pytest

from vmferry.core.destination_rows import DESTINATION_ROWS
from vmferry.core.effects import DESTINATION_GUARDS, SOURCE_GUARDS, DestinationEffect, Effect, Guard
from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Outcome, Row
from vmferry.core.view import (
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
    Retry,
    Served,
    Source,
    SourceView,
    Step,
    Target,
    Want,
    Wish,
)
from vmferry.testing.tables import Views, check, effects_of, narrowed, widened


@dataclass(frozen=True)
class Table:
    """One side's table and what it is made of."""

    name: str
    rows: tuple[Row[Any], ...]
    guards: Mapping[Any, tuple[Guard, ...]]
    effects: frozenset[Any]
    view: type
    questions: tuple[type[Enum], ...]
    at_least: int
    """Combinations of answers: a walk that loses some must not pass for a smaller table."""
    stride: int = 1
    """One view in so many is matched row by row; a prime that shares no factor with the numbers of answers, so that
    all of them occur."""

    def others(self, row: Row[Any]) -> list[Any]:
        """The patterns of all rows but this one."""
        return [other.when for other in self.rows if other is not row]


SOURCE = Table(
    "source", SOURCE_ROWS, SOURCE_GUARDS, frozenset(Effect), SourceView,
    (Want, Step, Source, Cpus, Target, Grant, Change, Retry, Leave, Disks), 2_000_001, stride=97,
)  # fmt: skip
DESTINATION = Table(
    "destination", DESTINATION_ROWS, DESTINATION_GUARDS, frozenset(DestinationEffect), DestinationView,
    (Wish, Held, Incoming, Ran, Halt, Served), 672,
)  # fmt: skip
BOTH = {table.name: table for table in (SOURCE, DESTINATION)}
each_table = pytest.mark.parametrize("name", BOTH)
each_row = pytest.mark.parametrize(
    ("name", "row"), [pytest.param(t.name, row, id=row.label) for t in BOTH.values() for row in t.rows]
)


@cache
def walk(name: str) -> Views[Any]:
    return Views(BOTH[name].view)


@each_table
def test_the_walk_has_every_combination_of_answers(name: str) -> None:
    table, views = BOTH[name], walk(name).views
    assert len(set(views)) == len(views) == prod(len(kind) for kind in table.questions) >= table.at_least


@each_table
@pytest.mark.proves("S1", "S19", "S29", "S37")
def test_every_combination_has_exactly_one_row(name: str) -> None:
    found = check(walk(name), [row.when for row in BOTH[name].rows])
    assert walk(name).pick(found.gaps) == []
    assert walk(name).pick(found.overlaps) == []


@each_table
def test_the_sets_of_views_are_those_that_a_row_itself_matches(name: str) -> None:
    table = BOTH[name]
    found = [
        (row.label, walk(name).where(row.when).to_bytes(len(walk(name).views) // 8 + 1, "little")) for row in table.rows
    ]
    views = walk(name).views
    for number in range(0, len(views), table.stride):
        by_bits = [label for label, bits in found if bits[number // 8] >> number % 8 & 1]
        assert by_bits == [row.label for row in table.rows if row.matches(views[number])], views[number]


@each_table
def test_labels_are_unique_and_every_effect_is_used(name: str) -> None:
    rows = BOTH[name].rows
    assert len({row.label for row in rows}) == len(rows)
    assert {effect for row in rows for effect in effects_of(row)} == BOTH[name].effects


@each_row
def test_no_row_is_dead(name: str, row: Row[Any]) -> None:
    assert walk(name).where(row.when)


@each_row
def test_every_effect_is_allowed_by_its_guard_in_every_view_of_its_row(name: str, row: Row[Any]) -> None:
    for effect in effects_of(row):
        refused = walk(name).where(row.when) & ~walk(name).allowed(BOTH[name].guards[effect])
        assert walk(name).pick(refused) == [], effect


@each_row
def test_a_row_that_is_dropped_or_doubled_is_caught(name: str, row: Row[Any]) -> None:
    others = BOTH[name].others(row)
    assert check(walk(name), others).gaps
    assert check(walk(name), [*others, row.when, row.when]).overlaps


@each_row
def test_a_pattern_one_answer_wider_or_narrower_is_caught(name: str, row: Row[Any]) -> None:
    others = BOTH[name].others(row)
    tried = 0
    for question, answer, pattern in widened(walk(name), row.when):
        assert check(walk(name), [*others, pattern]).overlaps, (question, answer)
        tried += 1
    for question, answer, pattern in narrowed(row.when):
        assert check(walk(name), [*others, pattern]).gaps, (question, answer)
        tried += 1
    assert tried


@each_row
def test_a_limit_and_what_follows_it_come_together(name: str, row: Row[Any]) -> None:
    assert (row.limit_ms is None) == (row.then is None)
    assert row.limit_ms is None or row.limit_ms > 0


@each_row
def test_a_row_that_only_waits_says_for_what_or_what_a_person_can_do(name: str, row: Row[Any]) -> None:
    assert row.why.endswith(".")
    if row.do is None and row.limit_ms is None:
        assert row.action or row.outcome in (Outcome.PENDING, Outcome.DESTINATION)
