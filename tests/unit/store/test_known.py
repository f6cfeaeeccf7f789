"""Ids -> numbers: found exactly if they were added, whatever the order, and never beyond the limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmferry.store import known as module
from vmferry.store.known import UNKNOWN, KnownPages, first_of_each
from vmferry.store.page_ids import Ids

SMALL_IDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40)
"""Few halves, so that equal first halves with other second ones are common."""


def ids(pairs: list[tuple[int, int]]) -> Ids:
    return np.array(pairs, "<u8").reshape(-1, 2).view(np.uint8).reshape(-1, 16)


@given(st.lists(SMALL_IDS, max_size=8), SMALL_IDS)
def test_what_was_added_is_found_and_nothing_else(
    batches: list[list[tuple[int, int]]], asked: list[tuple[int, int]]
) -> None:
    model: dict[tuple[int, int], int] = {}
    known, number = KnownPages(), 0
    for batch in batches:
        fresh = [pair for pair in dict.fromkeys(batch) if pair not in model]
        numbers = range(number, number + len(fresh))
        known.add(ids(fresh), np.array(numbers, np.uint32))
        model.update(zip(fresh, numbers, strict=True))
        number += len(fresh)
    assert len(known) == len(model)
    assert known.find(ids(asked)).tolist() == [model.get(pair, int(UNKNOWN)) for pair in asked]


def test_runs_are_merged_only_up_to_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STORE_KNOWN_RUN_PAGES_MAX", 4)
    known = KnownPages()
    pairs = [(number % 3, number) for number in range(40)]
    for number, pair in enumerate(pairs):
        known.add(ids([pair]), np.array([number], np.uint32))
    assert {len(run.numbers) for run in known._runs} <= {1, 2, 3, 4}
    assert known.find(ids(pairs)).tolist() == list(range(40))


def test_no_more_than_the_limit_is_remembered() -> None:
    known = KnownPages(3)
    pairs = [(number, 0) for number in range(5)]
    known.add(ids(pairs[:2]), np.array([0, 1], np.uint32))
    known.add(ids(pairs[2:]), np.array([2, 3, 4], np.uint32))
    known.add(ids([(9, 9)]), np.array([9], np.uint32))
    assert known.find(ids(pairs)).tolist() == [0, 1, 2, UNKNOWN, UNKNOWN]
    assert len(known) == 3


@given(SMALL_IDS)
@example([])
@example([(1, 2), (1, 3), (1, 2), (0, 2)])
def test_the_first_of_each(pairs: list[tuple[int, int]]) -> None:
    leaders, positions = first_of_each(ids(pairs))
    distinct = list(dict.fromkeys(pairs))
    assert [pairs[row] for row in leaders] == distinct
    assert [distinct[position] for position in positions] == pairs
    assert leaders.tolist() == [pairs.index(pair) for pair in distinct]
