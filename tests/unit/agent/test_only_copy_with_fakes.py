"""What may be the only copy of a guest is given up by nobody: not for silence, not for an error, not for a name."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from typing import Any

import pytest

from vmferry.agent import peer_commands, source_act
from vmferry.agent.source import SourceAttempt
from vmferry.core.effects import Effect
from vmferry.core.facts import Fact
from vmferry.core.table import Outcome
from vmferry.core.view import Cpus
from vmferry.errors import Busy
from vmferry.jobs.journal import Entry
from vmferry.qmp.errors import QmpCommandError
from vmferry.testing.fake_site import MakeSite, Site

LOCK = 'Failed to get "write" lock'


def answered(attempt: SourceAttempt, words: str) -> asyncio.Event:
    """Set once an effect of the attempt has failed with these words."""
    heard = asyncio.Event()
    on_trouble = attempt.on_trouble

    def hearing(effect: Effect, error: Exception) -> None:
        on_trouble(effect, error)
        if words in str(error):
            heard.set()

    attempt.on_trouble = hearing  # type: ignore[method-assign]
    return heard


async def forgets_everything(site: Site, host: str) -> None:
    """Its agent starts anew with an empty journal; its QEMUs live on."""
    await site.stop(host)
    for path in (site.directory / f"s{host}").glob("journal*"):
        path.unlink()
    await site.restart(host)


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.proves("S36", "S42", "S58")
async def test_a_destination_that_forgot_the_job_after_the_grant_proves_nothing(make_site: MakeSite, mode: str) -> None:
    """1. the grant may have arrived  2. the destination's agent loses its journal  3. it is asked what it knows."""
    site = await make_site()
    site.director.script("a", {"pages": "hold"})
    site.when("a", Fact.GRANT_SENT, site.part)
    attempt = await site.migrate(mode=mode)
    heard = answered(attempt, "knows nothing of job")
    await site.until_outcome(attempt, Outcome.UNCERTAIN)
    await forgets_everything(site, "b")
    site.join()
    async with asyncio.timeout(10):
        await heard.wait()
    assert attempt.outcome() is Outcome.UNCERTAIN
    assert "knows nothing of job" in attempt.wire()["trouble"]
    assert not {Fact.TARGET_GONE, Fact.SOURCE_RESUMED} & {entry.fact for entry in attempt.facts}
    assert site.agents["b"].known_jobs == {}, "and it has promised nothing"
    assert site.director.running("g") == []
    assert [p.is_gone for p in site.director.puppets] == [False, False]


async def test_a_destination_that_forgot_the_job_before_the_grant_renounces_it(make_site: MakeSite) -> None:
    """Nobody was ever told to run: that it never will is then true, and written down."""
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    attempt = await site.migrate()
    await site.director.reached("a", "active")
    await forgets_everything(site, "b")
    await site.command("a", "vm-cancel", vm="g")
    await site.noted_by("a", Fact.TARGET_GONE)
    await site.settle()
    assert (attempt.wire()["status"], attempt.wire()["outcome"]) == ("cancelled", "source")
    kinds = [entry.kind for entry in site.agents["b"].journal.read() if entry.subject == attempt.job]
    assert Entry.RENOUNCED in kinds
    assert [p.host for p in site.director.running("g")] == ["a"]


async def refused_without_a_source(site: Site) -> SourceAttempt:
    """The destination has every page and is refused its disk; the source's process is gone by then."""
    site.director.script("b", {"cont": "hold"}, cont=LOCK)
    attempt = await site.migrate()
    await site.director.reached("b", "cont")
    await site.director.kill(site.director.newest("a"))
    await site.noted_by("a", Fact.SOURCE_GONE)
    site.director.script("b", cont=LOCK)  # later tries need not wait
    site.director.go("b", "cont")
    await site.noted_by("a", Fact.START_REFUSED)
    return attempt


@pytest.mark.proves("S40", "S42", "S53", "S58")
async def test_a_refused_start_does_not_cost_the_only_copy(make_site: MakeSite) -> None:
    site = await make_site()
    attempt = await refused_without_a_source(site)
    await site.until(lambda: attempt.facts.last_round(Fact.START_REFUSED) > 1)  # so it is tried again
    assert attempt.outcome() is Outcome.HELD
    assert Fact.ERROR not in attempt.facts
    assert Fact.RELEASE not in site.place().facts
    assert not site.director.newest("b", incoming=True).is_gone
    site.director.script("b")
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"
    await site.check("b")


