"""What people and scripts are told: numbers, timeline, the error at the end, one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vmferry.core.destination_rows import DESTINATION_ROWS
from vmferry.core.facts import Fact, FactLog
from vmferry.core.report import Measured, ending_error, job_wire, place_wire, sentence, timeline
from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Outcome, Row
from vmferry.errors import (
    GuestHeld,
    GuestLost,
    MigrationCancelled,
    MigrationFailed,
    PlanRefused,
    Uncertain,
    VmferryError,
)

F = Fact
ROWS = {row.label: row for row in SOURCE_ROWS}


def log_of(*facts: Fact) -> FactLog:
    log = FactLog()
    for number, fact in enumerate(facts):
        log = log.with_fact(fact, at_s=100.0 + number, text="disk is full" if fact is F.ERROR else "", by="agent")
    return log


def wire(outcome: Outcome, log: FactLog | None = None, *, over: bool = True, **changes: Any) -> dict[str, Any]:
    measured = changes.pop("measured", Measured(started_s=100.0))
    row: Row[Any] | None = changes.pop("row", ROWS["B-clean"])
    given: dict[str, Any] = {"cause": None, **changes}
    return job_wire(
        job="j1", vm="web1", source="host-a", destination="host-b", mode="precopy",
        log=log or log_of(F.MIGRATE), row=row, outcome=outcome, measured=measured, over=over, **given,
    )  # fmt: skip


@pytest.mark.proves("S43")
def test_the_downtime_is_from_stop_to_resume_and_only_when_both_are_known() -> None:
    assert Measured(stop_s=1.0, resume_s=1.0125).downtime_ms == 12.5
    assert Measured(stop_s=1.0).downtime_ms is None
    assert Measured(resume_s=1.0).downtime_ms is None
    assert Measured(started_s=1.0, ended_s=3.5).total_ms == 2500
    assert Measured(started_s=1.0).total_ms is None


@pytest.mark.proves("S2", "S3", "S20")
def test_the_timeline_has_facts_and_marks_in_the_order_of_time_and_the_status_where_it_changed() -> None:
    measured = Measured(started_s=100.0, marks=[(101.5, "STOP on the source")])
    rows = timeline(log_of(F.MIGRATE, F.PLANNED, F.ERROR), measured)
    assert rows == [
        {"at_ms": 0.0, "what": "migrate", "by": "agent", "status": "setup"},
        {"at_ms": 1000.0, "what": "planned", "by": "agent"},
        {"at_ms": 1500.0, "what": "STOP on the source"},
        {"at_ms": 2000.0, "what": "error", "text": "disk is full", "by": "agent", "status": "failing"},
    ]
    assert timeline(FactLog().with_fact(F.PLANNED), Measured()) == [{"at_ms": 0.0, "what": "planned", "status": "none"}]


@pytest.mark.parametrize(
    ("outcome", "cls", "guest"),
    [
        (Outcome.UNCERTAIN, Uncertain, "unknown"),
        (Outcome.HELD, GuestHeld, "paused"),
        (Outcome.DEGRADED, GuestHeld, "running-on-destination"),
        (Outcome.LOST, GuestLost, "lost"),
    ],
)
def test_an_outcome_that_is_not_settled_is_an_error_of_its_own(
    outcome: Outcome, cls: type[VmferryError], guest: str
) -> None:
    cause = MigrationFailed("the link broke").to_wire()
    error = ending_error(log_of(F.MIGRATE), outcome, cause=cause)
    assert type(error) is cls
    assert error.guest == guest
    assert error.cause == cause


def test_a_guest_that_arrived_is_no_error() -> None:
    assert ending_error(log_of(F.MIGRATE, F.CANCEL, F.ERROR), Outcome.DESTINATION, cause=None) is None


@pytest.mark.proves("S14", "S15")
def test_a_cancel_is_told_as_cancelled_with_the_error_that_came_before_it() -> None:
    cause = MigrationFailed("disk is full").to_wire()
    before = ending_error(log_of(F.MIGRATE, F.ERROR, F.CANCEL), Outcome.SOURCE, cause=cause)
    assert isinstance(before, MigrationCancelled)
    assert before.cause == cause
    after = ending_error(log_of(F.MIGRATE, F.CANCEL, F.ERROR), Outcome.SOURCE, cause=cause)
    assert isinstance(after, MigrationCancelled)
    assert after.cause is None
    alone = ending_error(log_of(F.MIGRATE, F.CANCEL), Outcome.SOURCE, cause=None)
    assert isinstance(alone, MigrationCancelled)


def test_a_failure_is_told_by_the_error_that_made_the_attempt_turn_back() -> None:
    log = log_of(F.MIGRATE, F.ERROR)
    refused = ending_error(log, Outcome.SOURCE, cause=PlanRefused("no room").to_wire())
    assert isinstance(refused, PlanRefused)
    unknown = ending_error(log, Outcome.SOURCE, cause={"code": "from-the-future", "message": "odd"})
    assert isinstance(unknown, MigrationFailed)
    assert unknown.message == "odd"
    seen = ending_error(log, Outcome.SOURCE, cause=None)
    assert isinstance(seen, MigrationFailed)
    assert seen.message == "disk is full"
    assert ending_error(log_of(F.MIGRATE), Outcome.PENDING, cause=None) is None


@pytest.mark.proves("S8")
def test_the_wire_form_has_the_fine_status_the_coarse_one_and_why() -> None:
    shown = wire(Outcome.PENDING, log_of(F.MIGRATE, F.SETUP_DONE), over=False, row=ROWS["M-memory"])
    assert (shown["status"], shown["coarse"], shown["because"]) == ("active", "moving", ["setup-done"])
    assert (shown["row"], shown["error"]) == ("M-memory", None)
    assert shown["sentence"] == "web1 moves from host-a to host-b: active."
    assert "trouble" not in shown
    assert json.loads(json.dumps(shown)) == shown


@pytest.mark.proves("S90")
def test_a_wait_for_devices_is_shown_from_the_first_page_to_the_switchover() -> None:
    told = {}
    for facts in ((), (F.SETUP_DONE,), (F.SETUP_DONE, F.DEVICES_READY)):
        shown = wire(Outcome.PENDING, log_of(F.MIGRATE, F.SWITCHOVER_ACK, *facts), over=False)
        told[len(facts)] = (shown["waits_for_devices"], "devices on host-b are ready" in shown["sentence"])
    assert told == {0: (False, False), 1: (True, True), 2: (False, False)}
    asked = log_of(F.MIGRATE, F.SWITCHOVER_ACK, F.SETUP_DONE, F.ERROR)
    assert wire(Outcome.SOURCE, asked, over=True)["waits_for_devices"] is False
    assert wire(Outcome.PENDING, log_of(F.MIGRATE, F.SETUP_DONE), over=False)["waits_for_devices"] is False


def test_a_trouble_that_is_tried_again_is_shown() -> None:
    assert wire(Outcome.PENDING, over=False, trouble="the disk is full")["trouble"] == "the disk is full"


def test_without_a_row_there_is_no_reason_and_no_action() -> None:
    shown = wire(Outcome.DESTINATION, row=None)
    assert (shown["row"], shown["why"], shown["action"]) == (None, "", "")


def test_the_action_of_the_row_is_the_hint_unless_the_error_has_a_better_one() -> None:
    died = wire(Outcome.LOST, row=ROWS["G-died"])
    assert died["error"]["hint"] == ROWS["G-died"].action
    hinted = wire(Outcome.SOURCE, row=ROWS["G-died"], cause=PlanRefused("no", hint="free a disk").to_wire())
    assert hinted["error"]["hint"] == "free a disk"
    going_on = wire(Outcome.UNCERTAIN, over=False, row=ROWS["G-uncertain"])
    # Who waits no longer is told this error: the next action belongs to it before the end, too.
    assert going_on["error"]["hint"] == ROWS["G-uncertain"].action


def test_a_pending_attempt_has_an_error_only_when_it_is_over() -> None:
    log = log_of(F.MIGRATE, F.ERROR)
    assert wire(Outcome.PENDING, log, over=False)["error"] is None
    assert wire(Outcome.PENDING, log, over=True)["error"]["message"] == "disk is full"


NUMBERS = Measured(started_s=100.0, ended_s=101.5, stop_s=101.0, resume_s=101.0125)


@pytest.mark.proves("S33")
@pytest.mark.parametrize(
    ("outcome", "row", "parts"),
    [
        (Outcome.DESTINATION, "G-ran-clean", ("web1 runs on host-b (precopy", "12.5 ms", "1.50 s in all")),
        (Outcome.SOURCE, "B-clean", ("web1", "host-a", "as before")),
        (Outcome.PENDING, "M-memory", ("web1 moves from host-a to host-b: ",)),
        (Outcome.UNCERTAIN, "G-uncertain", ("UNCERTAIN: host-b may run web1", "host-a stays paused", "Next: ")),
        (Outcome.HELD, "B-stuck", ("web1 is whole and paused: ", "Next: ")),
        (Outcome.DEGRADED, "G-ran-broken", ("without some of its memory", "Next: ")),
        (Outcome.LOST, "G-died", ("web1 is lost: ", "Next: restart the guest from its disks")),
        (Outcome.LOST, "F-back-nothing", ("web1 is lost: ", "Next: restart it from its disks")),
    ],
)
def test_one_sentence_says_where_the_guest_is_and_what_is_next(
    outcome: Outcome, row: str, parts: tuple[str, ...]
) -> None:
    shown = wire(outcome, row=ROWS[row], measured=NUMBERS)
    assert shown["sentence"] == sentence(shown)
    for part in parts:
        assert part in shown["sentence"]


def test_the_sentence_names_the_error_and_leaves_out_what_was_not_measured() -> None:
    failed = wire(Outcome.SOURCE, log_of(F.MIGRATE, F.ERROR))
    assert "disk is full" in failed["sentence"]
    assert "()" not in wire(Outcome.DESTINATION)["sentence"]
    assert "paused for" not in wire(Outcome.DESTINATION)["sentence"]


# --- what the destination alone can say ------------------------------------------------------------------


def told_there(label: str, *facts: Fact) -> dict[str, Any]:
    row = next(row for row in DESTINATION_ROWS if row.label == label)
    return place_wire(
        job="j1", vm="web1", source="host-a", destination="host-b", log=log_of(*facts), row=row, error=None, over=False
    )  # fmt: skip


def test_the_destination_says_the_same_names_as_the_source() -> None:
    there = told_there("D-load", F.PREPARE, F.LISTENING, F.HEADER_SEEN)
    assert set(there) == set(wire(Outcome.PENDING, over=False))
    json.dumps(there)
    assert (there["status"], there["coarse"], there["row"], there["outcome"]) == (
        "active", "moving", "D-load", "pending",
    )  # fmt: skip
    assert [(row["at_ms"], row["what"], row.get("status")) for row in there["timeline"]] == [
        (0.0, "prepare", "none"), (1000.0, "listening", "setup"), (2000.0, "header-seen", "active"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "begins", "ends"),
    [
        ("D-load", "host-b awaits web1; the agent of host-a does not answer", "bring the agent of host-a back"),
        ("D-wait-grant", "host-b awaits web1; the agent of host-a", "the source decides, and this side waits for it."),
        ("D-ran", "web1 runs on host-b; the agent of host-a does not answer", "it conducts the migration."),
    ],
)
def test_the_destinations_sentence_says_where_the_guest_is_and_what_is_next(label: str, begins: str, ends: str) -> None:
    text = told_there(label)["sentence"]
    assert text.startswith(begins)
    assert ends in text


def test_counters_are_taken_over_as_far_as_qemu_tells() -> None:
    measured = Measured()
    measured.count({"status": "setup"})
    assert (measured.transferred_bytes, measured.throttle_percent, measured.remaining_by_source) == (None, 0, {})
    ram = {
        "transferred": 7,
        "total": 9,
        "remaining": 2,
        "normal": 1,
        "duplicate": 3,
        "mbps": 1.5,
        "dirty-sync-count": 4,
    }
    more = {"cpu-throttle-percentage": 20, "vfio": {"remaining": 5}, "disk": {}, "setup-time": 6, "downtime": 8}
    measured.count({"ram": ram, **more})
    assert (measured.transferred_bytes, measured.total_bytes, measured.remaining_bytes) == (7, 9, 2)
    assert (measured.normal_pages, measured.zero_pages, measured.mbps, measured.passes) == (1, 3, 1.5, 4)
    assert (measured.throttle_percent, measured.remaining_by_source) == (20, {"ram": 2, "vfio": 5})
    assert (measured.setup_ms, measured.qemu_downtime_ms) == (6.0, 8.0)
    measured.count({"ram": {"transferred": 8}})
    assert measured.passes == 4, "what is not told again stays"
