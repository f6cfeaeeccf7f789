"""The public status: golden sequences, every causal history of facts, and what may never be seen.

`next_facts` is the model: which facts may be recorded next, given the log. Breadth first search visits every
reachable set of facts (and every order that a rule looks at); hypothesis walks longer histories with every
fact there is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.core.facts import ROUNDED, Fact, FactLog, error_stamp, first_error, visible_error
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.core.status import (
    cancel_refusal,
    derive_destination,
    derive_source,
    destination_status,
    is_over,
    source_status,
)
from vmferry.core.transitions import DESTINATION_EDGES, SOURCE_EDGES, SOURCE_RULES, docs_markdown

F = Fact
Step = Fact | tuple[Fact, int]
ROUNDS_MAX = 2
TERMINAL = {S.COMPLETED, S.FAILED, S.CANCELLED, S.COLO}


def record(log: FactLog, step: Step) -> FactLog:
    fact, round_no = step if isinstance(step, tuple) else (step, 0)
    return log.with_fact(fact, round_no=round_no, text=f"{fact} {round_no}")


def log_of(*steps: Step) -> FactLog:
    log = FactLog()
    for step in steps:
        log = record(log, step)
    return log


def statuses(steps: Iterable[Step], *, announce: bool = True) -> list[S]:
    """What a follower of events sees; `announce` plays the agent's part after the proof of loading."""
    log, seen = FactLog(), [source_status(FactLog())]
    for step in steps:
        log = record(log, step)
        if announce and F.PACKAGE_LOADED in log:
            log = record(log, F.POSTCOPY_ANNOUNCED)
        if source_status(log) is not seen[-1]:
            seen.append(source_status(log))
    return seen


# --- golden sequences -----------------------------------------------------------------------------------

SET_UP: tuple[Step, ...] = (F.MIGRATE, F.PAUSE_CAP, F.PLANNED, F.PREPARE, F.PREPARED, F.CONFIGURED, F.STARTED)
TO_SWITCHOVER = (*SET_UP, F.SETUP_DONE, F.SWITCHOVER, F.CONTINUE)
PRECOPY = (*TO_SWITCHOVER, F.COMMITTED, F.ALL_SENT, F.PEER_ACK, F.LOADED, F.GRANT_SENT, F.RUN_ACKED, F.CLEANUP)
TO_PACKAGE = (*TO_SWITCHOVER, F.PACKAGE_SENT, F.COMMITTED)
TO_POSTCOPY = (*TO_PACKAGE, F.PACKAGE_LOADED, F.LOADED, F.GRANT_SENT, F.RUN_ACKED)
THE_END = (F.ALL_SENT, F.PEER_ACK, F.CLEANUP)
HEAL_1 = ((F.LINK_LOST, 1), (F.RESUME_WANTED, 1), (F.RECONNECTED, 1), (F.RESUME_ACK, 1))
BREAK_AGAIN = ((F.LINK_LOST, 2), (F.RESUME_WANTED, 2), (F.RECONNECT_FAILED, 2), (F.LINK_LOST, 3))
HEAL_3 = ((F.RESUME_WANTED, 3), (F.RECONNECTED, 3), (F.RECONNECT_FAILED, 3), (F.LINK_LOST, 4))
HEAL_4 = ((F.RESUME_WANTED, 4), (F.RECONNECTED, 4), (F.RESUME_ACK, 4))

UP_TO_DEVICE = "none setup active pre-switchover device"
UP_TO_POSTCOPY = f"{UP_TO_DEVICE} postcopy-device postcopy-active"
HEALED = "postcopy-paused postcopy-recover-setup postcopy-recover postcopy-active"

