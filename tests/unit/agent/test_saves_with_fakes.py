"""Saves of a real agent with fake QEMUs: the snapshot, the guest, the job; and every way to go wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmferry import limits
from vmferry.agent.save import SaveJob
from vmferry.agent.snapshot_sink import SnapshotSink, find
from vmferry.core.facts import Fact
from vmferry.core.saving import SaveFact
from vmferry.engine.frozen import FrozenDisk, SnapshotWords, thaw
from vmferry.errors import (
    Blocked,
    Busy,
    CancelRefused,
    JobRefused,
    PlanRefused,
    QemuError,
    RepositoryError,
    UsageError,
    VmferryError,
)
from vmferry.store.errors import StorePermanent, UnknownSnapshot
from vmferry.store.local import LocalFolder
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository
from vmferry.testing import fake_stream
from vmferry.testing.fake_site import SETTLE_S, MakeSite, Site

F = SaveFact
KEPT: dict[str, Any] = {"auto-dismiss": False}
HELD: dict[str, Any] = {"auto-finalize": False}
PRECOPY: dict[str, Any] = {"way": "precopy"}
DISK = '[[disk]]\npath = "{path}"\n'


async def begin(site: Site, name: str = "one", **more: Any) -> SaveJob:
    await site.command("a", "vm-save", vm="g", name=name, **more)
    job = site.agents["a"].saves.active("g")
    assert job is not None
    return job


async def ended(job: SaveJob) -> dict[str, Any]:
    async with asyncio.timeout(SETTLE_S):
        await job.ended.wait()
    return job.wire()


async def save(site: Site, name: str = "one", **more: Any) -> dict[str, Any]:
    return await ended(await begin(site, name, **more))


async def until_fact(site: Site, job: SaveJob, fact: SaveFact) -> None:
    async with asyncio.timeout(SETTLE_S):
        while fact not in job.facts and not job.ended.is_set():
            await site._changes["a"].wait()
    assert fact in job.facts, job.wire()


def repository(site: Site) -> Repository:
    return site.agents["a"].snapshot_store.open_repository()


def names(site: Site) -> list[str]:
    return [info.head.name for info in repository(site).snapshots() if info.head is not None]


async def check_guest_runs(site: Site) -> None:
    """It runs, once, in the process in which it always was, and nothing of the save is left in its QEMU."""
    await site.check("a")
    machine = site.agents["a"].vms["g"].require_machine()
    on = {c["capability"] for c in await machine.execute("query-migrate-capabilities") if c["state"]}
    assert on <= {"events"}, on
    assert (await machine.execute("query-migrate-parameters"))["max-bandwidth"] != 1 << 40
    assert site.agents["a"].saves.active("g") is None


def check_snapshot(site: Site, name: str, *, way: str) -> SnapshotWords:
    """The repository has it, with the last version of every page."""
    found = repository(site)
    info = find(found, name)
    assert info.snapshot == find(found, info.snapshot).snapshot
    with SnapshotReader(found, info.snapshot) as reader:
        pages = reader.read("pc.ram", 0, 64)
        assert [page.tobytes() for page in pages] == [fake_stream.page(number) for number in range(64)]
        assert not np.any(reader.read("pc.bios", 0, 4))
        state = thaw(reader.device_state)
        assert {each.idstr: each.body for each in state.devices} == fake_stream.DEVICES
        words = SnapshotWords.from_wire(reader.head.metadata)
    assert (words.vm, words.host, words.way) == ("g", "a", way)
    assert words.machine == "pc-q35-7.2"
    assert words.definition is not None
    assert words.definition["name"] == "g"
    return words


# --- the two ways ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.parametrize("way", ["precopy", "background"])
async def test_a_guest_is_saved_and_goes_on(make_site: MakeSite, version: str, way: str) -> None:
    site = await make_site(version)
    wire = await save(site, way=way)
    assert (wire["status"], wire["outcome"], wire["error"]) == ("completed", "saved", None)
    assert wire["way"] == way
    assert wire["downtime_ms"] is not None
    words = check_snapshot(site, "one", way=way)
    assert words.was_running
    assert words.qemu_version.startswith(version)
    await check_guest_runs(site)
    assert "saved as one" in wire["sentence"]
    whats = [row["what"] for row in wire["timeline"]]
    assert whats.index("STOP") < whats.index("whole") < whats.index("kept")
    if way == "precopy":
        assert whats.index("RESUME") < whats.index("kept"), "the commit does not keep the guest waiting"
    status = await site.command("a", "job-status", job=wire["job"])
    assert status == wire


async def test_in_the_background_where_it_can_be_had(make_site: MakeSite) -> None:
    site = await make_site()
    assert (await save(site))["way"] == "background"
    site.director.script("a", refuse={"background-snapshot": "no userfaultfd here"})
    assert (await save(site, "two"))["way"] == "precopy"
    wire = await save(site, "three", way="background")
    assert wire["error"]["code"] == "refused"
    assert "no userfaultfd here" in wire["error"]["message"]
    assert names(site) == ["one", "two"]
    await check_guest_runs(site)


async def test_with_pause_the_guest_stands_until_its_snapshot_is_there(make_site: MakeSite) -> None:
    site = await make_site()
    wire = await save(site, pause=True)
    assert wire["way"] == "precopy"
    whats = [row["what"] for row in wire["timeline"]]
    assert whats.index("stopped") < whats.index("started")
    assert whats.index("kept") < whats.index("RESUME")
    assert check_snapshot(site, "one", way="precopy").was_running
    await check_guest_runs(site)


@pytest.mark.parametrize("way", ["precopy", "background"])
async def test_a_paused_guest_stays_paused(make_site: MakeSite, way: str) -> None:
    site = await make_site()
    machine = site.agents["a"].vms["g"].require_machine()
    await machine.execute("stop")
    wire = await save(site, way=way)
    assert wire["outcome"] == "saved"
    assert await machine.run_state() in ("paused", "postmigrate")
    assert site.director.running("g") == []
    assert not check_snapshot(site, "one", way=way).was_running
    await machine.execute("cont")
    await check_guest_runs(site)


async def test_a_guest_that_writes_too_fast_is_stopped_for_the_rest(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SAVE_PASSES_MAX", 3)
    site = await make_site()
    site.director.change("a", dirty=True)
    job = await begin(site, **PRECOPY)
    await until_fact(site, job, F.STOPPED)
    site.director.change("a", dirty=False)
    assert (await ended(job))["outcome"] == "saved"
    await check_guest_runs(site)


async def test_a_second_save_of_a_guest_refers_to_the_first(make_site: MakeSite) -> None:
    site = await make_site()
    first = await save(site)
    second = await save(site, "two")
    assert second["stored_bytes"] == 0 < first["stored_bytes"]
    check_snapshot(site, "two", way="background")


# --- jobs -----------------------------------------------------------------------------------------------------


async def test_the_job_is_listed_until_it_is_dismissed_also_by_the_next_agent(make_site: MakeSite) -> None:
    site = await make_site()
    wire = await save(site, **KEPT)
    for _ in range(2):
        (job,) = await site.command("a", "query-jobs")
        assert (job["id"], job["type"], job["status"], job["vm"]) == (wire["job"], "save", "concluded", "g")
        assert job["result"]["name"] == "one"
        assert (await site.command("a", "job-status", job=wire["job"]))["outcome"] == "saved"
        await site.restart("a")
    await site.command("a", "job-dismiss", id=wire["job"])
    assert await site.command("a", "query-jobs") == []
    await site.restart("a")
    assert await site.command("a", "query-jobs") == []
    assert names(site) == ["one"]


async def test_the_same_job_again_is_the_same_save(make_site: MakeSite) -> None:
    site = await make_site()
    wire = await save(site, job="mine")
    again = await site.command("a", "vm-save", vm="g", name="one", job="mine")
    assert again == wire


async def test_it_waits_for_leave_with_the_guest_standing(make_site: MakeSite) -> None:
    site = await make_site()
    job = await begin(site, **HELD)
    await until_fact(site, job, F.STANDS)
    (shown,) = await site.command("a", "query-jobs")
    assert (shown["status"], shown["detail"]) == ("pending", "pre-switchover")
    assert "waits for leave" in shown["reason"]
    assert shown["guest-paused-ms"] >= 0
    assert set(shown["verbs"]) == {"cancel", "finalize"}
    assert "waits for leave" in job.wire()["sentence"]
    await site.command("a", "job-finalize", id=job.job)
    assert (await ended(job))["outcome"] == "saved"
    await check_guest_runs(site)


async def test_without_leave_it_goes_on_unsaved(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SAVE_HOLD_S", 0.05)
    site = await make_site()
    wire = await save(site, **HELD)
    assert "nobody gave leave" in wire["error"]["message"]
    assert names(site) == []
    await check_guest_runs(site)


@pytest.mark.parametrize(
    ("step", "more"),
    [
        ("setup", PRECOPY),
        ("active", {}),
        ("converge", PRECOPY),
        ("device", PRECOPY),
        ("instant", {}),
        ("completed", {}),
    ],
)
async def test_a_cancel_leaves_the_guest_running_and_nothing_kept(
    make_site: MakeSite, step: str, more: dict[str, Any]
) -> None:
    site = await make_site()
    site.director.script("a", {step: "hold"})
    job = await begin(site, **more)
    await site.director.reached("a", step)
    await site.command("a", "job-cancel", id=job.job)
    await site.command("a", "job-cancel", id=job.job)
    site.director.go("a", step)
    wire = await ended(job)
    assert (wire["status"], wire["outcome"], wire["error"]["code"]) == ("cancelled", "none", "cancelled")
    assert names(site) == []
    await check_guest_runs(site)
    site.director.script("a")
    assert (await save(site, **more))["outcome"] == "saved", "and the next one works"


async def test_a_cancel_that_comes_too_late_is_refused(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    going, go = asyncio.Event(), asyncio.Event()
    run = site.agents["a"].snapshot_store.run

    async def running(work: Any, *args: Any, **more: Any) -> Any:
        if getattr(work, "__name__", "") == "commit":
            going.set()
            await go.wait()
        return await run(work, *args, **more)

    monkeypatch.setattr(site.agents["a"].snapshot_store, "run", running)
    job = await begin(site)
    async with asyncio.timeout(SETTLE_S):
        await going.wait()
    with pytest.raises(CancelRefused, match="vmferry forget"):
        await site.command("a", "job-cancel", id=job.job)
    go.set()
    assert (await ended(job))["outcome"] == "saved"


async def test_verbs_that_a_save_does_not_take(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    job = await begin(site)
    for verb in ("pause", "resume", "complete", "finalize", "dismiss", "change"):
        with pytest.raises(JobRefused):
            await site.command("a", f"job-{verb}", id=job.job)
    site.director.go("a", "active")
    await ended(job)


# --- blockers -------------------------------------------------------------------------------------------------


async def test_one_save_or_migration_at_a_time(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    job = await begin(site)
    with pytest.raises(Busy, match="being saved as one"):
        await site.command("a", "vm-save", vm="g", name="two")
    with pytest.raises(Busy, match="being saved as one"):
        await site.migrate()
    with pytest.raises(Busy, match="being saved as one"):
        await site.command("a", "vm-stop", vm="g", force=True)
    with pytest.raises(Busy, match="being saved"):
        await site.command("a", "rescue-throw-away", vm="g", never_ran=True)
    wire = await site.command("a", "vm-status", vm="g")
    assert {b["operation"] for b in wire["blockers"]} == {"migrate", "set", "stop", "snapshot"}
    site.director.go("a", "active")
    await ended(job)
    site.director.script("a")
    attempt = await site.migrate()
    with pytest.raises(Busy, match="on its way to b"):
        await site.command("a", "vm-save", vm="g", name="two")
    await site.until(lambda: attempt.ended.is_set())
    await site.settle()


async def test_a_person_can_hold_a_blocker_against_it(make_site: MakeSite) -> None:
    site = await make_site()
    await site.command("a", "blocker-add", vm="g", name="no", operation="snapshot", reason="secrets")
    with pytest.raises(Blocked, match="secrets"):
        await site.command("a", "vm-save", vm="g", name="one")


# --- what is refused before anything happens ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"name": "a/b"}, UsageError, "no name of a snapshot"),
        ({"name": ""}, UsageError, "no name of a snapshot"),
        ({"way": "sideways"}, UsageError, "allowed: auto, precopy, background"),
        ({"disks": "copy"}, UsageError, "allowed: refuse, external-snapshot"),
        ({"way": "background", "pause": True}, PlanRefused, "stands anyway"),
        ({"way": "background", "auto-finalize": False}, PlanRefused, "wait for leave"),
    ],
)
async def test_wishes_that_are_refused(
    make_site: MakeSite, more: dict[str, Any], error: type[VmferryError], words: str
) -> None:
    site = await make_site()
    with pytest.raises(error, match=words):
        await site.command("a", "vm-save", **{"vm": "g", "name": "one", **more})
    assert await site.command("a", "query-jobs") == []
    await check_guest_runs(site)


async def test_a_name_that_exists_is_refused(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    with pytest.raises(RepositoryError, match="has a snapshot one already"):
        await site.command("a", "vm-save", vm="g", name="one")
    assert names(site) == ["one"]


async def test_a_guest_that_is_passed_a_device_is_refused(make_site: MakeSite) -> None:
    site = await make_site()
    kept = site.agents["a"].vms["g"]
    object.__setattr__(kept.definition, "has_vfio", True)
    with pytest.raises(PlanRefused, match="passed through"):
        await site.command("a", "vm-save", vm="g", name="one")


async def test_a_guest_that_is_gone_is_refused(make_site: MakeSite) -> None:
    site = await make_site()
    await site.director.kill(site.director.newest("a"))
    with pytest.raises(QemuError):
        await site.command("a", "vm-save", vm="g", name="one")


# --- disks ----------------------------------------------------------------------------------------------------


async def with_disk(make_site: MakeSite, version: str = "11.1") -> tuple[Site, Path]:
    site = await make_site(version)
    image = site.directory / "h.img"
    image.write_bytes(bytes(1 << 16))
    await site.run_vm("h", more=DISK.format(path=image))
    return site, image


async def begin_h(site: Site, name: str = "one") -> SaveJob:
    await site.command("a", "vm-save", vm="h", name=name, disks="external-snapshot")
    job = site.agents["a"].saves.active("h")
    assert job is not None
    return job


async def test_writable_disks_are_refused_until_it_is_said_how(make_site: MakeSite) -> None:
    site, image = await with_disk(make_site)
    with pytest.raises(PlanRefused, match=f"writes to {image}") as caught:
        await site.command("a", "vm-save", vm="h", name="one")
    assert "external-snapshot" in caught.value.hint
    with pytest.raises(PlanRefused, match="in the background"):
        await site.command("a", "vm-save", vm="h", name="one", disks="external-snapshot", way="background")
    (site.directory / "h-disk0.one.qcow2").write_bytes(b"somebody's")
    with pytest.raises(PlanRefused, match="exists already"):
        await site.command("a", "vm-save", vm="h", name="one", disks="external-snapshot")
    kept = site.agents["a"].vms["h"]
    object.__setattr__(kept.definition, "spec", None)
    with pytest.raises(PlanRefused, match="not started from a spec"):
        await site.command("a", "vm-save", vm="h", name="two", disks="external-snapshot")


async def test_disks_of_the_same_instant(make_site: MakeSite) -> None:
    site, image = await with_disk(make_site)
    wire = await ended(await begin_h(site))
    assert wire["outcome"] == "saved"
    over = site.directory / "h-disk0.one.qcow2"
    info = find(repository(site), "one")
    assert info.head is not None
    (disk,) = (FrozenDisk.from_wire(each) for each in info.head.disks)
    stat = image.stat()
    assert (disk.path, disk.way, disk.overlay) == (str(image), "external-snapshot", str(over))
    assert (disk.size_bytes, disk.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    words = SnapshotWords.from_wire(info.head.metadata)
    assert words.definition is not None
    assert words.definition["disks"][0]["path"] == str(image), "the definition of that instant"
    for _ in range(2):
        definition = site.agents["a"].vms["h"].definition
        assert definition.writable_paths() == (str(over),)
        assert definition.spec is not None
        assert definition.spec["disk"][0]["format"] == "qcow2"
        await site.restart("a")
    whats = [row["what"] for row in wire["timeline"]]
    assert whats.index("STOP") < whats.index("disks") < whats.index("whole") < whats.index("RESUME")
    assert (await ended(await begin_h(site, "two")))["outcome"] == "saved"
    await site.check("a", "h")


async def test_a_transaction_that_fails_changes_no_disk(make_site: MakeSite) -> None:
    site, image = await with_disk(make_site)
    site.director.script("a", {"pre-switchover": "hold"})
    job = await begin_h(site)
    await site.director.reached("a", "pre-switchover")
    (site.directory / "h-disk0.one.qcow2").write_bytes(b"somebody's")
    site.director.go("a", "pre-switchover")
    wire = await ended(job)
    assert "exists" in wire["error"]["message"]
    assert site.agents["a"].vms["h"].definition.writable_paths() == (str(image),)
    await site.check("a", "h")


# --- trouble --------------------------------------------------------------------------------------------------


class Died(BaseException):
    """The agent is gone: nothing more is done."""


WISHES: dict[str, dict[str, Any]] = {
    "precopy": PRECOPY, "background": {"way": "background"}, "pause": {"pause": True}, "held": HELD,
}  # fmt: skip
ALWAYS = (F.WANTED, F.CONFIGURED, F.STARTED, F.WHOLE, F.RESUMED, F.KEPT, F.CLEANUP)
DEATHS = [*((way, fact) for way in ("precopy", "background", "pause") for fact in ALWAYS), ("pause", F.STOPPED),
          ("held", F.STANDS)]  # fmt: skip


@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.parametrize(("way", "fact"), DEATHS, ids=str)
async def test_an_agent_that_dies_at_a_fact_leaves_a_guest_that_runs(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, version: str, way: str, fact: SaveFact
) -> None:
    """No finished snapshot is lost, no half of one is there, and prune has a plan."""
    site = await make_site(version)
    await save(site, "before")
    note, died = SaveJob.note, asyncio.Event()

    def noting(self: SaveJob, found: SaveFact, **rest: Any) -> None:
        if died.is_set():
            raise Died
        note(self, found, **rest)
        if found is fact:
            died.set()
            raise Died

    monkeypatch.setattr(SaveJob, "note", noting)
    with monkeypatch.context() as context:

        async def nothing(self: SaveJob) -> None:
            raise Died

        job = await begin(site, "two", **WISHES[way], **KEPT)
        (task,) = (t for t in site.agents["a"]._tasks if t.get_name().startswith("save-"))
        await asyncio.wait({task}, timeout=SETTLE_S)
        assert task.done(), job.wire()
        assert isinstance(task.exception(), Died)
        context.setattr(SaveJob, "give_back", nothing)
        monkeypatch.setattr(SaveJob, "note", note)
        assert died.is_set(), "this way has such a fact"
        await site.stop("a")
    await site.restart("a")
    again = site.agents["a"].saves.active("g")
    assert again is not None
    wire = await ended(again)
    assert "restarted" in wire["error"]["message"]
    await check_guest_runs(site)
    committed = fact in (F.KEPT, F.CLEANUP) or (fact is F.RESUMED and way == "pause")
    assert names(site) == ["before", *(["two"] if committed else [])]
    (listed,) = await site.command("a", "query-jobs")
    assert (listed["id"], listed["status"]) == (job.job, "concluded")
    wire = await site.command("a", "snapshot-verify")
    assert wire["whole"]
    plan = await site.command("a", "snapshot-prune", dry_run=True)
    assert plan["done"] is None
    assert (await save(site, "three"))["outcome"] == "saved"


async def test_an_agent_that_is_closed_gives_the_guest_back_at_once(make_site: MakeSite) -> None:
    site = await make_site()
    job = await begin(site, **HELD)
    await until_fact(site, job, F.STANDS)
    await site.stop("a")
    await site.director.until(lambda: bool(site.director.running("g")))
    await site.restart("a")
    again = site.agents["a"].saves.active("g")
    assert again is not None
    await ended(again)
    await check_guest_runs(site)


async def test_an_agent_that_dies_after_the_new_files_finds_them(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _ = await with_disk(make_site)
    append = site.agents["a"].journal.append

    async def appending(kind: Any, subject: str, body: Any = None) -> None:
        if subject == "h":
            raise Died
        await append(kind, subject, body)

    monkeypatch.setattr(site.agents["a"].journal, "append", appending)

    async def nothing(self: SaveJob) -> None:
        raise Died

    await begin_h(site)
    (task,) = (t for t in site.agents["a"]._tasks if t.get_name().startswith("save-"))
    with monkeypatch.context() as context:
        context.setattr(SaveJob, "give_back", nothing)
        await asyncio.wait({task}, timeout=SETTLE_S)
        assert isinstance(task.exception(), Died)
        await site.stop("a")
    await site.restart("a")
    again = site.agents["a"].saves.active("h")
    assert again is not None
    wire = await ended(again)
    over = str(site.directory / "h-disk0.one.qcow2")
    assert site.agents["a"].vms["h"].definition.writable_paths() == (over,)
    assert any(over in note for note in wire["notes"])
    await site.check("a", "h")


@pytest.mark.parametrize("way", ["precopy", "background"])
async def test_a_repository_that_fails_in_the_middle(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    site = await make_site()

    def full(self: SnapshotSink, *arguments: Any) -> None:
        raise StorePermanent("the disk is full")

    with monkeypatch.context() as context:
        context.setattr(SnapshotSink, "put", full)
        wire = await save(site, way=way)
    assert (wire["error"]["code"], wire["error"]["message"]) == ("repository", "the disk is full")
    assert names(site) == []
    await check_guest_runs(site)
    assert (await save(site, way=way))["outcome"] == "saved"


async def test_a_commit_that_fails_leaves_no_snapshot(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    put = LocalFolder.put

    def failing(self: LocalFolder, name: str, data: bytes) -> None:
        if name.startswith("snapshots/"):
            raise StorePermanent("no room for the manifest")
        put(self, name, data)

    monkeypatch.setattr(LocalFolder, "put", failing)
    wire = await save(site)
    assert "no room for the manifest" in wire["error"]["message"]
    assert names(site) == []
    await check_guest_runs(site)


@pytest.mark.parametrize("step", ["setup", "active", "converge", "device"])
async def test_a_qemu_that_fails_keeps_its_guest(make_site: MakeSite, step: str) -> None:
    site = await make_site()
    site.director.script("a", {step: "fail"})
    wire = await save(site, **PRECOPY)
    assert wire["error"]["code"] == "failed"
    assert f"scripted failure at {step}" in wire["error"]["message"]
    assert names(site) == []
    await check_guest_runs(site)


@pytest.mark.parametrize("step", ["active", "device"])
async def test_a_qemu_that_dies_takes_its_guest_with_it(make_site: MakeSite, step: str) -> None:
    site = await make_site()
    site.director.script("a", {step: "die"})
    wire = await save(site, **PRECOPY)
    assert wire["outcome"] == "none"
    assert wire["error"] is not None
    assert names(site) == []


async def test_a_guest_that_cannot_be_started_is_told_as_held(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SAVE_RETURN_S", 0.1)
    site = await make_site()
    site.director.script("a", cont='Failed to get "write" lock')
    wire = await save(site, **PRECOPY)
    assert wire["error"]["code"] == "held"
    assert "write" in wire["error"]["message"]
    assert wire["error"]["guest"] == "paused"
    site.director.script("a")
    await site.agents["a"].vms["g"].require_machine().execute("cont")
    await check_guest_runs(site)


async def test_a_lock_that_is_free_again_in_time(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", cont='Failed to get "write" lock')
    job = await begin(site, **PRECOPY)
    await until_fact(site, job, F.WHOLE)
    site.director.script("a")
    assert (await ended(job))["outcome"] == "saved"
    await check_guest_runs(site)


async def test_options_that_qemu_keeps_are_named(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", wrong={"xbzrle": True})
    wire = await save(site)
    assert "xbzrle" in wire["error"]["message"]
    await site.check("a")


# --- the other commands ---------------------------------------------------------------------------------------


async def test_list_verify_forget_prune(make_site: MakeSite) -> None:
    site = await make_site()
    assert (await site.command("a", "snapshots"))["snapshots"] == []
    wire = await save(site)
    (listed,) = (await site.command("a", "snapshots"))["snapshots"]
    assert (listed["name"], listed["vm"], listed["pages"]) == ("one", "g", 68)
    assert (await site.command("a", "snapshot-verify", name="one"))["whole"]
    with pytest.raises(UnknownSnapshot):
        await site.command("a", "snapshot-verify", name="nobody")
    with pytest.raises(UsageError):
        await site.command("a", "snapshot-prune", empty_below=2.0)
    for pack in (site.directory / "sa/repository/packs").rglob("*"):
        if pack.is_file():
            pack.chmod(0o600)
            data = bytearray(pack.read_bytes())
            data[len(data) // 2] ^= 1
            pack.write_bytes(data)
    verdict = await site.command("a", "snapshot-verify")
    assert not verdict["whole"]
    assert verdict["damaged_snapshots"] == ["one"]
    assert {name for problem in verdict["problems"] for name in problem["snapshots"]} == {"one"}
    assert (await site.command("a", "snapshot-forget", name=wire["snapshot"]))["name"] == "one"
    with pytest.raises(UnknownSnapshot):
        await site.command("a", "snapshot-forget", name="one")
    assert (await site.command("a", "snapshot-prune"))["plan"]["too_young"] == 1


async def test_export_and_import_give_the_same_pages(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    file = site.directory / "one.stream"
    with pytest.raises(UsageError, match="not a whole path"):
        await site.command("a", "snapshot-export", name="one", file="one.stream")
    wire = await site.command("a", "snapshot-export", name="one", file=str(file))
    assert wire["bytes"] == file.stat().st_size
    with pytest.raises(UsageError, match="cannot be written"):
        await site.command("a", "snapshot-export", name="one", file=str(file))
    assert [each.name for each in site.directory.glob(".*.part")] == []
    back = await site.command("a", "snapshot-import", name="two", file=str(file))
    assert back["stored_bytes"] == 0, "every page is known"
    with SnapshotReader(repository(site), back["snapshot"]) as reader:
        assert [page[0] for page in reader.read("pc.ram", 0, 64)] == [fake_stream.page(n)[0] for n in range(64)]
        words = SnapshotWords.from_wire(reader.head.metadata)
    assert (words.way, words.definition, words.machine) == ("import", None, "pc-q35-7.2")
    with pytest.raises(RepositoryError, match="already"):
        await site.command("a", "snapshot-import", name="two", file=str(file))
    with pytest.raises(UsageError, match="cannot be read"):
        await site.command("a", "snapshot-import", name="three", file=str(site.directory / "nowhere"))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(VmferryError):
        await site.command("a", "snapshot-import", name="three", file=str(file))
    assert names(site) == ["one", "two"]


async def test_a_save_is_no_migration_to_those_who_look(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    assert (await site.command("a", "job-status", vm="g"))["status"] == "none"
    attempt = await site.migrate()
    await site.until(lambda: attempt.ended.is_set())
    await site.settle()
    assert Fact.RUN_ACKED in attempt.facts
    await site.check("b")
