"""The boot-sector guest: its shape and its letters. That it runs is shown in tests/real/test_guests.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.testing.bootsector import LogError, boot_sector, count_passes, write_image

CYCLE = b"BCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.mark.parametrize("delay_loops", [0, 1, 1_000_000])
def test_a_sector_is_bootable_and_leaves_the_partition_table_alone(delay_loops: int) -> None:
    sector = boot_sector(ram_mib=64, delay_loops_per_page=delay_loops)
    assert len(sector) == 512
    assert sector[-2:] == b"\x55\xaa"
    assert not any(sector[446:510])


def test_an_image_has_the_asked_size(tmp_path: Path) -> None:
    image = tmp_path / "boot.img"
    write_image(image, ram_mib=16, size_bytes=1440 * 1024)
    assert image.stat().st_size == 1440 * 1024
    assert image.read_bytes()[:512] == boot_sector(ram_mib=16)


def test_passes_are_counted_over_the_end_of_the_alphabet() -> None:
    assert count_passes(b"") == 0
    assert count_passes(b"\r\nseabios") == 0
    assert count_passes(b"A") == 0
    assert count_passes(b"A" + CYCLE + CYCLE + b"BC") == 52


@pytest.mark.parametrize("wrong", [b"ABD", b"ABB", b"ABCA", b"AZ"])
def test_lost_doubled_and_restarted_output_is_refused(wrong: bytes) -> None:
    with pytest.raises(LogError):
        count_passes(wrong)