GOLDEN: dict[str, tuple[tuple[Step, ...], str]] = {
    "precopy": (PRECOPY, f"{UP_TO_DEVICE} completed"),
    "precopy without the pause": (
        tuple(step for step in PRECOPY if step not in (F.PAUSE_CAP, F.CONTINUE)),
        "none setup active device completed",
    ),
    "postcopy": ((*TO_POSTCOPY, *THE_END), f"{UP_TO_POSTCOPY} completed"),
    "postcopy, memory all sent before the proof": (
        (*TO_PACKAGE, F.ALL_SENT, F.PACKAGE_LOADED, F.GRANT_SENT, F.RUN_ACKED, F.PEER_ACK, F.CLEANUP),
        f"{UP_TO_POSTCOPY} completed",
    ),
    "cancel in setup": ((*SET_UP, F.CANCEL, F.CLEANUP), "none setup cancelling cancelled"),
    "cancel in active": ((*SET_UP, F.SETUP_DONE, F.CANCEL, F.CLEANUP), "none setup active cancelling cancelled"),
    "cancel in pre-switchover": (
        (*SET_UP, F.SETUP_DONE, F.SWITCHOVER, F.CANCEL, F.CLEANUP),
        "none setup active pre-switchover cancelling cancelled",
    ),
    "cancel in device": ((*TO_SWITCHOVER, F.CANCEL, F.CLEANUP), f"{UP_TO_DEVICE} cancelling cancelled"),
    "cancel after the last byte": (
        (*TO_SWITCHOVER, F.ALL_SENT, F.PEER_ACK, F.CANCEL, F.CLEANUP),
        f"{UP_TO_DEVICE} cancelling cancelled",
    ),
    "cancel in postcopy-device": (
        (*TO_PACKAGE, F.CANCEL, F.CLEANUP),
        f"{UP_TO_DEVICE} postcopy-device cancelling cancelled",
    ),
    "cancel in postcopy-active before the grant": (
        (*TO_PACKAGE, F.PACKAGE_LOADED, F.CANCEL, F.CLEANUP),
        f"{UP_TO_POSTCOPY} cancelling cancelled",
    ),
    "cancel while the guest lets go of a device": (
        (*SET_UP, F.UNPLUG_WAIT, F.CANCEL, F.CLEANUP),
        "none setup wait-unplug cancelling cancelled",
    ),
    "cancel while failing": (
        (*SET_UP, F.SETUP_DONE, F.ERROR, F.CANCEL, F.CLEANUP),
        "none setup active failing cancelling cancelled",
    ),
    "an error because of the cancel": (
        (*SET_UP, F.SETUP_DONE, F.CANCEL, F.ERROR, F.CLEANUP),
        "none setup active cancelling cancelled",
    ),
    "cancel after failed": (
        (*SET_UP, F.SETUP_DONE, F.ERROR, F.CLEANUP, F.CANCEL),
        "none setup active failing failed",
    ),
    "error in setup": ((*SET_UP, F.ERROR, F.CLEANUP), "none setup failing failed"),
    "error in active": ((*SET_UP, F.SETUP_DONE, F.ERROR, F.CLEANUP), "none setup active failing failed"),
    "error in device": ((*TO_SWITCHOVER, F.ERROR, F.CLEANUP), f"{UP_TO_DEVICE} failing failed"),
    "error in postcopy-device": (
        (*TO_PACKAGE, F.ERROR, F.CLEANUP),
        f"{UP_TO_DEVICE} postcopy-device failing failed",
    ),
    "link lost before the proof": (
        (*TO_PACKAGE, (F.LINK_LOST, 1), F.CLEANUP),
        f"{UP_TO_DEVICE} postcopy-device failing failed",
    ),
    "start refused, the guest goes back": (
        (*TO_SWITCHOVER, F.ALL_SENT, F.PEER_ACK, F.GRANT_SENT, (F.START_REFUSED, 1), F.ERROR, F.TARGET_GONE, F.CLEANUP),
        f"{UP_TO_DEVICE} failing failed",
    ),
    "postcopy broken and healed twice": (
        (*TO_POSTCOPY, *HEAL_1, *BREAK_AGAIN, *HEAL_3, *HEAL_4, *THE_END),
        f"{UP_TO_POSTCOPY} {HEALED} postcopy-paused postcopy-recover-setup postcopy-paused "
        f"postcopy-recover-setup postcopy-recover {HEALED} completed",
    ),
    "failover devices": (
        (*SET_UP, F.UNPLUG_WAIT, F.UNPLUG_DONE, F.SETUP_DONE),
        "none setup wait-unplug active",
    ),
    "colo": ((F.COLO, *PRECOPY), f"{UP_TO_DEVICE} colo"),
    "a word that nobody has heard of": (
        (*SET_UP, (F.UNKNOWN_STATUS, 1), F.SETUP_DONE, (F.UNKNOWN_STATUS, 2)),
        "none setup active",
    ),
}


@pytest.mark.proves("S2", "S4", "S9", "S10", "S11", "S30", "S31", "S63", "S64", "S129", "S130")
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_sequence(name: str) -> None:
    steps, words = GOLDEN[name]
    assert " ".join(statuses(steps)) == words


def test_postcopy_is_completed_only_after_it_was_announced() -> None:
    steps = (*TO_POSTCOPY, *THE_END)
    assert source_status(log_of(*steps)) is S.POSTCOPY_ACTIVE
    assert statuses(steps)[-1] is S.COMPLETED


