"""What a host says of a guest that is on its way to it, also while nobody else can be asked."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.core.facts import Fact
from vmferry.errors import Busy, UnknownVm
from vmferry.testing.fake_site import MakeSite, Site


async def status(site: Site, host: str = "b") -> dict[str, Any]:
    return dict(await site.command(host, "vm-status", vm="g"))


async def test_the_destination_says_what_it_knows_while_the_sources_agent_is_down(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    attempt = await site.migrate()
    await site.noted_by("b", Fact.HEADER_SEEN)
    assert (await status(site))["host"] == "a", "the source conducts it as long as it answers"
    await site.stop("a")
    told = await status(site)
    assert (told["host"], told["run_state"], told["machine"]) == ("b", "incoming", "pc-q35-7.2")
    assert told["pid"] == site.director.newest("b", incoming=True).pid
    moving = told["migration"]
    assert (moving["job"], moving["source"], moving["destination"]) == (attempt.job, "a", "b")
    assert (moving["status"], moving["row"], moving["over"]) == ("active", "D-load", False)
    assert "bring the agent of a back" in moving["action"]
    assert "the agent of a does not answer" in moving["sentence"]
    for command in ("vm-stop", "vm-plan"):
        more = {"destination": "a"} if command == "vm-plan" else {}
        with pytest.raises(Busy, match="g is awaited here from a"):
            await site.command("b", command, vm="g", **more)
    await site.restart("a")
    site.director.go("a", "active")
    await site.settle()


async def test_a_restart_of_the_destination_forgets_none_of_it(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"device": "hold"})
    await site.migrate()
    await site.director.reached("a", "device")
    await site.stop("a")
    await site.restart("b")
    told = await status(site)
    assert (told["host"], told["run_state"]) == ("b", "incoming")
    assert told["migration"]["row"] == "D-load"
    await site.restart("a")
    site.director.go("a", "device")
    await site.settle()


async def test_a_guest_that_arrived_has_its_journey_told_by_this_side_until_the_source_answers(
    make_site: MakeSite,
) -> None:
    site = await make_site()
    site.director.script("a", {"pages": "hold"})
    await site.migrate(mode="postcopy")
    await site.noted_by("b", Fact.RUN_ACKED)
    await site.stop("a")
    told = await status(site)
    assert (told["host"], told["run_state"]) == ("b", "running")
    assert told["migration"]["outcome"] == "destination"
    assert told["migration"]["sentence"].startswith("g runs on b; the agent of a does not answer")
    await site.restart("a")
    await site.pages_arrive()


async def test_a_third_host_finds_the_place_and_uses_the_name_for_nothing_else(make_site: MakeSite) -> None:
    """The third host is `a` itself, with a journal that knows nothing."""
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    await site.migrate()
    await site.noted_by("b", Fact.HEADER_SEEN)
    await site.stop("a")
    for path in (site.directory / "sa").glob("journal*"):
        path.unlink()
    await site.restart("a")
    told = await status(site, "a")
    assert (told["host"], told["migration"]["row"]) == ("b", "D-load")
    with pytest.raises(Busy, match="b has a VM named g already"):
        await site.run_vm()
    with pytest.raises(Busy, match="g is awaited here"):
        await site.command("a", "vm-stop", vm="g")


async def test_a_place_that_is_settled_is_nobodys_vm(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("b", {"in-load": "die"})
    await site.migrate()
    await site.settle()
    await site.stop("a")
    with pytest.raises(UnknownVm):
        await status(site)
