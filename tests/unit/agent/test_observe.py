"""What QEMU's words prove: every word, early or late, from every QEMU."""

from __future__ import annotations

import pytest

from vmferry.agent.observe import (
    Finding,
    arrival,
    destination_findings,
    holds_back,
    mirror_findings,
    source_findings,
)
from vmferry.core.facts import Fact, FactLog, open_round, waits_for_channel
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.core.status import derive_destination, destination_status, source_status

F = Fact
SWITCHED = {F.SETUP_DONE, F.SWITCHOVER, F.CONTINUE}


def started() -> FactLog:
    log = FactLog()
    for fact in (F.MIGRATE, F.PREPARE, F.PLANNED, F.PAUSE_CAP, F.PREPARED, F.CONFIGURED, F.STARTED):
        log = log.with_fact(fact)
    return log


def tell(log: FactLog, findings: tuple[Finding, ...]) -> FactLog:
    for fact, round_no, text in findings:
        log = log.with_fact(fact, round_no=round_no, text=text)
        if fact is F.PACKAGE_LOADED:
            log = log.with_fact(F.POSTCOPY_ANNOUNCED)
    return log


def hear(*words: str | None, log: FactLog | None = None, has_proof: bool = True) -> FactLog:
    log = started() if log is None else log
    for word in words:
        log = tell(log, source_findings(word, log, has_proof=has_proof))
    return log


def new_facts(word: str | None, log: FactLog, *, has_proof: bool = True) -> set[Fact]:
    return {fact for fact, _, _ in source_findings(word, log, has_proof=has_proof)}


@pytest.mark.parametrize("word", ["pre-switchover", "device", "postcopy-device", "postcopy-active", "completed"])
@pytest.mark.proves("S90")
def test_a_switchover_proves_that_devices_with_a_say_were_ready(word: str) -> None:
    asked = started().with_fact(F.SWITCHOVER_ACK)
    facts = [entry.fact for entry in hear(word, log=asked)]
    assert facts.index(F.DEVICES_READY) < facts.index(F.SWITCHOVER)
    assert F.DEVICES_READY not in new_facts(word, started())
    assert F.DEVICES_READY not in new_facts("active", asked)


@pytest.mark.parametrize("word", [None, "none", "setup", "failing", "failed"])
def test_words_that_prove_nothing_by_themselves(word: str | None) -> None:
    assert source_findings(word, started(), has_proof=True) == ()


@pytest.mark.parametrize("word", ["failing", "failed", "cancelling", "cancelled"])
@pytest.mark.proves("S36")
def test_a_qemu_that_gives_up_after_the_switchover_may_run_its_guest_again(word: str) -> None:
    assert F.SOURCE_RESUMED not in new_facts(word, started())
    assert F.SOURCE_RESUMED in new_facts(word, started().with_fact(F.CONTINUE))


@pytest.mark.parametrize(
    ("word", "facts"),
    [
        ("wait-unplug", {F.UNPLUG_WAIT}),
        ("active", {F.SETUP_DONE}),
        ("pre-switchover", {F.SETUP_DONE, F.SWITCHOVER}),
        ("device", SWITCHED),
        ("postcopy-device", SWITCHED | {F.PACKAGE_SENT}),
        ("postcopy-active", SWITCHED | {F.PACKAGE_SENT, F.PACKAGE_LOADED}),
        ("postcopy-paused", SWITCHED | {F.PACKAGE_SENT, F.PACKAGE_LOADED, F.LINK_LOST}),
        ("postcopy-recover-setup", SWITCHED | {F.PACKAGE_SENT, F.PACKAGE_LOADED, F.LINK_LOST, F.RESUME_WANTED}),
        (
            "postcopy-recover",
            SWITCHED | {F.PACKAGE_SENT, F.PACKAGE_LOADED, F.LINK_LOST, F.RESUME_WANTED, F.RECONNECTED},
        ),
        ("completed", SWITCHED | {F.ALL_SENT, F.PEER_ACK}),
        ("colo", {F.COLO}),
        ("multiplying", {F.UNKNOWN_STATUS}),
    ],
)
def test_a_word_proves_everything_that_came_before_it(word: str, facts: set[Fact]) -> None:
    assert new_facts(word, started()) == facts


