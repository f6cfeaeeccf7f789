"""What a source's attempt keeps of the memory that its destination may need, and when that is not right any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmferry.agent.source import SourceAttempt
from vmferry.agent.wants import Wanted
from vmferry.clock import SystemClock
from vmferry.core.facts import Fact
from vmferry.qmp.codec import Event

RESUME = Event("RESUME", {}, None)


class Kept:
    """A memory that knows whether it was given back."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


class World:
    """As much of an agent and a machine as an attempt needs to hear events."""

    def __init__(self) -> None:
        self.asked = 0
        machine = SimpleNamespace(is_gone=False, version=(11, 1, 0), on_event=None, on_gone=None)
        context = SimpleNamespace(
            clock=SystemClock(),
            publish=lambda *_: None,
            clock_offset_s=lambda _: 0.0,
            remember_memory=self._remember,
            keep_task=lambda coroutine: coroutine.close(),
        )
        wanted = Wanted(job="j1", vm="web1", destination="host-b", generation=2, wanted_s=1.0)
        kept = SimpleNamespace(machine=machine)
        self.attempt = SourceAttempt(cast(Any, context), wanted, cast(Any, kept))
        self.memory = Kept()
        self.attempt.memory = cast(Any, self.memory)

    async def _remember(self, attempt: SourceAttempt) -> None:
        self.asked += 1


def test_a_guest_that_ran_again_after_the_switchover_takes_its_memory_with_it() -> None:
    made = World()
    made.attempt.note(Fact.PACKAGE_SENT)
    made.attempt.on_qemu_event(RESUME)
    assert made.attempt.has_run_since
    assert made.memory.is_closed
    assert made.attempt.memory is None


def test_a_guest_that_goes_on_before_the_switchover_does_not() -> None:
    made = World()
    made.attempt.on_qemu_event(RESUME)
    assert (made.attempt.has_run_since, made.memory.is_closed) == (False, False)


@pytest.mark.parametrize("is_anew", [False, True], ids=["as the news comes", "an agent that began anew"])
def test_memory_is_remembered_once_in_the_life_of_an_agent(is_anew: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[Any] = []

    def make(coroutine: Any, *, name: str) -> Any:
        tasks.append(name)
        return coroutine

    monkeypatch.setattr("vmferry.agent.source.asyncio.create_task", make)
    made = World()
    made.attempt.note(Fact.PACKAGE_SENT)
    if is_anew:  # the journal knows it already
        made.attempt.note(Fact.RUN_ACKED)
    for _ in range(3):
        made.attempt.hear_target({"ran": True})
    assert tasks == ["remember"]


def test_nothing_is_remembered_when_everything_was_sent() -> None:
    made = World()
    for fact in (Fact.PACKAGE_SENT, Fact.ALL_SENT):
        made.attempt.note(fact)
    made.attempt.hear_target({"ran": True})
    assert made.asked == 0
    assert not made.attempt._memory_asked
