"""docs/faults.md: thirty pairs, each with the rows that decide in it and, where the guest stands still, a way on."""

from __future__ import annotations

import pytest

from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Outcome
from vmferry.model.faults_doc import docs_markdown
from vmferry.model.pairs import PAIRS, Pair

by_name = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)


def test_all_thirty_pairs_are_there_in_order() -> None:
    assert [pair.name for pair in PAIRS] == [f"P{n}" for n in range(1, 31)]


@by_name
@pytest.mark.proves("S36")
def test_a_pair_that_is_reached_has_no_row_for_the_impossible(pair: Pair) -> None:
    labels = [row.label for row in pair.rows()]
    assert labels
    if not pair.unreachable:
        assert not [label for label in labels if label.startswith("X-")]


@by_name
@pytest.mark.proves("S58")
def test_whoever_is_held_or_in_doubt_is_told_what_to_do(pair: Pair) -> None:
    for row in pair.rows():
        if row.outcome in (Outcome.HELD, Outcome.UNCERTAIN, Outcome.DEGRADED, Outcome.LOST) and row.do is None:
            assert row.action, row.label


def test_the_document_names_every_row_of_a_started_migration_and_is_the_same_each_time() -> None:
    text = docs_markdown()
    assert text == docs_markdown()
    missing = [r.label for r in SOURCE_ROWS if r.label[0] in "MCBG" and f"`{r.label}`" not in text]
    assert missing == []
