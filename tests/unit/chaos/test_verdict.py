"""What was seen -> the verdict."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vmferry.chaos.cells import Cell, Fault
from vmferry.chaos.verdict import Seen, Verdict, judge, physics, wire

PAIR = ("7.2", "11.1")
CUT = Cell(Fault("cut", "link", ("both-ways", "1s")), "grant", "precopy", PAIR)
KILLED = Cell(Fault("kill", "source-qemu"), "active", "precopy", PAIR)


def seen(**changes: Any) -> Seen:
    good = Seen(
        CUT.name,
        injected=True,
        proof="ports are dead",
        running_on=["host-b"],
        makes_progress=True,
        wrong_pages=0,
        over=True,
        outcome="destination",
        qemus_left=1,
    )
    return dataclasses.replace(good, **changes)


def test_good() -> None:
    assert judge(CUT, seen()) == (Verdict.GOOD, "")
    assert judge(CUT, seen(taken=["vmferry recover g1 -> 0"]))[0] is Verdict.ACTED


@pytest.mark.parametrize(("ended_first", "verdict"), [(True, Verdict.PHYSICS), (False, Verdict.SURPRISE)])
def test_a_guest_that_died_when_its_job_was_over_is_not_the_jobs(ended_first: bool, verdict: Verdict) -> None:
    gone = seen(running_on=[], qemus_left=0, outcome="source", makes_progress=False, ended_first=ended_first)
    assert judge(KILLED, gone)[0] is verdict


def test_what_was_not_injected_does_not_count_whatever_else_is_so() -> None:
    assert judge(CUT, seen(injected=False, why_not="too late", overlap_ms=5.0)) == (Verdict.NOT_INJECTED, "too late")


@pytest.mark.parametrize(
    "changes",
    [{"overlap_ms": 3.0}, {"two_writers": "disk has two"}, {"running_on": ["host-a", "host-b"]}],
)
def test_double(changes: dict[str, Any]) -> None:
    assert judge(CUT, seen(**changes))[0] is Verdict.DOUBLE


@pytest.mark.parametrize(
    "changes",
    [
        {"wrong_pages": 1},
        {"letters": "pass 3 wrote 'B'"},
        {"outcome": "source"},
        {"over": False},
        {"left": ["host-b: process 1"]},
        {"troubles": ["Traceback"]},
        {"unlocked": ["g1-0.img"]},
        {"cancels": ["accepted"], "status": "completed"},
        {"cancels": ["refused: too late"], "status": "cancelled"},
    ],
)
def test_surprises(changes: dict[str, Any]) -> None:
    verdict, why = judge(CUT, seen(**changes))
    assert verdict is Verdict.SURPRISE
    assert why


def test_a_guest_that_stands_still() -> None:
    still = seen(running_on=[], makes_progress=False, over=False, outcome="held", row="B-stuck", action="think")
    verdict, why = judge(CUT, still)
    assert verdict is Verdict.STUCK
    assert "B-stuck" in why
    assert judge(CUT, dataclasses.replace(still, qemus_left=0))[0] is Verdict.LOST
    waits = judge(CUT, seen(makes_progress=False))
    assert waits[0] is Verdict.STUCK
    assert "its CPUs wait for pages" in waits[1]


def test_a_guest_whose_only_copy_died() -> None:
    gone = seen(running_on=[], makes_progress=False, qemus_left=0, outcome="lost")
    assert judge(KILLED, gone)[0] is Verdict.PHYSICS
    lie = judge(KILLED, dataclasses.replace(gone, outcome="source"))
    assert lie[0] is Verdict.SURPRISE
    assert "not told so" in lie[1]


def test_physics_excuses_only_what_it_must() -> None:
    device = Cell(Fault("kill", "source-qemu"), "device", "precopy", PAIR)
    assert physics(device, complete_there=False)
    assert physics(device, complete_there=True) == ""
    assert physics(CUT, complete_there=False) == ""
    for phase in ("setup", "active", "pre-switchover", "device", "grant"):
        assert physics(Cell(Fault("kill", "target-qemu"), phase, "precopy", PAIR), complete_there=False) == ""
    granted = Cell(Fault("kill", "target-qemu"), "granted", "precopy", PAIR)
    assert physics(granted, complete_there=True)


def test_the_wire_form_says_how_to_repeat_it() -> None:
    found = wire(CUT, seen(wall_s=1.234))
    assert found["cell"] == CUT.name
    assert (found["verdict"], found["wall_s"]) == ("good", 1.23)


def test_a_cancel_is_kept_or_refused() -> None:
    assert judge(CUT, seen(cancels=["refused: too late"], status="completed"))[0] is Verdict.GOOD
    cancelled = seen(cancels=["accepted", "accepted"], status="cancelled", outcome="source", running_on=["host-a"])
    assert judge(CUT, cancelled)[0] is Verdict.GOOD


def test_an_old_destination_does_not_live_through_a_recovery_that_breaks_off() -> None:
    for pair, why in ((("7.2", "7.2"), True), (("7.2", "11.1"), False)):
        cell = Cell(Fault("reset", "stream", ("1s",)), "postcopy-recover", "postcopy", pair)
        assert bool(physics(cell, complete_there=False)) is why
    link = Cell(Fault("reset", "link", ("1s",)), "postcopy-recover", "postcopy", ("7.2", "7.2"))
    assert physics(link, complete_there=False) == ""
    starting = Cell(Fault("kill", "target-qemu"), "starting", "precopy", PAIR)
    assert "nobody can know" in physics(starting, complete_there=True)