@pytest.mark.proves("S15")
def test_the_error_before_a_cancel_stays_visible_as_its_cause() -> None:
    log = log_of(*SET_UP, F.ERROR, F.CANCEL, F.CLEANUP)
    assert source_status(log) is S.CANCELLED
    assert visible_error(log) == ("error 0", "cause")


@pytest.mark.proves("S20")
def test_every_status_says_which_facts_made_it() -> None:
    assert derive_source(log_of(F.MIGRATE, F.ERROR)).because == (F.ERROR,)
    assert derive_source(log_of(F.MIGRATE, F.ERROR, F.CLEANUP)).because == (F.ERROR, F.CLEANUP)
    assert derive_source(log_of(F.MIGRATE, F.CANCEL, F.CLEANUP)).because == (F.CANCEL, F.CLEANUP)
    lost = log_of(F.MIGRATE, F.PACKAGE_SENT, (F.LINK_LOST, 1))
    assert derive_source(lost).because == (F.LINK_LOST,)
    for log in explored():
        derived = derive_source(log)
        for fact in derived.because:
            assert fact in log, (derived, [entry.fact for entry in log])
        assert derived.because or derived.status is S.NONE


# --- the model ------------------------------------------------------------------------------------------


def _link_is_up(log: FactLog) -> bool:
    lost = log.last_round(F.LINK_LOST)
    return lost == 0 or log.stamp(F.RESUME_ACK, lost) is not None


def _turned_back(log: FactLog) -> bool:
    return F.CANCEL in log or F.ERROR in log or error_stamp(log) is not None


def _memory_steps(log: FactLog) -> Iterator[Step]:
    if F.UNPLUG_WAIT not in log and F.SETUP_DONE not in log:
        yield F.UNPLUG_WAIT
    if F.UNPLUG_WAIT in log:
        yield F.UNPLUG_DONE
    if F.UNPLUG_WAIT not in log or F.UNPLUG_DONE in log:
        yield F.SETUP_DONE
    if F.SETUP_DONE in log:
        yield F.SWITCHOVER
    if F.SWITCHOVER in log and F.PAUSE_CAP in log:
        yield F.CONTINUE


def _switchover_steps(log: FactLog) -> Iterator[Step]:
    if F.SWITCHOVER not in log or (F.PAUSE_CAP in log and F.CONTINUE not in log):
        return
    postcopy, up = F.PACKAGE_SENT in log, _link_is_up(log)
    if F.ALL_SENT not in log:
        yield F.PACKAGE_SENT
    if postcopy and up:
        yield F.PACKAGE_LOADED
    if up:
        yield F.ALL_SENT
    if F.ALL_SENT in log and up and (not postcopy or F.PACKAGE_LOADED in log):
        yield F.PEER_ACK
    if not _turned_back(log) and (F.PACKAGE_LOADED in log or F.PEER_ACK in log):
        yield F.GRANT_SENT
    if F.GRANT_SENT in log and F.TARGET_GONE not in log:
        yield F.RUN_ACKED
    if F.RUN_ACKED not in log:
        yield F.TARGET_GONE


def _round_steps(log: FactLog) -> Iterator[Step]:
    if F.PACKAGE_SENT not in log or F.PEER_ACK in log:
        return
    lost = log.last_round(F.LINK_LOST)
    broken_again = lost and log.stamp(F.RECONNECT_FAILED, lost) is not None
    if lost < ROUNDS_MAX and (_link_is_up(log) or broken_again):
        yield (F.LINK_LOST, lost + 1)
    if lost and not _link_is_up(log) and not broken_again and F.PACKAGE_LOADED in log:
        yield (F.RESUME_WANTED, lost)
        if log.stamp(F.RESUME_WANTED, lost) is not None:
            yield (F.RECONNECTED, lost)
            yield (F.RECONNECT_FAILED, lost)
        if log.stamp(F.RECONNECTED, lost) is not None:
            yield (F.RESUME_ACK, lost)


def next_facts(log: FactLog) -> list[Step]:
    """What may be recorded next; nothing that is recorded already."""
    if F.MIGRATE not in log:
        return [F.MIGRATE]
    if F.PACKAGE_LOADED in log and F.POSTCOPY_ANNOUNCED not in log:
        return [F.POSTCOPY_ANNOUNCED]  # the agent does that before it looks at anything else
    steps: list[Step] = [F.ERROR]
    if len(log) == 1:
        steps += [F.PAUSE_CAP, F.COLO]
    if cancel_refusal(log) is None:
        steps.append(F.CANCEL)
    over = source_status(log) in (S.COMPLETED, S.COLO) or _turned_back(log)
    if over and (F.GRANT_SENT not in log or F.RUN_ACKED in log or F.TARGET_GONE in log):
        steps.append(F.CLEANUP)
    if F.CLEANUP not in log:
        steps += [*_memory_steps(log), *_switchover_steps(log), *_round_steps(log)]
    return [step for step in steps if record(log, step) is not log]


