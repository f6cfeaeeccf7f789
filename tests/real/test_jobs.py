"""Jobs on real QEMUs: the states that can be held, every verb in them, leave, pause, progress, results that stay."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from qemu.qmp import QMPClient

from vmferry.core.job import MIGRATE, Answer, JobStatus, Verb, answer, may_follow, pause_refusal
from vmferry.core.migration_status import MigrationStatus
from vmferry.testing.hosts import NEWEST, OLDEST, PAIRS, Follower, Guests, MakePair, TwoAgents, boot

pytestmark = pytest.mark.real

SLOW = ("--set", "max-bandwidth=2M", "--set", "downtime-limit=100ms")
IN_POSTCOPY = (
    "--mode",
    "postcopy",
    "--postcopy-after-passes",
    "0",
    "--set",
    "max-bandwidth=2M",
    "--set",
    "max-postcopy-bandwidth=2M",
)
VERSIONS = sorted({OLDEST, NEWEST})
READINGS = 5
"""Of a migration's progress, before it is let go faster."""


def begin(pair: TwoAgents, *words: str) -> str:
    return str(pair.a.ok("migrate", "web1", "host-b", "--detach", *words)["job"])


def the_job(pair: TwoAgents, host: str = "a") -> dict[str, Any]:
    (job,) = getattr(pair, host).ok("jobs")["jobs"]
    return dict(job)


def states(follow: Follower, kind: str = MIGRATE.name) -> list[str]:
    return [
        str(event.data["status"])
        for event in follow.heard
        if event.name == "JOB_STATUS_CHANGE" and event.data["type"] == kind
    ]


def until_state(follow: Follower, state: str) -> None:
    follow.until(lambda event: event.name == "JOB_STATUS_CHANGE" and event.data["status"] == state)


def refuse_what_the_table_refuses(pair: TwoAgents, job: str) -> None:
    """Every verb that a job in this state refuses, and nothing of it is done."""
    shown = the_job(pair)
    for verb in Verb:
        cell = answer(MIGRATE, verb, JobStatus(shown["status"]))
        reason = cell.why if cell.answer is Answer.REFUSED else None
        if verb is Verb.PAUSE and reason is None:
            reason = pause_refusal(MigrationStatus(shown["detail"]))
        if reason is not None:
            words = ("retry-for=1s",) if verb is Verb.CHANGE else ()
            error = pair.a.refused("job", verb.value, job, *words, code=22)
            assert reason in error["message"], error
    assert the_job(pair)["status"] == shown["status"]


