"""Processes of this host that an agent looks for without having been told of them."""

from __future__ import annotations

from pathlib import Path

from vmferry.vm import spawn as vm_spawn
from vmferry.vm.spawn import ProcessIdentity


def find_qemu(directory: str) -> ProcessIdentity | None:
    """The process whose command line has this runtime directory: an agent may die between starting a QEMU
    and writing down which process it is."""
    needle = f"{directory}/".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            cmdline = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if needle in cmdline and b"qmp.sock" in cmdline:
            return vm_spawn.identify(int(entry.name))
    return None
