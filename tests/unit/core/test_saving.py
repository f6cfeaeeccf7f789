"""A save: its facts, its job's state, and the table that gives its guest back to itself."""

from __future__ import annotations

import itertools

import pytest

from vmferry.core.job import KINDS, SAVE, Answer, JobStatus, Verb, answer, path
from vmferry.core.saving import (
    ROWS,
    Back,
    BackView,
    Did,
    Guest,
    Halted,
    Owed,
    Qemu,
    SaveFact,
    SaveLog,
    Word,
    awaits_leave,
    did,
    guest_of,
    halt_of,
    halted,
    may_cancel,
    may_name_copies,
    ran_at_instant,
    row_of,
    save_job,
    save_status,
    word_of,
)

F, J = SaveFact, JobStatus
VIEWS = [BackView(*answers) for answers in itertools.product(Qemu, Word, Guest, Owed, Did, Halted)]


def log(*facts: SaveFact) -> SaveLog:
    made = SaveLog()
    for number, fact in enumerate(facts):
        made = made.with_fact(fact, text=fact.value, at_s=float(number), by="test")
    return made


def test_every_combination_has_exactly_one_row_and_every_row_is_reached() -> None:
    assert {row_of(view).label for view in VIEWS} == {row.label for row in ROWS}
    assert len({row.label for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_guest_is_started_only_if_it_ran_and_nobody_sends_it(view: BackView) -> None:
    """`cont` while QEMU still sends would be refused or break the save; of a guest that did not run it is not ours."""
    row = row_of(view)
    if row.do is Back.CONT:
        assert view.owed is Owed.YES
        assert view.halted is Halted.NO, "what a panic or a shutdown has stopped is not a save's to start"
        assert view.word in (Word.IDLE, Word.DONE)
        assert view.qemu is Qemu.ANSWERS
        assert (view.guest, view.did) in {
            (Guest.STANDS, Did.STOP), (Guest.STANDS, Did.SEND), (Guest.SENT, Did.SEND)
        }, "a guest that somebody else has sent may run elsewhere"  # fmt: skip
    if row.do in (Back.DONE, Back.LEAVE) and view.qemu is Qemu.ANSWERS:
        if view.did is Did.SEND:
            left_standing = view.guest in (Guest.STANDS, Guest.SENT) and view.owed is Owed.YES
            assert not left_standing or view.halted is Halted.YES, "a save never leaves a guest stopped that ran"
            assert view.word in (Word.IDLE, Word.DONE), "nor a migration going on"
        if view.did is Did.STOP and view.word is Word.IDLE and view.halted is Halted.NO:
            assert (view.guest, view.owed) != (Guest.STANDS, Owed.YES), "a save never leaves a guest stopped that ran"
    if row.do is Back.CANCEL:
        assert view.word in (Word.GOING, Word.WAITS)
        assert view.did is Did.SEND, "what it did not begin is not its to end"
    if view.did is Did.NOTHING or view.qemu is Qemu.NOT_OURS:
        assert row.do in (Back.DONE, Back.LEAVE, Back.WAIT), (
            "a guest that was not touched, or is not ours, is left alone"
        )


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (None, Word.IDLE),
        ("none", Word.IDLE),
        ("setup", Word.GOING),
        ("active", Word.GOING),
        ("pre-switchover", Word.WAITS),
        ("device", Word.GOING),
        ("completed", Word.DONE),
        ("failed", Word.IDLE),
        ("failing", Word.ENDING),
        ("cancelling", Word.ENDING),
        ("cancelled", Word.IDLE),
        ("a word of the future", Word.GOING),
    ],
)
def test_qemus_words(status: str | None, word: Word) -> None:
    assert word_of(status) is word


@pytest.mark.parametrize(
    ("state", "guest"),
    [
        ("running", Guest.RUNS),
        ("paused", Guest.STANDS),
        ("finish-migrate", Guest.SENT),
        ("postmigrate", Guest.SENT),
        ("io-error", Guest.OTHER),
        ("guest-panicked", Guest.OTHER),
    ],
)
def test_run_states(state: str, guest: Guest) -> None:
    assert guest_of(state) is guest


