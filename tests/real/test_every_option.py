"""Every option of QEMU in every phase of a migration: its effect, or a refusal that names the reason.

Generated from the table's rows. The judge is the QEMU itself: what it has after a phase differs from what it had before
in exactly those options whose change was accepted.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmferry.core.migration_status import MigrationStatus
from vmferry.core.options import OPEN, OPTIONS, Option, Policy, Role, Value, ValueType
from vmferry.errors import VmferryError
from vmferry.qmp.blocking import BlockingClient
from vmferry.testing.hosts import NEWEST, OLDEST, Follower, Guests, MakePair, TwoAgents, boot, stopped

pytestmark = pytest.mark.real

SLOW = ("--mode", "precopy", "--set", "max-bandwidth=2M", "--set", "downtime-limit=100ms")
IN_POSTCOPY = (
    "--mode", "postcopy", "--postcopy-after-passes", "0",
    "--set", "max-bandwidth=2M", "--set", "max-postcopy-bandwidth=2M",
)  # fmt: skip

Phase = Callable[[TwoAgents, Follower], contextlib.AbstractContextManager[str]]


def begin(pair: TwoAgents, *words: str) -> str:
    return str(pair.a.ok("migrate", "web1", "host-b", "--detach", *words)["job"])


@contextlib.contextmanager
def active(pair: TwoAgents, follow: Follower) -> Iterator[str]:
    job = begin(pair, *SLOW)
    follow.status("active")
    yield job
    pair.a.ok("cancel", "web1")


@contextlib.contextmanager
def pre_switchover(pair: TwoAgents, follow: Follower) -> Iterator[str]:
    job = begin(pair, "--mode", "precopy", "--no-auto-finalize")
    follow.status("pre-switchover")
    yield job
    pair.a.ok("job", "finalize", job)


@contextlib.contextmanager
def postcopy_active(pair: TwoAgents, follow: Follower) -> Iterator[str]:
    job = begin(pair, *IN_POSTCOPY)
    follow.status("postcopy-active")
    yield job
    pair.a.ok("set", "web1", "max-postcopy-bandwidth=0")


@contextlib.contextmanager
def postcopy_paused(pair: TwoAgents, follow: Follower) -> Iterator[str]:
    job = begin(pair, *IN_POSTCOPY)
    follow.status("postcopy-active")
    pair.a.ok("job", "pause", job)
    follow.status("postcopy-paused")
    yield job
    pair.a.ok("job", "resume", job)
    follow.status("postcopy-active")
    pair.a.ok("set", "web1", "max-postcopy-bandwidth=0")


@contextlib.contextmanager
def cancelling(pair: TwoAgents, follow: Follower) -> Iterator[str]:
    job = begin(pair, *SLOW)
    follow.status("active")
    assert pair.b.process is not None
    with stopped(pair.b.process.pid):  # nobody there gives the place up
        asked = pair.a.cli_start("cancel", "web1", "--json")
        follow.status("cancelling")
        yield job
    asked.communicate(timeout=20)


@contextlib.contextmanager
def failing(pair: TwoAgents, follow: Follower) -> Iterator[str]:
    job = begin(pair, *SLOW)
    follow.status("active")
    assert pair.b.process is not None
    with stopped(pair.b.process.pid):
        os.kill(pair.b.qemu_pid("web1"), signal.SIGKILL)
        follow.status("failing")
        yield job


PHASES: dict[MigrationStatus, Phase] = {
    MigrationStatus.ACTIVE: active,
    MigrationStatus.PRE_SWITCHOVER: pre_switchover,
    MigrationStatus.POSTCOPY_ACTIVE: postcopy_active,
    MigrationStatus.POSTCOPY_PAUSED: postcopy_paused,
    MigrationStatus.CANCELLING: cancelling,
    MigrationStatus.FAILING: failing,
}
"""Those that can be held for as long as it takes. What is between them lasts milliseconds, and its windows are those
of the table, which is walked without QEMU."""
WHERE_IT_ENDS = dict.fromkeys((MigrationStatus.ACTIVE, MigrationStatus.CANCELLING, MigrationStatus.FAILING), "host-a")


def another(option: Option, now: Value | None) -> Value:
    """A value that the option may have, and has not now."""
    match option.type:
        case ValueType.BOOL:
            return not now
        case ValueType.ENUM:
            return next(word for word in option.words if word != now)
        case ValueType.STR:
            return "another"
        case ValueType.LIST:
            return []
        case _:
            assert option.low is not None
            assert option.high is not None
            assert now is None or isinstance(now, int)
            if now is None:
                return max(option.low, 1)
            if option.power_of_two:
                return now * 2 if now * 2 <= option.high else now // 2
            return now + 1 if now < option.high else now - 1


def read(path: str) -> dict[str, Any]:
    """What QEMU has."""
    with BlockingClient(path) as monitor:
        states = {each["capability"]: each["state"] for each in monitor.execute("query-migrate-capabilities")}
        return {**states, **monitor.execute("query-migrate-parameters")}


def change(follow: Follower, job: str, name: str, value: Value) -> str | None:
    """None, or why it is refused."""
    try:
        follow.execute("job-change", {"id": job, "config": {name: value}})
    except VmferryError as error:
        return str(error)
    return None


def every_option_once(follow: Follower, job: str, status: MigrationStatus, path: str) -> None:
    before = read(path)
    accepted: dict[str, Value] = {}
    for name, option in OPTIONS.items():
        value = another(option, before.get(name))
        is_open = status in OPEN[option.window] and option.policy is Policy.FREE and Role.SOURCE in option.roles
        refusal = change(follow, job, name, value)
        if refusal is None:
            assert is_open, f"{name} is accepted in {status}"
            accepted[name] = value
        else:
            assert not (is_open and name in before), f"{name} is refused in its window: {refusal}"
            assert name in refusal, f"{name} is refused in words that do not name it: {refusal}"
    assert read(path) == {**before, **accepted}
    assert bool(accepted) == (status in (MigrationStatus.ACTIVE, MigrationStatus.POSTCOPY_ACTIVE))


@pytest.mark.proves("S67", "S69", "S72", "S77", "S80")
@pytest.mark.parametrize("version", sorted({OLDEST, NEWEST}))
@pytest.mark.parametrize("status", list(PHASES), ids=lambda status: status.value)
def test_an_option_changes_in_its_window_and_nowhere_else(
    status: MigrationStatus, version: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    path = str(pair.a.status("web1")["monitor"])
    with pair.a.follow() as follow:
        with PHASES[status](pair, follow) as job:
            every_option_once(follow, job, status, path)
        follow.end()
    assert pair.running_on("web1") == [WHERE_IT_ENDS.get(status, "host-b")]
