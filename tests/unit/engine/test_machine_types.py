"""What machine types say about the wire."""

from __future__ import annotations

import pytest

from vmferry.engine import machine_types as m


@pytest.mark.parametrize(
    ("machine", "version"),
    [
        ("pc-i440fx-7.2", (7, 2)),
        ("pc-q35-11.1", (11, 1)),
        ("pc-i440fx-2.12", (2, 12)),
        ("pc-i440fx-rhel7.6.0", m.NEWEST),
        ("s390-ccw-virtio-9.2.1", (9, 2)),
        ("pc", m.NEWEST),
        ("microvm", m.NEWEST),
        ("", m.NEWEST),
    ],
)
def test_the_version_is_at_the_end_of_the_name(machine: str, version: tuple[int, int]) -> None:
    assert m.version_of(machine) == version


@pytest.mark.parametrize(
    ("question", "last_with", "first_without"),
    [
        (m.has_flush_per_section, "8.0", "8.1"),
        (m.has_early_preempt, "7.2", "8.0"),
        (m.has_legacy_zero_pages, "8.2", "9.0"),
        (m.has_switchover_ack, "11.0", "11.1"),
    ],
)
def test_old_ways_end_with_a_version(question: object, last_with: str, first_without: str) -> None:
    assert callable(question)
    assert question(f"pc-q35-{last_with}")
    assert not question(f"pc-q35-{first_without}")
    assert not question("microvm")


def test_a_goodbye_is_wanted_since_10_0() -> None:
    assert [m.wants_multifd_goodbye(f"pc-q35-{each}") for each in ("9.2", "10.0")] == [False, True]


@pytest.mark.conforms("33")
def test_the_switchover_command_is_sent_only_to_who_surely_knows_it() -> None:
    """QEMU 7.2 has machine types without a version too, and ends at a command that it does not know."""
    machines = ["pc-q35-9.2", "pc-q35-10.0", "pc-q35-11.1", "microvm", ""]
    assert [m.has_switchover_start(each) for each in machines] == [False, True, True, False, False]
