"""The table of a restore: total, safe in every combination of facts, and its words."""

from __future__ import annotations

from itertools import combinations

import pytest

from vmferry.core import restore as core
from vmferry.core.job import JobStatus as J
from vmferry.core.job import path
from vmferry.core.restore import RestoreFact as F
from vmferry.core.restore import RestoreLog, RestoreWish, Step, next_row

LAZY, FULL = RestoreWish(lazy=True, runs=True), RestoreWish(lazy=False, runs=True)
ROUNDS = {F.TROUBLE, F.MENDED, F.LOST, F.REJOINED, F.STANDS, F.AGAIN}


def log(*facts: F | tuple[F, int]) -> RestoreLog:
    found = RestoreLog()
    for each in facts:
        fact, number = each if isinstance(each, tuple) else (each, int(each in ROUNDS))
        found = found.with_fact(fact, round_no=number, text=f"text of {fact}", at_s=float(len(found.entries)))
    return found


READY = (F.WANTED, F.READ, F.LAUNCHED, F.LOADING)


@pytest.mark.parametrize(
    ("wish", "facts", "label"),
    [
        (LAZY, (F.WANTED,), "begin"),
        (LAZY, (F.WANTED, F.LAUNCHED), "begin"),
        (LAZY, (F.WANTED, F.READ), "begin"),
        (LAZY, (F.WANTED, F.READ, F.LAUNCHED), "load"),
        (LAZY, READY, "wait"),
        (LAZY, (*READY, F.LOADED), "keep"),
        (LAZY, (*READY, F.LOADED, F.KEPT), "run"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING), "run"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING, F.FAILED), "run"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING, F.CANCEL), "run"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING, F.STANDS), "stands"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING, F.STANDS, F.WHOLE), "stands"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING, F.STANDS, F.LOST), "rejoin"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING, F.STANDS, F.GONE), "died"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING, F.STANDS, F.AGAIN), "run"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING, F.STANDS, F.AGAIN, F.RAN), "wait"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.CANCEL), "given-up"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.RAN), "wait"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.RAN, F.WHOLE), "done"),
        (LAZY, (*READY, F.LOADED, F.LOST), "rejoin"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.RAN, F.LOST), "rejoin"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.RAN, F.LOST, F.REJOINED), "wait"),
        (FULL, (*READY, F.LOADED), "wait"),
        (FULL, (*READY, F.WHOLE), "keep"),
        (FULL, (*READY, F.WHOLE, F.KEPT), "run"),
        (FULL, (*READY, F.WHOLE, F.KEPT, F.RAN), "done"),
        (FULL, (*READY, F.CANCEL), "given-up"),
        (FULL, (*READY, F.FAILED), "given-up"),
        (FULL, (*READY, F.GONE), "given-up"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.STARTING, F.GONE), "died"),
        (LAZY, (*READY, F.LOADED, F.KEPT, F.RAN, F.GONE), "died"),
        (LAZY, (*READY, F.FAILED, F.UNDONE), "undone"),
        (LAZY, (*READY, F.FAILED, F.UNDONE, F.ENDED), "over"),
    ],
)
def test_what_is_done_next(wish: RestoreWish, facts: tuple[F, ...], label: str) -> None:
    assert next_row(log(*facts), wish).label == label


@pytest.mark.proves("S58")
def test_every_combination_of_facts_has_a_row_and_no_row_loses_a_guest() -> None:
    """A guest that may have run is never taken away, and none runs before the journal keeps it."""
    every = [fact for fact in F if fact is not F.WANTED]
    for size in range(5):
        for some in combinations(every, size):
            found = log(F.WANTED, *some)
            for wish in (LAZY, FULL, RestoreWish(lazy=True, runs=False)):
                step = next_row(found, wish).step
                if step is Step.UNDO:
                    assert F.RAN not in found
                    assert F.STARTING not in found
                if step is Step.RUN:
                    assert F.KEPT in found
                if F.ENDED in found:
                    assert step is Step.NOTHING
            assert core.restore_state(found) in J
            assert core.detail(found) != "none"


