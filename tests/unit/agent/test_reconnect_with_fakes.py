"""How a try to join a broken postcopy again ends at the source: the channel is cut unless the two are joined on it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vmferry.agent import rescue
from vmferry.core.effects import Effect
from vmferry.core.facts import Fact
from vmferry.core.view import Source
from vmferry.errors import HostUnreachable
from vmferry.qmp.errors import QmpCommandError
from vmferry.testing.fake_site import MakeSite


@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.proves("S18", "S53")
async def test_a_channel_on_which_the_two_are_joined_is_not_cut_by_the_end_of_the_try(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """1. QEMU's event says that it is joined  2. the table wants something else, and the try is ended  3. before it has
    heard the same by asking: here it never does."""

    async def never(*_: object, **__: object) -> str | None:
        await asyncio.Event().wait()
        return None

    site = await make_site(version, version)
    attempt = await site.migrate_without_last_pages()
    monkeypatch.setattr(rescue, "until_word", never)
    for channel in attempt.channels:
        channel.cut()
    await site.noted_by("b", Fact.RESUME_ACK)
    await site.until_row(attempt, "G-ran-pages")
    await site.pages_arrive()
    assert [side.facts.last_round(Fact.LINK_LOST) for side in (attempt, site.place())] == [1, 1]


@pytest.mark.proves("S53")
async def test_a_try_that_is_ended_before_the_two_are_joined_cuts_its_channel(make_site: MakeSite) -> None:
    """Nobody waits in a handshake without a peer. The destination's agent takes the channel, and says nothing more."""
    site = await make_site()
    attempt = await site.migrate_without_last_pages()
    asked, ask = asyncio.Event(), attempt.ask

    async def asking(command: str, **more: Any) -> dict[str, Any]:
        if command == "peer-recovering":
            asked.set()
            await asyncio.Event().wait()
        return await ask(command, **more)

    attempt.ask = asking  # type: ignore[method-assign]
    for channel in attempt.channels:
        channel.cut()
    await asked.wait()
    tried = attempt.channels[-1]
    await attempt.hold_back()
    assert tried.is_cut
    attempt.ask = ask  # type: ignore[method-assign]
    attempt.go_on()
    await site.noted_by("a", Fact.RESUME_ACK)
    await site.pages_arrive()


@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.proves("S27", "S53")
async def test_a_channel_lost_before_the_load_was_heard_of_is_no_failure(make_site: MakeSite, version: str) -> None:
    """1. the destination loads  2. the agents' link and the channel break  3. the source's QEMU has lost its channel,
    and before 10.2 does not know whether it was loaded  4. the link is back: it was, and nothing failed."""
    site = await make_site(version, version)
    site.director.script("a", {"pages": "hold"})
    site.when("b", Fact.PACKAGE_SENT, site.part)
    attempt = await site.migrate(mode="postcopy")
    await site.noted_by("b", Fact.LOADED)
    for channel in attempt.channels:
        channel.cut()
    await site.until_seen(attempt, lambda: attempt.readings.source is Source.BROKEN)
    site.join()
    await site.noted_by("b", Fact.RESUME_ACK)
    await site.pages_arrive()
    wire = attempt.wire()
    assert (wire["status"], wire["outcome"], wire["error"]) == ("completed", "destination", None)


@pytest.mark.proves("S18", "S53", "S119")
async def test_a_destination_gets_no_connection_on_which_nobody_speaks(make_site: MakeSite) -> None:
    """1. the connection is there  2. the destination's agent says so, and that answer is lost  3. the source gives the
    try up and cuts. An old destination that had the connection by then dies of it, with the guest."""
    site = await make_site("7.2", "7.2")
    site.director.script("b", frail=True)
    attempt = await site.migrate_without_last_pages()
    ask, lost = attempt.ask, asyncio.Event()

    async def asking(command: str, **more: Any) -> dict[str, Any]:
        answer = await ask(command, **more)
        if command == "peer-recovering" and not lost.is_set():
            lost.set()
            raise HostUnreachable("the answer was lost")
        return answer

    attempt.ask = asking  # type: ignore[method-assign]
    for channel in attempt.channels:
        channel.cut()
    await lost.wait()
    await site.noted_by("a", Fact.RESUME_ACK)
    await site.pages_arrive()


@pytest.mark.proves("S53", "S54", "S58")
async def test_a_source_that_never_leaves_a_recovery_names_the_way_that_is_left(make_site: MakeSite) -> None:
    """QEMU before 8.0: a recovery that broke off is neither paused nor joined again. Its memory is whole."""
    site = await make_site("7.2", "7.2")
    attempt = await site.migrate_without_last_pages()
    execute, on_trouble = attempt.machine.execute, attempt.on_trouble
    named, told = asyncio.Event(), []

    def noting(effect: Effect, error: Exception) -> None:
        on_trouble(effect, error)
        if attempt.fix:
            told.append(attempt.brief()["action"])
            named.set()

    async def migration(**_: object) -> dict[str, Any]:
        return {"status": "postcopy-recover"}

    async def refusing(command: str, *rest: Any, **more: Any) -> Any:
        if command == "migrate-pause":
            raise QmpCommandError(command, "GenericError", "only supported during postcopy-active state", peer="g")
        return await execute(command, *rest, **more)

    attempt.machine.migration = migration  # type: ignore[method-assign]
    attempt.machine.execute = refusing  # type: ignore[method-assign]
    attempt.on_trouble = noting  # type: ignore[method-assign]
    for channel in attempt.channels:
        channel.cut()
    attempt.refresh()
    await site.until_row(attempt, "G-ran-broken")
    await named.wait()
    assert "vmferry rescue g feed" in told[0]
    del attempt.machine.migration, attempt.machine.execute
    await site.pages_arrive()
