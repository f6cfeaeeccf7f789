"""Judges from outside: when each QEMU's CPUs ran, who held the disks, what the guest's memory holds.

Theory of operation
-------------------
Every QEMU of a chaos run has a second monitor (`ground` sees to that), which vmferry knows nothing of. One thread per
QEMU listens to it: STOP and RESUME carry QEMU's own times, and make intervals in which its CPUs ran. One more thread
looks for new monitors and samples /proc/locks. Nothing here is told by an agent.

Rule 1: a QEMU that does not answer (stopped, frozen) is taken as being in the state in which it was last heard.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.chaos.told import now_s
from vmferry.errors import VmferryError
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpDisconnected
from vmferry.vm import image_locks

SAMPLE_S = 0.005
LISTEN_S = 0.01
WRITE_BYTE = image_locks.USES_BASE + 1
TWO_WRITERS_SAMPLES = 4
"""A QEMU that tries to take a lock has it for a moment before it sees that another one forbids it."""
_SOCKET = re.compile(r"^(\d+)\.sock$")


@dataclass(slots=True)
class Life:
    """One QEMU. `ran` are intervals (from, to) of wall time, the last one open (None) while its CPUs run."""

    pid: int
    words: str
    ran: list[tuple[float, float | None]] = field(default_factory=list)
    gone_s: float | None = None
    asked: queue.Queue[tuple[str, dict[str, Any], queue.Queue[Any]]] = field(default_factory=queue.Queue)

    @property
    def is_running(self) -> bool:
        """Whether its CPUs run now, by what was last heard."""
        return self.gone_s is None and bool(self.ran) and self.ran[-1][1] is None

    def begin(self, at_s: float) -> None:
        """Its CPUs run from here on."""
        if not (self.ran and self.ran[-1][1] is None):
            self.ran.append((at_s, None))

    def end(self, at_s: float) -> None:
        """Its CPUs do not run any more."""
        if self.ran and self.ran[-1][1] is None:
            self.ran[-1] = (self.ran[-1][0], at_s)


def overlap_s(one: Life, other: Life, *, until_s: float) -> float:
    """For how long both ran at once."""
    total = 0.0
    for a_from, a_to in one.ran:
        for b_from, b_to in other.ran:
            both = min(a_to or until_s, b_to or until_s) - max(a_from, b_from)
            total += max(0.0, both)
    return total


def first_run_after(lives: Iterable[Life], at_s: float) -> float | None:
    """When a CPU ran first at or after the moment; the moment itself when one was running."""
    found = [max(begin, at_s) for life in lives for begin, end in life.ran if end is None or end > at_s]
    return min(found, default=None)


def longest_pause_s(lives: Iterable[Life], since_s: float, until_s: float) -> float:
    """The longest time within these bounds in which no CPU ran."""
    spans = sorted((begin, end or until_s) for life in lives for begin, end in life.ran)
    at_s, longest_s = since_s, 0.0
    for begin, end in spans:
        if begin > at_s:
            longest_s = max(longest_s, min(begin, until_s) - at_s)
        at_s = max(at_s, end)
    return max(longest_s, until_s - at_s)


class Witness:
    """Watches every QEMU whose command line has `mark` in it, by the monitors that appear in `monitors`."""

    def __init__(self, monitors: Path, mark: str) -> None:
        self.monitors, self.mark = monitors, mark
        self.lives: dict[int, Life] = {}
        self.inodes: dict[int, str] = {}
        """Images whose locks are sampled: inode -> path."""
        self.lock_samples = 0
        self.two_writers = ""
        self._suspicious = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._look, name="chaos-witness", daemon=True)]
        self._threads[0].start()

    def of_vm(self, vm: str) -> list[Life]:
        """The QEMUs that have or had this VM, in the order in which they came."""
        return [life for life in list(self.lives.values()) if f"/{vm}-" in life.words]

    def running(self, vm: str) -> list[Life]:
        """Those that run it now."""
        return [life for life in self.of_vm(vm) if life.is_running]

    def sample(self, paths: Iterable[Path]) -> None:
        """From now on the locks of these images are looked at, of no others."""
        self.inodes = {path.stat().st_ino: str(path) for path in paths}
        self.lock_samples, self.two_writers, self._suspicious = 0, "", 0

    def ask(self, life: Life, command: str, *, timeout_s: float = 5.0, **arguments: Any) -> Any:
        """One command on its second monitor. Raises TimeoutError or the command's error."""
        answer: queue.Queue[Any] = queue.Queue()
        life.asked.put((command, arguments, answer))
        try:
            found = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"{command} was not answered in {timeout_s:g} s") from None
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Ends every thread."""
        self._stop.set()
        for thread in self._threads:
            thread.join(5.0)

    # --- threads ---

    def _look(self) -> None:
        seen: set[str] = set()
        while not self._stop.wait(SAMPLE_S):
            with contextlib.suppress(OSError):
                for name in set(os.listdir(self.monitors)) - seen:
                    if self._meet(name):
                        seen.add(name)
            with contextlib.suppress(OSError):  # an image that is taken away in this moment
                self._sample_locks()

    def _meet(self, name: str) -> bool:
        """True when there is nothing more to do about this monitor."""
        found = _SOCKET.match(name)
        if found is None:
            return True
        pid = int(found[1])
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return True
        if self.mark not in words or "vmferry-qmp" not in words:
            return True
        life = Life(pid, words)
        thread = threading.Thread(target=self._listen, args=(life, self.monitors / name), daemon=True)
        self.lives[pid] = life
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()
        return True

    def _listen(self, life: Life, path: Path) -> None:
        try:
            client = self._connect(life, path)
            if client is None:
                return
            with client:
                if client.execute("query-status", deadline_s=60)["status"] == "running":
                    life.begin(now_s())
                while not self._stop.is_set():
                    for event in client.events(LISTEN_S):
                        _hear(life, event)
                    self._answer(life, client)
        except VmferryError:
            pass
        finally:
            life.gone_s = now_s()
            life.end(life.gone_s)
            with contextlib.suppress(OSError):
                path.unlink()

    def _connect(self, life: Life, path: Path) -> BlockingClient | None:
        while not self._stop.wait(LISTEN_S):
            try:
                return BlockingClient(str(path), deadline_s=60)
            except QmpDisconnected:
                if not Path(f"/proc/{life.pid}").exists():
                    return None
        return None

    def _answer(self, life: Life, client: BlockingClient) -> None:
        with contextlib.suppress(queue.Empty):
            command, arguments, answer = life.asked.get_nowait()
            try:
                answer.put(
                    client.execute(command, arguments or None, deadline_s=4.0, on_event=lambda e: _hear(life, e))
                )
            except QmpDisconnected as error:
                answer.put(error)
                raise
            except VmferryError as error:
                answer.put(error)

    def _sample_locks(self) -> None:
        if not self.inodes:
            return
        lines = image_locks.parse(Path("/proc/locks").read_text())
        self.lock_samples += 1
        pids = {life.pid for life in list(self.lives.values()) if life.gone_s is None}
        for inode, path in list(self.inodes.items()):
            writers = [line for line in lines if line.inode == inode and line.covers(WRITE_BYTE)]
            if len(writers) < 2:
                continue
            found = [h.pid for h in image_locks.image_locks(path).writers if h.pid in pids]
            if len(found) < 2:
                continue
            self._suspicious += 1
            if self._suspicious >= TWO_WRITERS_SAMPLES:
                self.two_writers = f"{path} has two writers: {found}"
            return
        self._suspicious = 0


def _hear(life: Life, event: Event) -> None:
    at_s = event.timestamp_us / 1e6 if event.timestamp_us is not None else now_s()
    if event.name == "RESUME":
        life.begin(at_s)
    elif event.name == "STOP":
        life.end(at_s)
