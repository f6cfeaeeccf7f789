"""Does the faults, and takes them away again. Each says what shows that it was really done.

A `Doing` is made, then `do` is called in the phase, later `undo`; between them the fault lasts. `proof` is empty until
something outside of the product has shown that the fault was there: a process that is gone or stopped, a connection
that cannot be made, a message that the proxy kept, a lock that is held, a file system that is full.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

from vmferry.chaos.cells import ALONE, STREAM_BACK_S, Fault
from vmferry.chaos.ground import PROXY_PORT, Ground
from vmferry.chaos.guest import GuestFiles
from vmferry.chaos.link import Rule
from vmferry.chaos.stage import Stage, qemus
from vmferry.chaos.told import now_s
from vmferry.core.facts import Fact
from vmferry.errors import VmferryError
from vmferry.testing.hosts import process_state, wait_true
from vmferry.vm import image_locks

DELAY_S = 2.5
PROBE_S = 0.15
NEWS = "event TARGET"
LOCKED = "Failed to get"
"""How QEMU begins to say that a lock is refused."""
_FLOCK = "hhqqi4x"
STRANGE_ANSWERS: dict[str, bytes] = {
    "http": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "empty": b'{"return": {}, "id": %ID%}\r\n',
    "error": b'{"error": {"class": "GenericError", "desc": "what is this?"}, "id": %ID%}\r\n',
    "types": b'{"return": [1, {"loaded": "perhaps"}, null], "id": %ID%}\r\n',
}


class Doing:
    """One fault in one run."""

    def __init__(self, ground: Ground, fault: Fault, guest: GuestFiles, stage: Stage) -> None:
        self.ground, self.fault, self.guest, self.stage = ground, fault, guest, stage
        self.proof = ""
        self.done_s = 0.0
        self.undone_s = 0.0
        self.stream_back_s = 0.0
        """When memory could move again while the agents still could not talk."""
        self.started_s = 0.0
        """When an agent that was killed was started again."""
        self.cancels: list[str] = []
        """What was answered to each cancel."""
        self.cli: subprocess.Popen[str] | None = None
        self._rule: Rule | None = None
        self._stack = contextlib.ExitStack()
        self._log_at = [len(host.log()) for host in (ground.a, ground.b)]

    # --- before the migration ---

    def prepare(self) -> None:
        """What must be there from the beginning: rules for messages."""
        how = self.fault.more[0] if self.fault.more else ""
        if self.fault.kind == "message":
            action, _, side = how.partition("-")
            self._rule = Rule(self.fault.what, side or "request", action, delay_s=DELAY_S)
            if self.fault.what == "news":
                self._rule.command, self._rule.about = NEWS, "ran"
                self._rule.times = 1000 if action == "drop" else 1
        if self.fault.kind == "strange":
            self._rule = Rule(self.fault.what, "answer", "replace", replace=STRANGE_ANSWERS[how])
        if self._rule is not None:
            if self.fault.what == "peer-target":
                # It is asked after the order only when the answer to that was lost, and every news with it.
                self._rule.after = self.ground.link.add(Rule("peer-grant", "answer", "drop"))
                self.ground.link.add(Rule(NEWS, "answer", "drop", times=1000, after=self._grant_went_by()))
            if self.fault.what == "peer-grant" and (self.fault.kind == "strange" or how == "drop-answer"):
                # What the destination tells by itself comes before its answer and would be enough.
                self.ground.link.add(Rule(NEWS, "answer", "drop", times=1000, about="ran", until=self._rule))
            self.ground.link.add(self._rule)
            self.stage.fault_rule = self._rule

    def _grant_went_by(self) -> Rule:
        """Happens when the order to start passes."""
        return self.ground.link.add(Rule("peer-grant", "request", "delay"))

    def begin(self, arguments: dict[str, Any]) -> None:
        """Asks for the migration: over the real command line where that is what is to be killed."""
        if self.fault.what != "cli":
            self.stage.begin(arguments)
            return
        words = ["migrate", self.guest.name, "host-b", "--mode", arguments["mode"]]
        for setting in arguments["settings"]:
            words += ["--set", setting]
        for code in arguments.get("accept", []):
            words += ["--accept", code]
        if "postcopy_after_passes" in arguments:
            words += ["--postcopy-after-passes", str(arguments["postcopy_after_passes"])]
        if "postcopy_after_ms" in arguments:
            words += ["--postcopy-after", f"{arguments['postcopy_after_ms'] // 1000}s"]
        self.cli = self.ground.a.cli_start(*words)

    # --- in the phase ---

    def do(self) -> None:
        """The fault begins. What it is done to may be gone: then `proof` stays empty."""
        match self.fault.kind:
            case "kill" | "stop":
                self._signal()
            case "cut":
                self._cut()
            case "reset":
                self._reset()
            case "message" | "strange":
                self._message()
            case "lock":
                self._lock()
            case "full":
                self._fill()
            case "cancel":
                self._cancel()
            case kind:
                raise AssertionError(kind)

    def undo(self) -> None:
        """The fault ends: agents are started again, what was stopped goes on, links are there, disks have room."""
        self._stack.close()
        if self.fault.kind == "kill" and self.fault.what.endswith("agent"):
            self.started_s = now_s()
            self.ground.host(self.fault.what).restart()
        self.undone_s = now_s()

    def _signal(self) -> None:
        what, kill = self.fault.what, self.fault.kind == "kill"
        if what == "cli":
            assert self.cli is not None
            if self.cli.poll() is not None:
                return
            pid = self.cli.pid
        elif what.endswith("agent"):
            process = self.ground.host(what).process
            assert process is not None
            pid = process.pid
        else:
            mine = qemus(self.ground.host(what), self.guest.name)
            if len(mine) != 1:
                return
            (pid,) = mine
        end = os.pidfd_open(pid)
        self._stack.callback(os.close, end)
        self.done_s = now_s()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if kill else signal.SIGSTOP)
        if kill:
            # Not its state: a process whose first thread is gone already may still read what it is told.
            ended = select.select([end], [], [], 5.0)[0]
            assert ended, f"process {pid} does not end"
            self._reap(what)
        else:
            wait_true(lambda: process_state(pid) == "T", timeout_s=2, why="it is stopped")
            self._stack.callback(_go_on, pid)
        self.proof = f"process {pid} {'is gone' if kill else 'is stopped'}"

    def _reap(self, what: str) -> None:
        """Those that are our own children."""
        if what == "cli":
            assert self.cli is not None
            self.cli.wait(5)
        elif what.endswith("agent"):
            process = self.ground.host(what).process
            assert process is not None
            process.wait(5)

    def _cut(self) -> None:
        ports: list[int] = []
        if self.fault.what in ("stream", "both"):
            ports += self.ground.streams.ports
        if self.fault.what in ("link", "both"):
            ports.append(PROXY_PORT)
        self._stack.enter_context(self.ground.cable_cut(ports, self.fault.more[0]))
        self.done_s = now_s()
        if ports and all(not _connects(self.ground, port) for port in ports):
            self.proof = f"ports {ports} are dead"

    def _reset(self) -> None:
        self.done_s = now_s()
        if self.fault == ALONE:
            self._leave_alone()
            return
        if self.fault.what in ("stream", "both"):
            before = self.ground.streams.passed()
            self.ground.streams.cut(refusing=True)
            self._stack.callback(self.ground.streams.refuse, refusing=False)
            if before or self.ground.streams.ports:
                self.proof = f"the stream was cut after {before} bytes"
        if self.fault.what == "stream":
            return
        cut = sum(link.cut(refusing=True) for link in self.ground.links)
        for link in self.ground.links:
            self._stack.callback(link.refuse, refusing=False)
        words = f"{cut} connections of the agents were cut"
        if self.fault.what == "both":
            self.proof = f"{self.proof}, {words}" if self.proof and cut else ""
        else:
            self.proof = words if cut else ""

    def _leave_alone(self) -> None:
        before = self.ground.streams.passed()
        cut = sum(link.cut(refusing=True) for link in self.ground.links)
        for link in self.ground.links:
            self._stack.callback(link.refuse, refusing=False)
        self.ground.streams.cut(refusing=True)
        again = threading.Timer(STREAM_BACK_S, self._let_stream_pass)
        again.start()
        self._stack.callback(again.join)
        if cut and before:
            self.proof = f"{cut} connections of the agents were cut, and the stream after {before} bytes"

    def _let_stream_pass(self) -> None:
        self.stream_back_s = now_s()
        self.ground.streams.refuse(refusing=False)

    def _message(self) -> None:
        """The rule is there since the beginning; the phase's hold is on the same message, or before it."""
        assert self._rule is not None
        self.done_s = self._rule.at_s or now_s()

    def settle_proof(self) -> None:
        """For faults that happen only after the phase's hold is let go."""
        if self._rule is not None and self._rule.count:
            self.proof = f"{self._rule.count} {self.fault.what}: {self._rule.action}"
        if self.fault.kind == "lock":
            if "source" in self.fault.more:
                words = self.ground.a.log()[self._log_at[0] :] + self._qemu_log()
                refused = LOCKED in words
            else:
                refused = self.stage.target.has(self.guest.name, Fact.START_REFUSED) is not None
            self.proof = self.proof if refused else ""
        if self.fault.kind == "full":
            # Its own agent says so to whoever asked it to write: in the end one of the two has it in its log.
            logs = [host.log()[at:] for host, at in zip((self.ground.a, self.ground.b), self._log_at, strict=True)]
            if not any("cannot be written" in log for log in logs):
                self.proof = ""

    def _qemu_log(self) -> str:
        """What the source's QEMU has written."""
        logs = (self.ground.a.runtime / "vms").glob(f"{self.guest.name}-*/qemu.log")
        return "".join(log.read_text(errors="replace") for log in logs)

    def _lock(self) -> None:
        where = self.fault.more[0]
        folder = self.ground.disks_b if where == "target" else self.ground.disks
        disks = [folder / disk.name for disk in self.guest.disks]
        chosen = disks if self.fault.what == "all" else disks[1:]
        if where in ("both", "source"):  # as one who waits for it: the source's own lock must be gone first
            self.stage.wait(lambda: all(_is_free(disk) for disk in chosen), why="the disks are still the source's")
        for disk in chosen:
            self._stack.callback(os.close, hold_disk(disk))
        self.done_s = now_s()
        if not any(_is_free(disk) for disk in chosen):
            self.proof = f"{len(chosen)} disks are locked"
        if where == "source":
            self.ground.streams.cut(refusing=False)  # so the guest has to go back, to disks that it cannot have
        if "and-reset" in self.fault.more:
            self.ground.streams.cut(refusing=True)
            self._stack.callback(self.ground.streams.refuse, refusing=False)
            self.stage.fact(Fact.LINK_LOST)

    def _cancel(self) -> None:
        """Done when it was asked for; whether it was accepted, or refused with a reason, is what it answers."""
        self.done_s = now_s()
        if self.fault.what == "after-reset":
            self.ground.streams.cut(refusing=False)
        for _ in range(2 if self.fault.what == "twice" else 1):
            try:
                self.ground.a.execute("vm-cancel", vm=self.guest.name)
                self.cancels.append("accepted")
            except VmferryError as error:
                self.cancels.append(f"refused: {error}")
        if self.fault.what == "then-reset":
            self.ground.streams.cut(refusing=False)
        self.proof = "; ".join(self.cancels)

    def _fill(self) -> None:
        folder = self.ground.host(self.fault.what).state
        ballast = folder / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12):
                with contextlib.suppress(OSError):  # no space left: the smaller pieces fill what is left
                    while True:
                        file.write(bytes(size))
        self._stack.callback(ballast.unlink)
        self.done_s = now_s()
        left = os.statvfs(folder)
        self.proof = "the file system under its journal is full" if left.f_bavail == 0 else ""

    def close(self) -> None:
        """Takes away what may still be there."""
        self._stack.close()
        if self.cli is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.cli.pid, signal.SIGCONT)
            self.cli.kill()
            self.cli.communicate()


def hold_disk(path: Path) -> int:
    """Takes QEMU's own locks of a writer who shares with nobody, as a QEMU elsewhere would hold them. The descriptor:
    closing it gives them back. Raises OSError when somebody else has the file for writing."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    for byte in (image_locks.USES_BASE + 1, image_locks.FORBIDS_BASE + 1):
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    return descriptor


def _is_free(disk: Path) -> bool:
    return image_locks.image_locks(str(disk)).can_write is not False


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _connects(ground: Ground, port: int) -> bool:
    """Whether the source's host gets through to this port of the target's now."""
    result: list[bool] = []

    def probe() -> None:
        with ground.a.net.inside():
            try:
                socket.create_connection((ground.b.net.address, port), PROBE_S).close()
                result.append(True)
            except OSError:
                result.append(False)

    thread = threading.Thread(target=probe)
    thread.start()
    thread.join()
    return result[0]
