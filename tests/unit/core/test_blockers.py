"""Blockers: who holds one, what it says, and which one a refusal cites."""

from __future__ import annotations

import pytest

from vmferry.core.blockers import (
    Blocker,
    Operation,
    first,
    held,
    of_arrival,
    of_migration,
    of_qemu,
    of_restore,
    of_save,
)


@pytest.mark.proves("S79")
@pytest.mark.parametrize(
    "blockers", [of_migration("b", "j1", 5.0), of_arrival("a", "j1", 5.0), of_save("nightly", "j1", 5.0)]
)
def test_a_migration_or_a_save_holds_one_against_every_operation_until_its_job_is_over(
    blockers: tuple[Blocker, ...],
) -> None:
    assert [one.operation for one in blockers] == list(Operation)
    for one in blockers:
        assert "j1" in one.reason
        assert (one.since_s, one.until, one.by_people) == (5.0, "the job j1 is concluded", False)


@pytest.mark.proves("S79")
def test_a_guest_that_lacks_memory_can_be_ended_and_nothing_else() -> None:
    """Its QEMU could neither send nor save it; to end it is the one way to give a restore up."""
    found = of_restore("monday", "j1", 5.0)
    assert [one.operation for one in found] == [each for each in Operation if each is not Operation.STOP]
    assert "monday" in found[0].reason


@pytest.mark.proves("S79")
def test_qemus_reasons_join_the_list() -> None:
    (one,) = of_qemu(["it has a device that cannot move"])
    assert (one.operation, one.name, one.reason) == (Operation.MIGRATE, "QEMU", "it has a device that cannot move")
    assert one.since_s is None
    assert of_qemu([]) == ()


@pytest.mark.proves("S79")
def test_a_refusal_cites_one_of_its_operation() -> None:
    mine = held(Operation.STOP, "backup", "it is copied", 1.0)
    assert first((mine, *of_migration("b", "j1", 5.0)), Operation.STOP) is mine
    assert first((mine,), Operation.MIGRATE) is None
    assert mine.to_wire() == {
        "operation": "stop",
        "name": "backup",
        "reason": "it is copied",
        "since_s": 1.0,
        "until": "it is removed by its name",
        "by_people": True,
    }
