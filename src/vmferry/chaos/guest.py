"""The guests of chaos runs, each with its own witness of what became of it.

`Boot` is the boot sector: it starts at once, and every page that it works with can be looked at from outside. `Linux`
takes seconds to start and checks itself: its memory, its disk and its clock, all the time (guest/watcher.h); what it
says on both sides must be the words of one life.

Rule 1: what is asked here is read from serial logs and from memory only. No agent's word counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from vmferry.testing import bootsector, linux_guest
from vmferry.testing.guest_report import Chunk, GuestReport, analyse_chain
from vmferry.testing.host_tools import default_cache

MIB = 1 << 20
RAM_MIB = 8
"""What the boot sector works with: memory from 1 MiB on."""
MEMORY_MIB = 24
DELAY_LOOPS = 3_000
"""Per page; one pass then takes some tens of milliseconds under TCG."""
DISK_BYTES = MIB
LINUX_MIB = 128
LINUX_DISK_BYTES = 16 * MIB
CHECKED_MIB = (8, 4)
"""Memory that Linux rewrites and checks, and memory that it only checks: half a second for both."""
DIRTY_MIB_PER_S = 5
DISK_BLOCKS = 16

Logs = Sequence[bytes]
"""The serial logs, in the order in which the guest can have been there: the source's, then the destination's."""


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """The spec and the disks of one guest."""

    name: str
    spec: Path
    disks: tuple[Path, ...]


class Guest(Protocol):
    """What a run asks of its guest."""

    files: GuestFiles
    boot_s: float
    """How long its start may take."""
    has_pages: bool
    """Whether its memory can be judged from outside (`passes`, `wrong_pages`)."""

    def has_booted(self, logs: Logs) -> bool:
        """Whether it does by now what it does all its life."""
        ...

    def progress(self, logs: Logs) -> int:
        """How much it has done where it is now; two more are proof that it goes on, and that all was checked."""
        ...

    def complaint(self, logs: Logs) -> str:
        """What is wrong with its life so far; "" for nothing."""
        ...


class Boot:
    """After k letters each page from 1 MiB to the end of what it works with begins with the byte k, or k + 1 where the
    pass that is under way has been already, and all else in these pages is zero. So a page that a migration lost, or
    brought in an older form, shows in one look at memory, at any time."""

    boot_s = 20.0
    has_pages = True

    def __init__(self, folder: Path, disks: Path, name: str) -> None:
        """Writes the files. Two disks: the one that it boots from and one more."""
        first, second = disks / f"{name}-0.img", disks / f"{name}-1.img"
        bootsector.write_image(first, ram_mib=RAM_MIB, delay_loops_per_page=DELAY_LOOPS, size_bytes=DISK_BYTES)
        _make_empty(second, DISK_BYTES)
        spec = folder / f"{name}.toml"
        spec.write_text(
            f'name = "{name}"\nmemory = "{MEMORY_MIB}M"\naccel = "tcg"\n'
            f'[[disk]]\npath = "{first}"\nboot = 0\n[[disk]]\npath = "{second}"\n'
        )
        self.files = GuestFiles(name, spec, (first, second))

    def has_booted(self, logs: Logs) -> bool:
        """It has made some passes."""
        return self.progress(logs) >= 3

    def progress(self, logs: Logs) -> int:
        """Letters, one per pass."""
        return sum(len(log) for log in logs)

    def complaint(self, logs: Logs) -> str:
        """A letter that is not the next one."""
        return passes(b"".join(logs))[1]


class Linux:
    """Writes to its disk and reads back, changes memory and checks it, ticks a hundred times a second, and says at once
    when anything is wrong."""

    boot_s = 60.0
    has_pages = False

    def __init__(self, folder: Path, disks: Path, name: str) -> None:
        """Writes the files; builds the guest where that was not done yet. Raises HostToolError."""
        guest = linux_guest.build(default_cache())
        disk = disks / f"{name}-0.img"
        _make_empty(disk, LINUX_DISK_BYTES)
        ram, const = CHECKED_MIB
        cmdline = linux_guest.cmdline(
            disk="vda", dirty_mib_per_s=DIRTY_MIB_PER_S, ram_mib=ram, const_mib=const, disk_blocks=DISK_BLOCKS
        )
        spec = folder / f"{name}.toml"
        spec.write_text(
            f'name = "{name}"\nmemory = "{LINUX_MIB}M"\naccel = "tcg"\n'
            f'[kernel]\nimage = "{guest.kernel}"\ninitrd = "{guest.initrd}"\ncmdline = "{cmdline}"\n'
            f'[[disk]]\npath = "{disk}"\n'
        )
        self.files = GuestFiles(name, spec, (disk,))

    def has_booted(self, logs: Logs) -> bool:
        """It has written and checked everything once."""
        return self.progress(logs) >= 1

    def progress(self, logs: Logs) -> int:
        """Whole checks of memory and of disk on the last side that it spoke on; of two one began and ended there."""
        report = _report(logs)
        return min(report.walks_after, report.disk_walks_after)

    def complaint(self, logs: Logs) -> str:
        """Ticks that are missing or came twice, a clock that went back, memory or disk that were wrong."""
        return "; ".join(_report(logs).complaints())


MAKE: Final[dict[str, Callable[[Path, Path, str], Guest]]] = {"boot": Boot, "linux": Linux}
"""The guest of a cell -> how it is made: folder for the spec, folder for the disks, name."""


def _make_empty(image: Path, size_bytes: int) -> None:
    with image.open("wb") as file:
        file.truncate(size_bytes)


def _report(logs: Logs) -> GuestReport:
    return analyse_chain([[Chunk(0.0, log)] for log in logs])


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
