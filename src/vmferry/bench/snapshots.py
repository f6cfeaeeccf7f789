"""What saving costs, measured with real guests: the size of snapshots, how long a guest stands, the agent's memory.

    python -m vmferry.bench.snapshots [--mib 512] [--large-mib 4096] [--json]

Theory of operation
-------------------
One agent with its local repository, and Linux guests whose page cache is full of real files: a tree of programs,
libraries and text of this host, which the kernel unpacks at boot from a second archive of its initial file system, and
which takes about a third of the guest's memory. Two of the guests write nothing on purpose afterwards but what their
own checks write. The third one works (`guest/work/worker.c`): it rewrites 107 bytes in each of as many pages as are
4.5 % of those that are not zero, all of them within ten seconds, again and again; what was measured of a Linux guest.

What a snapshot adds is by how much the repository grows: packs, indexes, the manifest with its tables and the device
state, all files but locks.

    snapshot_ratio          what the first snapshot of a repository adds, of the guest's bytes that are not zero (pages
                            that Linux has filled with one byte count as zeros here)
    second_snapshot_ratio   what a second one of the guest that works, ten seconds later, adds, of what the first
                            snapshot of a repository did: each has the same files
    idle_snapshot_ratio     the same of a guest that does nothing
    changed_share           pages that were not the same in both snapshots of the guest that works, of those that are
                            not zero, and how many of their bytes changed (`changed_bytes`, the median)
    hard_share              bytes that were stored for pages which had been compressed before they came into the guest
                            (zstd leaves more than nine tenths of them), of all that the first snapshot added, about
    second_vm_ratio         what a second VM from the same files adds, of what the first one did
    agent_peak_bytes        the most memory that the agent had while it saved a large guest

Rule 1: every number is read from what the commands told, from the repository's files, or from /proc of the agent; none
        is written down here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from vmferry.cli.render import table
from vmferry.demo.setup import choose_qemu, find_guest, read_answer, vmferry_command
from vmferry.store.backend import LEFTOVERS
from vmferry.store.compression import Compressor
from vmferry.store.local import LocalFolder
from vmferry.store.manifest import ZERO
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository
from vmferry.testing import linux_guest
from vmferry.testing.serial_log import SerialReader
from vmferry.units import MIB, format_size

PAGE_BYTES: Final = 4096
LATER_S: Final = 10.0
BOOT_S: Final = 240.0
SAVE_S: Final = 600.0
MATERIAL_SHARE: Final = 3
"""A guest's files take this part of its memory: a third."""
CHANGED_SHARE: Final = 0.045
CHANGED_BYTES: Final = 107
"""Measured of a Linux guest: so many of its pages that are not zero changed in ten seconds, and so much in each."""
SAMPLED: Final = 16
HARD: Final = 0.9
_RUN: Final = 4096
_WORK: Final = {"dirty_mib_per_s": 0, "ram_mib": 2, "const_mib": 2, "check_mib_per_s": 1}


@dataclass
class OneAgent:
    """An agent of its own on this host. A context manager: leaving it ends the agent and its guests."""

    qemu: str = ""
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="vmf-snap-", dir="/tmp")))

    def __post_init__(self) -> None:
        self.qemu = self.qemu or choose_qemu()
        self.socket = self.folder / "run" / "agent.sock"
        self._pids: list[int] = []
        self._log = (self.folder / "agent.log").open("wb")
        words = ["agent", "--name", "bench", "--state-dir", str(self.folder / "state"), "--qemu", self.qemu]
        words += ["--runtime-dir", str(self.folder / "run")]
        argv = [*vmferry_command(), *words]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        end_s = time.monotonic() + 30
        while "result=ready" not in (self.folder / "agent.log").read_text():
            if time.monotonic() > end_s or self.process.poll() is not None:
                self.close()
                raise AssertionError("the agent does not start")
            time.sleep(0.02)

    def vmferry(self, *words: str) -> dict[str, Any]:
        """A command with `--json`, to its end. Raises the error that it told."""
        argv = [*vmferry_command(), *words, "--json", "--socket", str(self.socket)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=SAVE_S)
        return read_answer(words[0], done.returncode, done.stdout, done.stderr)

    def run(self, name: str, *, memory_mib: int, initrd: Path, work: str = "") -> dict[str, Any]:
        """Starts a Linux guest and waits until it has checked its memory once. `work`: what the kernel is told besides,
        for one that works."""
        guest = find_guest()
        spec = self.folder / f"{name}.toml"
        spec.write_text(
            f'name = "{name}"\nmemory = "{memory_mib}M"\naccel = "tcg"\n[kernel]\nimage = "{guest.kernel}"\n'
            f'initrd = "{initrd}"\ncmdline = "{linux_guest.cmdline(**_WORK)} {work}"\n'  # type: ignore[arg-type]
        )
        wire = self.vmferry("run", str(spec))
        self._pids.append(int(wire["pid"]))
        with SerialReader.follow(Path(wire["serial"])) as console:
            console.wait_walks(1, timeout_s=BOOT_S)
        return wire

    def peak_bytes(self) -> int:
        """The most memory that the agent has had so far."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the kernel does not tell")

    def close(self) -> None:
        """Ends the agent, then its guests: exactly those processes."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- what the guests' page cache is full of -----------------------------------------------------------------


