"""Real QEMUs in trouble, for the tests of the rescue tools: with a monitor for a test and one for an agent."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vmferry.agent import machine as machines
from vmferry.agent.machine import Machine
from vmferry.clock import SystemClock
from vmferry.core.rescue import Evidence, NeverRan
from vmferry.testing import bootsector
from vmferry.testing.hosts import NEWEST, OLDEST, wait_true
from vmferry.testing.stream_peers import MIB, QemuPeer
from vmferry.vm import spawn as vm_spawn

T = TypeVar("T")
RAM_MIB, TOUCH_MIB = 64, 48
SLOW = 4 * MIB
"""Bytes per second that leave time for an accident in the middle."""
VERSIONS = [OLDEST, NEWEST]


class Starter:
    """Starts QEMUs, each with a second monitor in `folder`; leaving it ends them all."""

    def __init__(self) -> None:
        # A short name: there are sockets in it.
        self.folder = Path(tempfile.mkdtemp(prefix="vmf-"))
        self.shm_folder = Path(tempfile.mkdtemp(prefix="vmf-", dir="/dev/shm"))
        self._stack = contextlib.ExitStack()
        self._count = 0

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        shutil.rmtree(self.folder)
        shutil.rmtree(self.shm_folder)

    def __call__(self, version: str, *, more: tuple[str, ...] = (), **options: Any) -> Guest:
        self._count += 1
        qmp = self.folder / f"agent-{self._count}"
        monitor = ("-qmp", f"unix:{qmp},server=on,wait=off")
        given = {"ram_mib": RAM_MIB, "touch_mib": TOUCH_MIB, "more": (*monitor, *more), **options}
        return Guest(self._stack.enter_context(QemuPeer(version, **given)), qmp)


class Guest:
    """A QEMU as a test holds it (`peer`) and as an agent does (`with_machine`)."""

    def __init__(self, peer: QemuPeer, qmp: Path) -> None:
        self.peer, self.qmp = peer, qmp

    def with_machine(self, work: Callable[[Machine], Awaitable[T]]) -> T:
        """Runs what an agent would do with this QEMU."""

        async def run() -> T:
            identity = vm_spawn.identify(self.peer.process.pid)
            assert identity is not None
            machine = machines.attach_process("web1", identity, str(self.qmp), clock=SystemClock())
            assert machine is not None
            try:
                return await work(machine)
            finally:
                await machine.close()

        return asyncio.run(run())

    def memory(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Every page from 1 MiB on."""
        return self.peer.read_memory(MIB, self.peer.ram_bytes - MIB)

    def proof_that_it_never_ran(self) -> NeverRan:
        """What an agent that started this QEMU with -S knows of it."""
        return NeverRan(
            evidence=Evidence.PROCESS_GONE,
            text=f"the destination's QEMU (process {self.peer.process.pid})",
            stands=lambda: self.peer.process.poll() is not None,
            was_started_paused=True,
            was_told_to_run=False,
            has_run=False,
        )

    def letters(self) -> bytes:
        """What the guest wrote on this QEMU's serial port."""
        return (self.peer.folder / "serial").read_bytes()

    def goes_on_from(self, source: Guest) -> bool:
        """Whether the guest goes on here as one life with what it did there. Raises AssertionError if it does not."""
        begun = len(self.letters())
        wait_true(lambda: len(self.letters()) >= begun + 2, why="two passes of the guest")
        return bootsector.count_passes(source.letters() + self.letters()) > 2

    def kill(self) -> None:
        self.peer.process.kill()
        self.peer.process.wait()


def renounced() -> NeverRan:
    return NeverRan(evidence=Evidence.RENOUNCED, text="host-b renounced", stands=lambda: True)


def begin_postcopy(source: Guest, destination: Guest, **parameters: Any) -> None:
    """The source gave its guest away, with most pages still here; the destination has loaded."""
    for guest in (source, destination):
        guest.peer.set_up("postcopy-ram")
    source.peer.execute("migrate-set-parameters", {"max-bandwidth": SLOW, "max-postcopy-bandwidth": SLOW, **parameters})
    uri = f"unix:{destination.peer.folder}/in"
    destination.peer.migrate_incoming(uri)
    source.peer.migrate(uri)
    source.peer.until_status("active")
    source.peer.execute("migrate-start-postcopy")
    source.peer.until_status("postcopy-active")
    destination.peer.until_runstate("paused", "running")


def equal(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> bool:
    assert before.shape == after.shape
    assert before.any(axis=1).sum() > 1000, "there is something to compare"
    return bool((before == after).all())


def went_on(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> bool:
    """The guest's law: each pass adds one to the first byte of each page in turn, and changes nothing else."""
    begun, now = (each[: (TOUCH_MIB - 1) * MIB // 4096] for each in (before, after))
    assert (begun[:, 1:] == now[:, 1:]).all()
    passes = now[:, 0] - begun[:, 0]  # modulo 256; the pass that is under way makes one step in it
    steps = np.flatnonzero(np.diff(passes.astype(np.int16)))
    assert len(steps) <= 2, steps  # the pass that was under way before, and the one that is now
    return bool(passes.any())
