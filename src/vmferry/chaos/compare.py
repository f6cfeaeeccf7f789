"""The same faults against a bare QMP script (`bare`): what becomes of the guest where nobody takes care of it.

Theory of operation
-------------------
Two QEMUs on this machine, a relay between them, the script as a process of its own, and the same `Witness`. The
phases are held by the relay: `active` by a small bandwidth, `switchover` by keeping what the destination says from the
source (all is over there, and the source does not know), `postcopy-active` by a slow line after the guest was started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.chaos import guest as guests
from vmferry.chaos.faults import hold_disk
from vmferry.chaos.told import now_s
from vmferry.chaos.witness import Witness, overlap_s
from vmferry.errors import VmferryError
from vmferry.testing.hosts import QEMUS, wait_true
from vmferry.testing.qemus import with_second_monitor
from vmferry.testing.relay import Relay

END_S = 6.0
SLOW_BYTES_PER_S, FAST_BYTES_PER_S = 1 << 20, 1 << 30
FAULTS = ("kill source-qemu", "kill target-qemu", "kill script", "cut stream", "lock disk")
PHASES = {"precopy": ("active", "switchover"), "postcopy": ("active", "switchover", "postcopy-active")}


@dataclass(frozen=True, slots=True)
class BareCell:
    """One comparison run."""

    fault: str
    phase: str
    mode: str
    qemu: str

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.fault}/{self.phase}/{self.mode}/{self.qemu}"


def cells(versions: Sequence[str]) -> list[BareCell]:
    """Each fault in each phase, for each version moving to itself. A lock matters only at the start."""
    return [
        BareCell(fault, phase, mode, version)
        for mode, phases in PHASES.items()
        for phase in phases
        for fault in FAULTS
        for version in versions
        if fault != "lock disk" or phase == "switchover"
    ]


@dataclass(slots=True)
class _Side:
    process: subprocess.Popen[bytes]
    monitor: Path
    serial: Path


@dataclass(slots=True)
class BareRun:
    """One run; `go` gives survived, double, lost or stuck."""

    cell: BareCell
    folder: Path
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def go(self) -> str:
        """Everything, and nothing of it left. Raises AssertionError when the phase was not reached."""
        with self.stack:
            return self._go()

    def _go(self) -> str:
        monitors = self.folder / "m"
        monitors.mkdir()
        disks = self.folder / "disks"
        disks.mkdir()
        made = guests.Boot(self.folder, disks, "bare").files
        witness = Witness(monitors, f"{self.folder}/")
        self.stack.callback(witness.close)
        source = self._qemu("a", made.disks[0], ["-S"])
        target = self._qemu("b", made.disks[0], ["-S", "-incoming", "defer"])
        wait_true(lambda: len(witness.lives) == 2, timeout_s=20, why="two second monitors")
        one, two = (witness.lives[side.process.pid] for side in (source, target))
        witness.ask(one, "cont")
        wait_true(lambda: source.serial.exists() and source.serial.stat().st_size > 3, timeout_s=20, why="it boots")
        slow = self.cell.phase == "active" or self.cell.mode == "postcopy"
        script = self._script(source, target, SLOW_BYTES_PER_S if slow else FAST_BYTES_PER_S)
        assert script.stdout is not None and script.stdin is not None  # noqa: PT018
        port = int(script.stdout.readline())
        relay = self.stack.enter_context(Relay(("127.0.0.1", port), listen=("127.0.0.1", int(self.relay_port))))
        if self.cell.phase == "switchover":
            relay.to_client.hold()
        self._poke(script)
        status = self._status_of(witness, one)
        wait_true(lambda: relay.to_target.passed_bytes > 0, timeout_s=20, why="it begins")
        self._reach(script, relay, witness, two, status)
        self._do(source, target, script, relay, made)
        relay.to_target.throttle(None)
        relay.to_client.release()
        if slow and one.gone_s is None:
            with contextlib.suppress(VmferryError, TimeoutError):
                fast = {"max-bandwidth": FAST_BYTES_PER_S, "max-postcopy-bandwidth": FAST_BYTES_PER_S}
                witness.ask(one, "migrate-set-parameters", **fast)
            if self.cell.phase == "active" and self.cell.mode == "postcopy":
                self._poke(script)
        return self._verdict(witness, one, two, source, target)

    relay_port: str = ""

    def _reach(self, script: Any, relay: Relay, witness: Witness, two: Any, status: Callable[[], str]) -> None:
        if self.cell.phase == "active" or self.cell.mode == "postcopy":
            wait_true(lambda: relay.to_target.passed_bytes > 100_000, timeout_s=20, why="memory moves")
            assert status() == "active", status()
        if self.cell.phase == "active":
            return
        if self.cell.mode == "postcopy":
            self._poke(script)
        if self.cell.phase == "switchover":
            # The source is not asked: a QEMU before 8.0 does not answer while it waits for its destination's result.
            there = self._status_of(witness, two)
            wait_true(lambda: there() in ("completed", "postcopy-active"), timeout_s=20, why="all is over there")
            if self.cell.mode == "precopy":
                assert not two.is_running, "the source knows already"
            return
        wait_true(lambda: status() == "postcopy-active", timeout_s=20, why="postcopy")
        wait_true(lambda: two.is_running, timeout_s=20, why="it was started there")
        assert status() == "postcopy-active", status()

    def _do(self, source: _Side, target: _Side, script: Any, relay: Relay, made: guests.GuestFiles) -> None:
        match self.cell.fault:
            case "kill source-qemu":
                _kill(source.process)
            case "kill target-qemu":
                _kill(target.process)
            case "kill script":
                _kill(script)
            case "cut stream":
                relay.cut(reset=True)
            case "lock disk":
                with contextlib.suppress(OSError):
                    self.stack.callback(os.close, hold_disk(made.disks[0]))

    def _verdict(self, witness: Witness, one: Any, two: Any, source: _Side, target: _Side) -> str:
        end_s = now_s() + END_S
        wait_true(lambda: now_s() > end_s, timeout_s=END_S + 5)
        if overlap_s(one, two, until_s=now_s()) > 0.02:
            return "double"
        running = [side for side, life in ((source, one), (target, two)) if life.is_running]
        if running:
            before = running[0].serial.stat().st_size
            with contextlib.suppress(AssertionError):
                wait_true(lambda: running[0].serial.stat().st_size > before + 1, timeout_s=3)
                return "survived"
        alive = [life for life in (one, two) if life.gone_s is None]
        return "stuck" if alive and not self._is_lost(one, two) else "lost"

    def _is_lost(self, one: Any, two: Any) -> bool:
        """A source that died in the middle, or a destination that had run."""
        if one.gone_s is not None and (self.cell.phase != "switchover" or self.cell.mode == "postcopy"):
            return True
        return two.gone_s is not None and bool(two.ran)

    # --- processes ---

    def _qemu(self, letter: str, disk: Path, more: list[str]) -> _Side:
        serial, monitor = self.folder / f"{letter}.log", self.folder / f"{letter}.sock"
        script = self.folder / "qemu"
        if not script.exists():
            with_second_monitor(QEMUS[self.cell.qemu], script, self.folder / "m")
        argv = [
            str(script), "-name", "vmferry-qmp", "-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg",
            "-m", f"{guests.MEMORY_MIB * 1024 + 8}K", "-serial", f"file:{serial}", "-qmp",
            f"unix:{monitor},server=on,wait=off", "-drive", f"file={disk},format=raw,if=virtio", *more,
        ]  # fmt: skip
        log = self.stack.enter_context((self.folder / f"{letter}.err").open("wb"))
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.stack.callback(_kill, process)
        return _Side(process, monitor, serial)

    def _script(self, source: _Side, target: _Side, bandwidth: int) -> subprocess.Popen[str]:
        self.relay_port = str(_free_port())
        pages = SLOW_BYTES_PER_S if self.cell.phase == "postcopy-active" else FAST_BYTES_PER_S
        words = [str(source.monitor), str(target.monitor), "127.0.0.1", self.relay_port, self.cell.mode]
        words += [str(bandwidth), str(pages)]
        log = self.stack.enter_context((self.folder / "script.err").open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", "vmferry.chaos.bare", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        self.stack.callback(_kill, process)
        return process

    def _poke(self, script: Any) -> None:
        """The first time: begin; the second time: switch to postcopy."""
        with contextlib.suppress(OSError, ValueError):  # it may have been killed
            script.stdin.write("!")
            script.stdin.flush()

    def _status_of(self, witness: Witness, life: Any) -> Callable[[], str]:
        return lambda: str(witness.ask(life, "query-migrate").get("status"))


def _kill(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait(10)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def chosen(only: str = "") -> list[BareCell]:
    """The comparison runs with `only` in their name."""
    return [cell for cell in cells(sorted({*QEMUS})) if only in cell.name]


def run_all(say: Callable[[str], None], only: str = "") -> dict[str, Any]:
    """Every comparison run (with `only` in its name): verdicts by fault, phase and mode."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    wanted = chosen(only)
    for number, cell in enumerate(wanted, 1):
        with _folder() as folder:
            try:
                found = BareRun(cell, folder).go()
            except (AssertionError, VmferryError, TimeoutError, OSError, ValueError) as error:
                found = "not-injected"
                say(f"    {type(error).__name__}: {error}"[:200])
        say(f"[{number}/{len(wanted)}] {found:<14} {cell.name}")
        rows.setdefault((cell.fault, cell.phase, cell.mode), []).append(f"{cell.qemu}: {found}")
    return {
        "rows": [
            {"fault": fault, "phase": phase, "mode": mode, "raw": "; ".join(found)}
            for (fault, phase, mode), found in rows.items()
        ]
    }


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vfb-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
