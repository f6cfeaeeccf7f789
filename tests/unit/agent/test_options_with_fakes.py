"""A QEMU that stays has the options that it had before somebody wanted to move its guest."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.agent import source_options
from vmferry.agent.machine_options import read_options
from vmferry.agent.source import SourceAttempt
from vmferry.agent.way_back import SLOWEST
from vmferry.core.facts import Fact
from vmferry.errors import OptionLocked
from vmferry.jobs.journal import Entry
from vmferry.testing.fake_site import MakeSite, Site

OWN = {"downtime-limit": 123, "max-bandwidth": 7_000_000, "announce-rounds": 3}


async def options(site: Site) -> dict[str, Any]:
    return await read_options(site.agents["a"].vms["g"].require_machine())


async def as_its_owner_had_it(site: Site) -> dict[str, Any]:
    """Options that are not QEMU's defaults, as somebody who started it by hand may have set them."""
    machine = site.agents["a"].vms["g"].require_machine()
    await machine.execute("migrate-set-capabilities", {"capabilities": [{"capability": "xbzrle", "state": True}]})
    await machine.execute("migrate-set-parameters", OWN)
    return await options(site)


@pytest.mark.parametrize("ends", ["cancel", "error"])
@pytest.mark.parametrize("fact", [Fact.PREPARED, Fact.CONFIGURED, Fact.STARTED, Fact.SETUP_DONE, Fact.SWITCHOVER])
async def test_options_are_put_back_by_an_agent_that_was_started_since(
    make_site: MakeSite, fact: Fact, ends: str
) -> None:
    site = await make_site()
    before = await as_its_owner_had_it(site)
    if ends == "error":
        site.director.script("b", {"in-loaded": "fail"})
    site.crash_at("a", fact)
    await site.migrate(settings=["downtime-limit=250ms"])
    await site.noted_by("a", fact)
    assert await options(site) != before
    if ends == "cancel":
        await site.command("a", "vm-cancel", vm="g")
    await site.restart("a")
    await site.settle()
    assert site.attempt().wire()["status"] == ("cancelled" if ends == "cancel" else "failed")
    assert await options(site) == before
    await site.check("a")


