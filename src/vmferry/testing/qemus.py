"""The QEMU versions that tests can use on this machine."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

from vmferry.testing import newer_qemu
from vmferry.testing.host_tools import default_cache, run

_VERSION = re.compile(r"QEMU emulator version (\d+)\.(\d+)")


def available() -> dict[str, Path]:
    """Version ("major.minor", asked from the program) to program: the system's, and the one in the cache.

    The oldest comes first. Empty if there is none. tools/setup_machine.py provides both.
    """
    programs = [newer_qemu.home(default_cache()) / newer_qemu.SYSTEM_PROGRAM]
    system = shutil.which(newer_qemu.SYSTEM_PROGRAM)
    if system is not None:
        programs.append(Path(system))
    found = {_version(program): program for program in programs if program.exists()}
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".")]))


def image_tool(program: Path) -> Path:
    """The qemu-img of the same version as `program`, one of those in `available`."""
    return program.with_name("qemu-img")


def ram_size(ram_mib: int) -> str:
    """What `-m` takes, for guests that are to be migrated under TCG: 8 KiB more than `ram_mib` MiB.

    QEMU before 9.0 loses writes of a TCG guest while it is migrated: after reading the dirty bitmap in big
    steps it forgets to make the vCPU report its next write to these pages (fixed upstream by "physmem: Fix
    migration dirty bitmap coherency with TCG memory access", 03bfc2188f). The guest of these tests found it:
    pages a generation too old, or a kernel panic, in roughly one of fifteen migrations from 7.2; none in 200
    from 11.1. RAM that is no multiple of 256 KiB makes QEMU walk the bitmap page by page, which is right in
    all versions: no damage in 660 migrations from 7.2. KVM is not concerned. Both sides need the same size.
    """
    assert ram_mib > 0
    return f"{ram_mib * 1024 + 8}k"


def with_second_monitor(program: Path, script: Path, monitors: Path) -> Path:
    """A script that becomes this QEMU, with one more monitor in the folder `monitors`, named after its process."""
    script.write_text(
        f'#!/bin/sh\nexec {program} "$@" -chardev socket,id=second,path={monitors}/$$.sock,server=on,wait=off'
        " -mon chardev=second,mode=control\n"
    )
    script.chmod(0o755)
    return script


@functools.cache
def _version(program: Path) -> str:
    printed = run([str(program), "--version"])
    found = _VERSION.search(printed)
    assert found is not None, f"{program} --version printed {printed!r}"
    return f"{found[1]}.{found[2]}"
