"""Jobs of two real agents with fake QEMUs: states, verbs, holds, pauses, and results that wait to be dismissed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from vmferry import limits
from vmferry.agent.agent import Agent
from vmferry.core.facts import Fact
from vmferry.core.job import (
    INCOMING,
    KINDS,
    MIGRATE,
    Answer,
    JobStatus,
    Verb,
    answer,
    destination_job,
    may_follow,
    pause_refusal,
    source_job,
)
from vmferry.core.migration_status import MigrationStatus
from vmferry.core.source_rows import HOLD_MS
from vmferry.errors import Busy, JobRefused, OptionLocked, UnknownJob, UsageError, VmferryError
from vmferry.jobs import journal
from vmferry.testing.fake_site import SETTLE_S, JumpClock, MakeSite, Site

J = JobStatus


class Heard:
    """What the agent of a host publishes from now on."""

    def __init__(self, agent: Agent) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        publish = agent.publish

        def listening(name: str, data: dict[str, Any]) -> None:
            self.events.append((name, data))
            publish(name, data)

        agent.publish = listening  # type: ignore[method-assign]

    def states(self, kind: str) -> list[str]:
        return [
            data["status"] for name, data in self.events if name == "JOB_STATUS_CHANGE" and data["type"] == kind
        ]  # fmt: skip

    def of(self, name: str) -> list[dict[str, Any]]:
        return [data for event, data in self.events if event == name]


async def jobs(site: Site, host: str = "a") -> list[dict[str, Any]]:
    return list(await site.command(host, "query-jobs"))


async def the_job(site: Site, host: str = "a") -> dict[str, Any]:
    (job,) = await jobs(site, host)
    return job


KEPT: dict[str, Any] = {"auto-dismiss": False}


async def held(site: Site) -> str:
    """A precopy that waits for leave; its job's id."""
    hold: dict[str, Any] = {"auto-finalize": False}
    attempt = await site.migrate(**hold)
    await site.until_row(attempt, "M-hold")
    return attempt.job


@pytest.mark.proves("S93", "S94", "S100", "S107", "S108")
@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
async def test_both_sides_have_a_job_of_the_same_id_and_pass_qemus_states(make_site: MakeSite, mode: str) -> None:
    site = await make_site()
    here, there = Heard(site.agents["a"]), Heard(site.agents["b"])
    await site.migrate(mode=mode)
    await site.settle()
    middle = ["waiting", "pending", "running"] if mode == "postcopy" else []
    end = ["waiting", "pending", "concluded", "null"]
    assert here.states(MIGRATE.name) == ["created", "running", *middle, *end]
    assert there.states(INCOMING.name) == ["created", "running", *end]
    ids = {data["id"] for heard in (here, there) for data in heard.of("JOB_STATUS_CHANGE")}
    assert ids == {site.attempt().job}
    for heard, log in ((here, site.attempt().facts), (there, site.place().facts)):
        facts = heard.of("JOB_FACT")
        assert [data["fact"] for data in facts] == [entry.fact.value for entry in log], "an event for each fact"
        numbers = [data["revision"] for data in facts]
        assert numbers == sorted(set(numbers)), "each makes a revision of its own"
        assert all("revision" in data for data in heard.of("JOB_CHANGE"))
    assert await jobs(site, "a") == await jobs(site, "b") == [], "dismissed by themselves"
    assert (await site.command("a", "job-status", job=site.attempt().job))["outcome"] == "destination"


@pytest.mark.proves("S97", "S106")
async def test_a_job_waits_for_leave_with_the_guest_paused_and_goes_on_with_it(make_site: MakeSite) -> None:
    site = await make_site()
    job = await held(site)
    shown = await the_job(site)
    assert (shown["id"], shown["status"], shown["detail"]) == (job, J.PENDING, "pre-switchover")
    assert "waits for leave" in shown["reason"]
    assert shown["guest-paused-ms"] >= 0
    assert "finalize" in shown["verbs"]
    wire = await site.command("a", "vm-status", vm="g")
    assert wire["migration"]["outcome"] == "held"
    assert "job finalize" in wire["migration"]["action"]
    assert not [effect for host, effect in site.did if host == "a" and effect in ("continue", "commit")]
    await site.command("a", "job-finalize", id=job)
    await site.settle()
    assert site.attempt().wire()["outcome"] == "destination"
    await site.check("b")


