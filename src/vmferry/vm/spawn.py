"""Start a QEMU that outlives the agent, and find it again afterwards.

Theory of operation
-------------------
A QEMU gets its own session, no terminal, a log file, and no file descriptor of the agent: the agent can
die, be upgraded or restarted, and the guest does not notice. A process is known by its pid, its start time
and the host's boot id, because a pid alone is reused. Whoever wants to signal a process first holds a pidfd
and then compares the start time, so a signal never hits a stranger:

    1. pidfd_open(pid)         the descriptor is bound to whatever process has this pid now
    2. read /proc/pid/stat     if that is our process, then so is the pidfd: it cannot change any more
    3. pidfd_send_signal       to exactly that process, even if it died and the pid was reused meanwhile

Rule 1: nothing here kills a QEMU on its own account; `kill` is an order that somebody decided.
Rule 2: a start that fails leaves no file behind that was not there before.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import select
import signal
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from vmferry import limits
from vmferry.errors import QemuError, SpecError
from vmferry.vm.runtime import RuntimePaths

T = TypeVar("T")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process and no other, also after the agent or the host was restarted.

    `start_time_ticks` is field 22 of /proc/PID/stat (clock ticks since boot).
    """

    pid: int
    start_time_ticks: int
    boot_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Spawned:
    """A process that was started here. The holder owns `pidfd` and closes it with `close`."""

    identity: ProcessIdentity
    pidfd: int

    @property
    def pid(self) -> int:
        """The process id."""
        return self.identity.pid

    @property
    def start_time_ticks(self) -> int:
        """When it started, in clock ticks since boot."""
        return self.identity.start_time_ticks

    def close(self) -> None:
        """Give the pidfd back. The process is not touched."""
        os.close(self.pidfd)


def spawn(
    argv: Sequence[str], *, runtime: RuntimePaths, cwd: str = "/", environment: dict[str, str] | None = None
) -> Spawned:
    """Start `argv` detached from the agent; stdout and stderr are appended to `runtime.log_path`.

    Returns as soon as the process exists: whether QEMU accepts its arguments is seen later (`start`).
    Raises SpecError when the program cannot be executed; no process exists then.
    """
    assert argv, "a command line has at least the program"
    log = _open_log(runtime)
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=cwd,
            env=environment,
            close_fds=True,
            start_new_session=True,
        )
    except OSError as error:
        raise SpecError(f"{argv[0]} cannot be started: {error.strerror}", cause=error) from error
    finally:
        os.close(log)
    # A child of ours cannot vanish before somebody reaps it, so its pid is still its own here.
    pidfd = os.pidfd_open(process.pid)
    identity = identify(process.pid)
    assert identity is not None, "an unreaped child has a /proc entry"
    # The object must not reap or warn about a process that is meant to outlive it; the pidfd takes over.
    process.returncode = 0
    return Spawned(identity, pidfd)


