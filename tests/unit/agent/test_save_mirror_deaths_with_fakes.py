"""Saves of a real agent with fake QEMUs, whose disks are copied: agents that die, and what people see and may do."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.save_mirror_sites import VERSIONS, begin, check_untouched, left, listed, save, stored
from tests.save_sites import KEPT, chore, ended, names, until_fact, with_disk
from vmferry import limits
from vmferry.agent import images
from vmferry.agent.machine import Machine
from vmferry.agent.save import SaveJob
from vmferry.core.saving import SaveFact
from vmferry.errors import Busy, PlanRefused
from vmferry.jobs.journal import Entry
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.errors import QmpCommandError
from vmferry.testing.fake_site import SETTLE_S, MakeSite, Site
from vmferry.vm.image_locks import WriteLock

F = SaveFact

# --- deaths ---------------------------------------------------------------------------------------------------


class Died(BaseException):
    """The agent is gone: nothing more is done."""


async def die_at(site: Site, monkeypatch: pytest.MonkeyPatch, dies: Callable[[SaveFact], bool], **wish: Any) -> SaveJob:
    """The agent of a save ends with a fact, in the middle of what it does."""
    note, died = SaveJob.note, asyncio.Event()

    def noting(self: SaveJob, found: SaveFact, **rest: Any) -> None:
        if died.is_set():
            raise Died
        note(self, found, **rest)
        if dies(found):
            died.set()
            raise Died

    async def nothing(self: SaveJob) -> None:
        raise Died

    with monkeypatch.context() as context:
        context.setattr(SaveJob, "note", noting)
        job = await begin(site, **KEPT, **wish)
        (task,) = (t for t in site.agents["a"]._tasks if t.get_name().startswith("save-"))
        await asyncio.wait({task}, timeout=SETTLE_S)
        assert task.done(), job.wire()
        assert isinstance(task.exception(), Died)
        context.setattr(SaveJob, "give_back", nothing)
        context.setattr(SaveJob, "note", note)
        await site.stop("a")
    return job


async def next_agent(site: Site) -> dict[str, Any]:
    await site.restart("a")
    again = site.agents["a"].saves.active("h")
    assert again is not None
    return await ended(again)


MOMENTS = (
    F.WANTED, F.CONFIGURED, F.COPYING, F.COPIES_READY, F.STARTED, F.STANDS, F.COPIED, F.WHOLE, F.RESUMED, F.COMMITS,
    F.KEPT, F.CLEANUP,
)  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("fact", MOMENTS)
@pytest.mark.parametrize("pause", [False, True], ids=["runs", "pause"])
@pytest.mark.proves("S53", "S123")
async def test_an_agent_that_dies_at_each_moment(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, version: str, fact: SaveFact, pause: bool
) -> None:
    """The next one ends what is at work, the guest goes on, and a copy stays exactly as long as a snapshot may have
    it."""
    site, image = await with_disk(make_site, version)
    await die_at(site, monkeypatch, lambda found: found is fact, pause=pause)
    wire = await next_agent(site)
    is_kept = fact in (F.KEPT, F.CLEANUP) or (fact is F.RESUMED and pause)
    assert wire["outcome"] == ("saved" if is_kept else "none"), wire
    assert names(site) == (["one"] if is_kept else [])
    assert left(site) == ({stored(site).name} if is_kept or fact is F.COMMITS else set())
    await check_untouched(site, image)
    if fact is F.COMMITS:  # a put that was on its way may come to the store yet
        assert any("a snapshot may have it" in note for note in wire["notes"])
        assert await listed(site) == {stored(site).name: ""}
    assert (await save(site, "two", pause=pause))["outcome"] == "saved"
    assert (await chore(site, "snapshot-verify"))["whole"]


@pytest.mark.parametrize("when", ["before-the-journal-knows", "before-it-has-its-name"])
async def test_an_agent_that_dies_while_it_makes_images(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    site, image = await with_disk(make_site)
    append, publish = site.agents["a"].journal.append, images.publish

    async def appending(kind: Entry, subject: str, body: Any = None) -> None:
        if kind is Entry.IMAGE_MADE and when == "before-the-journal-knows":
            raise Died
        await append(kind, subject, body)

    def publishing(path: str, **more: Any) -> None:
        if when == "before-it-has-its-name":
            raise Died
        publish(path, **more)

    monkeypatch.setattr(site.agents["a"].journal, "append", appending)
    with monkeypatch.context() as context:
        context.setattr(images, "publish", publishing)
        await begin(site)
        (task,) = (t for t in site.agents["a"]._tasks if t.get_name().startswith("save-"))
        await asyncio.wait({task}, timeout=SETTLE_S)
        assert isinstance(task.exception(), Died)
        assert len(left(site)) == 1, "a file under its first name"
        await site.stop("a")
    wire = await next_agent(site)
    assert wire["outcome"] == "none"
    assert left(site) == set()
    await check_untouched(site, image)


async def test_a_qemu_that_is_another_one_by_now_is_left_alone(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent and the guest's QEMU die, and the VM is started anew before the journal is read: its jobs are its own,
    and the copy, which nobody has open, goes."""
    site, _ = await with_disk(make_site)
    job = await die_at(site, monkeypatch, lambda found: found is F.COPIES_READY)
    assert left(site) == {stored(site).name}
    asked: list[str] = []
    execute = Machine.execute

    async def executing(self: Machine, command: str, *arguments: Any, **more: Any) -> Any:
        asked.append(command)
        return await execute(self, command, *arguments, **more)

    monkeypatch.setattr("vmferry.agent.saves.why_not_ours", lambda *_: "its VM has another QEMU now")
    monkeypatch.setattr(Machine, "execute", executing)
    wire = await next_agent(site)
    assert wire["outcome"] == "none"
    assert not {"job-cancel", "job-dismiss", "blockdev-del"} & set(asked)
    machine = site.agents["a"].vms["h"].require_machine()
    assert [each["id"] for each in await machine.execute("query-jobs")] == [job.wanted.copies[0].job]