def _key(log: FactLog) -> object:
    """Two logs with the same key have the same future and the same status."""
    won = [log.stamp(fact) for fact in (F.ALL_SENT, F.PEER_ACK, F.RUN_ACKED, F.POSTCOPY_ANNOUNCED)]
    stamps = [
        log.stamp(F.CANCEL),
        error_stamp(log),
        max((s for s in won if s is not None), default=None),
        log.stamp(F.CLEANUP),
    ]
    order = tuple(sorted((s, n) for n, s in enumerate(stamps) if s is not None))
    return frozenset((entry.fact, entry.round) for entry in log), tuple(n for _, n in order)


@cache
def walked() -> tuple[tuple[FactLog, ...], frozenset[tuple[S, S]]]:
    """Every reachable log (one for each key) and every change of status on the way."""
    seen, edges, found = {_key(FactLog())}, set(), [FactLog()]
    queue = deque(found)
    while queue:
        log = queue.popleft()
        status = source_status(log)
        for step in next_facts(log):
            after = record(log, step)
            if source_status(after) is not status:
                edges.add((status, source_status(after)))
            if _key(after) not in seen:
                seen.add(_key(after))
                found.append(after)
                queue.append(after)
    return tuple(found), frozenset(edges)


def explored() -> tuple[FactLog, ...]:
    return walked()[0]


def test_the_walk_is_large_enough_to_mean_something() -> None:
    assert len(explored()) > 5_000


@pytest.mark.proves("S19", "S64")
def test_all_17_values_are_reached() -> None:
    assert {source_status(log) for log in explored()} == set(S)


@pytest.mark.proves("S4", "S9", "S63")
def test_only_the_edges_of_the_transition_map_are_taken_and_all_of_them() -> None:
    golden = {(start, end) for start, ends in SOURCE_EDGES.items() for end in ends}
    assert walked()[1] - golden == set()
    assert golden - walked()[1] == set()


def test_a_terminal_status_is_final_and_never_before_the_cleanup_of_a_failure() -> None:
    for log in explored():
        status = source_status(log)
        if status in TERMINAL:
            assert {source_status(record(log, step)) for step in next_facts(log)} <= {status}
        if status in (S.FAILED, S.CANCELLED):
            assert is_over(log)
        if status in (S.FAILING, S.CANCELLING):
            assert not is_over(log), "busy until the cleanup is over"


@pytest.mark.proves("S9", "S10", "S11")
def test_an_accepted_cancel_leads_to_cancelled_and_nowhere_else() -> None:
    for log in explored():
        cancel, cleanup = log.stamp(F.CANCEL), log.stamp(F.CLEANUP)
        if cancel is None or (cleanup is not None and cleanup < cancel):
            continue
        before = FactLog()
        for entry in log.entries[:cancel]:
            before = before.with_fact(entry.fact, round_no=entry.round)
        if source_status(before) in (S.COMPLETED, S.COLO):
            assert source_status(log) is source_status(before)
        else:
            assert source_status(log) is (S.CANCELLED if cleanup is not None else S.CANCELLING)


@pytest.mark.proves("S22")
def test_failing_lasts_until_the_cleanup() -> None:
    for log in explored():
        if source_status(log) is S.FAILING:
            assert first_error(log) is not None
            assert F.CLEANUP not in log
            if F.GRANT_SENT not in log:
                assert source_status(record(log, F.CLEANUP)) is S.FAILED


@pytest.mark.proves("S15")
def test_the_first_error_is_visible_for_ever_and_never_replaced() -> None:
    for log in explored():
        first = first_error(log)
        if first is None:
            continue
        for step in next_facts(log):
            assert first_error(record(log, step)) == first
        visible = visible_error(log)
        assert visible is not None
        assert visible[0] == first.text


@pytest.mark.proves("S19", "S27", "S31")
def test_completed_has_every_proof() -> None:
    for log in explored():
        if source_status(log) in (S.COMPLETED, S.COLO):
            assert F.ALL_SENT in log
            assert F.PEER_ACK in log
            assert F.RUN_ACKED in log
            if F.PACKAGE_SENT in log:
                assert F.PACKAGE_LOADED in log
                assert F.POSTCOPY_ANNOUNCED in log
        if source_status(log) in (S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED):
            assert F.PACKAGE_LOADED in log


