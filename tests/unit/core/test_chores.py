"""Chores: the state and the word of every set of facts, and what each kind answers."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from vmferry.core.chores import ChoreFact, ChoreLog, awaits_leave, chore_job, chore_status
from vmferry.core.job import CHORES, IMPORT, PRUNE, Answer, Verb, answer, path
from vmferry.core.job import JobStatus as J

F = ChoreFact


def log(*facts: ChoreFact) -> ChoreLog:
    found = ChoreLog()
    for fact in facts:
        found = found.with_fact(fact)
    return found


@pytest.mark.parametrize(
    ("facts", "state", "word"),
    [
        ((), J.UNDEFINED, "setup"),
        ((F.WANTED,), J.CREATED, "setup"),
        ((F.WANTED, F.BEGUN), J.RUNNING, "active"),
        ((F.WANTED, F.BEGUN, F.PLANNED), J.PENDING, "active"),
        ((F.WANTED, F.HOLD, F.BEGUN, F.PLANNED), J.PENDING, "planned"),
        ((F.WANTED, F.HOLD, F.BEGUN, F.PLANNED, F.FINALIZE), J.PENDING, "active"),
        ((F.WANTED, F.BEGUN, F.WHOLE), J.PENDING, "active"),
        ((F.WANTED, F.BEGUN, F.CANCEL), J.ABORTING, "cancelling"),
        ((F.WANTED, F.HOLD, F.BEGUN, F.PLANNED, F.CANCEL), J.ABORTING, "cancelling"),
        ((F.WANTED, F.BEGUN, F.CANCEL, F.CLEANUP), J.CONCLUDED, "cancelled"),
        ((F.WANTED, F.BEGUN, F.ERROR), J.ABORTING, "failing"),
        ((F.WANTED, F.BEGUN, F.ERROR, F.CLEANUP), J.CONCLUDED, "failed"),
        ((F.WANTED, F.RESTARTED, F.ERROR, F.CLEANUP), J.CONCLUDED, "failed"),
        ((F.WANTED, F.RESTARTED, F.DONE, F.CLEANUP), J.CONCLUDED, "completed"),
        ((F.WANTED, F.BEGUN, F.CANCEL, F.DONE, F.CLEANUP), J.CONCLUDED, "completed"),
        ((F.WANTED, F.BEGUN, F.DONE, F.CLEANUP), J.CONCLUDED, "completed"),
    ],
)
@pytest.mark.proves("S94")
def test_state_and_word(facts: tuple[ChoreFact, ...], state: J, word: str) -> None:
    assert (chore_job(log(*facts)), chore_status(log(*facts))) == (state, word)


def test_a_fact_is_recorded_once() -> None:
    once = log(F.WANTED)
    assert once.with_fact(F.WANTED, text="again") is once


def test_every_set_of_facts_has_an_answer_and_only_a_held_plan_waits() -> None:
    for size in range(len(F) + 1):
        for facts in combinations(F, size):
            found = log(*facts)
            assert chore_job(found) in J
            assert chore_status(found)
            assert not awaits_leave(found) or {F.HOLD, F.PLANNED} <= set(facts)


@pytest.mark.proves("S93")
def test_every_way_leads_through_states_that_a_job_has() -> None:
    ends = [(F.DONE,), (F.ERROR,), (F.CANCEL,), (F.CANCEL, F.DONE)]
    middles: list[tuple[ChoreFact, ...]] = [(), (F.PLANNED,), (F.PLANNED, F.FINALIZE), (F.WHOLE,)]
    passed: list[J]
    for begin, middle, end in product([(F.WANTED,), (F.WANTED, F.BEGUN)], middles, ends):
        found, passed = ChoreLog(), []
        for fact in (*begin, *middle, *end, F.CLEANUP):
            before = chore_job(found)
            found = found.with_fact(fact)
            failed = F.DONE not in found and bool({F.ERROR, F.CANCEL} & set(end))
            passed += path(before, chore_job(found), failed=failed)
        assert passed[-1] is J.CONCLUDED
        assert set(passed) <= PRUNE.states


@pytest.mark.proves("S99")
def test_a_prune_waits_for_leave_and_an_import_that_is_being_kept_is_not_cancelled() -> None:
    does = {(k.name, v, j) for k, v, j in product(CHORES, Verb, J) if answer(k, v, j).answer is Answer.DOES}
    assert {(name, j) for name, verb, j in does if verb is Verb.FINALIZE} == {("prune", J.PENDING)}
    assert answer(IMPORT, Verb.CANCEL, J.PENDING).answer is Answer.REFUSED
    for kind in CHORES:
        assert (kind.name, Verb.CANCEL, J.RUNNING) in does
        assert answer(kind, Verb.CANCEL, J.CONCLUDED).answer is Answer.NOTHING
        assert (kind.name, Verb.DISMISS, J.CONCLUDED) in does
