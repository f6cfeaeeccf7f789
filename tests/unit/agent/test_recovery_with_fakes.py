"""A postcopy breaks while the destination's QEMU answers nothing in band: the agents join it again by themselves."""

from __future__ import annotations

import os
from typing import Any

import pytest

from vmferry import limits
from vmferry.agent import recovery
from vmferry.agent.relayed import RelayedChannel
from vmferry.core.facts import Fact
from vmferry.errors import QemuError
from vmferry.qmp.errors import QmpTimeout
from vmferry.testing.fake_site import MakeSite, Site

VERSIONS = ("7.2", "11.1")


async def broken(site: Site, **script: Any) -> None:
    """The guest runs on b, its last pages are not there, and the channel is gone."""
    site.director.script("b", **script)
    attempt = await site.migrate_without_last_pages()
    for channel in attempt.channels:
        channel.cut()
    await site.noted_by("b", Fact.LINK_LOST)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.proves("S36", "S53", "S66", "S123")
async def test_a_qemu_that_hangs_for_want_of_a_page_is_recovered_out_of_band(
    make_site: MakeSite, version: str, tls: bool
) -> None:
    """Pair P19."""
    site = await make_site(version, version, tls=tls)
    await broken(site, hang=True)
    place = site.place()
    assert place.machine is not None
    with pytest.raises(QmpTimeout):
        await place.machine.execute("query-status", deadline_s=0.2)
    await site.noted_by("b", Fact.RESUME_ACK)
    assert isinstance(place.channels[-1], RelayedChannel)
    assert await place.machine.run_state() == "running"
    await site.pages_arrive()
    assert site.attempt().wire()["outcome"] == "destination"
    assert place.channels[-1].wait_over(limits.RELAY_LINGER_S)
    assert not [name for name in os.listdir(place.runtime.directory) if name.startswith("rec")]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_qemu_that_answers_gets_the_connection_itself(make_site: MakeSite, version: str) -> None:
    site = await make_site(version, version)
    await broken(site)
    await site.noted_by("b", Fact.RESUME_ACK)
    assert not any(isinstance(channel, RelayedChannel) for channel in site.place().channels)
    await site.pages_arrive()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.proves("S18", "S53")
async def test_a_relayed_channel_that_breaks_is_made_again(make_site: MakeSite, version: str) -> None:
    site = await make_site(version, version)
    await broken(site, hang=True)
    await site.noted_by("b", Fact.RESUME_ACK)
    place = site.place()
    place.channels[-1].cut()
    await site.until(lambda: place.facts.last_round(Fact.RESUME_ACK) == 2)
    await site.pages_arrive()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.proves("S18", "S53")
async def test_a_source_that_does_not_come_leaves_the_qemu_as_it_was(make_site: MakeSite, version: str) -> None:
    """Its agent dies when it has asked; QEMU listens for nobody until the next one asks again."""
    site = await make_site(version, version)
    site.crash_at("a", Fact.LINK_LOST)
    await broken(site, hang=True)
    place = site.place()
    offer = await recovery.reconnect(place)
    assert offer["cut_off"] == 1
    await site.restart("a")
    await site.noted_by("b", Fact.RESUME_ACK)
    assert place.rounds > 1
    await site.pages_arrive()


async def test_a_silent_qemu_that_did_not_say_that_it_is_in_postcopy_is_left_alone(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("b", {"cont": "silent"})
    await site.migrate()
    await site.director.reached("b", "cont")
    with pytest.raises(QemuError, match="nothing says that it is in postcopy"):
        await recovery.reconnect(site.place())
    assert not site.director.newest("b").is_gone


@pytest.mark.parametrize(("version", "word"), [("7.2", "postcopy-active"), ("11.1", "failed")])
@pytest.mark.proves("S53", "S121")
async def test_a_source_that_was_not_told_of_the_last_page_asks(make_site: MakeSite, version: str, word: str) -> None:
    """1. the last page is there  2. stream and link break, so nobody here has heard  3. the link is there again, and
    nobody tells twice. QEMU says that it failed, or waits for ever."""
    site = await make_site(version, version)
    attempt = await site.migrate_without_last_pages()

    async def migration(**_: object) -> dict[str, Any]:
        return {"status": word}

    attempt.machine.on_event = None
    attempt.machine.migration = migration  # type: ignore[method-assign]
    site.part()
    site.director.go("a", "pages")
    await site.noted_by("b", Fact.ALL_SENT)
    site.join()
    attempt.refresh()
    await site.noted_by("a", Fact.TARGET_WHOLE)
    del attempt.machine.migration
    await site.settle()
    await site.check("b")