@pytest.mark.proves("S18")
def test_no_two_rounds_of_a_recovery_overlap() -> None:
    for log in explored():
        status, lost = source_status(log), log.last_round(F.LINK_LOST)
        if status is S.POSTCOPY_RECOVER:
            assert log.stamp(F.RECONNECTED, lost) is not None
            assert log.stamp(F.RECONNECTED, lost + 1) is None


@pytest.mark.proves("S14")
def test_a_cancel_is_refused_with_the_reason_once_the_destination_may_run() -> None:
    for log in explored():
        refusal = cancel_refusal(log)
        may_run = F.GRANT_SENT in log and F.TARGET_GONE not in log and not is_over(log)
        assert (refusal is not None) == may_run
    by_hand = log_of(*TO_SWITCHOVER, F.RUN_ACKED)
    assert "never told to" in str(cancel_refusal(by_hand))
    assert cancel_refusal(FactLog()) is None
    assert cancel_refusal(log_of(*PRECOPY)) is None, "it is over: a cancel changes nothing"


ALL_STEPS = [fact for fact in Fact if fact not in ROUNDED]
ROUND_STEPS = st.tuples(st.sampled_from(sorted(ROUNDED)), st.integers(1, 4))


@pytest.mark.proves("S32")
@given(st.lists(st.sampled_from(ALL_STEPS) | ROUND_STEPS, max_size=40))
def test_any_order_of_any_facts_has_a_status_on_both_sides(steps: list[Step]) -> None:
    """Not only causal ones: events of two hosts may come in any order, twice, or from an old round."""
    log = log_of(*steps)
    assert source_status(log) in S
    assert destination_status(log) in S
    assert log_of(*steps, *steps) == log
    won = source_status(log) in (S.COMPLETED, S.COLO)
    for fact in (F.CANCEL, F.ERROR, F.CLEANUP):
        if won:
            assert source_status(record(log, fact)) is source_status(log), "a win is final"


@given(st.data())
def test_long_histories_take_only_edges_of_the_map(data: st.DataObject) -> None:
    log = FactLog()
    for _ in range(data.draw(st.integers(0, 40))):
        steps = next_facts(log)
        if not steps:
            break
        before, log = source_status(log), record(log, data.draw(st.sampled_from(steps)))
        assert source_status(log) is before or source_status(log) in SOURCE_EDGES[before]


# --- the destination ------------------------------------------------------------------------------------

ARRIVES = (F.PREPARE, F.LISTENING, F.HEADER_SEEN)
LOADS = (*ARRIVES, F.PACKAGE_SENT, F.PACKAGE_LOADED, F.LOADED)
HEALS = ((F.LINK_LOST, 1), (F.RESUME_WANTED, 1), (F.RECONNECTED, 1), (F.RESUME_ACK, 1))


@pytest.mark.proves("S37", "S38")
@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((*ARRIVES, F.LOADED, F.ALL_SENT, F.TARGET_RAN), "none setup active completed"),
        (
            (*LOADS, F.TARGET_RAN, *HEALS, F.ALL_SENT),
            "none setup active postcopy-device postcopy-active postcopy-paused postcopy-recover-setup "
            "postcopy-recover postcopy-active completed",
        ),
        ((F.PREPARE, F.ERROR, F.TARGET_GONE), "none failed"),
        ((*ARRIVES, F.TARGET_GONE), "none setup active failed"),
        ((*ARRIVES, F.PACKAGE_SENT, F.ERROR), "none setup active postcopy-device failed"),
    ],
)
def test_golden_sequence_of_the_destination(steps: tuple[Step, ...], words: str) -> None:
    log, seen = FactLog(), [S.NONE]
    for step in steps:
        log = record(log, step)
        if destination_status(log) is not seen[-1]:
            assert destination_status(log) in DESTINATION_EDGES[seen[-1]]
            seen.append(destination_status(log))
    assert " ".join(seen) == words


def test_the_destination_says_which_facts_made_its_status() -> None:
    assert derive_destination(FactLog()).because == ()
    assert derive_destination(log_of(F.PREPARE)).because == (F.PREPARE,)
    assert derive_destination(log_of(F.PREPARE, F.TARGET_GONE)).because == (F.TARGET_GONE,)
    assert derive_destination(log_of(F.PREPARE, F.ERROR)).because == (F.ERROR,)


# --- the documents --------------------------------------------------------------------------------------


@pytest.mark.proves("S33")
def test_the_document_has_every_rule_and_every_edge() -> None:
    text = docs_markdown()
    assert all(when in text and then in text for when, then in SOURCE_RULES)
    assert "postcopy_device --> postcopy_active" in text
    assert set(SOURCE_EDGES) == set(S)
    assert "completed --> [*]" in text
