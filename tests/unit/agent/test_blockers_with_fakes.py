"""Blockers that people and tools hold: listed, cited, durable, honoured at the moment of acting, taken along."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.errors import Blocked, Busy, UsageError
from vmferry.testing.fake_site import MakeSite, Site


async def block(site: Site, operation: str, name: str = "backup", host: str = "a") -> dict[str, Any]:
    wire = await site.command(host, "blocker-add", vm="g", name=name, operation=operation, reason="it is being copied")
    return dict(wire)


async def listed(site: Site, host: str = "a") -> list[tuple[str, str]]:
    wire = await site.command(host, "vm-status", vm="g")
    return [(one["operation"], one["name"]) for one in wire["blockers"]]


@pytest.mark.proves("S79")
async def test_one_against_migration_is_cited_by_plan_and_migrate_until_it_is_removed(
    make_site: MakeSite,
) -> None:
    site = await make_site()
    wire = await block(site, "migrate")
    assert wire["reason"] == "it is being copied"
    assert wire["since_s"] > 0
    await site.restart("a")
    assert await listed(site) == [("migrate", "backup")]
    with pytest.raises(Blocked, match="blocked by backup: it is being copied"):
        await site.migrate()
    plan = await site.command("a", "vm-plan", vm="g", destination="b")
    assert not plan["possible"]
    assert [one["code"] for one in plan["objections"] if one["weight"] == "blocker"] == ["blocked"]
    await site.command("a", "blocker-remove", vm="g", name="backup")
    await site.restart("a")
    assert await listed(site) == []
    await site.migrate()
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S79")
async def test_a_migration_holds_blockers_while_it_runs_and_refusals_cite_them(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"converge": "hold"})
    attempt = await site.migrate()
    await site.noted_by("a", Fact.SETUP_DONE)
    holder = f"job {attempt.job}"
    assert await listed(site) == [(operation, holder) for operation in ("migrate", "set", "stop", "snapshot")]
    for command, more in (("vm-stop", {}), ("vm-migrate", {"destination": "b"})):
        with pytest.raises(Busy, match=f"on its way to b already .job {attempt.job}"):
            await site.command("a", command, vm="g", **more)
    with pytest.raises(Busy, match="on its way"):
        await block(site, "stop")
    site.director.go("a", "converge")
    await site.settle()
    assert await listed(site, "b") == []
    await site.check("b")


@pytest.mark.proves("S79")
async def test_one_that_comes_after_the_plan_is_honoured_before_memory_moves(make_site: MakeSite) -> None:
    site = await make_site()
    blockers = site.agents["a"].blockers

    def hold_one() -> None:
        blockers.restore("g", [{"name": "late", "operation": "migrate", "reason": "it came late", "since_s": 1.0}])

    site.when("a", Fact.CONFIGURED, hold_one)
    attempt = await site.migrate()
    await site.settle()
    wire = attempt.wire()
    assert (wire["status"], wire["outcome"], wire["error"]["code"]) == ("failed", "source", "blocked")
    assert Fact.STARTED not in attempt.facts
    await site.check("a")


@pytest.mark.proves("S79")
async def test_blockers_go_along_with_their_vm(make_site: MakeSite) -> None:
    site = await make_site()
    await block(site, "stop")
    await block(site, "set", "audit")
    attempt = await site.migrate()
    with pytest.raises(Blocked, match="audit"):
        await site.command("a", "vm-set", vm="g", settings=["retry-for=1s"])
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"
    await site.restart("a")
    await site.restart("b")
    assert await listed(site, "b") == [("stop", "backup"), ("set", "audit")]
    assert site.agents["a"].blockers.held("g") == ()
    with pytest.raises(Blocked, match="stop is blocked by backup"):
        await site.command("b", "vm-stop", vm="g", force=True)
    await site.command("b", "blocker-remove", vm="g", name="backup")
    await site.command("b", "vm-stop", vm="g", force=True)
    assert site.agents["b"].blockers.held("g") == ()


async def test_what_is_no_blocker_is_refused(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    for wrong in ({"name": "a/b"}, {"reason": " "}, {"operation": "dance"}):
        wish = {"vm": "g", "name": "n", "operation": "stop", "reason": "r", **wrong}
        with pytest.raises(UsageError):
            await site.command("a", "blocker-add", **wish)
    with pytest.raises(UsageError, match="none"):
        await site.command("a", "blocker-remove", vm="g", name="n")
    monkeypatch.setattr(limits, "BLOCKERS_MAX", 1)
    await block(site, "stop")
    await block(site, "migrate")
    assert await listed(site) == [("migrate", "backup")], "the same name again replaces it"
    with pytest.raises(Busy, match="1 blockers"):
        await block(site, "stop", "another")