def initrd_with_files(folder: Path, size_bytes: int) -> Path:
    """The guest's initial file system, and behind it an archive of about so many bytes of this host's files."""
    path = folder / f"initrd-{size_bytes // MIB}"
    base = find_guest().initrd.read_bytes()
    with path.open("wb") as out:
        out.write(base + bytes(-len(base) % 4))
        out.write(_entry("worker", linux_guest.worker(), mode=0o100755))
        out.write(_entry("m", b"", mode=0o040755))
        for number, (name, data) in enumerate(_files(size_bytes)):
            out.write(_entry(f"m/{number}-{name}", data))
        out.write(_entry("TRAILER!!!", b""))
    return path


def _files(size_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Files of all kinds by turns: programs, libraries, Python's own library, and what else a system shares."""
    roots = ("/usr/bin", "/usr/lib", sysconfig.get_path("stdlib"), "/usr/share")
    ways = [_walk(root) for root in roots]
    left = size_bytes
    while ways:
        for way in tuple(ways):
            file = next(way, None)
            if file is None:
                ways.remove(way)
                continue
            with contextlib.suppress(OSError):
                data = file.read_bytes()
                left -= len(data)
                yield file.name.encode("ascii", "replace").decode(), data
            if left <= 0:
                return


def _walk(root: str) -> Iterator[Path]:
    for place, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            file = Path(place, name)
            if not file.is_symlink() and file.is_file() and 512 < file.stat().st_size < 32 * MIB:
                yield file


def _entry(name: str, data: bytes, *, mode: int = 0o100644) -> bytes:
    """One file of a cpio archive (`newc`)."""
    raw = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + raw
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def _poisoned(agent: OneAgent, snapshot: str) -> int:
    """Pages that Linux has filled with one byte (0xcc) when it gave its initial file system's memory free: they would
    make every ratio look better than it is."""
    repository = Repository.open(LocalFolder(agent.folder / "state" / "repository"))
    with SnapshotReader(repository, snapshot) as reader:
        found = 0
        for block in reader.head.blocks:
            table = reader.table(block.name)
            numbers, counts = np.unique(table[table != ZERO], return_counts=True)
            for number, count in zip(numbers[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
                page = reader.source.page(number)
                found += count if (page == page[0]).all() else 0
        return found


def repository_bytes(folder: Path) -> int:
    """What a repository takes in its folder, but for what is only there while somebody works on it."""
    passing = {folder / "locks", folder / LEFTOVERS.rstrip("/")}
    return sum(
        (Path(place) / name).stat().st_size
        for place, _, names in os.walk(folder)
        if Path(place) not in passing
        for name in names
    )


def saved(agent: OneAgent, vm: str, name: str) -> dict[str, Any]:
    """A save as the command tells it, and `added_bytes`: by how much the repository grew."""
    folder = agent.folder / "state" / "repository"
    before = repository_bytes(folder)
    wire = agent.vmferry("save", vm, name)
    return {**wire, "added_bytes": repository_bytes(folder) - before}


def _hard_share(agent: OneAgent, snapshot: str, added_bytes: int) -> float:
    """See the module's text. One page of some is looked at."""
    repository = Repository.open(LocalFolder(agent.folder / "state" / "repository"))
    compressor = Compressor(1)
    with SnapshotReader(repository, snapshot, is_locked=False) as reader:
        rows = np.concatenate([reader.table(block.name) for block in reader.head.blocks])
        some = np.unique(rows[rows != ZERO])[::SAMPLED]
        sizes = [len(compressor.frame(reader.source.page(row).data)) for row in some.tolist()]
    return round(sum(size for size in sizes if size > HARD * PAGE_BYTES) * SAMPLED / added_bytes, 3)


def _changed_bytes(agent: OneAgent, before: str, after: str) -> npt.NDArray[np.int64]:
    """Of each page that is not the same in two snapshots of one guest and zero in neither: how many bytes differ."""
    repository = Repository.open(LocalFolder(agent.folder / "state" / "repository"))
    found = [np.zeros(0, np.int64)]
    with (
        SnapshotReader(repository, before, is_locked=False) as old,
        SnapshotReader(repository, after, is_locked=False) as new,
    ):
        for block in old.head.blocks:
            zero = old.is_zero(block.name) | new.is_zero(block.name)
            for first in range(0, block.pages, _RUN):
                count = min(_RUN, block.pages - first)
                pages = old.read(block.name, first, count) != new.read(block.name, first, count)
                different = np.count_nonzero(pages, axis=1)
                found.append(different[(different > 0) & ~zero[first : first + count]])
    return np.concatenate(found)


# --- measures -------------------------------------------------------------------------------------------------


def sizes(agent: OneAgent, *, memory_mib: int) -> dict[str, Any]:
    """The ratios of the module's text, in a repository that is empty before."""
    initrd = initrd_with_files(agent.folder, memory_mib * MIB // MATERIAL_SHARE)
    agent.run("one", memory_mib=memory_mib, initrd=initrd)
    first = saved(agent, "one", "first")
    time.sleep(LATER_S)  # what is measured is what a guest does in this time
    second = saved(agent, "one", "second")
    agent.run("two", memory_mib=memory_mib, initrd=initrd)
    other = saved(agent, "two", "other")
    not_zero = first["pages"] - first["zero_pages"] - _poisoned(agent, first["snapshot"])
    return {
        "memory_mib": memory_mib,
        "way": first["way"],
        "not_zero_bytes": not_zero * PAGE_BYTES,
        "added_bytes": first["added_bytes"],
        "packs_bytes": first["stored_bytes"],
        "snapshot_ratio": round(first["added_bytes"] / (not_zero * PAGE_BYTES), 4),
        "hard_share": _hard_share(agent, first["snapshot"], first["added_bytes"]),
        "idle_snapshot_ratio": round(second["added_bytes"] / first["added_bytes"], 4),
        **_working(agent, first, not_zero, memory_mib=memory_mib, initrd=initrd),
        "second_vm_ratio": round(other["added_bytes"] / first["added_bytes"], 4),
        "save_ms": first["total_ms"],
        "downtime_ms": first["downtime_ms"],
        "second_save_ms": second["total_ms"],
    }


def _working(agent: OneAgent, first: dict[str, Any], not_zero: int, *, memory_mib: int, initrd: Path) -> dict[str, Any]:
    """Two snapshots of a guest that works, and what the repository says of what it changed between them."""
    work = f"rdinit=/worker work_pages={round(not_zero * CHANGED_SHARE)} work_bytes={CHANGED_BYTES} "
    agent.run("three", memory_mib=memory_mib, initrd=initrd, work=f"{work} work_seconds={LATER_S:.0f}")
    time.sleep(LATER_S)  # each page has been rewritten once, as in every later ten seconds
    before = saved(agent, "three", "working-1")
    time.sleep(LATER_S)
    after = saved(agent, "three", "working-2")
    changed = _changed_bytes(agent, before["snapshot"], after["snapshot"])
    return {
        "second_snapshot_ratio": round(after["added_bytes"] / first["added_bytes"], 4),
        "second_added_bytes": after["added_bytes"],
        "changed_share": round(len(changed) / not_zero, 4),
        "changed_bytes": round(float(np.median(changed)), 1) if len(changed) else 0.0,
    }


def precopy(agent: OneAgent) -> dict[str, Any]:
    """How long the guest `one` of `sizes` stands when it is saved by precopy."""
    wire = agent.vmferry("save", "one", "by-precopy", "--way", "precopy")
    return {"precopy_ms": wire["total_ms"], "precopy_downtime_ms": wire["downtime_ms"]}


def memory(agent: OneAgent, *, memory_mib: int) -> dict[str, Any]:
    """The agent's memory while it saves a large guest, by both ways."""
    before = agent.peak_bytes()
    initrd = initrd_with_files(agent.folder, memory_mib * MIB // (2 * MATERIAL_SHARE))
    agent.run("large", memory_mib=memory_mib, initrd=initrd)
    first = agent.vmferry("save", "large", "large-1")
    again = agent.vmferry("save", "large", "large-2", "--way", "precopy")
    return {
        "large_mib": memory_mib,
        "large_not_zero_bytes": (first["pages"] - first["zero_pages"]) * PAGE_BYTES,
        "large_save_ms": first["total_ms"],
        "large_again_ms": again["total_ms"],
        "agent_before_bytes": before,
        "agent_peak_bytes": agent.peak_bytes(),
    }


def run_bench(*, memory_mib: int, large_mib: int) -> dict[str, Any]:
    """All of it. `large_mib` 0: without the large guest."""
    with OneAgent() as agent:
        found = {**sizes(agent, memory_mib=memory_mib), **precopy(agent)}
        return found | (memory(agent, memory_mib=large_mib) if large_mib else {})


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m vmferry.bench.snapshots")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--large-mib", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    found = run_bench(memory_mib=arguments.mib, large_mib=arguments.large_mib)
    if arguments.json:
        print(json.dumps(found))
        return 0
    rows = [(name, format_size(value) if name.endswith("_bytes") else str(value)) for name, value in found.items()]
    print("\n".join(table(("WHAT", "VALUE"), rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