@pytest.mark.proves("S97")
async def test_a_leave_holds_over_a_restart_and_so_does_the_wait_for_it(make_site: MakeSite) -> None:
    site = await make_site()
    job = await held(site)
    await site.restart("a")
    await site.until_row(site.attempt(), "M-hold")
    await site.command("a", "job-finalize", id=job)
    await site.restart("a")
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S97")
async def test_without_leave_the_guest_goes_back_in_bounded_time(make_site: MakeSite) -> None:
    clock = JumpClock()
    site = await make_site(clock=clock)
    await held(site)
    clock.leap(HOLD_MS / 1000)
    site.attempt().wake()
    await site.settle()
    wire = site.attempt().wire()
    assert (wire["status"], wire["outcome"]) == ("failed", "source")
    assert "M-hold" in wire["error"]["message"]
    await site.check("a")


async def test_a_cancel_ends_the_wait(make_site: MakeSite) -> None:
    site = await make_site()
    job = await held(site)
    assert (await site.command("a", "job-cancel", id=job))["status"] in (J.ABORTING, J.PENDING)
    await site.settle()
    assert site.attempt().wire()["status"] == "cancelled"
    await site.check("a")


@pytest.mark.proves("S95")
async def test_a_result_stays_until_it_is_dismissed_over_restarts_on_both_sides(make_site: MakeSite) -> None:
    site = await make_site()
    attempt = await site.migrate(**KEPT)
    job = attempt.job
    await site.settle()
    for round_no in (1, 2):
        for host, kind in (("a", MIGRATE), ("b", INCOMING)):
            shown = await the_job(site, host)
            assert (shown["id"], shown["type"], shown["status"]) == (job, kind.name, J.CONCLUDED)
            assert shown["result"]["outcome"] == "destination"
            assert shown["result"]["timeline"]
            assert shown["current-progress"] == shown["total-progress"] > 0
            if round_no == 1:
                await site.restart(host)
    for host in ("a", "b"):
        assert (await site.command(host, "job-dismiss", id=job))["status"] == J.NULL
        assert await jobs(site, host) == []
        with pytest.raises(UnknownJob):
            await site.command(host, "job-dismiss", id=job)
        await site.restart(host)
        assert await jobs(site, host) == []
    with pytest.raises(UnknownJob, match="dismissed"):
        await site.command("a", "job-status", job=job)


@pytest.mark.proves("S95")
async def test_a_failure_stays_with_its_cause_until_it_is_dismissed(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("b", {"in-load": "fail"})
    attempt = await site.migrate(**KEPT)
    await site.settle()
    await site.restart("a")
    shown = await the_job(site)
    assert shown["status"] == J.CONCLUDED
    assert shown["result"]["error"]["cause"], "with what the destination says"
    assert shown["error"] == shown["result"]["error"]["message"]
    assert (await the_job(site, "b"))["result"]["outcome"] == "source"
    assert attempt.job == shown["id"]
    await site.check("a")


async def test_too_many_results_to_be_read_refuse_one_more_and_drop_none(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "JOBS_UNDISMISSED_MAX", 1)
    site = await make_site()
    await site.migrate(**KEPT)
    await site.settle()
    await site.migrate("a")
    await site.settle()
    with pytest.raises(Busy, match="wait to be dismissed"):
        await site.migrate(**KEPT)
    assert len(await jobs(site)) == 1
    await site.command("a", "job-dismiss", id=(await the_job(site))["id"])
    await site.migrate(**KEPT)
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S98", "S99")
async def test_change_covers_options_mode_and_policies(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"converge": "hold"})
    by_hand: dict[str, Any] = {"postcopy-after-ms": 10_000_000, "accept": ["tcg-loses-writes"]}
    attempt = await site.migrate(mode="postcopy", **by_hand)
    await site.noted_by("a", Fact.SETUP_DONE)
    changes: dict[str, Any] = {
        "downtime-limit": 200,
        "max-bandwidth": 1 << 20,
        "config": {"max-postcopy-bandwidth": 1 << 30},
    }
    await site.command("a", "job-change", id=attempt.job, settings=["retry-for=10s"], **changes)
    now = await attempt.machine.execute("query-migrate-parameters")
    assert (now["downtime-limit"], now["max-bandwidth"], now["max-postcopy-bandwidth"]) == (200, 1 << 20, 1 << 30)
    assert attempt.policy.retry_for_ms == 10_000
    for wrong, error in (
        ({"config": {"downtime-limit": "soon"}}, UsageError),
        ({"config": {"multifd-channels": 8}}, OptionLocked),
        ({"mode": "precopy"}, UsageError),
        ({"type": "mirror"}, UsageError),
        ({"max-bandwidth": 1, "settings": ["max-bandwidth=2"]}, UsageError),
    ):
        with pytest.raises(error):
            await site.command("a", "job-change", id=attempt.job, **wrong)
    await site.command("a", "job-change", id=attempt.job, mode="postcopy")
    assert Fact.START_POSTCOPY in attempt.facts
    site.director.go("a", "converge")
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S99")
async def test_a_postcopy_is_paused_and_goes_on_only_when_it_is_resumed(make_site: MakeSite) -> None:
    site = await make_site()
    attempt = await site.migrate_without_last_pages()
    heard = Heard(site.agents["a"])
    await site.command("a", "job-pause", id=attempt.job)
    await site.until_row(attempt, "G-ran-broken-hold")
    shown = await the_job(site)
    assert (shown["status"], shown["reason"]) == (J.PAUSED, "a person paused it")
    assert (await site.command("a", "job-pause", id=attempt.job))["status"] == J.PAUSED
    assert not [effect for _, effect in site.did if effect == "reconnect"]
    await site.restart("a")
    attempt = site.attempt()
    await site.until_row(attempt, "G-ran-broken-hold")
    await site.command("a", "job-resume", id=attempt.job)
    site.director.go("a", "pages")
    await site.settle()
    assert [effect for _, effect in site.did if effect == "reconnect"]
    assert "paused" in heard.states(MIGRATE.name)
    await site.check("b")


