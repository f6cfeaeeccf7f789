"""Stopping a guest's CPUs from outside of QEMU, where QEMU's own `stop` would hang.

Theory of operation
-------------------
A vCPU that waits for a missing page (postcopy without a channel) does not reach the place where QEMU's `stop` waits
for it, and QMP hangs until the page comes. The kernel can stop the thread all the same: ptrace seizes it, interrupts
it, also in the middle of a page fault, and lets it go on later as if nothing had been. QEMU's other threads, which
receive the pages and answer QMP, go on.

All ptrace calls for a thread must come from the thread that seized it; a `Freezer` has one for that. When the agent
ends, so does the seizure, and the guest goes on: nothing is left stopped for good. A restarted agent finds the same
trouble and stops it again.

Rule 1: all threads or none: what cannot be stopped in time lets the others go.
Rule 2: a vCPU may be stopped while it holds QEMU's big lock; then QMP is silent and the caller must `thaw` and try
        again (`agent.destination_act`).

Source: ptrace(2), PTRACE_SEIZE and PTRACE_INTERRUPT (Linux 3.4); userfaultfd faults are interruptible by it, under
KVM since Linux 6.3.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from vmferry.errors import QemuError

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000
STOP_S = 1.0
"""A thread is stopped within microseconds unless it waits in the kernel for a device; then it is not ours to wait."""
POLL_S = 0.0005

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Freezer:
    """Holds the vCPU threads of one QEMU still. One owner; `close` lets them go and joins the thread."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._held: tuple[int, ...] = ()
        self._thread: ThreadPoolExecutor | None = None

    @property
    def is_frozen(self) -> bool:
        """The threads are stopped by us."""
        return bool(self._held)

    async def freeze(self, threads: Iterable[int]) -> None:
        """Raises QemuError when one of them cannot be stopped; then all go on."""
        if self._held:
            return
        wanted = tuple(sorted(set(threads)))
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="freezer")
        work = asyncio.get_running_loop().run_in_executor(self._thread, _freeze, self.pid, wanted)
        try:
            await asyncio.shield(work)
        except OSError as error:
            raise QemuError(
                f"the CPUs of process {self.pid} cannot be stopped from outside: {error}",
                side="destination",
                guest="running-on-destination",
                hint="the agent needs the right to trace the QEMU (CAP_SYS_PTRACE)",
                cause=error,
            ) from error
        self._held = wanted

    async def thaw(self) -> None:
        """The threads go on. One that is gone meanwhile needs nothing."""
        if self._held and self._thread is not None:
            held, self._held = self._held, ()
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, _let_go, held))

    async def close(self) -> None:
        """Lets them go and ends the thread."""
        await self.thaw()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
            self._thread = None


def _ptrace(request: int, thread: int) -> None:
    if _libc.ptrace(request, thread, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _freeze(pid: int, threads: tuple[int, ...]) -> None:
    seized: list[int] = []
    end_s = time.monotonic() + STOP_S
    try:
        for thread in threads:
            if not os.path.exists(f"/proc/{pid}/task/{thread}"):
                raise OSError(errno.ESRCH, f"it has no thread {thread}")
            _ptrace(_SEIZE, thread)
            seized.append(thread)
            _ptrace(_INTERRUPT, thread)
        for thread in seized:
            _wait_stopped(thread, end_s)
    except BaseException:
        _let_go(tuple(seized))
        raise


def _wait_stopped(thread: int, end_s: float) -> None:
    while True:
        found, status = os.waitpid(thread, os.WNOHANG | _WALL)
        if found == thread:
            if not os.WIFSTOPPED(status):
                raise OSError(errno.ESRCH, f"thread {thread} has ended")
            return
        if time.monotonic() >= end_s:
            raise OSError(errno.ETIMEDOUT, f"thread {thread} does not stop")
        time.sleep(POLL_S)


def _let_go(threads: tuple[int, ...]) -> None:
    for thread in threads:
        try:
            _ptrace(_DETACH, thread)
        except OSError:
            # Not stopped yet, so it cannot be detached: it is as soon as it stops. Or it is gone.
            _detach_when_stopped(thread)


def _detach_when_stopped(thread: int) -> None:
    end_s = time.monotonic() + STOP_S
    while time.monotonic() < end_s:
        try:
            found, status = os.waitpid(thread, os.WNOHANG | _WALL)
            if found == thread:
                if os.WIFSTOPPED(status):
                    _ptrace(_DETACH, thread)
                return
        except OSError:
            return
        time.sleep(POLL_S)
