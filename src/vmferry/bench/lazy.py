"""Restores: how soon a guest runs, how long a page takes, how large snapshots are; a full one against QEMU's own.

Theory of operation
-------------------
Guests of several sizes are saved into a repository of this run, and brought back by a real agent, over and over:

    resume_ms        from the command's arrival on the agent's control socket to QEMU's RESUME event, by the clock of
                     this host; QEMU's start is in it, the command line's own start is not (`command_line_ms` has both)
    first_tick_ms    from the same moment to the first line that the guest writes after it (a Linux guest, which ticks
                     every 10 ms)
    fault_*_us       a page that the guest waits for and that the agent holds already (read ahead, or zero): from the
                     request that was read to the page written; of the Linux guest
    read_fault_*_us  the same of all pages that it waits for; most have to be read, from a local folder that the kernel
                     has in its cache
    restore_ratio    a full restore against `-incoming file:` with mapped-ram of the same guest on the newer QEMU, by
                     turns; QEMU's time over ours. Both end with the RESUME event, by QEMU's own time; ours begins with
                     the command's arrival at the agent, QEMU's with the call that starts its process
    agent_mb         the most memory that the agent had: `agent_restore_mb` over all restores, `agent_save_mb` over a
                     save of the largest guest, which it has restored before

Rule 1: medians; every sample is in the report, and nothing is left out because it is bad.
Rule 2: each size has memory in proportion: half of it is filled, so that a time that grows with memory shows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from vmferry.bench import snapshots
from vmferry.cli.render import table
from vmferry.errors import QemuError, UsageError
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.errors import QmpDisconnected
from vmferry.store.local import LocalFolder
from vmferry.store.repository import Repository
from vmferry.testing import bootsector, linux_guest
from vmferry.testing.host_tools import default_cache
from vmferry.testing.qemus import available
from vmferry.testing.snapshots import SpecGuest
from vmferry.units import MIB
from vmferry.vm import argv as vm_argv
from vmferry.vm.runtime import RuntimePaths

ROUNDS_MIN: Final = 3
SIZES_MIB: Final = (256, 1024, 4096)
LINUX_MIB: Final = 512
WAIT_S: Final = 120.0
RESUME_MS_MAX, FLAT_MAX = 200.0, 1.2
FAULT_P50_US_MAX, FAULT_P99_US_MAX = 100.0, 1000.0
SNAPSHOT_RATIO_MAX, SECOND_RATIO_MAX, OTHER_RATIO_MAX = 0.30, 0.05, 0.65
RESTORE_RATIO_MIN: Final = 0.8
AGENT_MB_MAX: Final = 200.0
_SIZES: Final = (
    "snapshot_ratio", "hard_share", "second_snapshot_ratio", "idle_snapshot_ratio", "changed_share", "changed_bytes",
    "second_vm_ratio", "agent_mb", "agent_restore_mb", "agent_save_mb", "agent_guest_mib",
)  # fmt: skip
_POLL_S: Final = 0.002


class Bed:
    """A folder, a repository, and an agent. Everything ends with the block."""

    def __init__(self, stack: contextlib.ExitStack, *, linux_mib: int = LINUX_MIB) -> None:
        self.stack, self.linux_mib = stack, linux_mib
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vf-lazy-", dir="/tmp")))
        self.version = list(available())[-1]
        self.qemu = available()[self.version]
        self.repository = Repository.create(LocalFolder(self.folder / "repository"))
        self._names = itertools.count()
        self._agent: subprocess.Popen[bytes] | None = None
        stack.callback(self._end_agent)

    @property
    def socket(self) -> str:
        """The agent's."""
        return str(self.folder / "run" / "agent.sock")

    def start_agent(self) -> None:
        """A real one, that knows its QEMU and has loaded what a restore needs."""
        (self.folder / "state").mkdir(exist_ok=True)
        argv = [sys.executable, "-m", "vmferry.cli.main", "agent", "--name", "bench",
                "--state-dir", str(self.folder / "state"), "--runtime-dir", str(self.folder / "run"),
                "--repository", str(self.folder / "repository"), "--qemu", str(self.qemu)]  # fmt: skip
        log = (self.folder / "agent.log").open("wb")
        self._agent = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        _until(lambda: b"result=ready" in (self.folder / "agent.log").read_bytes(), "an agent that is ready")
        with BlockingClient(self.socket) as client:
            client.execute("doctor", deadline_s=60)  # by then its QEMU was asked

    def _end_agent(self) -> None:
        if self._agent is not None:
            with contextlib.suppress(OSError, QmpDisconnected, QemuError), BlockingClient(self.socket) as client:
                for vm in client.execute("vm-list", {"local": True})["vms"]:
                    client.execute("vm-stop", {"vm": vm["vm"], "force": True}, deadline_s=30)
            self._agent.terminate()
            self._agent.wait(20)

    def peak_mb(self) -> float:
        """The most memory that the agent has had since the start, or since `forget_peak`."""
        assert self._agent is not None
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{self._agent.pid}/status").read_text().splitlines()
        )  # fmt: skip
        return int(fields["VmHWM"].split()[0]) * 1024 / 1e6

    def forget_peak(self) -> None:
        """What it has now counts as the most."""
        assert self._agent is not None
        Path(f"/proc/{self._agent.pid}/clear_refs").write_text("5")  # proc(5): resets VmHWM

    # --- guests -------------------------------------------------------------------------------------------

    def spec_of_boot(self, memory_mib: int) -> Path:
        """A guest that fills half of its memory, and then writes a letter for each pass over it."""
        image = self.folder / f"boot{memory_mib}.img"
        filled = min(memory_mib // 2, 2048)
        bootsector.write_image(image, ram_mib=filled, delay_loops_per_page=0)
        path = self.folder / f"boot{memory_mib}.toml"
        path.write_text(
            f'name = "boot{memory_mib}"\nmemory = "{memory_mib}M"\naccel = "tcg"\n'
            f'[[disk]]\npath = "{image}"\nboot = 0\nreadonly = true\n'
        )
        return path

    def spec_of_linux(self, name: str) -> Path:
        """A Linux guest whose page cache is full of real files, that changes some of its memory, and ticks."""
        guest = linux_guest.build(default_cache())
        initrd = snapshots.initrd_with_files(self.folder, self.linux_mib * MIB // snapshots.MATERIAL_SHARE)
        cmdline = linux_guest.cmdline(ram_mib=16, const_mib=8, dirty_mib_per_s=2, check_mib_per_s=8)
        path = self.folder / f"{name}.toml"
        path.write_text(
            f'name = "{name}"\nmemory = "{self.linux_mib}M"\naccel = "tcg"\n'
            f'[kernel]\nimage = "{guest.kernel}"\ninitrd = "{initrd}"\ncmdline = "{cmdline}"\n'
        )
        return path

    def guest(self, spec: Path, is_alive: Callable[[bytes], bool]) -> contextlib.AbstractContextManager[SpecGuest]:
        """The guest, once it has worked."""
        return _alive(spec, self.qemu, self.version, is_alive)

    # --- restores -----------------------------------------------------------------------------------------

    def restore(self, snapshot: str, *, lazy: bool, until_tick: bool = False) -> dict[str, float]:
        """One restore through the agent; its times. The guest is ended afterwards."""
        vm = f"r{next(self._names)}"
        with BlockingClient(self.socket) as client:
            began_s = time.time()
            wire = client.execute("vm-restore", {"name": snapshot, "rename": vm, "lazy": lazy}, deadline_s=WAIT_S)
            tick_s = self._first_tick(vm) if until_tick else 0.0
            while not wire["over"]:
                for event in client.events(0.2):
                    if event.name == "RESTORE" and event.data["over"]:
                        break
                wire = client.execute("restore-status", {"job": wire["job"]})
            if wire["error"] or wire["resumed_s"] is None:
                raise QemuError(f"a measured restore failed: {wire['sentence']}")
            client.execute("vm-stop", {"vm": vm, "force": True}, deadline_s=30)
        found = {"resume_ms": (wire["resumed_s"] - began_s) * 1000, "whole_ms": wire["whole_ms"]}
        if tick_s:
            found["first_tick_ms"] = (tick_s - began_s) * 1000
        if lazy and wire["fault_p50_us"] is not None:
            found |= {"p50_us": wire["fault_p50_us"], "p99_us": wire["fault_p99_us"], "requests": wire["requests"]}
        if lazy and wire["held_p50_us"] is not None:
            found |= {"held_p50_us": wire["held_p50_us"], "held_p99_us": wire["held_p99_us"]}
        return found

    def _first_tick(self, vm: str) -> float:
        until_s = time.monotonic() + WAIT_S
        while time.monotonic() < until_s:
            for path in (self.folder / "run" / "vms").glob(f"{vm}-*/serial.log"):
                if path.stat().st_size:
                    return time.time()
            time.sleep(_POLL_S)
        raise QemuError(f"{vm} did not write anything")

    def save_again(self, snapshot: str) -> tuple[float, float]:
        """Restores a guest and has the agent save it; the guest stands, as it must under TCG. The most memory that the
        agent had before the save, and over it."""
        vm = f"r{next(self._names)}"
        with BlockingClient(self.socket) as client:
            wire = client.execute("vm-restore", {"name": snapshot, "rename": vm, "lazy": False}, deadline_s=WAIT_S)
            wire = _job_ended(client, "restore-status", wire)
            before_mb = self.peak_mb()
            self.forget_peak()
            wish = {"vm": vm, "name": f"{snapshot}-again", "pause": True}
            wire = _job_ended(client, "job-status", client.execute("vm-save", wish, deadline_s=WAIT_S))
            if wire["outcome"] != "saved":
                raise QemuError(f"a measured save failed: {wire['sentence']}")
            client.execute("vm-stop", {"vm": vm, "force": True}, deadline_s=30)
        return before_mb, self.peak_mb()

    def command_line_ms(self, snapshot: str) -> float:
        """A lazy restore from the start of `vmferry restore` to QEMU's RESUME."""
        vm = f"r{next(self._names)}"
        began_s = time.time()
        argv = [sys.executable, "-m", "vmferry.cli.main", "restore", snapshot, "--lazy", "--wait", "--as", vm]
        done = subprocess.run(
            [*argv, "--json", "--socket", self.socket], check=True, capture_output=True, timeout=WAIT_S
        )  # fmt: skip
        with BlockingClient(self.socket) as client:
            client.execute("vm-stop", {"vm": vm, "force": True}, deadline_s=30)
        return (float(json.loads(done.stdout)["resumed_s"]) - began_s) * 1000


def _job_ended(client: BlockingClient, command: str, wire: dict[str, Any]) -> dict[str, Any]:
    """The job as it ended."""
    until_s = time.monotonic() + WAIT_S
    while not wire["over"]:
        if time.monotonic() > until_s:
            raise QemuError(f"no end of a job within {WAIT_S:g} s: {wire['sentence']}")
        time.sleep(_POLL_S)
        wire = client.execute(command, {"job": wire["job"]})
    return wire


@contextlib.contextmanager
def _alive(spec: Path, qemu: Path, version: str, is_alive: Callable[[bytes], bool]) -> Iterator[SpecGuest]:
    with SpecGuest(spec, qemu=qemu, version=version, machine=_machine(version)) as guest:
        guest.until(lambda: is_alive(guest.serial), "sign of life", WAIT_S)
        yield guest


def _machine(version: str) -> str:
    return f"pc-q35-{version}"


def _until(is_so: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + WAIT_S
    while not is_so():
        if time.monotonic() > until_s:
            raise QemuError(f"no {what} within {WAIT_S:g} s")
        time.sleep(_POLL_S)


# --- QEMU's own restore ---------------------------------------------------------------------------------------


def save_to_file(guest: SpecGuest, path: Path) -> None:
    """The guest, which stands, into a file in the form of mapped-ram."""
    guest.go_on()  # QEMU sends no guest twice that has not run in between
    guest.qmp.execute("stop")
    states = [{"capability": "mapped-ram", "state": True}, {"capability": "return-path", "state": False}]
    guest.qmp.execute("migrate-set-capabilities", {"capabilities": states})
    guest.qmp.execute("migrate", {"uri": f"file:{path}"})
    guest.until(lambda: guest.qmp.execute("query-migrate").get("status") == "completed", "a saved file", WAIT_S)


def load_file(guest: SpecGuest, qemu: Path, path: Path, folder: Path) -> float:
    """Milliseconds from the call that starts a QEMU to its RESUME event, by its own time, out of the file."""
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        runtime = RuntimePaths(directory)
        argv = vm_argv.build_argv(
            guest.spec, qemu=str(qemu), machine=guest.spec.machine, accel="tcg", runtime=runtime, incoming=True
        )
        began_s = time.time()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            client = _connected(runtime.qmp_path)
            with client:
                states = [{"capability": name, "state": True} for name in ("mapped-ram", "events")]
                client.execute("migrate-set-capabilities", {"capabilities": states})
                client.execute("migrate-incoming", {"uri": f"file:{path}"})
                _event(client, "MIGRATION", status="completed")
                client.execute("cont")
                return (_event(client, "RESUME") - began_s) * 1000
        finally:
            process.kill()
            process.wait()


def _event(client: BlockingClient, name: str, **data: Any) -> float:
    """When QEMU says that this happened, in seconds. Raises QemuError when it does not within `WAIT_S`."""
    for event in client.events(WAIT_S):
        if event.name == name and data.items() <= event.data.items() and event.timestamp_us is not None:
            return event.timestamp_us / 1e6
    raise QemuError(f"no {name} within {WAIT_S:g} s")


def _connected(path: str) -> BlockingClient:
    until_s = time.monotonic() + WAIT_S
    while True:
        try:
            return BlockingClient(path, deadline_s=WAIT_S)
        except QmpDisconnected:
            if time.monotonic() > until_s:
                raise
            time.sleep(_POLL_S)


# --- the run --------------------------------------------------------------------------------------------------


def run_bench(*, rounds: int, sizes_mib: Sequence[int] = SIZES_MIB, linux_mib: int = LINUX_MIB) -> dict[str, Any]:
    """Everything as one JSON object. Raises VmferryError when something cannot be measured."""
    if rounds < ROUNDS_MIN:
        raise UsageError(f"--rounds: medians of fewer than {ROUNDS_MIN} rounds say nothing")
    with contextlib.ExitStack() as stack:
        bed = Bed(stack, linux_mib=linux_mib)
        sizes = _sizes(bed, sizes_mib)
        bed.start_agent()
        for size_mib in sizes_mib:
            bed.restore(f"boot{size_mib}", lazy=True)  # for warming up; it remembers the first touches, too
        samples: dict[int, list[dict[str, float]]] = {size: [] for size in sizes_mib}
        for number in range(rounds):
            _tell(f"lazy restores, round {number + 1} of {rounds} …")
            for size_mib in sizes_mib if number % 2 else reversed(sizes_mib):
                samples[size_mib].append(bed.restore(f"boot{size_mib}", lazy=True))
        ticks = [bed.restore("linux", lazy=True, until_tick=True) for _ in range(rounds + 1)][1:]
        command_line = [bed.command_line_ms(f"boot{sizes_mib[0]}") for _ in range(rounds)]
        full = _full(bed, rounds)
        return _result(bed, samples, ticks, command_line, full, sizes | _memory(bed, sizes_mib), rounds=rounds)


def _memory(bed: Bed, sizes_mib: Sequence[int]) -> dict[str, float]:
    """The agent's memory: what the restores so far took at most, and what a save takes."""
    _tell("the largest guest is saved by the agent …")
    restores_mb, save_mb = bed.save_again(f"boot{max(sizes_mib)}")
    return {
        "agent_restore_mb": round(restores_mb, 1),
        "agent_save_mb": round(save_mb, 1),
        "agent_mb": round(max(restores_mb, save_mb), 1),
        "agent_guest_mib": max(sizes_mib),
    }


def _sizes(bed: Bed, sizes_mib: Sequence[int]) -> dict[str, Any]:
    """Saves every guest. What snapshots take of a guest's memory is measured beside them (`bench.snapshots`)."""
    for size_mib in sizes_mib:
        _tell(f"a guest of {size_mib} MiB is saved …")
        with bed.guest(bed.spec_of_boot(size_mib), lambda serial: len(serial) >= 2) as guest:
            _, image = guest.save(bed.repository, f"boot{size_mib}")
            image.close()
    _tell("Linux guests are saved …")
    with bed.guest(bed.spec_of_linux("one"), _has_worked) as guest:
        _, image = guest.save(bed.repository, "linux")
        image.close()
    return snapshots.run_bench(memory_mib=bed.linux_mib, large_mib=0)


def _has_worked(serial: bytes) -> bool:
    """A Linux guest that has looked at all that it has once."""
    return serial.count(b"\nW memory ") >= 1


def _full(bed: Bed, rounds: int) -> dict[str, list[float]]:
    """The Linux guest, by turns out of the repository and out of a file of QEMU's own."""
    path = bed.folder / "mapped-ram"
    found: dict[str, list[float]] = {"ours": [], "qemu": []}
    with bed.guest(bed.spec_of_linux("three"), _has_worked) as guest:
        _, image = guest.save(bed.repository, "linux-full")
        image.close()
        save_to_file(guest, path)
        _tell(f"full restores, {rounds} rounds …")
        for number in range(rounds + 1):
            for who in ("ours", "qemu") if number % 2 else ("qemu", "ours"):
                took_ms = (
                    bed.restore("linux-full", lazy=False)["resume_ms"]
                    if who == "ours"
                    else load_file(guest, bed.qemu, path, bed.folder)
                )
                if number:  # the first is for warming up
                    found[who].append(took_ms)
    return found


def _result(
    bed: Bed,
    samples: dict[int, list[dict[str, float]]],
    ticks: list[dict[str, float]],
    command_line: list[float],
    full: dict[str, list[float]],
    sizes: dict[str, Any],
    *,
    rounds: int,
) -> dict[str, Any]:
    resume = {str(size): round(_median(each, "resume_ms"), 1) for size, each in samples.items()}
    served = [each for each in ticks if "p50_us" in each]
    held = [each for each in ticks if "held_p50_us" in each]
    result: dict[str, Any] = {
        "resume_ms": resume,
        "flatness": round(max(resume.values()) / min(resume.values()), 3),
        "first_tick_ms": round(_median(ticks, "first_tick_ms"), 1),
        "command_line_ms": round(statistics.median(command_line), 1),
        "fault_p50_us": round(_median(held, "held_p50_us"), 1) if held else None,
        "fault_p99_us": round(_median(held, "held_p99_us"), 1) if held else None,
        "read_fault_p50_us": round(_median(served, "p50_us"), 1),
        "read_fault_p99_us": round(_median(served, "p99_us"), 1),
        "restore_ratio": round(statistics.median(full["qemu"]) / statistics.median(full["ours"]), 3),
        **{name: sizes[name] for name in _SIZES},
        "rounds": rounds,
        "qemu": bed.version,
        "load_average": os.getloadavg()[0],
        "samples": {str(size): each for size, each in samples.items()},
        "ticks": ticks,
        "full_ms": full,
        "command_line_all_ms": command_line,
    }
    result["goals_met"] = {
        "resume_ms": max(resume.values()) <= RESUME_MS_MAX,
        "flatness": result["flatness"] <= FLAT_MAX,
        "fault_p50_us": result["fault_p50_us"] is not None and result["fault_p50_us"] <= FAULT_P50_US_MAX,
        "fault_p99_us": result["fault_p99_us"] is not None and result["fault_p99_us"] <= FAULT_P99_US_MAX,
        "restore_ratio": result["restore_ratio"] >= RESTORE_RATIO_MIN,
        "snapshot_ratio": sizes["snapshot_ratio"] <= SNAPSHOT_RATIO_MAX,
        "second_snapshot_ratio": sizes["second_snapshot_ratio"] <= SECOND_RATIO_MAX,
        "second_vm_ratio": sizes["second_vm_ratio"] <= OTHER_RATIO_MAX,
        "agent_mb": sizes["agent_mb"] <= AGENT_MB_MAX,
    }
    return result


def _median(samples: list[dict[str, float]], name: str) -> float:
    return statistics.median(each[name] for each in samples)


def report_lines(result: dict[str, Any]) -> list[str]:
    """The table for people."""
    rows = [(f"lazy, {size} MiB: command to RESUME", f"{ms:.0f} ms", f"{RESUME_MS_MAX:.0f} ms")
            for size, ms in result["resume_ms"].items()]  # fmt: skip
    rows += [
        ("the largest of these to the smallest", f"{result['flatness']:.2f}", f"{FLAT_MAX:.2f}"),
        ("lazy: command line's start to RESUME", f"{result['command_line_ms']:.0f} ms", ""),
        ("lazy: command to the guest's first tick", f"{result['first_tick_ms']:.0f} ms", ""),
        ("a page that the agent holds already, median", _us(result["fault_p50_us"]), _us(FAULT_P50_US_MAX)),
        ("the same, 99 of 100", _us(result["fault_p99_us"]), _us(FAULT_P99_US_MAX)),
        ("any page, most of them still to be read, median", _us(result["read_fault_p50_us"]), ""),
        ("the same, 99 of 100", _us(result["read_fault_p99_us"]), ""),
        ("full restore, mapped-ram's time to ours", f"{result['restore_ratio']:.2f}", f"{RESTORE_RATIO_MIN:.2f}"),
        ("snapshot of a Linux guest", f"{result['snapshot_ratio']:.2f}", f"{SNAPSHOT_RATIO_MAX:.2f}"),
        ("of that, pages compressed before they came", f"{result['hard_share']:.2f}", ""),
        (
            f"a second one, 10 s later ({result['changed_share'] * 100:.1f} % of the pages changed, "
            f"{result['changed_bytes']:.0f} bytes in each)",
            f"{result['second_snapshot_ratio']:.3f}",
            f"{SECOND_RATIO_MAX:.2f}",
        ),
        ("the same of an idle guest", f"{result['idle_snapshot_ratio']:.4f}", ""),
        ("one of another guest", f"{result['second_vm_ratio']:.2f}", f"{OTHER_RATIO_MAX:.2f}"),
        (
            f"the agent's memory, restores of guests up to {result['agent_guest_mib']} MiB",
            f"{result['agent_restore_mb']:.0f} MB",
            f"{AGENT_MB_MAX:.0f} MB",
        ),
        ("the same, a save of the largest", f"{result['agent_save_mb']:.0f} MB", f"{AGENT_MB_MAX:.0f} MB"),
    ]
    lines = table(("WHAT", "MEASURED", "GOAL"), rows)
    missed = [name for name, is_met in result["goals_met"].items() if not is_met]
    lines.append("every goal is met" if not missed else f"missed: {', '.join(missed)}")
    lines.append(f"QEMU {result['qemu']}, medians of {result['rounds']}; the load was {result['load_average']:.1f}")
    return lines


def _us(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f} µs"


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