async def test_what_they_were_is_durable_before_the_first_one_changes(make_site: MakeSite) -> None:
    site = await make_site()
    before = await as_its_owner_had_it(site)
    journal = site.agents["a"].journal
    append = journal.append
    seen: list[dict[str, Any]] = []

    async def looking(kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        await append(kind, subject, body)
        if kind is Entry.OPTIONS_BEFORE:
            seen.append(await options(site))

    journal.append = looking  # type: ignore[method-assign]
    await site.migrate(settings=["downtime-limit=250ms"])
    await site.settle()
    assert seen == [before]
    written = [entry.body for entry in journal.read() if entry.kind is Entry.OPTIONS_BEFORE]
    assert len(written) == 1
    assert written[0].items() <= before.items()
    assert {"xbzrle", *OWN} <= set(written[0])


async def test_an_option_that_is_changed_on_the_way_is_put_back_too(make_site: MakeSite) -> None:
    """Also when the agent that knew the plan is gone."""
    site = await make_site()
    before = await as_its_owner_had_it(site)
    site.director.script("a", {"active": "hold"})
    await site.migrate()
    await site.director.reached("a", "active")
    await site.restart("a")
    await site.command("a", "vm-set", vm="g", settings=["max-bandwidth=2M"])
    assert (await options(site))["max-bandwidth"] != before["max-bandwidth"]
    await site.command("a", "vm-cancel", vm="g")
    await site.settle()
    assert await options(site) == before
    await site.check("a")


# --- changed on the way -----------------------------------------------------------------------------------------

PACE = "max-postcopy-bandwidth"


async def held_back(site: Site) -> SourceAttempt:
    """A postcopy of QEMU 7.2 whose destination is about to be started: its pages go as slowly as they can."""
    site.director.script("b", {"cont": "hold"})
    attempt = await site.migrate(mode="postcopy", settings=[f"{PACE}=1M"])
    await site.director.reached("b", "cont")
    assert (await options(site))[PACE] == SLOWEST
    return attempt


@pytest.mark.proves("S72")
@pytest.mark.parametrize("anew", [False, True])
async def test_the_pace_of_a_postcopy_that_is_held_back_changes_when_the_destination_has_run(
    make_site: MakeSite, anew: bool
) -> None:
    """QEMU told at once would send the last page before the guest has run: if its destination dies then, a source of
    7.2 waits for ever."""
    site = await make_site("7.2", "7.2")
    attempt = await held_back(site)
    told = await site.command("a", "job-change", id=attempt.job, max_postcopy_bandwidth=20 << 20)
    assert told["id"] == attempt.job
    assert (await options(site))[PACE] == SLOWEST
    if anew:
        await site.restart("a")
        attempt = site.attempt()
    machine, seen = attempt.machine, list[Any]()
    execute = machine.execute

    async def hearing(name: str, arguments: Any = None, **more: Any) -> Any:
        if name == "migrate-set-parameters" and Fact.CLEANUP not in attempt.facts:
            seen.append(arguments.get(PACE))
        return await execute(name, arguments, **more)

    machine.execute = hearing  # type: ignore[method-assign, assignment]
    site.director.script("b")
    site.director.go("b", "cont")
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"
    assert 20 << 20 in seen
    assert 1 << 20 not in seen


@pytest.mark.proves("S72")
async def test_a_pace_that_changes_while_the_old_one_is_set_is_set_too(make_site: MakeSite) -> None:
    """1. the destination has run: QEMU is told the pace  2. a person changes it, which only remembers it  3. done"""
    site = await make_site("7.2", "7.2")
    attempt = await held_back(site)
    execute, told = attempt.machine.execute, list[int]()

    async def slow(name: str, arguments: Any = None, **more: Any) -> Any:
        if name == "migrate-set-parameters" and PACE in arguments and Fact.PACED not in attempt.facts:
            told.append(arguments[PACE])
            if len(told) == 1:
                await source_options.change(attempt, {PACE: 9 << 20})
        return await execute(name, arguments, **more)

    attempt.machine.execute = slow  # type: ignore[method-assign, assignment]
    site.director.script("b")
    site.director.go("b", "cont")
    await site.settle()
    assert told == [1 << 20, 9 << 20]


async def test_a_pace_that_is_remembered_just_as_the_pages_are_let_go_is_told(make_site: MakeSite) -> None:
    site = await make_site("7.2", "7.2")
    attempt = await held_back(site)
    append = attempt.context.journal.append

    async def paced_meanwhile(kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        await append(kind, subject, body)
        if kind is Entry.OPTIONS:
            attempt.note(Fact.PACED)

    attempt.context.journal.append = paced_meanwhile  # type: ignore[method-assign]
    await source_options.change(attempt, {PACE: 9 << 20})
    assert (await options(site))[PACE] == 9 << 20
    site.director.script("b")
    site.director.go("b", "cont")
    await site.settle()


@pytest.mark.proves("S74", "S75", "S79")
async def test_a_refused_change_names_the_window_of_an_option_in_use(make_site: MakeSite) -> None:
    """Also of one that follows from another choice: that is not what hinders it now."""
    site = await make_site()
    attempt = await site.migrate(auto_finalize=False)
    await site.until_row(attempt, "M-hold")
    window = (
        r"multifd-channels is in use since the channels were opened; it may change again when this migration is over"
    )
    for change in ({"config": {"multifd-channels": 8}}, {"settings": ["multifd-channels=8"]}):
        with pytest.raises(OptionLocked, match=window):
            await site.command("a", "job-change", id=attempt.job, **change)
    with pytest.raises(OptionLocked, match="release-ram is refused: "):  # not now, and not when it is over
        await site.command("a", "job-change", id=attempt.job, config={"release-ram": True})
    await site.command("a", "job-finalize", id=attempt.job)
    await site.settle()
    await site.check("b")
