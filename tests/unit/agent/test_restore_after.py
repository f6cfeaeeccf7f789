"""What a restarted agent makes of a restore that an earlier one began: which facts, and so which row."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vmferry.agent.restore_after import take_up
from vmferry.agent.restoring import RestoreAttempt, RestoreWanted
from vmferry.core.restore import RestoreFact as F
from vmferry.core.restore import next_row
from vmferry.errors import QemuError
from vmferry.jobs.journal import Entry, JobState, Written, replay

JOB = "1f" * 16


class FakeMachine:
    is_gone = False
    on_gone = on_event = None

    def __init__(self, state: str, word: str) -> None:
        self.state, self.word = state, word

    async def run_state(self, **more: Any) -> str:
        if not self.state:
            raise QemuError("no answer")
        return self.state

    async def migration(self, **more: Any) -> dict[str, Any]:
        return {"status": self.word}


class FakeAgent:
    def __init__(self) -> None:
        self.vms: dict[str, Any] = {}
        self.begun: list[RestoreAttempt] = []
        self.entries: list[tuple[Entry, str]] = []
        self.clock = SimpleNamespace(wall_s=lambda: 1.0, now_s=lambda: 1.0)
        self.config = SimpleNamespace(name="host-a", qemu="qemu-system-x86_64")
        self.journal = SimpleNamespace(append=self._append)
        self.there: Any = None
        self.host = SimpleNamespace(find_qemu=lambda directory: self.there)
        self.restores = SimpleNamespace(begin=self.begun.append)

    def publish(self, name: str, data: dict[str, Any]) -> None:
        pass

    def tail_log(self, runtime: Any) -> str:
        return ""

    async def _append(self, kind: Entry, subject: str, body: Any = None) -> None:
        self.entries.append((kind, subject))


async def row_of(
    *entries: Entry, qemu: str | None = "paused", word: str = "postcopy-active", lazy: bool = True, kept: str = "/vm"
) -> tuple[str, RestoreAttempt, FakeAgent]:
    """The row that the next agent begins with.

    Args:
        entries: what the journal has of the job after RESTORE_WANTED.
        qemu: its run state; '' does not answer; None: it has ended.
        kept: the directory of the VM that has the name; '' no VM has it.
    """
    wanted = RestoreWanted(job=JOB, vm="web1", snapshot="5" * 32, name="monday", lazy=lazy, runs=True,
                           definition={}, directory="/vm")  # fmt: skip
    written = [Written(0, Entry.RESTORE_WANTED, JOB, msgspec.to_builtins(wanted))]
    written += [Written(number, kind, JOB, {}) for number, kind in enumerate(entries, 1)]
    state: JobState = replay(written).jobs[JOB]
    agent = FakeAgent()
    if kept:
        machine = None if qemu is None else FakeMachine(qemu, word)
        agent.vms["web1"] = SimpleNamespace(directory=kept, machine=machine, require_machine=lambda: machine)
    await take_up(agent, state)  # type: ignore[arg-type]
    attempt = agent.begun[0]
    return next_row(attempt.log, attempt.wish).label, attempt, agent


E = Entry


@pytest.mark.parametrize(
    ("entries", "more", "label"),
    [
        ((), {"kept": ""}, "given-up"),
        ((), {"kept": "/another"}, "given-up"),
        ((), {"qemu": None}, "given-up"),
        ((), {"lazy": False}, "run"),
        ((E.CANCEL_WANTED,), {}, "given-up"),
        ((E.CANCEL_WANTED, E.CANCEL_REFUSED), {"lazy": False}, "run"),
        ((E.STARTING, E.RENOUNCED), {}, "given-up"),
        ((E.STARTING,), {"lazy": False}, "run"),
        ((E.STARTING,), {}, "rejoin"),
        ((E.STARTING,), {"qemu": None}, "died"),
        ((E.STARTING,), {"kept": ""}, "died"),
        ((E.STARTING,), {"kept": "/another"}, "died"),
        ((E.STARTING, E.CANCEL_WANTED), {"qemu": "inmigrate"}, "given-up"),
        ((E.STARTING, E.CANCEL_WANTED), {"lazy": False}, "stands"),
        ((E.STARTING, E.CANCEL_WANTED), {"qemu": "running", "lazy": False}, "done"),
        ((E.STARTING, E.RAN), {"lazy": False}, "done"),
        ((E.STARTING, E.RAN), {"qemu": "io-error"}, "rejoin"),
        ((E.STARTING, E.RAN), {"qemu": "", "word": ""}, "rejoin"),
        ((E.STARTING,), {"qemu": "io-error", "word": "completed"}, "done"),
    ],
)
def test_what_the_next_agent_does(entries: tuple[Entry, ...], more: dict[str, Any], label: str) -> None:
    found, attempt, _ = asyncio.run(row_of(*entries, **more))
    assert found == label, attempt.log


@pytest.mark.parametrize("state", ["running", "paused", "io-error", "internal-error", "guest-panicked", "shutdown", ""])
@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kept", ["/vm", "", "/another"])
@pytest.mark.proves("S55", "S58")
def test_a_guest_that_may_have_run_is_never_taken_away(state: str, cancel: bool, ran: bool, kept: str) -> None:
    entries = (E.STARTING, *((E.RAN,) if ran else ()), *((E.CANCEL_WANTED,) if cancel else ()))
    label, attempt, _ = asyncio.run(row_of(*entries, qemu=state, kept=kept))
    assert label != "given-up"
    assert F.STARTING in attempt.log
    assert F.CANCEL not in attempt.log


def test_a_guest_that_a_person_stopped_is_not_started() -> None:
    """1. it ran, lazily  2. a person says stop  3. the agent restarts: pages go on to be sent, and no `cont` is."""
    _, attempt, _ = asyncio.run(row_of(E.STARTING, E.RAN, qemu="paused"))
    assert F.RAN in attempt.log
    rejoined = attempt.log.with_fact(F.REJOINED, round_no=1)
    assert next_row(rejoined, attempt.wish).label == "wait"


def test_a_cancel_that_cannot_be_obeyed_is_taken_back() -> None:
    _, _, agent = asyncio.run(row_of(E.STARTING, E.CANCEL_WANTED, qemu="running"))
    assert agent.entries == [(Entry.RAN, JOB), (Entry.CANCEL_REFUSED, JOB)]


def test_a_qemu_whose_vm_is_not_kept_any_more_is_named_and_left_alone(tmp_path: Path) -> None:
    agent = FakeAgent()
    agent.there = SimpleNamespace(pid=4711)
    wanted = RestoreWanted(job=JOB, vm="web1", snapshot="5" * 32, name="monday", lazy=True, runs=True,
                           definition={}, directory=str(tmp_path))  # fmt: skip
    state = JobState(JOB, "restore", msgspec.to_builtins(wanted), starting=True)
    asyncio.run(take_up(agent, state))  # type: ignore[arg-type]
    error = agent.begun[0].error
    assert error is not None
    assert "4711" in error.message
    assert error.guest == "unknown"
