"""Which guests would lose writes, and what follows from it."""

from __future__ import annotations

import pytest

from vmferry.core import hazards
from vmferry.core.options import Mode
from vmferry.units import MIB

OLD, NEW = (7, 2, 22), (11, 1, 2)


@pytest.mark.parametrize(
    ("accelerator", "version", "memory_bytes", "loses"),
    [
        ("tcg", OLD, 256 * MIB, True),
        ("tcg", OLD, 256 * MIB + 8192, False),
        ("tcg", NEW, 256 * MIB, False),
        ("kvm", OLD, 256 * MIB, False),
        ("tcg", None, 256 * MIB, False),
        ("tcg", OLD, None, False),
        (None, OLD, 256 * MIB, False),
    ],
)
def test_old_qemus_lose_writes_of_tcg_guests_with_memory_in_whole_steps(
    accelerator: str | None, version: tuple[int, int, int] | None, memory_bytes: int | None, loses: bool
) -> None:
    assert hazards.precopy_loses_writes(accelerator, version, memory_bytes) is loses


@pytest.mark.parametrize(
    ("mode", "accelerator", "version", "stops"),
    [
        (Mode.POSTCOPY, "tcg", NEW, True),
        (Mode.POSTCOPY, "tcg", None, True),  # not known: the careful answer
        (Mode.POSTCOPY, "tcg", OLD, False),
        (Mode.POSTCOPY, "kvm", NEW, False),
        (Mode.PRECOPY, "tcg", NEW, False),
    ],
)
def test_newer_ones_lose_them_while_postcopy_stands_by(
    mode: Mode, accelerator: str, version: tuple[int, int, int] | None, stops: bool
) -> None:
    assert hazards.stops_first(mode, accelerator, version) is stops


@pytest.mark.parametrize(
    ("version", "goes_back"), [(None, True), ((7, 2, 22), False), ((10, 1, 9), False), ((10, 2, 0), True), (NEW, True)]
)
def test_newer_ones_go_back_from_the_end_of_a_postcopy(version: tuple[int, int, int] | None, goes_back: bool) -> None:
    assert hazards.goes_back_after_grant(version) is goes_back


@pytest.mark.parametrize(
    ("version", "waits"), [(None, True), ((7, 2, 22), True), ((8, 1, 9), True), ((8, 2, 0), False), (NEW, False)]
)
def test_older_ones_wait_for_ever_after_their_last_page(version: tuple[int, int, int] | None, waits: bool) -> None:
    assert hazards.waits_for_ever_after_last_page(version) is waits


@pytest.mark.parametrize(
    ("version", "dies"), [(None, True), ((7, 2, 22), True), ((8, 1, 9), True), ((8, 2, 0), False), (NEW, False)]
)
def test_older_ones_die_of_a_recovery_that_breaks_off(version: tuple[int, int, int] | None, dies: bool) -> None:
    assert hazards.dies_of_broken_recovery(version) is dies


def test_a_background_snapshot_is_taken_where_a_break_was_seen_to_do_no_harm() -> None:
    assert hazards.hangs_after_broken_background(None), "not known: the careful answer"
    assert hazards.hangs_after_broken_background(OLD)
    assert hazards.hangs_after_broken_background((10, 2, 0))
    assert not hazards.hangs_after_broken_background(NEW)
