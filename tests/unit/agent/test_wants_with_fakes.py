"""What people ask for while a migration runs, against the disk, the grant, and a restart of the source's agent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vmferry.agent import peer_commands
from vmferry.agent.machine import Machine
from vmferry.core import hazards
from vmferry.core.facts import Fact
from vmferry.core.table import Outcome
from vmferry.errors import CancelRefused, OptionLocked
from vmferry.jobs.journal import Entry
from vmferry.testing.fake_site import MakeSite, Site


def hold_after(site: Site, held: Entry, fact: Fact) -> asyncio.Event:
    """The disk of `a` takes an entry of this kind, and whoever wrote it hears so only after the fact. The event is set
    once the entry is there."""
    journal = site.agents["a"].journal
    append = journal.append
    written = asyncio.Event()

    async def slow(kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        await append(kind, subject, body)
        if kind is held:
            written.set()
            await site.noted_by("a", fact)

    journal.append = slow  # type: ignore[method-assign]
    return written


def written(site: Site) -> list[Entry]:
    return [entry.kind for entry in site.agents["a"].journal.read()]


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.proves("S13", "S34")
async def test_a_cancel_that_the_grant_overtook_is_refused_for_good(make_site: MakeSite, mode: str) -> None:
    """1. the cancel is written  2. the grant goes out, and the link breaks  3. the cancel is refused  4. the source's
    agent restarts  5. the link is back."""
    site = await make_site()
    asked: list[asyncio.Task[object]] = []
    hold_after(site, Entry.CANCEL_WANTED, Fact.GRANT_SENT)
    site.when("a", Fact.COMMITTED, lambda: asked.append(asyncio.create_task(site.command("a", "vm-cancel", vm="g"))))
    site.when("a", Fact.GRANT_SENT, site.part)
    attempt = await site.migrate(mode=mode)
    await site.until_outcome(attempt, Outcome.UNCERTAIN)
    with pytest.raises(CancelRefused, match="the migration goes forward"):
        await asked[0]
    assert Entry.CANCEL_WANTED in written(site)
    await site.restart("a")
    assert Fact.CANCEL not in site.attempt().facts
    site.join()
    await site.settle()
    assert site.attempt().wire()["status"] == "completed"
    await site.check("b")


@pytest.mark.proves("S13")
async def test_a_cancel_that_was_accepted_outlives_a_restart(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    await site.migrate()
    await site.director.reached("a", "active")
    site.crash_at("a", Fact.CANCEL)
    await site.command("a", "vm-cancel", vm="g")
    await site.restart("a")
    await site.settle()
    assert (site.attempt().wire()["status"], site.attempt().wire()["outcome"]) == ("cancelled", "source")
    await site.check("a")


@pytest.mark.proves("S21")
async def test_a_switch_to_postcopy_by_hand_outlives_a_restart(make_site: MakeSite) -> None:
    site = await make_site("7.2")  # a newer one stops a TCG guest first and switches at once
    site.crash_at("a", Fact.START_POSTCOPY)
    attempt = await site.migrate(mode="postcopy", postcopy_after_passes=1_000_000)
    await site.noted_by("a", Fact.SETUP_DONE)
    await site.command("a", "vm-start-postcopy", vm="g")
    await site.command("a", "vm-start-postcopy", vm="g")
    assert written(site).count(Entry.POSTCOPY_WANTED) == 1
    assert Fact.POSTCOPY_TOLD not in attempt.facts
    await site.restart("a")
    await site.settle()
    assert Fact.PACKAGE_SENT in site.attempt().facts
    assert site.attempt().wire()["status"] == "completed"
    await site.check("b")


async def test_a_precopy_is_not_switched_by_hand_before_a_restart_nor_after_it(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    await site.migrate()
    await site.director.reached("a", "active")
    for _ in range(2):
        with pytest.raises(OptionLocked, match="was started as precopy"):
            await site.command("a", "vm-start-postcopy", vm="g")
        await site.restart("a")
    site.director.go("a", "active")
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S42")
@pytest.mark.parametrize(("version", "stops"), [("7.2", False), ("11.1", True)])
async def test_a_source_that_may_go_back_is_paused_before_the_switch_to_postcopy(
    version: str, stops: bool, make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it goes back to is then a paused guest, and not a second one that runs."""
    monkeypatch.setattr(hazards, "standby_loses_writes", lambda *_: False)  # as under KVM
    said: list[str] = []
    execute = Machine.execute

    async def listen(machine: Machine, command: str, *more: Any, **options: Any) -> Any:
        said.append(command)
        return await execute(machine, command, *more, **options)

    monkeypatch.setattr(Machine, "execute", listen)
    site = await make_site(version)
    attempt = await site.migrate(mode="postcopy", postcopy_after_passes=0)
    await site.settle()
    assert attempt.wire()["mode"] == "postcopy"
    before = said[: said.index("migrate-start-postcopy")]
    assert ("stop" in before) is stops
    await site.check("b")


@pytest.mark.proves("S13", "S35")
async def test_a_place_that_is_released_while_it_is_written_down_is_not_made(make_site: MakeSite) -> None:
    """1. the place is being written into the journal  2. a release of the job comes, finds no place, and renounces it
    3. a place that was made now would wait for a source that has gone on."""
    site = await make_site()
    there = site.agents["b"]
    append, is_first = there.journal.append, True

    async def slow(kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        nonlocal is_first
        await append(kind, subject, body)
        if kind is Entry.PLACE_WANTED and is_first:
            is_first = False
            await peer_commands.COMMANDS["peer-release"](there, "a", {"job": subject, "generation": 2})

    there.journal.append = slow  # type: ignore[method-assign]
    attempt = await site.migrate()
    await site.settle()
    assert (attempt.wire()["status"], attempt.wire()["outcome"]) == ("failed", "source")
    assert there.places == {}
    await site.check("a")
