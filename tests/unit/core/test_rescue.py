"""Each tool fits one kind of trouble; a proof that does not stand proves nothing."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from vmferry.core.migration_status import MigrationStatus
from vmferry.core.rescue import Answer, Evidence, NeverRan, Tool, ended_well, has_settled, may_use

WORDS = [None, *(status.value for status in MigrationStatus), "something-new"]
RUN_STATES = ["running", "paused", "finish-migrate", "postmigrate", "inmigrate", "something-new"]
POSTCOPY = {"postcopy-active", "postcopy-recover", "postcopy-recover-setup"}


@pytest.mark.proves("S29")
@pytest.mark.parametrize("tool", Tool)
def test_over_all_words_and_run_states_a_tool_is_allowed_only_for_its_trouble(tool: Tool) -> None:
    allowed: dict[bool, set[tuple[str | None, str]]] = {False: set(), True: set()}
    for word, run_state in itertools.product(WORDS, RUN_STATES):
        answer = may_use(tool, word, run_state)
        assert not (answer.refusal and answer.pause_first)
        if not answer.refusal:
            allowed[answer.pause_first].add((word, run_state))
    still = [each for each in RUN_STATES if each != "running"]
    expected = {
        Tool.BRING_BACK: (
            set(itertools.product(["postcopy-paused"], still)),
            set(itertools.product(POSTCOPY, still)),
        ),
        Tool.THROW_AWAY: ({("failed", "finish-migrate"), ("cancelled", "finish-migrate")}, set()),
        # A destination's guest may be called running: it waits for its pages.
        Tool.FEED: (
            set(itertools.product(["postcopy-paused"], RUN_STATES)),
            set(itertools.product(["postcopy-recover"], RUN_STATES)),
        ),
    }[tool]
    assert (allowed[False], allowed[True]) == expected


def test_a_refusal_says_what_is_so_and_what_the_tool_is_for() -> None:
    said = may_use(Tool.THROW_AWAY, "failed", "running").refusal
    assert "running" in said
    assert "finish-migrate" in said
    assert "none" in may_use(Tool.FEED, None, "paused").refusal
    assert may_use(Tool.BRING_BACK, "postcopy-paused", "finish-migrate") == Answer()


def test_what_counts_as_an_end() -> None:
    ends = {None, "none", "completed", "failed", "cancelled", "postcopy-paused"}
    assert {word for word in WORDS if has_settled(word)} == ends
    assert [word for word in WORDS if ended_well(word)] == ["completed"]


def proof(evidence: Evidence, *, stands: bool = True, **known: bool | None) -> NeverRan:
    return NeverRan(evidence=evidence, text="host-b", stands=lambda: stands, **known)


@pytest.mark.proves("S55")
@pytest.mark.parametrize(
    ("paused", "told", "ran"), list(itertools.product([True, False, None], [True, False, None], [True, False, None]))
)
def test_a_process_that_is_gone_proves_something_only_if_it_cannot_have_run(
    paused: bool | None, told: bool | None, ran: bool | None
) -> None:
    found = proof(Evidence.PROCESS_GONE, was_started_paused=paused, was_told_to_run=told, has_run=ran)
    assert (found.objection() == "") == ((paused, told, ran) == (True, False, False))


@pytest.mark.proves("S55")
@pytest.mark.parametrize("evidence", Evidence)
def test_no_evidence_stands_against_a_run_or_after_it_fell(evidence: Evidence) -> None:
    good = proof(evidence, was_started_paused=True, was_told_to_run=False, has_run=False)
    assert good.objection() == ""
    assert "has run" in dataclasses.replace(good, has_run=True).objection()
    assert "not so" in dataclasses.replace(good, stands=lambda: False).objection()


@pytest.mark.parametrize("evidence", [Evidence.RENOUNCED, Evidence.NEVER_GRANTED, Evidence.PERSON])
def test_a_word_needs_no_history(evidence: Evidence) -> None:
    assert proof(evidence).objection() == ""


def test_the_evidence_is_asked_each_time() -> None:
    answers = iter([True, False])
    found = NeverRan(evidence=Evidence.RENOUNCED, text="host-b", stands=lambda: next(answers))
    assert found.objection() == ""
    assert found.objection() != ""
