"""Deaths, cuts, restarts and cancels at every point of a migration between fake QEMUs."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from vmferry.core.facts import Fact
from vmferry.core.table import Outcome
from vmferry.errors import Busy, CancelRefused, QemuError
from vmferry.testing.fake_site import MakeSite

BEFORE_RUN = ["in-start", "in-listen", "in-header", "in-load", "in-loaded"]


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.parametrize("step", BEFORE_RUN)
@pytest.mark.proves("S24", "S30", "S35", "S36")
async def test_a_destination_that_dies_before_it_runs_costs_nothing(make_site: MakeSite, step: str, mode: str) -> None:
    site = await make_site()
    site.director.script("b", {step: "die"})
    attempt = await site.migrate(mode=mode)
    await site.settle()
    assert (attempt.wire()["status"], attempt.wire()["outcome"]) == ("failed", "source")
    await site.check("a")
    site.director.script("b")
    await site.migrate(mode=mode)
    await site.settle()
    await site.check("b")


@pytest.mark.parametrize("step", ["in-load", "in-loaded"])
async def test_a_load_that_fails_costs_nothing(make_site: MakeSite, step: str) -> None:
    site = await make_site()
    site.director.script("b", {step: "fail"})
    attempt = await site.migrate()
    await site.settle()
    assert (attempt.wire()["status"], attempt.wire()["outcome"]) == ("failed", "source")
    assert "scripted failure" in str(attempt.wire()["error"])
    await site.check("a")


@pytest.mark.proves("S36")
async def test_a_destination_that_dies_while_it_is_asked_is_named(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. its agent asks  2. it dies  3. the table hears of the death before anybody has looked why."""
    site = await make_site()
    site.director.script("b", {"in-load": "hold"})
    attempt = await site.migrate()
    await site.noted_by("b", Fact.HEADER_SEEN)
    machine = site.place().machine
    assert machine is not None

    async def dies(**_: object) -> dict[str, object]:
        os.kill(machine.pid, signal.SIGKILL)
        assert await machine.wait_gone(deadline_s=5.0)
        raise QemuError("it ended before it answered")

    monkeypatch.setattr(machine, "migration", dies)
    await site.settle()
    wire = attempt.wire()
    assert (wire["status"], wire["outcome"], wire["error"]["side"]) == ("failed", "source", "destination")
    await site.check("a")


async def test_a_destination_that_dies_at_cont_counts_as_having_run(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("b", {"cont": "die"})
    attempt = await site.migrate()
    await site.noted_by("a", Fact.TARGET_DIED)
    assert attempt.outcome() is Outcome.LOST
    assert site.director.running("g") == []
    assert not site.director.newest("a").is_gone
    site.director.never_two_ran()


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.parametrize("step", ["setup", "active", "converge", "pre-switchover", "device"])
async def test_a_source_that_dies_with_the_only_copy_leaves_nothing(make_site: MakeSite, step: str, mode: str) -> None:
    site = await make_site()
    site.director.script("a", {step: "die"})
    attempt = await site.migrate(mode=mode)
    await site.settle()
    assert attempt.outcome() is Outcome.LOST
    await site.check(None)


async def test_a_source_that_dies_after_it_gave_everything_keeps_the_destination(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"completed": "die"})
    attempt = await site.migrate()
    await site.noted_by("a", Fact.SOURCE_GONE)
    await site.noted_by("b", Fact.LOADED)
    await site.until(lambda: attempt.outcome() in (Outcome.HELD, Outcome.DESTINATION))
    assert not site.director.newest("b").is_gone
    site.director.never_two_ran()


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.proves("S36", "S42", "S58")
async def test_a_link_lost_before_the_grant_arrives_is_uncertain_and_heals(make_site: MakeSite, mode: str) -> None:
    site = await make_site()
    site.when("a", Fact.GRANT_SENT, site.part)
    attempt = await site.migrate(mode=mode)
    await site.noted_by("a", Fact.GRANT_SENT)
    await site.until_outcome(attempt, Outcome.UNCERTAIN)
    assert site.director.running("g") == []
    assert not site.director.newest("a").is_gone
    assert not site.director.newest("b").is_gone
    with pytest.raises(CancelRefused):
        await site.command("a", "vm-cancel", vm="g")
    site.join()
    await site.settle()
    assert attempt.wire()["status"] == "completed"
    await site.check("b")


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
async def test_a_link_lost_before_the_answer_is_uncertain_and_heals(make_site: MakeSite, mode: str) -> None:
    site = await make_site()
    site.when("b", Fact.START_SENT, site.part)
    attempt = await site.migrate(mode=mode)
    await site.noted_by("b", Fact.TARGET_RAN)
    await site.until_outcome(attempt, Outcome.UNCERTAIN)
    assert [p.host for p in site.director.running("g")] == ["b"]
    assert not site.director.newest("a").is_gone
    site.join()
    await site.settle()
    assert attempt.wire()["status"] == "completed"
    await site.check("b")


SOURCE_FACTS = {
    "precopy": [
        Fact.MIGRATE, Fact.PLANNED, Fact.PREPARE, Fact.PREPARED, Fact.CONFIGURED, Fact.STARTED, Fact.SETUP_DONE,
        Fact.SWITCHOVER, Fact.TARGET_READY, Fact.CONTINUE, Fact.COMMITTED, Fact.PEER_ACK, Fact.GRANT_SENT,
        Fact.RUN_ACKED, Fact.SOURCE_RETIRED,
    ],
    "postcopy": [
        Fact.START_POSTCOPY, Fact.PACKAGE_SENT, Fact.PACKAGE_LOADED, Fact.COMMITTED, Fact.GRANT_SENT, Fact.RUN_ACKED,
    ],
}  # fmt: skip
DESTINATION_FACTS = {
    "precopy": [
        Fact.PREPARE, Fact.LISTENING, Fact.HEADER_SEEN, Fact.LOADED, Fact.COMMITTED, Fact.GRANTED, Fact.START_SENT,
        Fact.TARGET_RAN, Fact.RUN_ACKED,
    ],
    "postcopy": [Fact.PACKAGE_LOADED, Fact.COMMITTED, Fact.START_SENT, Fact.TARGET_RAN, Fact.RUN_ACKED],
}  # fmt: skip
CRASHES: list[tuple[str, str, Fact]] = [("a", mode, fact) for mode, facts in SOURCE_FACTS.items() for fact in facts]
CRASHES += [("b", mode, fact) for mode, facts in DESTINATION_FACTS.items() for fact in facts]