async def _in_state(site: Site, state: str) -> str:
    """A job that is held in this state; its id."""
    match state:
        case "running":
            site.director.script("a", {"converge": "hold"})
            attempt = await site.migrate()
            await site.noted_by("a", Fact.SETUP_DONE)
            return attempt.job
        case "pending":
            return await held(site)
        case "paused":
            attempt = await site.migrate_without_last_pages()
            await site.command("a", "job-pause", id=attempt.job)
            await site.until_row(attempt, "G-ran-broken-hold")
            return attempt.job
        case "aborting":
            site.director.script("a", {"converge": "hold", "cleanup": "hold"})
            attempt = await site.migrate()
            await site.noted_by("a", Fact.SETUP_DONE)
            await site.command("a", "vm-cancel", vm="g")
            return attempt.job
        case _:
            attempt = await site.migrate(**KEPT)
            await site.settle()
            return attempt.job


@pytest.mark.proves("S16", "S99")
@pytest.mark.parametrize("state", ["running", "pending", "paused", "aborting", "concluded"])
@pytest.mark.parametrize("verb", list(Verb))
async def test_every_verb_in_every_state_does_what_the_table_says(make_site: MakeSite, state: str, verb: Verb) -> None:
    site = await make_site()
    job = await _in_state(site, state)
    info = site.agents["a"].jobs.info(job)
    assert info.status.value == state
    cell = answer(MIGRATE, verb, info.status)
    before = len(site.attempt().facts)
    more = {"settings": ["retry-for=30s"]} if verb is Verb.CHANGE else {}
    refused: VmferryError | None = None
    try:
        await site.command("a", f"job-{verb.value}", id=job, **more)
    except VmferryError as error:
        refused = error
    fine = pause_refusal(MigrationStatus(info.detail)) if verb is Verb.PAUSE and cell.answer is Answer.DOES else None
    if cell.answer is Answer.REFUSED or fine is not None:
        assert isinstance(refused, JobRefused), refused
        assert (fine or cell.why) in refused.message
        assert len(site.attempt().facts) == before, "nothing was done"
    elif verb is Verb.CANCEL and state == "paused":
        assert refused is not None, "it was told to run there: the finer rule"
        assert refused.code == "cancel-refused"
    else:
        assert refused is None, refused
        did_more = len(site.attempt().facts) > before
        assert did_more == (cell.answer is Answer.DOES and verb is not Verb.DISMISS and (verb, state) != (
            Verb.PAUSE, "paused",
        )) or state == "aborting"  # fmt: skip


