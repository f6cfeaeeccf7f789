"""What the two guests of chaos runs say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.chaos.guest import Boot, Linux


def line(words: str) -> bytes:
    raw = words.encode()
    return raw + b" %02x\n" % (sum(raw) % 256)


def ticks(first: int, last: int) -> bytes:
    return b"".join(line(f"T {seq} {seq * 10_000} 0") for seq in range(first, last + 1))


READY = line("READY 1 0000-11 tick_ms=10")
CHECKED = line("W memory 1") + line("W disk 1")


@pytest.fixture
def linux() -> Linux:
    return Linux.__new__(Linux)  # its files are of no interest here


def test_linux_has_booted_when_it_has_checked_everything_once(linux: Linux) -> None:
    assert not linux.has_booted([READY + ticks(1, 3), b""])
    assert not linux.has_booted([READY + ticks(1, 3) + line("W memory 1"), b""])
    assert linux.has_booted([READY + ticks(1, 3) + CHECKED, b""])


def test_one_life_on_two_sides_has_nothing_to_complain_of(linux: Linux) -> None:
    here = READY + ticks(1, 5) + CHECKED + ticks(6, 7)[:-7]
    there = ticks(7, 7)[-7:] + ticks(8, 9) + line("W memory 2") + line("W disk 2")
    assert linux.complaint([here, there]) == ""
    assert linux.progress([there]) == 1


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (ticks(9, 12), "1 ticks were lost"),
        (ticks(6, 9), "2 ticks came twice; the guest ran on both sides"),
        (ticks(8, 9) + line("E memory 5"), "1 memory errors"),
        (ticks(8, 9) + line("E disk 5"), "1 disk errors"),
        (ticks(8, 9) + b"Kernel panic - not syncing\n", "panicked"),
    ],
)
def test_what_is_wrong_with_a_life_is_said(linux: Linux, there: bytes, words: str) -> None:
    assert words in linux.complaint([READY + ticks(1, 7), there])


def test_the_boot_sector_counts_letters_on_both_sides(tmp_path: Path) -> None:
    boot = Boot(tmp_path, tmp_path, "g1")
    assert [disk.exists() for disk in boot.files.disks] == [True, True]
    assert str(boot.files.disks[0]) in boot.files.spec.read_text()
    assert not boot.has_booted([b"AB", b""])
    assert boot.has_booted([b"ABC", b""])
    assert boot.progress([b"ABC", b"DE"]) == 5
    assert boot.complaint([b"ABC", b"DE"]) == ""
    assert boot.complaint([b"ABC", b"CD"]) != ""
