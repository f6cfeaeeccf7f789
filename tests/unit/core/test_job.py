"""Jobs: QEMU's map and verbs, every kind's answer in every state, a way for every change of a migration's status."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from vmferry.core.facts import Fact, FactLog
from vmferry.core.job import (
    DESTINATION_STATES,
    INCOMING,
    KINDS,
    MEANINGS,
    MIGRATE,
    MIRROR,
    MIRROR_REASONS,
    MOVES,
    OURS,
    PAUSABLE,
    SOURCE_STATES,
    VERBS,
    Answer,
    JobStatus,
    Kind,
    Verb,
    answer,
    destination_job,
    docs_markdown,
    may_follow,
    mirror_job,
    path,
    pause_reason,
    pause_refusal,
    source_job,
    way,
)
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.core.transitions import DESTINATION_EDGES, SOURCE_EDGES

J, F = JobStatus, Fact
ENDS = {S.COMPLETED, S.FAILED, S.CANCELLED}


def log(*facts: Fact | tuple[Fact, int]) -> FactLog:
    made = FactLog()
    for fact in facts:
        name, round_no = fact if isinstance(fact, tuple) else (fact, 0)
        made = made.with_fact(name, round_no=round_no, text=f"text of {name}")
    return made


def test_the_words_are_qemus() -> None:
    words = "undefined created running paused ready standby waiting pending aborting concluded null"
    assert [state.value for state in JobStatus] == words.split()
    assert set(MEANINGS) == set(MOVES) == set(J)
    assert set(VERBS) == set(Verb)


def test_every_state_leads_to_the_end_and_none_leads_back_from_it() -> None:
    for state in J:
        if state is not J.NULL:
            assert path(state, J.NULL)[-1] is J.NULL
    assert not MOVES[J.NULL]
    for ours in OURS:
        assert ours[1] not in MOVES[ours[0]], "QEMU has it: it is not ours"


@pytest.mark.proves("S93", "S94")
@pytest.mark.parametrize(
    ("side", "edges", "states"),
    [("source", SOURCE_EDGES, SOURCE_STATES), ("destination", DESTINATION_EDGES, DESTINATION_STATES)],
)
def test_every_change_of_the_status_is_a_way_through_the_map(
    side: str, edges: dict[S, frozenset[S]], states: dict[S, JobStatus]
) -> None:
    kind = MIGRATE if side == "source" else INCOMING
    seen = 0
    for before, afters in edges.items():
        for after in afters:
            failed = after in (S.FAILED, S.CANCELLED)
            passed = (states[before], *path(states[before], states[after], failed=failed))
            assert all(may_follow(a, b) for a, b in pairwise(passed)), (before, after, passed)
            assert set(passed) <= kind.states | {J.UNDEFINED}
            if after not in (S.FAILING, S.CANCELLING, S.FAILED, S.CANCELLED) and J.ABORTING not in passed[:1]:
                assert J.ABORTING not in passed, "only an end that is none looks like one"
            seen += 1
    assert seen == sum(len(ends) for ends in edges.values())


@pytest.mark.proves("S93")
def test_a_whole_run_passes_each_state_once_and_in_qemus_order() -> None:
    def run(*statuses: S, failed: bool = False) -> str:
        passed: list[JobStatus] = []
        now = J.UNDEFINED
        for state in [*(SOURCE_STATES[status] for status in statuses), J.CONCLUDED]:
            steps = path(now, state, failed=failed and state is J.CONCLUDED)
            passed += steps
            now = state
        return " ".join(passed)

    assert run(S.SETUP, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE, S.COMPLETED) == (
        "created running waiting pending concluded"
    )
    assert run(S.SETUP, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE, S.POSTCOPY_DEVICE, S.POSTCOPY_ACTIVE, S.COMPLETED) == (
        "created running waiting pending running waiting pending concluded"
    )
    assert run(S.SETUP, S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.CANCELLING, S.CANCELLED, failed=True) == (
        "created running paused running aborting concluded"
    )
    assert run(S.SETUP, failed=True) == "created running aborting concluded"


def test_an_end_without_success_passes_aborting_and_one_with_does_not() -> None:
    for state in (J.CREATED, J.RUNNING, J.PAUSED, J.PENDING):
        assert path(state, J.CONCLUDED, failed=True)[-2:] == (J.ABORTING, J.CONCLUDED)
        assert J.ABORTING not in path(state, J.CONCLUDED)
    assert path(J.ABORTING, J.CONCLUDED, failed=True) == (J.CONCLUDED,)
    assert path(J.RUNNING, J.RUNNING) == ()
    with pytest.raises(ValueError, match="never becomes"):
        path(J.CONCLUDED, J.RUNNING)


def test_a_step_says_by_its_facts_whether_the_end_is_a_success() -> None:
    won = log(F.MIGRATE, F.SETUP_DONE, F.SWITCHOVER, F.ALL_SENT, F.PEER_ACK, F.RUN_ACKED)
    assert way(MIGRATE, won, won.with_fact(F.CLEANUP)) == (J.CONCLUDED,)
    failed = log(F.MIGRATE, F.ERROR)
    assert way(MIGRATE, log(F.MIGRATE), failed) == (J.ABORTING,)
    assert way(MIGRATE, failed, failed.with_fact(F.CLEANUP)) == (J.CONCLUDED,)
    assert way(MIGRATE, FactLog(), log(F.MIGRATE)) == (J.CREATED, J.RUNNING)
    ran = log(F.PREPARE, F.LISTENING, F.HEADER_SEEN, F.TARGET_RAN)
    assert way(INCOMING, ran, ran.with_fact(F.CLEANUP)) == (J.WAITING, J.PENDING, J.CONCLUDED)
    for died in (ran.with_fact(F.TARGET_DIED), log(F.PREPARE, F.LISTENING, F.HEADER_SEEN)):
        assert way(INCOMING, died, died.with_fact(F.CLEANUP)) == (J.ABORTING, J.CONCLUDED)


@pytest.mark.proves("S94", "S116")
def test_every_status_has_a_state_for_both_sides() -> None:
    assert set(SOURCE_STATES) == set(DESTINATION_STATES) == set(S)
    assert SOURCE_STATES[S.PRE_SWITCHOVER] is J.PENDING
    assert {status for status in S if SOURCE_STATES[status] is J.ABORTING} == {S.FAILING, S.CANCELLING}
    assert {status for status in S if SOURCE_STATES[status] is J.PAUSED} == PAUSABLE - {S.POSTCOPY_ACTIVE}


@pytest.mark.proves("S107", "S108")
def test_the_destinations_job_begins_with_the_place_and_runs_with_the_stream() -> None:
    assert destination_job(FactLog()) is J.UNDEFINED
    waits = log(F.PREPARE, F.LISTENING)
    assert destination_job(waits) is J.CREATED
    assert destination_job(waits.with_fact(F.HEADER_SEEN)) is J.RUNNING
    loaded = waits.with_fact(F.HEADER_SEEN).with_fact(F.LOADED).with_fact(F.ALL_SENT)
    assert destination_job(loaded) is J.PENDING, "all is there, and the right to run is awaited"
    assert destination_job(loaded.with_fact(F.CLEANUP)) is J.CONCLUDED
    assert destination_job(waits.with_fact(F.ERROR)) is J.ABORTING


def test_the_sources_job_is_concluded_when_all_is_cleaned_up() -> None:
    assert source_job(FactLog()) is J.UNDEFINED
    assert source_job(log(F.MIGRATE)) is J.RUNNING
    won = log(F.MIGRATE, F.SETUP_DONE, F.SWITCHOVER, F.ALL_SENT, F.PEER_ACK, F.RUN_ACKED)
    assert source_job(won) is J.PENDING, "its QEMU is still to be ended"
    assert source_job(won.with_fact(F.CLEANUP)) is J.CONCLUDED
    assert source_job(log(F.MIGRATE, F.ERROR)) is J.ABORTING


@pytest.mark.proves("S99")
@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_kind_answers_every_verb_in_every_state(kind: Kind) -> None:
    for verb, state in product(Verb, J):
        cell = answer(kind, verb, state)
        assert cell.why, "an answer says why, or what follows"
        if state in (J.UNDEFINED, J.NULL):
            assert cell.answer is Answer.REFUSED, (verb, state)
    assert answer(kind, Verb.DISMISS, J.CONCLUDED).answer is Answer.DOES, "what stays until it is dismissed can be"


@pytest.mark.proves("S92", "S96", "S99")
def test_a_mirror_takes_what_qemu_takes_but_what_is_its_migrations_to_say() -> None:
    does = {(v, j) for v, j in product(Verb, J) if answer(MIRROR, v, j).answer is Answer.DOES}
    qemus = {(verb, state) for verb, states in VERBS.items() for state in states}
    assert does <= qemus
    assert qemus - does == {
        (Verb.COMPLETE, J.READY), (Verb.FINALIZE, J.PENDING),  # all of them or none
        (Verb.PAUSE, J.CREATED), (Verb.PAUSE, J.READY), (Verb.PAUSE, J.STANDBY),  # its migration needs it
        (Verb.PAUSE, J.PAUSED),  # nothing is left to do
        (Verb.RESUME, J.CREATED), (Verb.RESUME, J.RUNNING), (Verb.RESUME, J.READY),
    }  # fmt: skip
    assert "migration" in answer(MIRROR, Verb.COMPLETE, J.READY).why
    assert set(MIRROR_REASONS) <= MIRROR.states


@pytest.mark.proves("S92", "S114")
@pytest.mark.parametrize(
    ("word", "facts", "state"),
    [
        (None, (), J.UNDEFINED),
        ("running", (Fact.DISKS_STARTED,), J.RUNNING),
        ("standby", (Fact.DISKS_STARTED,), J.STANDBY),
        ("a word of a later QEMU", (Fact.DISKS_STARTED,), J.UNDEFINED),
        (None, (Fact.DISKS_STARTED,), J.CREATED),
        (None, (Fact.DISKS_STARTED, Fact.DISK_FAILED), J.ABORTING),
        (None, (Fact.DISKS_STARTED, Fact.DISKS_DRAINED), J.CONCLUDED),
        (None, (Fact.DISKS_STARTED, Fact.DISKS_DROPPED), J.NULL),
        ("concluded", (Fact.DISKS_STARTED, Fact.DISKS_DROPPED), J.CONCLUDED),
    ],
)
def test_a_mirrors_state_is_qemus_word_and_without_one_what_the_facts_leave(
    word: str | None, facts: tuple[Fact, ...], state: JobStatus
) -> None:
    assert mirror_job(word, log(Fact.DISKS_WANTED, *facts)) is state


@pytest.mark.proves("S97", "S98", "S99")
def test_what_a_migration_takes_beyond_qemus_table_is_listed_here() -> None:
    beyond = {
        (verb, state)
        for verb, state in product(Verb, J)
        if answer(MIGRATE, verb, state).answer is not Answer.REFUSED and state not in VERBS[verb]
    }
    assert beyond == {
        (Verb.CANCEL, J.ABORTING), (Verb.CANCEL, J.CONCLUDED),  # a cancel after the end changes nothing (S14)
        (Verb.CHANGE, J.PENDING), (Verb.CHANGE, J.WAITING), (Verb.CHANGE, J.ABORTING),  # policies, at any time
    }  # fmt: skip
    assert answer(MIGRATE, Verb.FINALIZE, J.PENDING).answer is Answer.DOES
    assert answer(MIGRATE, Verb.COMPLETE, J.READY).answer is Answer.REFUSED


@pytest.mark.proves("S99")
def test_only_a_postcopy_can_be_paused() -> None:
    assert {status for status in S if pause_refusal(status) is None} == PAUSABLE
    assert "max-bandwidth" in (pause_refusal(S.ACTIVE) or "")


def test_a_pause_says_why() -> None:
    cut = log(F.MIGRATE, (F.LINK_LOST, 1))
    assert pause_reason(cut) == f"the channel broke: text of {F.LINK_LOST}"
    paused = cut.with_fact(F.PAUSE, round_no=1)
    assert pause_reason(paused) == "a person paused it"
    assert pause_reason(paused.with_fact(F.PAUSE_OVER, round_no=1)).startswith("the channel broke")
    assert pause_reason(log(F.MIGRATE)) == "the channel broke"


def test_the_document_names_every_state_verb_and_kind() -> None:
    text = docs_markdown()
    for word in (*J, *Verb, *KINDS, *S):
        assert f"`{word}`" in text, word
