"""The 17 statuses: complete, spelled as QEMU spells them, each with its words for people."""

from __future__ import annotations

import pytest

from vmferry.core import migration_status
from vmferry.core.migration_status import (
    COARSE_DOCS,
    TERMINAL,
    Coarse,
    MigrationStatus,
    coarse,
    docs_markdown,
    libvirt_job_status,
    meaning,
    parse_status,
)

QEMU_11_1 = {
    "none", "setup", "cancelling", "cancelled", "active", "postcopy-device", "postcopy-active",
    "postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "completed", "failed", "failing", "colo",
    "pre-switchover", "device", "wait-unplug",
}  # fmt: skip


def test_the_17_values_of_qemu_11_1_and_no_other() -> None:
    assert {status.value for status in MigrationStatus} == QEMU_11_1
    assert len(MigrationStatus) == 17


@pytest.mark.parametrize("status", MigrationStatus)
def test_every_status_is_named_for_everybody(status: MigrationStatus) -> None:
    assert parse_status(status.value) is status
    assert coarse(status) in COARSE_DOCS
    assert libvirt_job_status(status)
    assert meaning(status)
    assert f"| `{status}` | {coarse(status)} |" in docs_markdown()


def test_an_unknown_word_is_unknown() -> None:
    assert parse_status("multiplying") is None


@pytest.mark.proves("S116")
def test_nine_coarse_words_and_each_is_used_and_documented() -> None:
    assert {coarse(status) for status in MigrationStatus} == set(Coarse)
    assert all(text in docs_markdown() for text in COARSE_DOCS.values())


@pytest.mark.proves("S7")
@pytest.mark.parametrize(
    ("status", "libvirt"),
    [
        ("none", "none"), ("setup", "active"), ("active", "active"), ("wait-unplug", "active"),
        ("pre-switchover", "paused"), ("device", "migrating"), ("postcopy-active", "postcopy"),
        ("postcopy-paused", "postcopy-paused"), ("postcopy-recover", "postcopy"), ("failed", "failed"),
        ("cancelled", "canceled"), ("completed", "hypervisor-completed"),
    ],
)  # fmt: skip
def test_the_libvirt_column_follows_libvirts_switch(status: str, libvirt: str) -> None:
    assert libvirt_job_status(MigrationStatus(status)) == libvirt


def test_terminal_statuses_are_those_with_nothing_at_work() -> None:
    finished = {Coarse.IDLE, Coarse.DONE, Coarse.FAILED, Coarse.CANCELLED}
    assert {status for status in MigrationStatus if coarse(status) in finished} == TERMINAL
    assert migration_status.TERMINAL is TERMINAL
