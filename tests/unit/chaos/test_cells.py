"""Which runs there are."""

from __future__ import annotations

import pytest

from vmferry.chaos import cells
from vmferry.chaos.cells import ACTORS, LENGTHS, MESSAGE_FAULTS, MESSAGES, MODES, PHASES, PHASES_OF, WIRES, Cell, Fault
from vmferry.core.migration_status import MigrationStatus

PAIRS = [("7.2", "7.2"), ("11.1", "11.1"), ("7.2", "11.1")]
EVERY = cells.matrix(PAIRS)
CORE = cells.matrix(PAIRS, core=True)


def test_names_are_unique_and_find_their_cell() -> None:
    names = [cell.name for cell in EVERY]
    assert len(set(names)) == len(names)
    assert [cell.name for cell in cells.select(EVERY, names[7])] == [names[7]]


def test_the_core_is_a_part_that_has_every_fault_in_every_mode() -> None:
    assert set(CORE) < set(EVERY)
    left_out = {(c.fault.kind, c.mode) for c in EVERY} - {(c.fault.kind, c.mode) for c in CORE}
    assert left_out == set()
    assert {c.pair for c in CORE} == set(PAIRS)


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize("mode", MODES)
def test_everybody_is_killed_in_every_phase(actor: str, mode: str) -> None:
    for which in (EVERY, CORE):
        found = {c.phase for c in which if c.fault == Fault("kill", actor) and c.mode == mode}
        turned = {"cancelling", "cancelled", "failing", "failed"}
        nobody_there = {"source-qemu": {"completed"}, "target-qemu": turned, "cli": {"cancelled", "failed"}}
        assert found == set(PHASES_OF[mode]) - nobody_there.get(actor, set())


def test_every_message_and_every_wire_is_there() -> None:
    for message in MESSAGES:
        found = {c.fault.more[0] for c in EVERY if c.fault.kind == "message" and c.fault.what == message}
        news = {"drop-answer", "delay-answer", "duplicate-answer"}
        assert found == (news if message == "news" else set(MESSAGE_FAULTS))
    for wire in WIRES:
        assert {c.fault.more[1] for c in EVERY if c.fault.kind == "cut" and c.fault.what == wire} == set(LENGTHS)


def test_phases_are_public_statuses_or_marked_moments() -> None:
    words = {status.value for status in MigrationStatus}
    assert all(status in words for status in PHASES.values() if status)
    assert all(status in ("", phase) for phase, status in PHASES.items())
    assert {phase for mode in MODES for phase in PHASES_OF[mode]} == set(PHASES)


def test_cells_of_one_ground_run_together() -> None:
    grounds = cells.by_ground(EVERY)
    assert sum(len(found) for found in grounds.values()) == len(EVERY)
    storages = {storage for _, storage in grounds}
    assert storages == {"shared", "own", "small"}
    own = Cell(Fault("lock", "one", ("target",)), "device", "precopy", PAIRS[0])
    assert own.ground == (PAIRS[0], "own")


def test_the_core_has_a_cancel_in_every_phase_that_is_no_end() -> None:
    for mode in MODES:
        found = {c.phase for c in CORE if c.fault == Fault("cancel", "once") and c.mode == mode}
        assert found == set(PHASES_OF[mode]) - set(cells.ENDS)
    both = {(c.fault.what, c.phase) for c in CORE if c.fault.kind == "cancel" and c.fault.what.endswith("reset")}
    assert {("then-reset", "device"), ("after-reset", "postcopy-device")} <= both


def test_the_guest_that_checks_itself_is_in_the_core_in_both_modes() -> None:
    linux = [c for c in CORE if c.guest == "linux"]
    assert {c.mode for c in linux} == set(MODES)
    assert {c.fault.kind for c in linux} == {"kill", "reset", "lock"}
    assert {c.fault.what for c in linux if c.fault.kind == "kill"} == set(ACTORS)
    assert all(c.name.endswith("/linux") for c in linux)


def test_what_depends_on_the_qemus_is_there_with_every_pair() -> None:
    for fault, phase in (
        (Fault("lock", "all", ("target",)), "device"),
        (Fault("message", "peer-recovering", ("drop-answer",)), "postcopy-paused"),
        (Fault("reset", "both", ("1s",)), "last"),
    ):
        found = {c.pair for c in CORE if c.fault == fault and c.phase == phase and c.guest == "boot"}
        assert found == set(PAIRS), fault


def test_cells_that_cannot_be_are_left_out() -> None:
    old = [c for c in EVERY if (c.phase, c.mode) == ("loaded", "postcopy")]
    assert {c.pair for c in old} == {("11.1", "11.1")}
    late = [c for c in EVERY if "and-reset" in c.fault.more]
    assert {c.pair[1] for c in late} == {"11.1"}


def test_patterns() -> None:
    assert cells.select(EVERY, "") == EVERY
    assert all("kill-cli/" in c.name for c in cells.select(EVERY, "kill-cli/"))
    both = cells.select(EVERY, "kill-cli/,kill-*/setup/precopy/7.2-7.2,")
    assert {c.fault.name for c in both} > {"kill-cli"}
    assert all("kill-cli/" in c.name or c.name.endswith("setup/precopy/7.2-7.2") for c in both)
    found = cells.select(EVERY, "kill-*/setup/precopy/7.2-7.2")
    assert {c.fault.what for c in found} == set(ACTORS)
