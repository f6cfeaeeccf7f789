"""The guest of demo and benchmark as a spec file, and its way from one host to the other."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.cli import client as agent_client
from vmferry.demo.arrivals import Arrivals
from vmferry.demo.setup import AgentHost, TwoAgents, read_answer
from vmferry.errors import UsageError
from vmferry.qmp.blocking import BlockingClient
from vmferry.testing import linux_guest
from vmferry.testing.linux_guest import LinuxGuest
from vmferry.testing.serial_log import SerialReader
from vmferry.units import MIB

KERNEL_MIB = 112
"""What Linux and the guest's program need beside the memory that is checked."""
CHECKED_MIB = 96
"""About a second of checking under TCG."""
DISK_BLOCKS = 40
DISK_WRITE_MS = 20
DISK_BYTES = 16 * MIB
ARRIVAL_S = 60.0
NEWS_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestWish:
    """What the guest shall do all the time. Two thirds of the checked memory are rewritten, one third is not."""

    name: str
    memory_mib: int
    dirty_mib_per_s: int
    checked_mib: int = CHECKED_MIB
    check_mib_per_s: int = 96
    tick_ms: int = 10
    accel: str = "auto"
    fixed_layout: bool = False
    """Two such guests use the same pages."""

    @property
    def regions_mib(self) -> tuple[int, int]:
        """The rewritten and the constant region, as large as the memory allows."""
        room = min(self.checked_mib, self.memory_mib - KERNEL_MIB)
        if room < 3:
            raise UsageError(f"a guest of {self.memory_mib} MiB is too small; it needs {KERNEL_MIB + 3} MiB")
        return room * 2 // 3, room // 3

    def cmdline(self) -> str:
        """The kernel command line."""
        ram, const = self.regions_mib
        return linux_guest.cmdline(
            dirty_mib_per_s=self.dirty_mib_per_s,
            ram_mib=ram,
            const_mib=const,
            check_mib_per_s=self.check_mib_per_s,
            tick_ms=self.tick_ms,
            disk="vda",
            disk_blocks=DISK_BLOCKS,
            disk_write_ms=DISK_WRITE_MS,
            fixed_layout=self.fixed_layout,
        )


def write_spec(wish: GuestWish, guest: LinuxGuest, folder: Path) -> Path:
    """The spec file and the disk image that both hosts see; both in `folder`."""
    image = folder / f"{wish.name}.img"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    spec = folder / f"{wish.name}.toml"
    spec.write_text(
        f'name = "{wish.name}"\n'
        f'memory = "{wish.memory_mib}M"\n'
        f'accel = "{wish.accel}"\n'
        "[kernel]\n"
        f"image = {json.dumps(str(guest.kernel))}\n"
        f"initrd = {json.dumps(str(guest.initrd))}\n"
        f'cmdline = "{wish.cmdline()}"\n'
        "[[disk]]\n"
        f"path = {json.dumps(str(image))}\n"
    )
    return spec


@dataclass(slots=True)
class Moved:
    """One `vmferry migrate`: its answer, how long the process took, and the console on the far side."""

    code: int
    wire: dict[str, Any]
    wall_ms: float
    console: SerialReader | None


def move(pair: TwoAgents, source: AgentHost, vm: str, *words: str, show: bool = False) -> Moved:
    """Runs `vmferry migrate` to its end, and reads the guest's console at the destination from its first byte.

    With `show` the command writes to the person's terminal. Raises the error of a command that was refused
    before it became a migration.
    """
    there = pair.other(source)
    output = None if show else subprocess.PIPE
    command = source.command("migrate", vm, there.name, *words, *([] if show else ["--json"]))
    with (
        Arrivals(there.vm_folder, f"{vm}-") as arrivals,
        BlockingClient(str(source.socket_path), name=f"the agent of {source.name}") as news,
    ):
        began_s = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True)
        console: SerialReader | None = None
        try:
            folder = arrivals.next(unless_ends=process.pid, timeout_s=ARRIVAL_S)
            console = None if folder is None else SerialReader.follow(folder / "serial.log")
            out, err = process.communicate()
            wall_ms = (time.monotonic() - began_s) * 1000
            wire = _last_news(news, vm) if show else _answer(process.returncode, out, err)
        except BaseException:
            process.kill()
            process.wait()
            if console is not None:
                console.close()
            raise
    return Moved(process.returncode, wire, wall_ms, console)


def _answer(code: int, out: str, err: str) -> dict[str, Any]:
    wire = json.loads(out) if out.strip() else {}
    if "job" in wire:
        return dict(wire)
    return read_answer("migrate", code, out, err)


def _last_news(news: BlockingClient, vm: str) -> dict[str, Any]:
    """What the agent told when the job ended; {} if it never became one."""
    for event in news.events(NEWS_S):
        if event.name == "JOB_ENDED" and event.data.get("vm") == vm:
            return dict(event.data)
    return {}


def start(host: AgentHost, spec: Path) -> tuple[dict[str, Any], SerialReader]:
    """`vmferry run`, and the guest's console."""
    with Arrivals(host.vm_folder, f"{spec.stem}-") as arrivals:
        wire = host.vmferry("run", str(spec))
        folder = arrivals.next(unless_ends=os.getpid(), timeout_s=0)
    assert folder is not None, "the agent made a directory for the QEMU that it started"
    return wire, SerialReader.follow(folder / "serial.log")


def status(host: AgentHost, vm: str) -> dict[str, Any]:
    """`vm-status`, without a process for it."""
    return dict(agent_client.once(str(host.socket_path), "vm-status", {"vm": vm}))