@pytest.mark.parametrize(("host", "mode", "fact"), CRASHES)
@pytest.mark.proves("S35", "S36", "S55")
async def test_an_agent_that_restarts_at_a_fact_ends_well(
    make_site: MakeSite, host: str, mode: str, fact: Fact
) -> None:
    site = await make_site()
    if mode == "postcopy":
        site.director.script("a", {"pages": "hold"})  # or its end could overtake what is looked for
    site.crash_at(host, fact)
    await site.migrate(mode=mode)
    await site.noted_by(host, fact)
    await site.restart(host)
    site.director.go("a", "pages")
    await site.settle()
    site.director.never_two_ran()
    running = [p.host for p in site.director.running("g")]
    assert len(running) == 1
    await site.check(running[0])


CANCELS: list[tuple[str, Fact]] = [
    ("precopy", fact) for fact in SOURCE_FACTS["precopy"][:13] if fact is not Fact.MIGRATE
]
CANCELS += [("postcopy", fact) for fact in SOURCE_FACTS["postcopy"][:5]]


@pytest.mark.parametrize(("mode", "fact"), CANCELS)
@pytest.mark.proves("S10", "S11", "S13", "S17")
async def test_a_cancel_at_a_fact_ends_in_cancelled_or_is_refused(make_site: MakeSite, mode: str, fact: Fact) -> None:
    site = await make_site()
    asked: list[asyncio.Task[object]] = []

    def ask() -> None:
        asked.append(asyncio.create_task(site.command("a", "vm-cancel", vm="g")))

    site.when("a", fact, ask)
    attempt = await site.migrate(mode=mode)
    await site.noted_by("a", fact)
    await asyncio.wait(asked)
    await site.settle()
    refusal = asked[0].exception()
    if refusal is None:
        assert (attempt.wire()["status"], attempt.wire()["outcome"]) == ("cancelled", "source")
        await site.check("a")
        await site.migrate()
        await site.settle()
    else:
        assert isinstance(refusal, CancelRefused)
        assert fact in (Fact.PACKAGE_SENT, Fact.COMMITTED, Fact.PEER_ACK, Fact.PACKAGE_LOADED, Fact.GRANT_SENT)
        # It may have been loaded before the command was heard.
        assert fact is not Fact.PACKAGE_SENT or Fact.PACKAGE_LOADED in attempt.facts
    await site.check("b")


async def test_a_guest_that_was_stopped_for_the_move_runs_again_after_a_restart(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"stop": "hold"})
    await site.migrate(mode="postcopy")
    await site.director.reached("a", "stop")
    await site.restart("a")
    site.director.go("a", "stop")
    await site.settle()
    await site.check("a")


@pytest.mark.parametrize("fact", [Fact.CONFIGURED, Fact.STARTED])
async def test_a_restart_does_not_take_the_way_here_for_the_way_on(make_site: MakeSite, fact: Fact) -> None:
    """The QEMU of a guest that arrived says `completed`, which is no word about its next journey."""
    site = await make_site()
    await site.migrate()
    await site.settle()
    await site.check("b")
    site.crash_at("b", fact)
    site.noted.clear()
    await site.migrate("a")
    await site.noted_by("b", fact)
    await site.restart("b")
    await site.settle()
    assert Fact.COMMITTED not in site.attempt("b").facts
    await site.check("b")


async def test_a_destination_that_vanishes_after_it_ran_is_not_taken_for_one_that_never_did(
    make_site: MakeSite,
) -> None:
    """1. the guest runs on b  2. before that is in b's journal, b loses agent and QEMU  3. b's agent comes back."""
    site = await make_site()
    site.crash_at("b", Fact.TARGET_RAN)
    attempt = await site.migrate()
    await site.noted_by("b", Fact.TARGET_RAN)
    await site.director.kill(site.director.newest("b", incoming=True))
    await site.restart("b")
    await site.until_outcome(attempt, Outcome.LOST)
    assert site.director.running("g") == []
    assert Fact.SOURCE_RESUMED not in attempt.facts


async def test_two_wants_at_the_same_moment_are_one(make_site: MakeSite) -> None:
    site = await make_site()
    orders = [site.migrate(), site.migrate()]
    answers = await asyncio.gather(*orders, return_exceptions=True)
    assert [type(answer) for answer in answers].count(Busy) == 1
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S13")
async def test_a_cancel_from_the_host_that_the_guest_came_from_reaches_the_way_back(make_site: MakeSite) -> None:
    """1. `a` has sent the guest to `b`  2. on its way back it has no place on `a` yet  3. the cancel is said on `a`."""
    site = await make_site()
    await site.migrate()
    await site.settle()
    site.crash_at("b", Fact.MIGRATE)
    attempt = await site.migrate(to="a")
    brief = await site.command("a", "vm-cancel", vm="g")
    assert brief["job"] == attempt.job
    assert Fact.CANCEL in attempt.facts
    await site.restart("b")
    await site.settle()
    assert site.attempt("b").wire()["status"] == "cancelled"
    await site.check("b")
