"""Saves of a real agent with fake QEMUs whose guests stop by themselves on the way: nobody starts them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.save_sites import KEPT, PRECOPY, begin, check_snapshot, ended, save, until_fact
from vmferry.agent.save import SaveJob
from vmferry.core.saving import SaveFact
from vmferry.testing.fake_site import SETTLE_S, MakeSite, Site

F = SaveFact
HALTS = ["guest-panicked", "io-error", "shutdown", "internal-error"]


async def check_stands(site: Site, *states: str) -> None:
    """It was not started again, and is there."""
    assert not site.director.running("g")
    assert await site.agents["a"].vms["g"].require_machine().run_state() in states


@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.parametrize("halt", HALTS)
async def test_a_guest_that_stops_by_itself_is_saved_so_and_not_started(
    make_site: MakeSite, version: str, halt: str
) -> None:
    site = await make_site(version)
    site.director.script("a", {"active": {"halt": halt}})
    wire = await save(site, **PRECOPY)
    assert (wire["outcome"], wire["error"]) == ("saved", None)
    assert not check_snapshot(site, "one", way="precopy", run_state=halt).was_running
    assert any(halt in note for note in wire["notes"])
    assert [row["what"] for row in wire["timeline"]].count("RESUME") == 0
    await check_stands(site, "postmigrate")


async def test_one_that_stops_after_the_instant_of_a_background_save(make_site: MakeSite) -> None:
    """The snapshot is of a guest that ran; the guest itself is left as it is."""
    site = await make_site()
    site.director.script("a", {"converge": {"halt": "guest-panicked"}})
    wire = await save(site, way="background")
    assert wire["outcome"] == "saved"
    assert check_snapshot(site, "one", way="background").was_running
    await check_stands(site, "guest-panicked")


async def test_one_whose_save_fails_afterwards(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": {"halt": "io-error"}, "device": "fail"})
    wire = await save(site, **PRECOPY)
    assert wire["outcome"] == "none"
    await check_stands(site, "io-error")


async def test_the_next_agent_does_not_start_it_either(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU says `postmigrate` by then, as of any guest that was sent: the journal has what was heard."""
    site = await make_site()
    site.director.script("a", {"active": {"halt": "guest-panicked"}, "converge": "hold"})
    job = await begin(site, **PRECOPY, **KEPT)
    await until_fact(site, job, F.HALTED)
    stands = asyncio.Event()

    async def standing(self: SaveJob) -> None:
        stands.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as context:
        context.setattr(SaveJob, "give_back", standing)
        site.director.go("a", "converge")
        async with asyncio.timeout(SETTLE_S):
            await stands.wait()
        await site.stop("a")
    assert not site.director.running("g")
    await site.restart("a")
    again = site.agents["a"].saves.active("g")
    assert again is not None
    wire: dict[str, Any] = await ended(again)
    assert any("guest-panicked" in note for note in wire["notes"])
    await check_stands(site, "postmigrate")
