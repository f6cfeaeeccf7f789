#!/usr/bin/env python3
"""Prepares a fresh Debian 12 for running and testing vmferry. May be run again at any time; run it as root.

    python3 tools/setup_machine.py           prepare what is missing
    python3 tools/setup_machine.py --check   say what is missing, change nothing, exit 1 if anything is

Four steps: Debian packages; a newer QEMU beside the system's one (for migrations between two versions); the
Linux guest of the tests; QEMU's own script that reads streams. All but the first live in `.cache` of the project,
or in $VMFERRY_CACHE. Only the standard library is used: this runs before a virtual environment exists.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from vmferry.testing import analyzer, linux_guest, newer_qemu
from vmferry.testing.host_tools import HostToolError, default_cache, run

DPKG_STATUS = Path("/var/lib/dpkg/status")
# Each with what it is for.
PACKAGES = {
    "qemu-system-x86": "the hypervisor",
    "ipxe-qemu": "boot ROMs of network cards; part of the migrated state",
    "qemu-utils": "qemu-img and qemu-storage-daemon",
    "iproute2": "ip and tc: network namespaces of the tests",
    "nftables": "lost packets and partitions of the tests",
    "socat": "an independent hand on QMP sockets",
    "busybox-static": "a shell for guests under repair",
    "debootstrap": "guests with a whole Debian in them",
    "debian-archive-keyring": "checks what is downloaded from newer Debian suites",
    "patchelf": "lets the newer QEMU run with its own libraries",
    "gcc": "compiles the test guest",
    "libc6-dev": "compiles the test guest",
    "python3-venv": "the virtual environment",
}


@dataclass(frozen=True)
class Step:
    """`missing` tells what there is to do, quickly and without changing anything; empty = nothing."""

    name: str
    missing: Callable[[], list[str]]
    do: Callable[[], object]


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 all is there, 1 something is missing or failed, 2 wrong use."""
    parser = argparse.ArgumentParser(description="Prepare this machine for running and testing vmferry.")
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    only_check: bool = parser.parse_args(argv).check
    absent = 0
    for step in steps(default_cache()):
        missing = step.missing()
        if not missing:
            print(f"ok       {step.name}")
        elif only_check:
            absent += 1
            print(f"missing  {step.name}: {', '.join(missing)}")
        elif not carry_out(step, missing):
            return 1
    return 1 if absent else 0


def steps(cache: Path) -> list[Step]:
    return [
        Step("Debian packages", missing_packages, lambda: install(missing_packages())),
        Step(
            f"newer QEMU in {newer_qemu.home(cache)}",
            lambda: [] if newer_qemu.is_built(cache) else [f"QEMU of Debian {newer_qemu.SUITE}"],
            lambda: newer_qemu.build(cache),
        ),
        Step(
            f"Linux guest in {cache / 'linux-guest'}",
            lambda: [] if linux_guest.built(cache) else ["kernel or initramfs"],
            lambda: linux_guest.build(cache),
        ),
        Step(
            f"QEMU's analyze-migration.py in {analyzer.home(cache).parent}",
            lambda: [] if analyzer.is_there(cache) else ["the script, out of Debian's source of QEMU"],
            lambda: analyzer.fetch(cache),
        ),
    ]


def carry_out(step: Step, missing: list[str]) -> bool:
    print(f"doing    {step.name}: {', '.join(missing)}", flush=True)
    started_s = time.monotonic()
    try:
        step.do()
    except HostToolError as error:
        root_hint = "" if os.geteuid() == 0 else " (this needs root)"
        print(f"failed   {step.name}{root_hint}: {error}", file=sys.stderr)
        return False
    left = step.missing()
    if left:
        print(f"failed   {step.name}: still missing {', '.join(left)}", file=sys.stderr)
        return False
    print(f"done     {step.name} in {time.monotonic() - started_s:.1f} s", flush=True)
    return True


def missing_packages() -> list[str]:
    """Reads dpkg's status file itself: asking dpkg-query takes longer than all other checks together."""
    installed = set()
    name = ""
    for line in DPKG_STATUS.read_text().splitlines():
        if line.startswith("Package: "):
            name = line.removeprefix("Package: ")
        elif line == "Status: install ok installed":
            installed.add(name)
    return [package for package in PACKAGES if package not in installed]


def install(packages: list[str]) -> None:
    run(["apt-get", "update"])
    run(["apt-get", "install", "-y", "--no-install-recommends", *packages], timeout_s=1800)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
