"""Processes: detached, recognised, signalled without hitting a stranger, refused without a trace."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmferry.errors import QemuError, SpecError
from vmferry.vm import spawn
from vmferry.vm.runtime import RuntimePaths

SLEEP = ["/bin/sleep", "300"]


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimePaths:
    return RuntimePaths(str(tmp_path))


async def test_a_process_is_known_killed_once_and_reaped(runtime: RuntimePaths) -> None:
    spawned = spawn.spawn(SLEEP, runtime=runtime)
    assert spawn.is_same_process(spawned.identity)
    assert spawned.identity == spawn.identify(spawned.pid)
    assert os.getsid(spawned.pid) == spawned.pid
    waiters = [asyncio.create_task(spawn.wait_exit(spawned.pidfd)) for _ in range(2)]
    await asyncio.sleep(0)
    assert spawn.kill(spawned.identity, signal.SIGTERM)
    assert set(await asyncio.gather(*waiters)) == {-signal.SIGTERM, None}
    assert not spawn.is_same_process(spawned.identity)
    assert not spawn.kill(spawned.identity)
    spawned.close()


def test_a_zombie_is_dead(runtime: RuntimePaths) -> None:
    spawned = spawn.spawn(["/bin/true"], runtime=runtime)
    os.waitid(os.P_PIDFD, spawned.pidfd, os.WEXITED | os.WNOWAIT)
    assert spawn.identify(spawned.pid) == spawned.identity
    assert not spawn.is_same_process(spawned.identity)
    assert spawn.reap(spawned.pidfd) == 0
    assert spawn.reap(spawned.pidfd) is None
    spawned.close()


@pytest.mark.parametrize("change", [{"start_time_ticks": 1}, {"boot_id": "another boot"}])
def test_a_reused_pid_is_never_signalled(runtime: RuntimePaths, change: dict[str, object]) -> None:
    spawned = spawn.spawn(SLEEP, runtime=runtime)
    try:
        earlier = dataclasses.replace(spawned.identity, **change)  # type: ignore[arg-type]
        assert not spawn.is_same_process(earlier)
        assert spawn.open_process(earlier) is None
        assert not spawn.kill(earlier)
        assert spawn.is_same_process(spawned.identity)
    finally:
        spawn.kill(spawned.identity)
        os.waitid(os.P_PIDFD, spawned.pidfd, os.WEXITED)
        spawned.close()


def test_no_descriptor_of_the_agent_is_inherited(runtime: RuntimePaths, tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        spawned = spawn.spawn(["/bin/ls", "-l", "/proc/self/fd"], runtime=runtime)
        os.waitid(os.P_PIDFD, spawned.pidfd, os.WEXITED)
        spawned.close()
    output = Path(runtime.log_path).read_text()
    assert "/dev/null" in output
    assert "secret" not in output


async def test_a_refused_start_raises_the_programs_words_and_leaves_nothing(runtime: RuntimePaths) -> None:
    script = f"echo 'warning: noise'; touch {runtime.qmp_path}; echo 'qemu-system-x: -device foo: bad' >&2; exit 1"
    earlier = spawn.spawn(["/bin/echo", "boom"], runtime=runtime)
    await spawn.wait_exit(earlier.pidfd)
    earlier.close()
    with pytest.raises(SpecError, match=r"^QEMU refused to start: -device foo: bad$"):
        await spawn.start(["/bin/sh", "-c", script], runtime=runtime, ready=_never, timeout_s=10)
    assert os.listdir(runtime.directory) == ["qemu.log"], "a log of an earlier run stays"


async def test_a_start_that_never_gets_ready_is_ended(runtime: RuntimePaths) -> None:
    with pytest.raises(QemuError, match=r"did not answer within 0\.05 s"):
        await spawn.start(SLEEP, runtime=runtime, ready=_never, timeout_s=0.05)
    assert os.listdir(runtime.directory) == []


async def test_what_ready_raises_is_passed_on(runtime: RuntimePaths) -> None:
    async def fail() -> None:
        raise ConnectionError("no")

    with pytest.raises(ConnectionError):
        await spawn.start(SLEEP, runtime=runtime, ready=fail, timeout_s=10)
    assert os.listdir(runtime.directory) == []


async def test_a_ready_start_returns_both(runtime: RuntimePaths) -> None:
    async def ready() -> str:
        return "greeting"

    spawned, answer = await spawn.start(SLEEP, runtime=runtime, ready=ready, timeout_s=10)
    assert answer == "greeting"
    assert not spawn.has_ended(spawned.pidfd)
    assert spawn.kill(spawned.identity)
    assert await spawn.wait_exit(spawned.pidfd) == -signal.SIGKILL
    assert spawn.has_ended(spawned.pidfd)
    assert not spawn.has_ended(-1)
    spawned.close()


def test_a_missing_program_is_a_spec_error(runtime: RuntimePaths) -> None:
    with pytest.raises(SpecError, match="/no/such/qemu cannot be started: No such file"):
        spawn.spawn(["/no/such/qemu"], runtime=runtime)


def test_a_process_outlives_the_one_that_started_it(runtime: RuntimePaths) -> None:
    code = (
        "import sys; from vmferry.vm import spawn; from vmferry.vm.runtime import RuntimePaths\n"
        "s = spawn.spawn(['/bin/sleep', '300'], runtime=RuntimePaths(sys.argv[1]))\n"
        "print(s.pid, s.start_time_ticks, s.identity.boot_id, flush=True)\n"
        "import os, signal; os.killpg(os.getpgrp(), signal.SIGKILL)\n"
    )
    parent = subprocess.run(
        [sys.executable, "-c", code, runtime.directory],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.returncode == -signal.SIGKILL
    pid, ticks, boot_id = parent.stdout.split()
    identity = spawn.ProcessIdentity(int(pid), int(ticks), boot_id)
    assert spawn.is_same_process(identity)
    assert spawn.kill(identity)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (
            "2026-11-21T04:19:16.742790Z qemu-system-x86_64: -device foo: not valid\n",
            "-device foo: not valid",
        ),
        ("qemu-system-x86_64: warning: host lacks x\n", "warning: host lacks x"),
        ("qemu-system-x86_64: warning: host lacks x\nboom: no\n", "boom: no"),
        ("\n".join("abcdefg"), "c; d; e; f; g"),
    ],
)
def test_tail_log(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "log").write_text(text)
    assert spawn.tail_log(str(tmp_path / "log")) == expected


def test_tail_of_a_missing_log_is_empty(tmp_path: Path) -> None:
    assert spawn.tail_log(str(tmp_path / "none")) == ""


async def _never() -> None:
    await asyncio.Event().wait()
