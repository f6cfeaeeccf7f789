"""The loop of an attempt by itself, with a table of one row."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vmferry.agent.loop import AttemptLoop
from vmferry.clock import SystemClock
from vmferry.core.effects import Effect
from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Row

GRANT = next(row for row in SOURCE_ROWS if row.do is Effect.SEND_GRANT)


class OneRow(AttemptLoop[Effect]):
    """Wants the grant to be sent for ever; ends once its guard was asked so often as there are answers."""

    def __init__(self, *answers: bool) -> None:
        super().__init__(job="j1", vm="web1", clock=SystemClock())
        self.answers = list(answers)
        self.acted: list[Effect] = []

    def row(self) -> Row[Effect]:
        return GRANT

    def allows(self, effect: Effect) -> bool:
        answer = self.answers.pop(0)
        if not self.answers:
            self.ended.set()
        return answer

    async def act(self, effect: Effect) -> None:
        self.acted.append(effect)

    def interruptible(self, effect: Effect) -> bool:
        return False

    def on_trouble(self, effect: Effect, error: Exception) -> None:
        raise AssertionError(error)


async def test_an_effect_is_carried_out_under_its_guard() -> None:
    loop = OneRow(True, True)
    await loop.run()
    assert loop.acted == [Effect.SEND_GRANT]


async def test_what_was_allowed_when_it_was_decided_is_asked_again_when_it_is_done() -> None:
    """1. the loop finds the grant allowed and makes its task  2. a cancel is accepted  3. the task begins."""
    loop = OneRow(True, False)
    await loop.run()
    assert loop.acted == []


class Malformed(OneRow):
    """What it asks is answered in other types than ours."""

    def __init__(self, *answers: bool) -> None:
        super().__init__(*answers)
        self.troubles: list[Exception] = []

    async def act(self, effect: Effect) -> None:
        answer: Any = [1, None]
        self.acted.append(answer["loaded"])

    def on_trouble(self, effect: Effect, error: Exception) -> None:
        self.troubles.append(error)


@pytest.mark.proves("S53")
async def test_a_malformed_answer_is_trouble_and_does_not_end_the_loop() -> None:
    loop = Malformed(True, True, True, True)
    await loop.run()
    assert [type(error) for error in loop.troubles] == [TypeError, TypeError]


class Holding(OneRow):
    """Its effect holds something, and takes a turn of the loop to give it back."""

    def __init__(self) -> None:
        super().__init__(True, True, True)
        self.holds = asyncio.Event()

    async def act(self, effect: Effect) -> None:
        self.holds.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.holds.clear()


async def test_a_loop_that_is_ended_has_given_back_what_its_effect_held() -> None:
    """An agent that closes ends its attempts in the middle of what they do."""
    loop = Holding()
    running = asyncio.create_task(loop.run())
    await loop.holds.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not loop.holds.is_set()