@pytest.mark.parametrize(
    ("facts", "state", "word"),
    [
        ((), J.UNDEFINED, "none"),
        ((F.WANTED,), J.CREATED, "starting"),
        ((F.WANTED, F.READ, F.LAUNCHED), J.RUNNING, "starting"),
        (READY, J.RUNNING, "loading"),
        ((*READY, F.LOADED), J.RUNNING, "loaded"),
        ((*READY, F.LOADED, F.RAN), J.RUNNING, "running-lazily"),
        ((*READY, F.LOADED, F.RAN, F.TROUBLE), J.PAUSED, "waiting"),
        ((*READY, F.LOADED, F.RAN, F.TROUBLE, F.MENDED), J.RUNNING, "running-lazily"),
        ((*READY, F.LOADED, F.RAN, F.LOST), J.PAUSED, "rejoining"),
        ((*READY, F.LOADED, F.RAN, F.WHOLE), J.PENDING, "completed"),
        ((*READY, F.LOADED, F.STARTING, F.STANDS), J.PAUSED, "standing"),
        ((*READY, F.LOADED, F.STARTING, F.STANDS, F.AGAIN, F.RAN), J.RUNNING, "running-lazily"),
        ((*READY, F.CANCEL), J.ABORTING, "cancelled"),
        ((*READY, F.FAILED), J.ABORTING, "failed"),
        ((*READY, F.RAN, F.GONE), J.ABORTING, "lost"),
        ((*READY, F.RAN, F.WHOLE, F.ENDED), J.CONCLUDED, "completed"),
    ],
)
def test_how_it_stands(facts: tuple[F, ...], state: J, word: str) -> None:
    assert (core.restore_state(log(*facts)), core.detail(log(*facts))) == (state, word)


@pytest.mark.proves("S93")
def test_the_states_follow_each_other_as_qemus_do() -> None:
    way = [F.WANTED, F.READ, F.LAUNCHED, F.LOADING, F.LOADED, F.KEPT, F.STARTING, F.STANDS, F.AGAIN, F.RAN,
           F.TROUBLE, F.MENDED, F.LOST, F.REJOINED, F.WHOLE, F.ENDED]  # fmt: skip
    for stop in range(1, len(way) + 1):
        before, after = log(*way[: stop - 1]), log(*way[:stop])
        path(core.restore_state(before), core.restore_state(after))  # raises where no way leads
        path(core.restore_state(after), core.restore_state(after.with_fact(F.GONE)), failed=True)


def test_why_it_is_paused() -> None:
    assert core.reason(log(*READY)) == ""
    assert core.reason(log(*READY, F.TROUBLE)) == "text of trouble"
    assert core.reason(log(*READY, F.TROUBLE, F.LOST)) == "text of lost"
    assert core.reason(log(*READY, F.STARTING, F.TROUBLE, F.STANDS)) == "text of stands"


def test_a_cancel_is_refused_from_the_order_to_start_on() -> None:
    assert core.cancel_refusal(log(*READY, F.LOADED, F.KEPT)) is None
    for fact in (F.STARTING, F.RAN):
        assert "runs already" in (core.cancel_refusal(log(*READY, F.LOADED, F.KEPT, fact)) or "")


def test_trouble_of_a_whole_night_is_a_short_log() -> None:
    found = log(F.WANTED, F.RAN)
    for number in range(1, 1001):
        found = found.with_fact(F.TROUBLE, round_no=number, text=f"trouble {number}")
        assert found.has_trouble
        found = found.with_fact(F.MENDED, round_no=number)
        assert not found.has_trouble
    assert len(found.entries) == 2 + 2 * (core.ROUNDS_KEPT + 1)
    assert found.text(F.TROUBLE) == "trouble 1000"
    assert [entry.round for entry in found.entries if entry.fact is F.TROUBLE][:2] == [1, 951]
    assert F.WANTED in found


def test_a_log_remembers_when_and_what_first() -> None:
    found = log(F.WANTED, F.READ)
    assert found.at_s(F.READ) == 1.0
    assert found.at_s(F.RAN) is None
    assert found.text(F.RAN) == ""
    assert found.with_fact(F.READ, text="again") is found
    assert core.has_won(log(F.WHOLE, F.RAN))
    assert not core.has_won(log(F.WHOLE))
    lost = log(F.WHOLE, F.RAN, F.GONE)
    assert (core.has_won(lost), core.detail(lost)) == (False, "lost"), "whole it was, and its QEMU ended"