@pytest.mark.parametrize(
    ("event", "data", "state"),
    [
        ("GUEST_PANICKED", {"action": "pause"}, "guest-panicked"),
        ("GUEST_PANICKED", {"action": "poweroff"}, "guest-panicked"),
        ("GUEST_PANICKED", {"action": "run"}, ""),
        ("BLOCK_IO_ERROR", {"action": "stop"}, "io-error"),
        ("BLOCK_IO_ERROR", {"action": "report"}, ""),
        ("WATCHDOG", {"action": "pause"}, "watchdog"),
        ("WATCHDOG", {"action": "reset"}, ""),
        ("SHUTDOWN", {"guest": True}, "shutdown"),
        ("STOP", {}, ""),
    ],
)
def test_events_with_which_a_guest_stops_by_itself(event: str, data: dict[str, str], state: str) -> None:
    assert halt_of(event, data) == state


@pytest.mark.parametrize(
    ("way", "heard", "instant", "by", "ran"),
    [
        ("precopy", "", "running", "", True),
        ("precopy", "", "paused", "", True),
        ("precopy", "", "internal-error", "internal-error", False),
        ("precopy", "io-error", "", "io-error", False),
        ("precopy", "io-error", "running", "", True),
        ("background", "io-error", "running", "io-error", True),
        ("precopy", "", "", "", True),
    ],
)
def test_what_stopped_a_guest_and_whether_it_ran_at_the_instant(
    way: str, heard: str, instant: str, by: str, ran: bool
) -> None:
    """The stream is right about its own instant: one that went on after it was heard to stop runs. Of a background
    save that instant is long over when the guest stops."""
    made = SaveLog().with_fact(F.CONFIGURED, text=way)
    for fact, text in ((F.HALTED, heard), (F.INSTANT, instant)):
        made = made.with_fact(fact, text=text) if text else made
    assert halted(made) == by
    assert ran_at_instant(made, before=True) is ran
    assert not ran_at_instant(made, before=False)


@pytest.mark.parametrize(
    ("facts", "proved"),
    [
        ((F.WANTED, F.CONFIGURED), Did.NOTHING),
        ((F.WANTED, F.ACTS), Did.SEND),
        ((F.WANTED, F.ACTS, F.STARTED), Did.SEND),
        ((F.WANTED, F.ACTS, F.REFUSED), Did.NOTHING),
        ((F.WANTED, F.STOPPED), Did.STOP),
        ((F.WANTED, F.STOPPED, F.ACTS), Did.SEND),
        ((F.WANTED, F.STOPPED, F.ACTS, F.REFUSED), Did.STOP),
    ],
)
def test_what_a_save_is_proved_to_have_told_its_qemu(facts: tuple[SaveFact, ...], proved: Did) -> None:
    assert did(log(*facts)) is proved


PLAY = [
    (F.WANTED, J.CREATED, "setup"),
    (F.CONFIGURED, J.CREATED, "setup"),
    (F.STARTED, J.RUNNING, "active"),
    (F.STANDS, J.RUNNING, "device"),
    (F.DISKS, J.RUNNING, "device"),
    (F.WHOLE, J.PENDING, "device"),
    (F.RESUMED, J.PENDING, "device"),
    (F.KEPT, J.PENDING, "device"),
    (F.CLEANUP, J.CONCLUDED, "completed"),
]


@pytest.mark.proves("S93", "S94")
def test_a_save_as_its_job_shows_it() -> None:
    made, before = SaveLog(), save_job(SaveLog())
    assert (before, save_status(made)) == (J.UNDEFINED, "setup")
    passed: list[JobStatus] = []
    for fact, state, status in PLAY:
        made = made.with_fact(fact)
        assert (save_job(made), save_status(made)) == (state, status), fact
        passed += path(before, state)
        before = state
    assert passed == [J.CREATED, J.RUNNING, J.WAITING, J.PENDING, J.CONCLUDED]
    assert set(passed) <= SAVE.states