async def start(
    argv: Sequence[str],
    *,
    runtime: RuntimePaths,
    ready: Callable[[], Awaitable[T]],
    timeout_s: float,
    cwd: str = "/",
) -> tuple[Spawned, T]:
    """Start `argv` and wait until `ready()` returns (a QMP client connected, say) or QEMU gives up.

    Raises SpecError with QEMU's own words when it exits first, and QemuError when `ready` is not there
    within `timeout_s` seconds; in both cases, and when cancelled, the process is gone and the files it made
    in the runtime directory are removed. What `ready` raises is passed on after the same cleaning up.
    So `argv` must hold -S: a guest that runs before `ready` is done could be killed at work.
    """
    before = _files(runtime)
    log_bytes = _size(runtime.log_path)
    try:
        spawned = spawn(argv, runtime=runtime, cwd=cwd)
    except SpecError:
        _remove_new(runtime, before)
        raise
    attempt = asyncio.ensure_future(ready())
    ending = asyncio.ensure_future(wait_exit(spawned.pidfd))
    try:
        done, _ = await asyncio.wait({attempt, ending}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if attempt in done and ending not in done:
            return spawned, attempt.result()
        if ending in done:
            words = (
                tail_log(runtime.log_path, since_bytes=log_bytes) or f"no reason given, exit status {ending.result()}"
            )
            raise SpecError(f"QEMU refused to start: {words}")
        words = tail_log(runtime.log_path, since_bytes=log_bytes)
        raise QemuError(f"QEMU did not answer within {timeout_s:g} s of its start", cause=words or None)
    except BaseException:
        await _abandon(spawned, runtime, before)
        raise
    finally:
        for task in (attempt, ending):
            task.cancel()
        await asyncio.gather(attempt, ending, return_exceptions=True)


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended, by the kernel's word of this moment; reaped or not. -1 names none: False."""
    if pidfd < 0:
        return False
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


async def wait_exit(pidfd: int) -> int | None:
    """Wait until the process ends; it may be a child or not.

    Returns the exit status (negative: the signal that killed it), or None when it was not our child and
    the kernel will not tell. Reaps a child.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    # The loop keeps one callback per descriptor; a duplicate lets two places wait for one process.
    own = os.dup(pidfd)

    def on_readable() -> None:
        loop.remove_reader(own)
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(own, on_readable)
    try:
        await ended
    finally:
        loop.remove_reader(own)
        os.close(own)
    return reap(pidfd)


def reap(pidfd: int) -> int | None:
    """The exit status of an ended child, collected; None when it still runs or is not our child."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of the process that has this pid now, or None when there is none; a zombie counts."""
    stat = _read_stat(pid)
    if stat is None:
        return None
    return ProcessIdentity(pid, stat[1], host_boot_id())


def host_boot_id() -> str:
    """The kernel's name for this boot of the host; another boot has another one."""
    return _BOOT_ID.read_text().strip()


def is_same_process(identity: ProcessIdentity) -> bool:
    """Whether exactly this process is still alive. A zombie is dead: it holds no lock and runs no guest."""
    stat = _read_stat(identity.pid)
    if stat is None or stat[0] in "ZX":
        return False
    return stat[1] == identity.start_time_ticks and host_boot_id() == identity.boot_id


def open_process(identity: ProcessIdentity) -> int | None:
    """A pidfd of exactly this process, or None when it is gone. The caller closes it."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except OSError:
        return None
    if is_same_process(identity):
        return pidfd
    os.close(pidfd)
    return None


def kill(identity: ProcessIdentity, signal_number: int = signal.SIGKILL) -> bool:
    """Signal exactly this process; False when it was already gone and nobody was signalled."""
    pidfd = open_process(identity)
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, signal_number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def tail_log(
    path: str,
    *,
    since_bytes: int = 0,
    limit_bytes: int = limits.VM_LOG_TAIL_BYTES_MAX,
    limit_lines: int = limits.VM_LOG_TAIL_LINES_MAX,
) -> str:
    """The last lines of a QEMU log after its first `since_bytes`, joined by '; ', without time stamps and
    the program's name; warnings only when there is nothing else. Empty when there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(since_bytes, os.fstat(file.fileno()).st_size - limit_bytes))
            text = file.read(limit_bytes).decode(errors="replace")
    except OSError:
        return ""
    lines = [_without_prefix(line.strip()) for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if "warning:" not in line] or lines
    return "; ".join(reasons[-limit_lines:])


def _without_prefix(line: str) -> str:
    """'2026-01-01T00:00:00.000000Z qemu-system-x86_64: -device x: why' -> '-device x: why'."""
    first, _, rest = line.partition(" ")
    if len(first) >= 20 and first.endswith("Z") and first[4:5] == "-":
        line = rest
    program, found, rest = line.partition(": ")
    return rest if found and "qemu-system" in program and " " not in program else line


def _read_stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time from /proc/PID/stat; the name in it may hold spaces and parentheses."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _open_log(runtime: RuntimePaths) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        return os.open(runtime.log_path, flags, 0o600)
    except OSError as error:
        raise QemuError(f"{runtime.log_path} cannot be written: {error.strerror}", cause=error) from error


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _files(runtime: RuntimePaths) -> set[str]:
    """What is in the directories that QEMU may write to."""
    found: set[str] = set()
    for directory in {runtime.directory, runtime.ram_directory or runtime.directory}:
        with contextlib.suppress(FileNotFoundError):
            found.update(entry.path for entry in os.scandir(directory))
    return found


def _remove_new(runtime: RuntimePaths, before: set[str]) -> None:
    """Remove what this start made; in a shared memory directory only the files of this runtime directory."""
    own_ram = runtime.ram_path("")[: -len(".ram")]
    for path in _files(runtime) - before:
        if os.path.dirname(path) == runtime.directory.rstrip("/") or path.startswith(own_ram):
            with contextlib.suppress(OSError):
                os.unlink(path)


async def _abandon(spawned: Spawned, runtime: RuntimePaths, before: set[str]) -> None:
    """End a QEMU whose start failed: it never ran a guest instruction that anybody was told about."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(spawned.pidfd, signal.SIGKILL)
    await asyncio.shield(wait_exit(spawned.pidfd))
    spawned.close()
    _remove_new(runtime, before)