@pytest.mark.proves("S97", "S99", "S106")
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_a_switchover_waits_for_leave_and_goes_on_with_it(
    source: str, destination: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(source, destination)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        job = begin(pair, "--no-auto-finalize", "--no-auto-dismiss", "--mode", "precopy")
        follow.status("pre-switchover")
        until_state(follow, "pending")
        shown = the_job(pair)
        assert (shown["status"], shown["detail"]) == ("pending", "pre-switchover")
        assert shown["guest-paused-ms"] > 0
        refuse_what_the_table_refuses(pair, job)
        assert "device" not in follow.statuses()
        pair.a.ok("job", "change", "web1", "retry-for=1min")  # policies change at any time, options do not
        pair.a.refused("job", "change", "web1", "downtime-limit=1s", code=10)
        pair.a.ok("job", "finalize", "web1")
        assert follow.end()["outcome"] == "destination"
        passed = ["undefined", *states(follow)]
        assert passed[-1] == "concluded"
        assert all(may_follow(JobStatus(a), JobStatus(b)) for a, b in pairwise(passed)), passed
    assert pair.running_on("web1") == ["host-b"]
    for host in ("a", "b"):
        assert the_job(pair, host)["status"] == "concluded"
        getattr(pair, host).kill()
        getattr(pair, host).restart()
        assert the_job(pair, host)["result"]["outcome"] == "destination"
        getattr(pair, host).ok("job", "dismiss", job)
        assert getattr(pair, host).ok("jobs")["jobs"] == []


def test_a_leave_that_waits_survives_its_agent_and_a_cancel_ends_it(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair()
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        job = begin(pair, "--no-auto-finalize", "--mode", "precopy")
        follow.status("pre-switchover")
    pair.a.kill()
    pair.a.restart()
    assert the_job(pair)["status"] == "pending"
    pair.a.ok("job", "cancel", job)
    with pair.a.follow() as follow:
        wire = follow.execute("job-status", {"vm": "web1"})
        assert (wire if wire["over"] else follow.end())["status"] == "cancelled"
    assert pair.running_on("web1") == ["host-a"]


@pytest.mark.proves("S98", "S99")
@pytest.mark.parametrize("version", VERSIONS)
def test_verbs_of_a_precopy_that_runs(version: str, make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        job = begin(pair, *SLOW, "--mode", "precopy")
        follow.status("active")
        refuse_what_the_table_refuses(pair, job)
        shown = follow.execute(
            "job-change", {"id": job, "downtime-limit": 2000, "config": {"max-bandwidth": 1 << 30}}
        )  # fmt: skip
        assert shown["id"] == job
        assert follow.end()["outcome"] == "destination"
        until_state(follow, "null")
        assert states(follow) == ["created", "running", "waiting", "pending", "concluded", "null"]
    assert pair.running_on("web1") == ["host-b"]


@pytest.mark.proves("S99")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_postcopy_is_paused_by_hand_and_goes_on_when_it_is_resumed(
    version: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        job = begin(pair, *IN_POSTCOPY)
        follow.until(lambda event: event.name == "JOB_FACT" and event.data["fact"] == "run-acked")
        pair.a.ok("job", "pause", job)
        until_state(follow, "paused")
        follow.until(lambda event: event.name == "JOB_CHANGE" and event.data.get("row") == "G-ran-broken-hold")
        shown = the_job(pair)
        assert (shown["status"], shown["reason"]) == ("paused", "a person paused it")
        refuse_what_the_table_refuses(pair, job)
        assert pair.running_on("web1") == ["host-b"]
        pair.a.ok("job", "resume", job)
        assert follow.end(timeout_s=120)["outcome"] == "destination"
    assert pair.running_on("web1") == ["host-b"]


@pytest.mark.proves("S101", "S102", "S103")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_progress_of_a_real_run(version: str, mode: str, make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    words: tuple[str, ...] = ("--mode", "precopy", "--set", "max-bandwidth=20M")
    if mode == "postcopy":
        words = ("--mode", "postcopy", "--postcopy-after-passes", "0")  # so there is memory left for it
        words += ("--set", "max-bandwidth=20M", "--set", "max-postcopy-bandwidth=3M")
    with pair.a.follow() as follow:
        begin(pair, *words)
        for _ in range(READINGS):
            follow.until(lambda event: event.name == "JOB_PROGRESS")
        if mode == "precopy":  # at that rate it need not end: the guest writes about as fast
            pair.a.ok("set", "web1", "max-bandwidth=1G")
        end = follow.end(timeout_s=60)
        assert end["outcome"] == "destination"
        told = [event.data for event in follow.heard if event.name in ("JOB_PROGRESS", "JOB_CHANGE")]
    told = [data for data in told if data.get("role") is None]
    assert len(told) > 2
    for before, after in pairwise(told):
        assert after["current_bytes"] >= before["current_bytes"]
        assert after["percent"] >= before["percent"]
        assert 0 <= after["percent_error"] <= 100
    read = [event.data for event in follow.heard if event.name == "JOB_PROGRESS"]
    in_postcopy = {data["whole_bytes"] for data in read if data["status"] == "postcopy-active"}
    assert len(in_postcopy) <= 1, "from the first reading in postcopy on no new work appears"
    assert mode == "precopy" or in_postcopy
    assert end["progress"]["percent"] == 100
    assert end["progress"]["current_bytes"] == end["progress"]["whole_bytes"] > 0


def test_a_stranger_steers_a_job_with_qemus_own_library(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair()
    boot(pair.a, guests.boot())

    async def steer() -> list[Any]:
        client = QMPClient("stranger")
        await client.connect(str(pair.a.socket))
        try:
            config = {"max-bandwidth": 1 << 20}
            wish: dict[str, Any] = {"vm": "web1", "destination": "host-b", "mode": "precopy", "config": config}
            heard: list[str] = []
            with client.listener(("JOB_STATUS_CHANGE", "MIGRATION")) as listener:
                begun: Any = await client.execute("vm-migrate", wish)
                listed: Any = await client.execute("query-jobs")
                async for event in listener:
                    data: Any = event["data"]
                    if event["event"] == "JOB_STATUS_CHANGE":
                        heard.append(str(data["status"]))
                    elif data["status"] == "active" and "role" not in data:
                        await client.execute("job-cancel", {"id": begun["job"]})
                    if "null" in heard:
                        break
            return [*listed, heard]
        finally:
            await client.disconnect()

    job, heard = asyncio.run(asyncio.wait_for(steer(), 60))
    assert (job["type"], job["status"]) == ("migrate", "running")
    assert heard[-2:] == ["concluded", "null"]
    assert pair.running_on("web1") == ["host-a"]