@pytest.mark.parametrize(
    ("facts", "during", "end"),
    [
        ((F.WANTED, F.STARTED, F.CANCEL), "cancelling", "cancelled"),
        ((F.WANTED, F.STARTED, F.CANCEL, F.ERROR), "cancelling", "cancelled"),
        ((F.WANTED, F.ERROR), "failing", "failed"),
        ((F.WANTED, F.RESTARTED), "failing", "failed"),
        ((F.WANTED, F.STARTED, F.WHOLE, F.RESUMED, F.ERROR), "failing", "failed"),
    ],
)
def test_ends_that_are_no_success(facts: tuple[SaveFact, ...], during: str, end: str) -> None:
    made = log(*facts)
    assert (save_job(made), save_status(made)) == (J.ABORTING, during)
    over = made.with_fact(F.CLEANUP)
    assert (save_job(over), save_status(over)) == (J.CONCLUDED, end)


def test_a_save_that_copies_disks_runs_before_its_memory_goes() -> None:
    made = log(F.WANTED, F.CONFIGURED, F.COPYING)
    assert (save_job(made), save_status(made)) == (J.RUNNING, "active")
    assert path(J.CREATED, J.RUNNING) == (J.RUNNING,)
    for fact in (F.COPIES_READY, F.STARTED):
        made = made.with_fact(fact)
        assert (save_job(made), save_status(made)) == (J.RUNNING, "active")


@pytest.mark.parametrize(
    ("facts", "may"),
    [
        ((F.COPIED, F.WHOLE), False),
        ((F.COPIED, F.WHOLE, F.COMMITS), True),
        ((F.COMMITS, F.ERROR), True),
        ((F.COMMITS, F.ERROR, F.ABSENT), False),
        ((F.COMMITS, F.UNKNOWN), True),
        ((F.UNKNOWN, F.ABSENT), True),
        ((F.COMMITS, F.KEPT), True),
        ((F.RESTARTED, F.COMMITS), True),
    ],
)
def test_whether_a_snapshot_may_name_the_copies(facts: tuple[SaveFact, ...], may: bool) -> None:
    assert may_name_copies(log(F.WANTED, *facts)) is may


def test_leave_is_awaited_while_the_guest_stands() -> None:
    waits = log(F.WANTED, F.STARTED, F.HOLD, F.STANDS)
    assert awaits_leave(waits)
    assert (save_job(waits), save_status(waits)) == (J.PENDING, "pre-switchover")
    given = waits.with_fact(F.FINALIZE)
    assert not awaits_leave(given)
    assert (save_job(given), save_status(given)) == (J.PENDING, "device"), "it does not go back to running"
    assert not awaits_leave(log(F.WANTED, F.HOLD))


def test_a_fact_is_recorded_once() -> None:
    made = log(F.WANTED)
    assert made.with_fact(F.WANTED, text="again") is made
    entry = made.entry(F.WANTED)
    assert entry is not None
    assert entry.text == "wanted"
    assert made.entry(F.KEPT) is None


def test_a_cancel_is_too_late_once_the_commit_began() -> None:
    assert may_cancel(log(F.WANTED, F.WHOLE), is_committing=False) is None
    assert "forget" in str(may_cancel(log(F.WANTED, F.WHOLE), is_committing=True))
    assert "forget" in str(may_cancel(log(F.KEPT), is_committing=False))
    assert may_cancel(log(F.WANTED, F.WHOLE), is_committing=True, stands=True) is None, "for the guest's sake"
    assert "forget" in str(may_cancel(log(F.KEPT), is_committing=True, stands=True))


@pytest.mark.proves("S99")
def test_the_kind_answers_every_verb_in_every_state() -> None:
    assert KINDS["save"] is SAVE
    for verb, state in itertools.product(Verb, SAVE.states):
        assert answer(SAVE, verb, state).why
    does = {(v, j) for v, j in itertools.product(Verb, SAVE.states) if answer(SAVE, v, j).answer is Answer.DOES}
    assert does == {
        *((Verb.CANCEL, j) for j in (J.CREATED, J.RUNNING, J.WAITING, J.PENDING)),
        (Verb.FINALIZE, J.PENDING),
        (Verb.DISMISS, J.CONCLUDED),
    }
