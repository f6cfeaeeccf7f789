"""An agent that runs for years: of ended jobs it keeps as many results as its journal does, and what others may ask."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.restore_beds import Bed, use_fakes
from tests.save_sites import KEPT, begin, chore, ended, save
from vmferry import limits
from vmferry.agent import peer_commands
from vmferry.agent.restores import Restores
from vmferry.core.facts import Fact
from vmferry.core.restore import RestoreFact as F
from vmferry.errors import Busy, HostUnreachable, UnknownJob, UnknownVm
from vmferry.jobs import journal
from vmferry.testing.fake_site import MakeSite


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "KEEP_ENDED_JOBS", 2)


async def test_saves_are_forgotten_but_for_the_newest_and_what_waits_to_be_dismissed(make_site: MakeSite) -> None:
    site = await make_site("11.1")
    saves = site.agents["a"].saves
    waiting = await save(site, "kept", **KEPT)
    jobs = [(await save(site, f"n{number}"))["job"] for number in range(4)]
    assert list(saves.results) == [waiting["job"], *jobs[2:]]
    assert (await site.command("a", "job-status", job=waiting["job"]))["name"] == "kept"
    with pytest.raises(UnknownVm):
        await site.command("a", "job-status", job=jobs[0])
    await site.command("a", "job-dismiss", id=waiting["job"])
    with pytest.raises(UnknownJob, match="dismissed"):
        await site.command("a", "job-status", job=waiting["job"])
    await save(site, "last")
    assert len(saves.results) == 2
    assert site.agents["a"].jobs.dismissed == set()


async def test_a_save_that_is_over_holds_nothing_of_its_guest(make_site: MakeSite) -> None:
    site = await make_site("11.1")
    job = await begin(site)
    saves = site.agents["a"].saves
    assert list(saves.at_work()) == [job]
    await ended(job)
    assert saves._jobs == {}
    assert saves.status(job=job.job) == saves.results[job.job]


async def test_chores_that_wait_to_be_dismissed_keep_their_results(make_site: MakeSite) -> None:
    site = await make_site("11.1")
    waiting = await chore(site, "snapshot-verify", **KEPT)
    jobs = [(await chore(site, "snapshot-verify"))["job"] for _ in range(3)]
    assert list(site.agents["a"].chores.results) == [waiting["job"], *jobs[1:]]
    assert (await site.command("a", "job-status", job=waiting["job"]))["whole"]


async def test_restores_are_forgotten_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch)
    seen: list[Any] = []
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        bed = Bed(folder, lazy=False, job=f"{number:032x}")
        if not seen:
            bed.agent.config.state_dir = tmp_path
            bed.agent.jobs = BookOf(seen)
            restores = Restores(bed.agent)  # type: ignore[arg-type]
        bed.agent.restores.over = restores.over
        restores._jobs[bed.attempt.vm] = bed.attempt
        bed.begin()
        bed.attempt.note(F.CANCEL)
        async with asyncio.timeout(10):
            await bed.task
    assert restores._jobs == {}
    assert list(restores.results) == [f"{number:032x}" for number in range(4)]
    assert seen == [restores.results] * 4, "each is handed to the book, which takes the oldest away"


class BookOf:
    """As much of a job book as the end of a restore uses."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def ended(self, *arguments: Any, **more: Any) -> None:
        pass

    def forget_old(self, results: Any) -> None:
        self.seen.append(results)


async def test_a_place_hears_how_a_migration_ended_whose_result_is_not_kept_any_more(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. the guest stayed here, and its place could not be released  2. many migrations later its host is back: it must
    not wait for a person."""
    site = await make_site("11.1")
    agent = site.agents["a"]

    async def cancelled() -> str:
        attempt = await site.migrate()
        await site.noted_by("a", Fact.STARTED)
        await site.command("a", "vm-cancel", vm="g")
        await site.settle()
        site.noted.clear()
        return attempt.job

    async def answer(job: str) -> bool:
        return bool((await peer_commands._wanted(agent, None, {"job": job}))["wanted"])

    site.director.script("a", {"pages": "hold"})
    jobs = [await cancelled() for _ in range(4)]
    assert list(agent.results) == jobs[2:]
    assert [await answer(job) for job in jobs] == [False] * 4
    assert await answer("f" * 32), "nobody knows that one"
    monkeypatch.setattr(limits, "JOBS_PROVEN_MAX", 1)
    jobs.append(await cancelled())
    assert [await answer(job) for job in jobs] == [True, True, False, False, False]


async def test_of_old_places_their_last_facts_are_kept_and_of_older_ones_nothing(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site("11.1")
    agent, there = site.agents["a"], site.agents["b"]
    site.director.script("a", {"pages": "hold"})
    jobs = []
    for _ in range(4):
        attempt = await site.migrate()
        await site.noted_by("a", Fact.STARTED)
        await site.command("a", "vm-cancel", vm="g")
        await site.settle()
        site.noted.clear()
        jobs.append(attempt.job)
    assert list(there.places) == jobs[2:]
    assert list(there.known_jobs) == jobs
    said = await agent.peers.link("b").call("peer-target", {"job": jobs[0], "generation": 2})
    assert said["gone"]
    with pytest.raises(Busy, match="for good"):
        await peer_commands._prepare(there, "a", {"vm": "g", "job": jobs[0], "source": "a"})
    monkeypatch.setattr(limits, "PLACES_PROVEN_MAX", 1)
    site.director.script("a")
    arrived = await site.migrate()
    await site.settle()
    assert list(there.known_jobs) == [arrived.job]
    with pytest.raises(HostUnreachable, match="not known"):
        await agent.peers.link("b").call("peer-target", {"job": jobs[0], "generation": 2, "granted": True})
    assert arrived.job in there.places, "its guest is here"