@pytest.mark.proves("S42", "S53", "S58")
async def test_an_error_after_the_grant_does_not_cost_the_only_copy(make_site: MakeSite) -> None:
    site = await make_site()
    attempt = await refused_without_a_source(site)
    attempt.fail(OSError("whatever it is"))
    await site.until_outcome(attempt, Outcome.HELD)
    assert attempt.row().label == "F-retry-start"
    assert "the start is tried again" in attempt.wire()["action"]
    assert Fact.RELEASE not in site.place().facts
    assert not site.director.newest("b", incoming=True).is_gone


async def test_a_name_is_not_free_while_the_job_of_its_vm_is_not_settled(make_site: MakeSite) -> None:
    """The QEMU here is gone, so nothing but the job keeps the name from being taken for free."""
    site = await make_site()
    await refused_without_a_source(site)
    with pytest.raises(Busy, match="g has a migration to b that is not settled"):
        await site.run_vm()
    assert [p.host for p in site.director.puppets] == ["a", "b"]
    site.director.script("b")
    await site.settle()
    await site.check("b")


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
async def test_a_qemu_that_was_left_behind_after_its_guest_was_given_away_is_ended(
    make_site: MakeSite, mode: str
) -> None:
    """1. the guest runs on b with every page  2. a writes that it keeps it no more  3. before it ends its QEMU, a's
    agent dies."""
    site = await make_site()
    journal = site.agents["a"].journal
    append = journal.append
    given_away = asyncio.Event()

    async def dying(kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        await append(kind, subject, body)
        if kind is Entry.FORGOTTEN:
            given_away.set()
            await asyncio.Event().wait()

    journal.append = dying  # type: ignore[method-assign]
    attempt = await site.migrate(mode=mode)
    async with asyncio.timeout(10):
        await given_away.wait()
    left = site.director.newest("a")
    await site.stop("a")
    assert not left.is_gone
    await site.restart("a")
    await site.director.until(lambda: left.is_gone)
    assert site.result(attempt.job)["outcome"] == "destination"
    await site.settle()
    await site.check("b")


async def loaded_and_never_told(site: Site) -> SourceAttempt:
    """The destination has every page; before it is told to run, the source loses agent and QEMU."""
    site.crash_at("a", Fact.GRANT_SENT)
    attempt = await site.migrate()
    await site.noted_by("a", Fact.GRANT_SENT)
    await site.noted_by("b", Fact.LOADED)
    await site.director.kill(site.director.newest("a"))
    await site.until(lambda: attempt.machine.is_gone)
    return attempt


@pytest.mark.proves("S53")
async def test_a_place_that_has_loaded_is_not_released_for_a_source_that_is_gone(make_site: MakeSite) -> None:
    site = await make_site()
    attempt = await loaded_and_never_told(site)
    await source_act.act(attempt, Effect.RELEASE_TARGET)
    assert Fact.TARGET_GONE not in attempt.facts
    assert Fact.LOADED in attempt.facts
    assert Fact.RELEASE not in site.place().facts
    assert not site.director.newest("b").is_gone


async def asks_whether_it_is_wanted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of `b` has heard nothing for too long, asks, and has its answer."""
    asked = asyncio.Event()
    answer = peer_commands.COMMANDS["peer-wanted"]

    async def hearing(*question: Any) -> Any:
        asked.set()
        return await answer(*question)

    monkeypatch.setitem(peer_commands.COMMANDS, "peer-wanted", hearing)
    place = site.place()
    place.heard_source_s = float("-inf")
    place.wake()
    async with asyncio.timeout(10):
        await asked.wait()
    await site.agents["b"].peers.link("a").call("peer-has", {"vm": "g"})  # the answer before it has been read, too


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.proves("S53")
async def test_a_place_stays_wanted_when_the_source_cannot_say_that_the_guest_is_there(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    site = await make_site()
    await loaded_and_never_told(site)
    await (forgets_everything(site, "a") if forgets else site.restart("a"))
    await asks_whether_it_is_wanted(site, monkeypatch)
    assert Fact.RELEASE not in site.place().facts
    assert site.place().row().label == "D-wait-grant"
    assert not site.director.newest("b").is_gone


async def left_behind(site: Site) -> None:
    """1. the place is made  2. the source's agent restarts, and the link breaks  3. the job ends as never begun."""
    site.crash_at("a", Fact.PREPARED)
    await site.migrate()
    await site.noted_by("a", Fact.PREPARED)
    site.part()
    await site.restart("a")
    await site.until(lambda: site.attempt().job in site.agents["a"].results)
    assert not site.place().ended.is_set()


async def test_a_place_that_was_left_behind_is_released_when_the_guest_runs_at_the_source(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    await left_behind(site)
    await asks_whether_it_is_wanted(site, monkeypatch)
    await site.settle()
    await site.check("a")


@pytest.mark.proves("S13")
async def test_a_place_that_was_left_behind_is_no_hindrance_to_the_next_migration(make_site: MakeSite) -> None:
    """Whoever is told that he may try again does not have to wait until the place has waited in vain."""
    site = await make_site()
    await left_behind(site)
    before = site.place()
    site.join()
    attempt = await site.migrate()
    await site.settle()
    assert before.ended.is_set()
    assert attempt.wire()["outcome"] == "destination"
    await site.check("b")


async def test_a_place_that_is_still_wanted_is_one(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    await site.migrate()
    await site.noted_by("b", Fact.HEADER_SEEN)
    wish = {"vm": "g", "job": "0" * 32, "ca_pem": None, "clear_text": True}
    with pytest.raises(Busy, match="b has a place for g from job"):
        await site.agents["a"].peers.link("b").call("peer-prepare", wish)
    site.director.go("a", "active")
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S36", "S53")
async def test_a_source_that_died_before_its_agent_came_back_asks_the_destination_first(make_site: MakeSite) -> None:
    """It was told to be lost, and the place waited for ever for a source that had ended the job."""
    site = await make_site()
    await loaded_and_never_told(site)
    await site.restart("a")
    await site.settle()
    assert site.attempt().wire()["outcome"] == "destination", "it held everything, so it was told to run it"
    await site.check("b")


@pytest.mark.proves("S36", "S123")
async def test_a_source_that_died_after_it_gave_everything_ends_well_when_its_agent_comes_back(
    make_site: MakeSite,
) -> None:
    site = await make_site()
    site.crash_at("a", Fact.GRANT_SENT)
    await site.migrate()
    site.director.script("b")
    await site.noted_by("a", Fact.GRANT_SENT)
    await site.noted_by("b", Fact.LOADED)
    await site.place().grant(site.place().place.generation)  # what a had sent arrives
    await site.noted_by("b", Fact.RUN_ACKED)
    source = site.director.newest("a")
    await site.director.kill(source)
    await site.restart("a")
    await site.settle()
    assert site.attempt().wire()["outcome"] == "destination"
    await site.check("b")
    await site.restart("a")
    assert "g" not in site.agents["a"].vms, "and it is forgotten, although nobody retired its QEMU"


@pytest.mark.parametrize("source", ["7.2", "11.1"])
@pytest.mark.proves("S36", "S123")
async def test_a_result_that_was_lost_with_the_channel_is_told_by_the_destination(
    make_site: MakeSite, source: str
) -> None:
    """1. the last page is there  2. the channel breaks before the source hears so: it waits in postcopy-paused for a
    destination that is completed and takes no recovery."""
    site = await make_site(source)
    site.director.script("b", {"in-pages": "hold"})
    attempt = await site.migrate(mode="postcopy")
    await site.director.reached("b", "in-pages")
    await site.noted_by("a", Fact.RUN_ACKED)
    for channel in attempt.channels:
        channel.cut()
    await site.settle()
    assert Fact.LINK_LOST in attempt.facts
    assert (attempt.wire()["status"], attempt.wire()["outcome"]) == ("completed", "destination")
    await site.check("b")


@pytest.mark.proves("S36")
async def test_a_restarted_source_hears_that_the_place_it_would_reconnect_to_was_given_up(make_site: MakeSite) -> None:
    """7.2 waits in postcopy-paused before the destination has loaded anything, and its agent has not committed yet."""
    site = await make_site("7.2")
    site.director.script("b", {"in-load": "hold"})
    site.crash_at("a", Fact.CONTINUE)
    attempt = await site.migrate(mode="postcopy")
    await site.director.reached("b", "in-load")
    for channel in attempt.channels:
        channel.cut()
    await site.noted_by("b", Fact.CLEANUP)
    await site.restart("a")
    await site.until_row(site.attempt(), "B-postcopy-lost")
    assert "rescue NAME bring-back" in site.attempt().row().action
    assert Fact.TARGET_GONE in site.attempt().facts


async def test_a_descriptor_that_a_dead_agent_gave_to_its_qemu_is_taken_back(make_site: MakeSite) -> None:
    site = await make_site()
    site.crash_at("a", Fact.STARTED)
    await site.migrate()
    await site.noted_by("a", Fact.STARTED)
    await site.restart("a")
    await site.settle()
    await site.check("a")
    machine = site.agents["a"].vms["g"].require_machine()
    with pytest.raises(QmpCommandError, match="not found"):
        await machine.execute("closefd", {"fdname": source_act.CHANNEL_NAME})


@pytest.mark.proves("S53", "S123")
async def test_a_guest_that_went_back_after_the_commit_is_not_sent_away_by_the_next_agent(make_site: MakeSite) -> None:
    """1. the commit is in the journal, QEMU has completed, the grant was not sent  2. the migration is cancelled, and
    the guest runs here  3. the agent dies  4. the next one reads the commit and finds a completed QEMU."""
    site = await make_site()
    site.crash_at("a", Fact.SOURCE_RESUMED)

    def cancel() -> None:
        if {Fact.COMMITTED, Fact.ALL_SENT} <= {entry.fact for entry in site.attempt().facts}:
            site.attempt().note(Fact.CANCEL, by="test")

    for fact in (Fact.COMMITTED, Fact.ALL_SENT):  # in this order or the other one
        site.when("a", fact, cancel)
    await site.migrate()
    await site.noted_by("a", Fact.SOURCE_RESUMED)
    await site.restart("a")
    await site.settle()
    assert site.attempt().wire()["outcome"] == "source"
    await site.check("a")


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.proves("S36", "S53", "S123")
async def test_a_copy_of_before_is_never_started(make_site: MakeSite, restarts: bool) -> None:
    """1. the destination has everything  2. the migration is cancelled, and the guest runs here again  3. its QEMU dies
    before the place is released (and its agent begins anew): what the place has is a guest of the past."""
    site = await make_site()

    def cancel() -> None:
        if {Fact.COMMITTED, Fact.ALL_SENT} <= {entry.fact for entry in site.attempt().facts}:
            site.attempt().note(Fact.CANCEL, by="test")

    for fact in (Fact.COMMITTED, Fact.ALL_SENT):  # in this order or the other one
        site.when("a", fact, cancel)
    site.when("a", Fact.SOURCE_RESUMED, site.part)
    attempt = await site.migrate()
    await site.noted_by("b", Fact.LOADED)
    await site.until_seen(attempt, lambda: attempt.readings.cpus is Cpus.AS_BEFORE)
    await site.director.kill(site.director.newest("a"))
    await site.noted_by("a", Fact.SOURCE_GONE)
    if restarts:
        await site.restart("a")
        attempt = site.attempt()
    site.join()
    await site.noted_by("a", Fact.TARGET_WHOLE)
    await site.until_outcome(attempt, Outcome.HELD)
    assert Fact.GRANT_SENT not in attempt.facts or restarts
    assert Fact.GRANTED not in site.place().facts
    assert site.director.running("g") == []


@pytest.mark.proves("S36", "S55")
async def test_a_place_that_was_given_up_is_not_taken_for_a_guest_that_ran_and_died(make_site: MakeSite) -> None:
    """1. the start was refused  2. the place is given up: its QEMU is killed  3. its agent dies before the end is
    written down  4. the next one finds an order to start and no QEMU."""
    site = await make_site()
    site.director.script("b", cont=LOCK)
    site.crash_at("b", Fact.TARGET_GONE)
    await site.migrate()
    await site.noted_by("b", Fact.TARGET_GONE)
    await site.restart("b")
    await site.settle()
    assert site.attempt().wire()["outcome"] == "source"
    await site.check("a")


@pytest.mark.proves("S52", "S53", "S55")
async def test_a_destination_that_died_before_the_order_to_start_is_not_taken_as_having_run(
    make_site: MakeSite,
) -> None:
    """It dies so short before the order that its agent's loop has not heard of it: `cont` would be written to nobody,
    and its end then be that of a QEMU which may have run."""
    site = await make_site()

    def die_unheard() -> None:
        pidfd = os.pidfd_open(site.director.newest("b").pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(5000)
        os.close(pidfd)

    site.when("b", Fact.GRANTED, die_unheard)
    attempt = await site.migrate()
    await site.settle()
    assert ("b", Fact.START_SENT) not in site.noted
    assert attempt.outcome() is Outcome.SOURCE
    await site.check("a")
