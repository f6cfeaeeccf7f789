"""The guest of a chaos run, seen from outside: the boot-sector guest, its letters, and every page that it wrote.

After k letters each page from 1 MiB to the end of what it works with begins with the byte k, or k + 1 where the pass
that is under way has been already, and all else in these pages is zero. So a page that a migration lost, or brought
in an older form, shows in one look at memory, at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmferry.testing import bootsector

MIB = 1 << 20
RAM_MIB = 8
"""What it works with: memory from 1 MiB on."""
MEMORY_MIB = 24
DELAY_LOOPS = 3_000
"""Per page; one pass then takes some tens of milliseconds under TCG."""
DISK_BYTES = MIB


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """The spec and the disks of one guest."""

    name: str
    spec: Path
    disks: tuple[Path, ...]


def make(folder: Path, disks: Path, name: str) -> GuestFiles:
    """Writes the files. Two disks: the one that it boots from and one more."""
    first, second = disks / f"{name}-0.img", disks / f"{name}-1.img"
    bootsector.write_image(first, ram_mib=RAM_MIB, delay_loops_per_page=DELAY_LOOPS, size_bytes=DISK_BYTES)
    with second.open("wb") as image:
        image.truncate(DISK_BYTES)
    spec = folder / f"{name}.toml"
    spec.write_text(
        f'name = "{name}"\nmemory = "{MEMORY_MIB}M"\naccel = "tcg"\n'
        f'[[disk]]\npath = "{first}"\nboot = 0\n[[disk]]\npath = "{second}"\n'
    )
    return GuestFiles(name, spec, (first, second))


def passes(logs: bytes) -> tuple[int, str]:
    """Whole passes that the joined letters tell of, and what is wrong with them ("" for nothing)."""
    try:
        return bootsector.count_passes(logs), ""
    except bootsector.LogError as error:
        return 0, str(error)


def wrong_pages(memory: bytes, passes_before: int, passes_after: int) -> int:
    """How many pages hold what they cannot hold. `memory` is what lies from 1 MiB on, read while the guest made its
    way from so many passes to so many."""
    allowed = {count % 256 for count in range(passes_before, passes_after + 2)}
    wrong = 0
    rest = bytes(bootsector.PAGE_BYTES - 1)
    for at in range(0, len(memory), bootsector.PAGE_BYTES):
        page = memory[at : at + bootsector.PAGE_BYTES]
        wrong += page[0] not in allowed or page[1:] != rest
    return wrong
