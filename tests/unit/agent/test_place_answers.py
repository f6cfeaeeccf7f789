"""What the source makes of answers to its question for a place: of lost ones, and of those of somebody in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vmferry.agent import peer_commands, source_act
from vmferry.core.facts import Fact
from vmferry.errors import Unfit
from vmferry.testing.fake_site import SETTLE_S, MakeSite


def answered(monkeypatch: pytest.MonkeyPatch, after: Callable[[int], Awaitable[None]]) -> list[int]:
    """Each place that is asked for is made, and then this is done with the n-th answer (from 1)."""
    real, asked = peer_commands.COMMANDS["peer-prepare"], list[int]()

    async def prepare(agent: Any, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
        offer: dict[str, Any] = await real(agent, who, arguments)
        asked.append(len(asked) + 1)
        await after(asked[-1])
        return offer

    monkeypatch.setitem(peer_commands.COMMANDS, "peer-prepare", prepare)
    return asked


async def test_a_place_whose_answer_is_lost_is_asked_for_again_and_is_the_same(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_act, "PLACE_ASK_S", 0.5)
    site = await make_site()

    async def lost(number: int) -> None:
        if number == 1:
            await asyncio.Event().wait()

    asked = answered(monkeypatch, lost)
    attempt = await site.migrate()
    await site.settle()
    assert asked == [1, 2]
    assert attempt.wire()["outcome"] == "destination"
    assert list(site.agents["b"].places) == [attempt.job]
    await site.check("b")


async def test_a_place_that_never_answers_ends_the_attempt_and_is_given_up(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_act, "PLACE_ASK_S", 0.3)
    monkeypatch.setattr(source_act, "PREPARE_S", 1.0)
    site = await make_site()

    async def lost(number: int) -> None:
        await asyncio.Event().wait()

    asked = answered(monkeypatch, lost)
    attempt = await site.migrate()
    await site.settle()
    assert len(asked) > 1
    wire = attempt.wire()
    assert (wire["outcome"], wire["error"]["code"]) == ("source", "host-unreachable")
    assert "peer-prepare" in wire["error"]["message"]
    await site.check("a")


async def test_a_refusal_that_is_not_the_destinations_leaves_no_place_behind(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something in between says no, and the destination has a place with a QEMU."""
    site = await make_site()

    async def refused(number: int) -> None:
        raise Unfit("somebody in between says no", side="destination")

    answered(monkeypatch, refused)
    attempt = await site.migrate()
    await site.settle()
    assert "somebody in between" in str(attempt.wire()["error"])
    (place,) = site.agents["b"].places.values()
    assert Fact.RELEASE in place.facts
    await asyncio.wait_for(place.ended.wait(), SETTLE_S)
    assert not list(site.agents["b"].vm_directory.glob("g-*"))
    await site.check("a")
