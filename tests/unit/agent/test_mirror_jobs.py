"""The mirrors of a migration as jobs of their own: two real agents, fake QEMUs, a guest with two local disks."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vmferry.agent import mirror_jobs
from vmferry.agent.source import SourceAttempt
from vmferry.agent.source_disks import OBEY_S
from vmferry.core.facts import Fact
from vmferry.core.job import MIRROR, JobStatus, may_follow
from vmferry.core.source_rows import DROP_MS
from vmferry.core.view import Disks, disks_of
from vmferry.errors import JobRefused, OptionLocked, UnknownJob, UsageError
from vmferry.testing.fake_site import JumpClock, MakeSite, Site

J = JobStatus
SIZE = 3 << 20
DISK = '[[disk]]\npath = "{path}"\nshared = false\n'


async def copying(
    make_site: MakeSite, *versions: str, clock: JumpClock | None = None, **more: Any
) -> tuple[Site, SourceAttempt]:
    """A migration whose disks are on their way, and stay so."""
    site = await make_site(*versions, clock=clock)
    paths = [site.directory / f"d{n}.img" for n in range(2)]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    site.disks("b")
    await site.run_vm("d", more="".join(DISK.format(path=path) for path in paths))
    site.director.script("a", {"mirror": "hold"})
    attempt = await site.migrate(vm="d", disks="copy", **more)
    await site.until_row(attempt, "P-copying")
    await site.until(lambda: mirrors(attempt) == ["running"] * 2)
    return site, attempt


def mirrors(attempt: SourceAttempt) -> list[str]:
    return [job.state.value for job in mirror_jobs.listed(attempt)]


async def listed(site: Site) -> list[dict[str, Any]]:
    return list(await site.command("a", "query-jobs"))


async def go(site: Site, script: dict[str, str] | None = None) -> None:
    """Both mirrors go on with their bulk; `script` says what comes after it."""
    site.director.script("a", script)
    for _ in range(2):
        await site.director.reached("a", "mirror")
        site.director.go("a", "mirror")


def told(site: Site) -> list[tuple[str, str]]:
    """(id, state) of every mirror's change that the source's agent publishes from now on."""
    heard: list[tuple[str, str]] = []
    publish = site.agents["a"].publish

    def listening(name: str, data: dict[str, Any]) -> None:
        if name == "JOB_STATUS_CHANGE" and data["type"] == MIRROR.name:
            heard.append((data["id"], data["status"]))
        publish(name, data)

    site.agents["a"].publish = listening  # type: ignore[method-assign]
    return heard


@pytest.mark.proves("S92", "S96", "S107", "S114")
@pytest.mark.parametrize("version", ["7.2", "11.1"])
async def test_each_disk_has_a_job_beside_that_of_the_migration(make_site: MakeSite, version: str) -> None:
    site, attempt = await copying(make_site, version, version)
    whole, *disks = await listed(site)
    assert (whole["id"], whole["type"]) == (attempt.job, "migrate")
    assert [(d["id"], d["type"], d["status"]) for d in disks] == [
        (f"{attempt.job}-disk-{n}", "mirror", "running") for n in range(2)
    ]
    assert [(d["vm"], d["peer"], d["total-progress"], Path(d["detail"]).name) for d in disks] == [
        ("d", "b", SIZE, f"d{n}.img") for n in range(2)
    ]
    assert disks[0]["verbs"] == ["cancel", "pause", "change"]
    heard = told(site)
    await go(site)
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"
    assert await listed(site) == []
    for disk in disks:
        states = [J.RUNNING, *(J(state) for job, state in heard if job == disk["id"])]
        assert [J.READY in states, *states[-2:]] == [True, J.CONCLUDED, J.NULL], states
        assert all(may_follow(*step) for step in pairwise(states)), states
        assert J.ABORTING not in states


@pytest.mark.proves("S96", "S99")
async def test_to_cancel_one_is_to_cancel_the_migration(make_site: MakeSite) -> None:
    site, attempt = await copying(make_site)
    heard = told(site)
    cancelled = await site.command("a", "job-cancel", id=f"{attempt.job}-disk-1")
    assert cancelled["id"] == f"{attempt.job}-disk-1"
    await site.settle()
    wire = attempt.wire()
    assert (wire["status"], wire["outcome"]) == ("cancelled", "source")
    await site.check("a", "d")
    assert {job for job, state in heard if state == "aborting"} == {f"{attempt.job}-disk-{n}" for n in range(2)}
    with pytest.raises(UnknownJob):
        await site.command("a", "job-cancel", id=f"{attempt.job}-disk-1")


@pytest.mark.proves("S99", "S114")
async def test_one_that_is_paused_holds_its_migration_until_it_is_resumed_also_over_a_restart(
    make_site: MakeSite,
) -> None:
    site, attempt = await copying(make_site)
    first = f"{attempt.job}-disk-0"
    with pytest.raises(JobRefused, match="not paused"):
        await site.command("a", "job-resume", id=first)
    paused = await site.command("a", "job-pause", id=first)
    assert (paused["status"], paused["verbs"]) == ("paused", ["cancel", "resume", "change"])
    assert mirrors(attempt) == ["paused", "running"]
    again = await site.command("a", "job-pause", id=first)
    assert (again["status"], again["reason"]) == ("paused", "a person paused it")
    await go(site)
    await site.until(lambda: mirrors(attempt) == ["paused", "ready"])
    assert disks_of(attempt.facts) is Disks.COPYING
    await site.restart("a")
    attempt = site.attempt(vm="d")
    await site.until(lambda: mirrors(attempt) == ["paused", "ready"])
    await site.command("a", "job-resume", id=first)
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"
    await site.check("b", "d")


@pytest.mark.proves("S96", "S99")
async def test_a_pause_that_comes_when_the_disk_is_just_ready_is_taken_back_at_the_switchover(
    make_site: MakeSite,
) -> None:
    """1. a person asks for a pause  2. the disk becomes ready  3. QEMU pauses it: it stands by"""
    site, attempt = await copying(make_site, auto_finalize=False)
    mirror = mirror_jobs.listed(attempt)[0]
    await go(site)
    await site.until(lambda: Fact.DISKS_READY in attempt.facts)
    with pytest.raises(JobRefused, match="all disks are copied"):
        await mirror_jobs.pause(mirror)
    with pytest.raises(JobRefused, match="its migration needs it"):
        await site.command("a", "job-pause", id=mirror.id)
    await attempt.machine.execute("job-pause", {"id": mirror.mirror.job})
    await site.until(lambda: mirrors(attempt)[0] == "standby")
    await site.until_row(attempt, "M-hold")
    await site.command("a", "job-finalize", id=attempt.job)
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"
    await site.check("b", "d")


@pytest.mark.proves("S98", "S99")
async def test_of_one_disk_the_speed_can_change_and_nothing_else(make_site: MakeSite) -> None:
    site, attempt = await copying(make_site)
    first = f"{attempt.job}-disk-0"
    speeds: list[dict[str, Any]] = []
    execute = attempt.machine.execute

    async def heard(name: str, arguments: Any = None, **more: Any) -> Any:
        if name == "block-job-set-speed":
            speeds.append(arguments)
        return await execute(name, arguments, **more)

    attempt.machine.execute = heard  # type: ignore[method-assign, assignment]
    await site.command("a", "job-change", id=first, type="mirror", max_bandwidth=1 << 20)
    await site.command("a", "job-change", id=first, type="mirror", settings=["max-bandwidth=2MiB"])
    assert [(s["device"], s["speed"]) for s in speeds] == [(attempt.mirrors[0].job, n << 20) for n in (1, 2)]
    for wish in ({"type": "migrate", "max_bandwidth": 1}, {"type": "mirror"}, {"type": "mirror", "downtime_limit": 1},
                 {"type": "mirror", "max_bandwidth": 1, "mode": "postcopy"}):  # fmt: skip
        with pytest.raises(UsageError):
            await site.command("a", "job-change", id=first, **wish)
    for verb in ("job-complete", "job-finalize"):
        with pytest.raises(JobRefused, match="all of them or none"):
            await site.command("a", verb, id=first)
    await go(site)
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"


@pytest.mark.proves("S95", "S96")
async def test_one_that_failed_says_why_and_can_be_dismissed_before_its_migration_ends(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, attempt = await copying(make_site)
    seen: list[list[dict[str, Any]]] = []
    at_once = asyncio.Event()
    tell = mirror_jobs.tell

    def telling(of: SourceAttempt) -> None:
        tell(of)
        if Fact.DISK_FAILED in of.facts and not seen and not of.ended.is_set():
            seen.append([info.to_wire() for info in site.agents["a"].jobs.infos()])
            for job in mirror_jobs.listed(of):
                if job.state is J.CONCLUDED:
                    mirror_jobs.dismiss(job)
            seen.append([info.to_wire() for info in site.agents["a"].jobs.infos()])
            at_once.set()

    monkeypatch.setattr(mirror_jobs, "tell", telling)
    await go(site, script={"drain": "fail"})
    await asyncio.wait_for(at_once.wait(), 30)
    await site.settle()
    before, after = seen
    failed = next(job for job in before if job["status"] == "concluded")
    assert "scripted failure" in failed["error"]
    assert failed["verbs"] == ["dismiss"]
    assert failed["id"] not in [job["id"] for job in after]
    assert attempt.wire()["outcome"] == "source"
    await site.check("a", "d")


# --- what the job may send -------------------------------------------------------------------------------------


class Speeds:
    """What QEMU is told of the disks' speed and of the memory's, in bytes per second."""

    def __init__(self, attempt: SourceAttempt) -> None:
        self.disks: list[int] = []
        self.memory: list[int] = []
        self._execute = attempt.machine.execute
        attempt.machine.execute = self._hearing  # type: ignore[method-assign, assignment]

    async def _hearing(self, name: str, arguments: Any = None, **more: Any) -> Any:
        if name == "block-job-set-speed":
            self.disks.append(arguments["speed"])
        elif name == "migrate-set-parameters" and "max-bandwidth" in arguments:
            self.memory.append(arguments["max-bandwidth"])
        return await self._execute(name, arguments, **more)


@pytest.mark.proves("S96", "S114")
async def test_memory_and_disks_share_what_the_job_may_send_and_the_pause_has_no_limit(make_site: MakeSite) -> None:
    site, attempt = await copying(make_site, settings=["max-bandwidth=8M"], auto_finalize=False)
    speeds = Speeds(attempt)
    await site.command("a", "job-change", id=attempt.job, max_bandwidth=16 << 20)
    assert (speeds.memory, speeds.disks) == ([16 << 20], [8 << 20] * 2), "the disks have all of it"
    site.director.script("a", {"active": "hold"})
    for _ in range(2):
        await site.director.reached("a", "mirror")
        site.director.go("a", "mirror")
    await site.director.reached("a", "active")
    assert (speeds.memory[1:], speeds.disks[2:]) == ([12 << 20], [2 << 20] * 2)
    await site.command("a", "job-change", id=attempt.job, max_bandwidth=4 << 20)
    assert (speeds.memory[2:], speeds.disks[4:]) == ([3 << 20], [1 << 19] * 2)
    site.director.script("a")
    site.director.go("a", "active")
    await site.until_row(attempt, "M-hold")
    await site.command("a", "job-finalize", id=attempt.job)
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"
    assert speeds.disks[6:] == [0, 0]


async def test_a_limit_that_is_less_than_a_byte_for_each_disk_is_none_of_no_limit(make_site: MakeSite) -> None:
    site, attempt = await copying(make_site)
    speeds = Speeds(attempt)
    await site.command("a", "job-change", id=attempt.job, max_bandwidth=1)
    await site.command("a", "job-change", id=attempt.job, max_bandwidth=0)
    assert speeds.disks == [1, 1, 0, 0]
    await go(site)
    await site.settle()


async def test_what_was_changed_holds_for_an_agent_that_begins_anew(make_site: MakeSite) -> None:
    site, attempt = await copying(make_site, settings=["max-bandwidth=8M"])
    await site.command("a", "job-change", id=attempt.job, max_bandwidth=4 << 20)
    await site.restart("a")
    attempt = site.attempt(vm="d")
    assert attempt.copying.speed == 2 << 20
    await go(site)
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"


@pytest.mark.proves("S72", "S75")
async def test_while_disks_are_copied_what_concerns_the_memory_can_change(make_site: MakeSite) -> None:
    site, attempt = await copying(make_site)
    await site.command("a", "job-change", id=attempt.job, downtime_limit=77)
    assert (await attempt.machine.execute("query-migrate-parameters"))["downtime-limit"] == 77
    with pytest.raises(OptionLocked, match="in use since"):
        await site.command("a", "job-change", id=attempt.job, settings=["announce-rounds=7"])
    await go(site)
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"


async def test_a_mirror_that_does_not_end_holds_nobody_up_for_ever(make_site: MakeSite) -> None:
    """A read of the guest's own image hangs in its storage: QEMU cannot end the job."""
    clock = JumpClock()
    site, attempt = await copying(make_site, clock=clock)
    execute, asked = attempt.machine.execute, asyncio.Event()

    async def deaf(name: str, arguments: Any = None, **more: Any) -> Any:
        if name in ("yank", "job-cancel"):
            asked.set()
            return {}
        return await execute(name, arguments, **more)

    attempt.machine.execute = deaf  # type: ignore[method-assign, assignment]
    await site.command("a", "job-cancel", id=attempt.job)
    await asyncio.wait_for(asked.wait(), 30)
    clock.leap(OBEY_S + 1)
    await site.until(lambda: "do not end" in attempt.trouble)
    clock.leap(DROP_MS / 1000)
    await site.settle()
    wire = attempt.wire()
    assert (wire["status"], wire["outcome"]) == ("cancelled", "source")
    attempt.machine.execute = execute  # type: ignore[method-assign]
    await site.check("a", "d")