LATE = ("wait-unplug", "active", "pre-switchover", "device", "postcopy-device", "postcopy-active", "postcopy-paused",
        "postcopy-recover-setup", "postcopy-recover")  # fmt: skip


@pytest.mark.proves("S1", "S20", "S83")
@pytest.mark.parametrize("word", LATE)
def test_an_agent_that_comes_late_shows_what_qemu_says(word: str) -> None:
    """After a restart one word must be enough: our status is QEMU's own."""
    assert source_status(hear(word)) is S(word)


@pytest.mark.proves("S2", "S83")
def test_the_whole_series_of_words_gives_the_same_statuses() -> None:
    words = [
        *("setup", "wait-unplug", "active", "pre-switchover", "device", "postcopy-device", "postcopy-active"),
        *("postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "postcopy-active"),
        *("postcopy-paused", "postcopy-recover-setup", "postcopy-paused", "postcopy-recover-setup"),
        *("postcopy-recover", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "postcopy-active"),
    ]
    log = started()
    for word in words:
        log = hear(word, log=log)
        assert source_status(log) is S(word)
    log = hear("completed", log=log.with_fact(F.GRANT_SENT).with_fact(F.RUN_ACKED))
    assert source_status(log) is S.COMPLETED


def test_the_same_word_twice_is_one_round() -> None:
    assert hear("postcopy-paused", "postcopy-paused").last_round(F.LINK_LOST) == 1
    assert hear("postcopy-recover", "postcopy-recover").last_round(F.LINK_LOST) == 1


def test_a_loss_that_was_not_heard_of_is_a_round_of_its_own() -> None:
    log = hear("postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "postcopy-active")
    missed = hear("postcopy-recover", log=log)
    assert missed.last_round(F.LINK_LOST) == 2
    assert source_status(missed) is S.POSTCOPY_RECOVER


def test_the_guest_gave_its_failover_devices_back_when_memory_moves() -> None:
    assert F.UNPLUG_DONE not in hear("active")
    assert F.UNPLUG_DONE in hear("wait-unplug", "active")


@pytest.mark.proves("S27")
def test_an_old_qemu_says_postcopy_active_before_the_destination_loaded() -> None:
    log = hear("active", "postcopy-active", has_proof=False)
    assert F.PACKAGE_LOADED not in log
    assert source_status(log) is S.POSTCOPY_DEVICE
    proven = log.with_fact(F.PACKAGE_LOADED)
    assert source_status(proven) is S.POSTCOPY_ACTIVE


BROKEN_WORDS = ["postcopy-paused", "postcopy-recover-setup", "postcopy-recover"]


@pytest.mark.parametrize("word", BROKEN_WORDS)
@pytest.mark.proves("S27", "S53")
def test_an_old_qemu_that_lost_its_channel_may_have_lost_a_guest_that_arrived(word: str) -> None:
    """A loss before the proof is an error, one after it is not: it is held back until it is known which it is."""
    log = hear("postcopy-active", word, has_proof=False)
    assert holds_back(word, log, has_proof=False)
    assert F.LINK_LOST not in log
    assert source_status(log) is S.POSTCOPY_DEVICE
    arrived = hear(word, log=log.with_fact(F.PACKAGE_LOADED), has_proof=False)
    assert not holds_back(word, arrived, has_proof=False)
    assert (
        source_status(arrived)
        is {
            "postcopy-paused": S.POSTCOPY_PAUSED,
            "postcopy-recover-setup": S.POSTCOPY_RECOVER_SETUP,
            "postcopy-recover": S.POSTCOPY_RECOVER,
        }[word]
    )
    for fact, round_no in ((F.TARGET_GONE, 0), (F.FENCED, 1), (F.STAND_IN, 0)):
        never_ran = hear(word, log=log.with_fact(fact, round_no=round_no), has_proof=False)
        assert source_status(never_ran) is S.FAILING
    assert not holds_back(word, log, has_proof=True)
    assert not holds_back("postcopy-active", log, has_proof=False)


@pytest.mark.parametrize("has_proof", [True, False])
def test_the_result_of_the_destination_proves_the_load_too(has_proof: bool) -> None:
    lost_event = hear("postcopy-device", "completed", has_proof=has_proof)
    assert F.PACKAGE_LOADED in lost_event
    assert source_status(lost_event.with_fact(F.RUN_ACKED)) is S.COMPLETED
    assert F.PACKAGE_LOADED not in hear("device", "completed")


@pytest.mark.parametrize("word", ["cancelling", "cancelled"])
def test_a_cancel_by_somebody_else_is_heard_and_our_own_is_known(word: str) -> None:
    foreign = hear(word)
    entry = foreign.entry(F.CANCEL)
    assert entry is not None
    assert "own monitor" in entry.text
    assert new_facts(word, started().with_fact(F.CANCEL)) == set()
    assert new_facts(word, started().with_fact(F.ERROR)) == set()


def test_words_that_nobody_has_heard_of_are_counted() -> None:
    log = hear("multiplying", "dividing")
    assert log.last_round(F.UNKNOWN_STATUS) == 2
    assert [entry.text for entry in log if entry.fact is F.UNKNOWN_STATUS] == ["multiplying", "dividing"]
    assert source_status(log) is S.SETUP


# --- the destination ------------------------------------------------------------------------------------


def place() -> FactLog:
    return FactLog().with_fact(F.PREPARE)


def arrive(*pairs: tuple[str | None, str | None], log: FactLog | None = None) -> FactLog:
    log = place() if log is None else log
    for word, run_state in pairs:
        log = tell(log, destination_findings(word, run_state, log))
    return log


@pytest.mark.parametrize("word", [None, "none", "failing", "failed", "cancelling", "cancelled"])
def test_words_of_the_destination_that_prove_nothing_by_themselves(word: str | None) -> None:
    assert destination_findings(word, "inmigrate", place()) == ()


@pytest.mark.proves("S37", "S38")
def test_the_destination_has_loaded_only_when_it_left_inmigrate() -> None:
    early = arrive(("setup", "inmigrate"), ("active", "inmigrate"), ("postcopy-active", "inmigrate"))
    assert F.LOADED not in early
    assert destination_status(early) is S.ACTIVE
    loaded = arrive(("postcopy-active", "paused"), log=early)
    assert F.LOADED in loaded
    assert destination_status(loaded) is S.POSTCOPY_ACTIVE
    assert F.TARGET_RAN not in loaded


def test_the_destination_of_a_precopy() -> None:
    log = arrive(("setup", "inmigrate"), ("active", "inmigrate"), ("completed", "inmigrate"))
    assert F.ALL_SENT not in log
    log = arrive(("completed", "paused"), log=log)
    assert F.LOADED in log
    assert destination_status(log) is S.COMPLETED


@pytest.mark.proves("S37")
def test_the_destination_of_a_postcopy_that_breaks_and_heals() -> None:
    log = place()
    for word in ("setup", "active", "postcopy-device", "postcopy-active", "postcopy-paused",
                 "postcopy-recover-setup", "postcopy-recover", "postcopy-paused", "postcopy-recover",
                 "postcopy-active", "completed"):  # fmt: skip
        state = "inmigrate" if word in ("setup", "active", "postcopy-device") else "running"
        log = arrive((word, state), log=log)
        assert destination_status(log) is S(word), word
    assert log.last_round(F.LINK_LOST) == 2


@pytest.mark.proves("S37", "S66")
def test_a_destination_that_has_loaded_needs_no_run_state_to_be_understood() -> None:
    """A QEMU whose main loop waits for a page says its events and answers no question."""
    log = arrive(("postcopy-active", None))
    assert F.LOADED not in log
    log = arrive(("postcopy-paused", None), log=arrive(("postcopy-active", "running")))
    assert open_round(log) == 1
    assert waits_for_channel(log)
    assert not waits_for_channel(arrive(("postcopy-recover", None), log=log))
    again = arrive(("postcopy-recover", None), ("postcopy-paused", None), ("postcopy-paused", "running"), log=log)
    assert (open_round(again), waits_for_channel(again)) == (2, True)
    healed = arrive(("postcopy-recover", None), ("postcopy-active", None), log=log)
    assert (open_round(healed), waits_for_channel(healed)) == (0, False)
    assert F.ALL_SENT in arrive(("completed", None), log=healed)


@pytest.mark.parametrize(
    "word", ["postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "completed"]
)
def test_an_agent_that_comes_late_shows_what_the_destination_says(word: str) -> None:
    assert destination_status(arrive((word, "paused"))) is S(word)


@pytest.mark.proves("S44")
def test_a_running_destination_has_run() -> None:
    log = arrive(("completed", "running"))
    assert F.TARGET_RAN in log
    assert derive_destination(log).because == (F.ALL_SENT,)


def test_words_of_the_destination_that_nobody_has_heard_of_are_counted() -> None:
    assert arrive(("multiplying", None), ("dividing", None)).last_round(F.UNKNOWN_STATUS) == 2


@pytest.mark.proves("S26", "S59")
def test_completed_proves_nothing_of_the_destination_where_a_stand_in_took_the_stream() -> None:
    paused = hear("postcopy-active", "postcopy-paused")
    led_out = hear("completed", log=paused.with_fact(F.STAND_IN))
    assert F.ALL_SENT not in led_out
    assert F.PEER_ACK not in led_out
    told = tell(led_out, arrival(led_out))  # its agent says that the guest runs there with every page
    assert {F.ALL_SENT, F.PEER_ACK} <= {entry.fact for entry in told}
    assert source_status(told.with_fact(F.RUN_ACKED)) is S.COMPLETED
    assert hear("completed", log=paused) == tell(paused, arrival(paused))


# --- mirrors of disks ------------------------------------------------------------------------------------


def mirrors(*words: tuple[str | None, str], paused: bool = False) -> list[tuple[Fact, int]]:
    log = hear("active", "pre-switchover") if paused else started()
    told = [(n, f"disk{n - 1}", status, error) for n, (status, error) in enumerate(words, start=1)]
    return [(fact, round_no) for fact, round_no, _ in mirror_findings(told, log)]


@pytest.mark.proves("S96", "S114")
@pytest.mark.parametrize("status", ["waiting", "pending"])
def test_a_mirror_that_somebody_asked_to_end_while_the_guest_runs_is_a_failure(status: str) -> None:
    """1. somebody completes it  2. it is pending  3. the guest is paused, and the mirror let go: the guest would be
    pivoted onto the copy, over the network."""
    assert mirrors((status, ""), ("ready", "")) == [(F.DISK_FAILED, 0), (F.DISK_READY, 2)]
    ((_, _, text),) = mirror_findings([(1, "disk0 (/d)", status, "")], hear("active"))
    assert text == "disk0 (/d): somebody asked its mirror to end"


def test_all_mirrors_must_be_ready() -> None:
    assert mirrors(("created", ""), ("running", "")) == []
    assert mirrors(("ready", ""), ("running", "")) == [(F.DISK_READY, 1)]
    assert mirrors(("standby", ""), ("ready", "")) == [(F.DISK_READY, 1), (F.DISK_READY, 2), (F.DISKS_READY, 0)]
    assert (F.DISKS_READY, 0) in mirrors(("waiting", ""), ("pending", ""), paused=True)


def test_an_end_without_an_error_is_a_proof_only_while_the_guest_is_paused() -> None:
    assert mirrors(("concluded", ""), ("concluded", ""), paused=True) == [(F.DISKS_READY, 0), (F.DISKS_DRAINED, 0)]
    assert mirrors(("concluded", ""), ("pending", ""), paused=True) == [(F.DISK_READY, 2), (F.DISKS_READY, 0)]
    assert mirrors(("concluded", ""), ("ready", "")) == [(F.DISK_FAILED, 0), (F.DISK_READY, 2)]


@pytest.mark.parametrize("status", [None, "null", "aborting"])
def test_a_mirror_that_is_gone_or_given_up_is_a_failure(status: str | None) -> None:
    assert mirrors((status, ""), ("ready", ""), paused=True) == [(F.DISK_FAILED, 0), (F.DISK_READY, 2)]


def test_the_failure_names_the_disk_and_the_reason() -> None:
    ((fact, _, text),) = mirror_findings([(1, "disk0 (/d)", "concluded", "No space left on device")], hear("active"))
    assert (fact, text) == (F.DISK_FAILED, "disk0 (/d): No space left on device")