@pytest.mark.proves("S99", "S108")
async def test_the_incoming_job_is_its_sources_to_steer(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("b", {"in-load": "hold"})
    attempt = await site.migrate()
    await site.noted_by("b", Fact.HEADER_SEEN)
    shown = await the_job(site, "b")
    assert (shown["type"], shown["status"], shown["peer"]) == (INCOMING.name, J.RUNNING, "a")
    for verb in Verb:
        if answer(KINDS[INCOMING.name], verb, J.RUNNING).answer is Answer.REFUSED:
            with pytest.raises(JobRefused):
                await site.command("b", f"job-{verb.value}", id=attempt.job)
    site.director.go("b", "in-load")
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S93")
async def test_the_states_of_a_real_log_are_a_way_through_the_map(make_site: MakeSite) -> None:
    site = await make_site()
    await site.migrate(mode="postcopy")
    await site.settle()
    for heard, state_of in ((site.attempt().facts, source_job), (site.place().facts, destination_job)):
        log = type(heard)()
        states = [J.UNDEFINED]
        for entry in heard:
            log = log.with_fact(entry.fact, round_no=entry.round)
            if state_of(log) is not states[-1]:
                states.append(state_of(log))
        assert states[-1] is J.CONCLUDED
        assert may_follow(states[0], J.CREATED)


async def test_an_unknown_job_is_unknown(make_site: MakeSite) -> None:
    site = await make_site()
    for verb in Verb:
        with pytest.raises(UnknownJob):
            await site.command("a", f"job-{verb.value}", id="nothing")


@pytest.mark.proves("S82")
async def test_the_whole_configuration_may_be_typed_and_is_checked_before_anything_starts(make_site: MakeSite) -> None:
    site = await make_site()
    for config in ({"downtime-limit": "200"}, {"events": False}, {"no-such": 1}, {"max-cpu-throttle": 1000}):
        with pytest.raises(UsageError):
            await site.command("a", "vm-migrate", vm="g", destination="b", config=config)
    assert not site.agents["a"].attempts
    attempt = await site.migrate(config={"downtime-limit": 123, "auto-converge": True}, settings=["max-bandwidth=0"])
    await site.settle()
    assert attempt.wanted.options == {"downtime-limit": 123, "auto-converge": True, "max-bandwidth": 0}
    assert attempt.wire()["outcome"] == "destination"
    await site.check("b")


@pytest.mark.proves("S105")
async def test_commands_are_answered_while_an_effect_and_the_journals_thread_are_busy(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    site.director.script("b", {"in-listen": "hold"})
    attempt = await site.migrate()
    await site.until(lambda: attempt.doing is not None and attempt.doing.value == "prepare")
    written, may_go = threading.Event(), threading.Event()
    append = journal._append

    def slowly(*arguments: Any) -> None:
        written.set()
        assert may_go.wait(SETTLE_S)
        append(*arguments)

    monkeypatch.setattr(journal, "_append", slowly)
    cancel = asyncio.create_task(site.command("a", "job-cancel", id=attempt.job))
    assert await asyncio.to_thread(written.wait, SETTLE_S)
    for command, more in (("query-jobs", {}), ("vm-status", {"vm": "g"}), ("job-status", {"vm": "g"})):
        assert await site.command("a", command, **more)
    assert not cancel.done(), "all of that while the cancel is being written"
    assert (await the_job(site))["status"] == J.RUNNING
    may_go.set()
    await cancel
    site.director.go("b", "in-listen")
    await site.settle()
    assert attempt.wire()["status"] == "cancelled"
    await site.check("a")


@pytest.mark.proves("S95")
async def test_a_job_that_ended_without_its_agent_stays_too(make_site: MakeSite) -> None:
    """1. the guest is given away, which is in the journal  2. the agent dies before it writes the job's end."""
    site = await make_site()
    site.crash_at("a", Fact.SOURCE_RETIRED)
    attempt = await site.migrate(**KEPT)
    await site.noted_by("a", Fact.SOURCE_RETIRED)
    await site.restart("a")
    shown = await the_job(site)
    assert (shown["id"], shown["status"]) == (attempt.job, J.CONCLUDED)
    assert shown["result"]["outcome"] == "destination"
    await site.command("a", "job-dismiss", id=attempt.job)
    assert await jobs(site) == []
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S101")
async def test_progress_does_not_begin_anew_with_the_agent(make_site: MakeSite) -> None:
    site = await make_site()
    await site.migrate_without_last_pages()
    await site.until(lambda: site.agents["a"].jobs.infos()[0].current_progress > 0)
    before = (await the_job(site))["current-progress"]
    await site.restart("a")
    assert (await the_job(site))["current-progress"] >= before > 0
    await site.pages_arrive()