async def test_a_copy_that_a_process_has_open_is_not_taken_away(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _ = await with_disk(make_site)
    monkeypatch.setattr(WriteLock, "take", lambda path: None)
    site.director.script("a", {"drain": "fail"})
    assert (await save(site))["outcome"] == "none"
    assert left(site) == {stored(site).name}
    assert set(await listed(site)) == {stored(site).name}, "it is told, and can be taken away later"


async def test_mirrors_that_do_not_end_keep_the_job(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest has been given back before; the job has no end as long as something of it is at work."""
    site, image = await with_disk(make_site)
    monkeypatch.setattr(limits, "SAVE_OBEY_S", 0.05)
    execute, deaf, refused = Machine.execute, True, asyncio.Event()

    async def executing(self: Machine, command: str, *arguments: Any, **more: Any) -> Any:
        if command == "job-cancel" and deaf:
            refused.set()
            raise QmpCommandError(command, "GenericError", "not now", peer="QEMU")
        return await execute(self, command, *arguments, **more)

    monkeypatch.setattr(Machine, "execute", executing)
    site.director.script("a", {"active": "hold"})
    job = await begin(site)
    await site.director.reached("a", "active")
    await site.agents["a"].saves.cancel(job.job)
    async with asyncio.timeout(SETTLE_S):
        await refused.wait()
    assert not job.ended.is_set()
    assert await job.kept.require_machine().run_state() == "running"
    deaf = False
    assert (await ended(job))["status"] == "cancelled"
    assert left(site) == set()
    await check_untouched(site, image)


# --- people ---------------------------------------------------------------------------------------------------


async def test_nobody_leads_a_copy_from_the_vms_monitor(make_site: MakeSite) -> None:
    site, image = await with_disk(make_site)
    site.director.script("a", {"mirror": "hold"})
    job = await begin(site)
    await site.director.reached("a", "mirror")
    (copy,) = job.wanted.copies
    path = (await site.command("a", "vm-status", vm="h"))["monitor"]

    def ask() -> tuple[list[str], list[str]]:
        heard = []
        with BlockingClient(path, name="the monitor") as monitor:
            jobs = [each["id"] for each in monitor.execute("query-jobs")]
            for command, wish in (
                ("job-cancel", {"id": copy.job}),
                ("block-job-cancel", {"device": copy.job}),
                ("block-job-pause", {"device": copy.job}),
                ("block-job-set-speed", {"device": copy.job, "speed": 1}),
                ("blockdev-del", {"node-name": copy.target}),
                ("block_resize", {"node-name": copy.node, "size": 1}),
            ):
                with pytest.raises(QmpCommandError) as caught:
                    monitor.execute(command, wish)
                heard.append(caught.value.desc)
        return jobs, heard

    jobs, heard = await asyncio.to_thread(ask)
    assert jobs == [job.job], "QEMU's own job has no name here but the save's"
    assert all("vmferry's own" in words for words in heard[:-1]), heard
    assert "is being saved" in heard[-1]
    site.director.go("a", "mirror")
    assert (await ended(job))["outcome"] == "saved"
    await check_untouched(site, image)


async def test_how_far_it_is(make_site: MakeSite) -> None:
    site, _ = await with_disk(make_site)
    site.director.script("a", {"mirror": "hold"})
    job = await begin(site)
    await site.director.reached("a", "mirror")
    await until_fact(site, job, F.COPYING)
    async with asyncio.timeout(SETTLE_S):
        while not (wire := job.wire())["copying"]["whole_bytes"]:  # noqa: ASYNC110 - QEMU's answers have no event
            await asyncio.sleep(0.005)
    memory = job.kept.definition.memory_bytes
    assert wire["copying"] == {"done_bytes": 0, "whole_bytes": 1 << 16}
    assert wire["progress"] == {"current_bytes": 0, "whole_bytes": (1 << 16) + memory, "percent": 0}
    assert "are being copied" in wire["sentence"]
    (info,) = await site.command("a", "query-jobs")
    assert (info["status"], info["total-progress"]) == ("running", (1 << 16) + memory)
    site.director.go("a", "mirror")
    assert (await ended(job))["copying"] is None


async def test_copies_are_listed_and_go_when_nobody_needs_them(make_site: MakeSite) -> None:
    site, _ = await with_disk(make_site)
    await save(site)
    for _ in range(2):
        assert await listed(site) == {stored(site).name: "the snapshot one needs it"}
        with pytest.raises(Busy, match="the snapshot one needs it"):
            await site.command("a", "restored-disk-remove", path=str(stored(site)), force=True)
        await site.restart("a")
    await site.command("a", "snapshot-forget", name="one")
    above = site.directory / "above.qcow2"
    words = ("create", "-b", str(stored(site)), "--", str(above))
    await asyncio.to_thread(subprocess.run, [str(site.directory / "qemu-img"), *words], check=True)
    with pytest.raises(Busy, match=f"{above} lies on it"):
        await site.command("a", "restored-disk-remove", path=str(stored(site)))
    above.unlink()
    assert await listed(site) == {stored(site).name: ""}
    await site.command("a", "restored-disk-remove", path=str(stored(site)))
    assert (left(site), await listed(site)) == (set(), {})
    await site.restart("a")
    assert await listed(site) == {}


async def test_a_copy_of_another_repositorys_snapshot_stays(make_site: MakeSite) -> None:
    site, _ = await with_disk(make_site)
    await save(site)
    disks = site.agents["a"].restores.disks
    (disk,) = disks.known()
    object.__setattr__(disk, "repository", "s3://elsewhere")
    await site.command("a", "snapshot-forget", name="one")
    assert "s3://elsewhere" in (await listed(site))[stored(site).name]
    await site.command("a", "restored-disk-remove", path=str(stored(site)), force=True)
    assert left(site) == set()


async def test_no_guest_is_started_on_a_copy_that_a_snapshot_has(make_site: MakeSite) -> None:
    site, _ = await with_disk(make_site)
    await save(site)
    lines = f'[[disk]]\npath = "{stored(site)}"\nformat = "qcow2"\n'
    with pytest.raises(PlanRefused, match="the snapshot one"):
        await site.run_vm("k", more=lines)
