"""Saves of a real agent with fake QEMUs: disks of the same instant, and every way to go wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.save_sites import (
    HELD,
    KEPT,
    PRECOPY,
    begin,
    begin_h,
    check_guest_runs,
    chore,
    ended,
    names,
    repository,
    save,
    until_fact,
    with_disk,
)
from vmferry import limits
from vmferry.agent import images
from vmferry.agent.machine import Machine
from vmferry.agent.save import SaveJob
from vmferry.agent.snapshot_sink import SnapshotSink, find
from vmferry.core.saving import SaveFact
from vmferry.engine.frozen import FrozenDisk, SnapshotWords
from vmferry.errors import (
    PlanRefused,
)
from vmferry.qmp.errors import QmpCommandError
from vmferry.store.errors import StorePermanent
from vmferry.store.local import LocalFolder
from vmferry.testing.fake_site import SETTLE_S, MakeSite

F = SaveFact

# --- disks ----------------------------------------------------------------------------------------------------


async def test_writable_disks_are_refused_until_it_is_said_how(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, image = await with_disk(make_site)
    with pytest.raises(PlanRefused, match=f"writes to {image}") as caught:
        await site.command("a", "vm-save", vm="h", name="one")
    assert "external-snapshot" in caught.value.hint
    with pytest.raises(PlanRefused, match="in the background"):
        await site.command("a", "vm-save", vm="h", name="one", disks="external-snapshot", way="background")
    (site.directory / "h-disk0.one.qcow2").write_bytes(b"somebody's")
    with pytest.raises(PlanRefused, match="exists already"):
        await site.command("a", "vm-save", vm="h", name="one", disks="external-snapshot")
    monkeypatch.setattr(images, "tool_of", lambda qemu: None)
    with pytest.raises(PlanRefused, match="no qemu-img"):
        await site.command("a", "vm-save", vm="h", name="two", disks="external-snapshot")
    kept = site.agents["a"].vms["h"]
    object.__setattr__(kept.definition, "spec", None)
    with pytest.raises(PlanRefused, match="not started from a spec"):
        await site.command("a", "vm-save", vm="h", name="two", disks="external-snapshot")


@pytest.mark.parametrize("has_disk", [True, False], ids=["beside-one-that-is-named", "alone"])
async def test_a_writable_disk_that_the_definition_does_not_name_is_refused(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, has_disk: bool
) -> None:
    """As after blockdev-add and device_add on the VM's own monitor."""
    site, _ = await with_disk(make_site)
    vm = "h" if has_disk else "g"
    execute, plugged = Machine.execute, {"filename": "/srv/new.img", "virtual-size": 1 << 20}

    async def plugging(self: Machine, command: str, *arguments: Any, **more: Any) -> Any:
        answer = await execute(self, command, *arguments, **more)
        if command == "query-block":
            answer.append({"device": "", "inserted": {"node-name": "new", "ro": is_read_only, "image": plugged}})
        return answer

    is_read_only = False
    monkeypatch.setattr(Machine, "execute", plugging)
    wish: dict[str, Any] = {"vm": vm, "name": "one", "disks": "external-snapshot" if has_disk else "refuse"}
    with pytest.raises(PlanRefused, match=r"/srv/new\.img, which its definition does not name"):
        await site.command("a", "vm-save", **wish)
    assert await site.command("a", "query-jobs") == []
    is_read_only = True
    await site.command("a", "vm-save", **wish)
    job = site.agents["a"].saves.active(vm)
    assert job is not None
    assert (await ended(job))["outcome"] == "saved"


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


async def test_a_transaction_that_fails_changes_no_disk(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site, image = await with_disk(make_site)
    execute = Machine.execute

    async def refusing(self: Machine, command: str, *arguments: Any, **more: Any) -> Any:
        if command == "transaction":
            raise QmpCommandError(command, "GenericError", "no room", peer="QEMU")
        return await execute(self, command, *arguments, **more)

    monkeypatch.setattr(Machine, "execute", refusing)
    wire = await ended(await begin_h(site))
    assert "no room" in wire["error"]["message"]
    assert site.agents["a"].vms["h"].definition.writable_paths() == (str(image),)
    assert not (site.directory / "h-disk0.one.qcow2").exists(), "what nobody goes on in is taken away"
    await site.check("a", "h")


async def test_a_link_where_the_guest_would_go_on_is_not_followed(make_site: MakeSite) -> None:
    """1. the name is free as the save begins  2. somebody lays a link there, to what he may not write himself."""
    site, image = await with_disk(make_site)
    others = site.directory / "others"
    others.write_bytes(b"somebody's")
    over = site.directory / "h-disk0.one.qcow2"
    site.director.script("a", {"active": "hold"})
    job = await begin_h(site)
    await site.director.reached("a", "active")
    assert (over.stat().st_mode & 0o777, over.is_symlink()) == (0o600, False), "made before the guest stops"
    over.unlink()
    over.symlink_to(others)
    site.director.go("a", "active")
    wire = await ended(job)
    assert "not the file that was made for it" in wire["error"]["message"]
    assert others.read_bytes() == b"somebody's"
    assert site.agents["a"].vms["h"].definition.writable_paths() == (str(image),)
    await site.check("a", "h")


async def test_new_files_of_an_agent_that_died_before_they_were_used_are_taken_away(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, image = await with_disk(make_site)
    over = site.directory / "h-disk0.one.qcow2"
    site.director.script("a", {"active": "hold"})
    await begin_h(site)
    await site.director.reached("a", "active")
    await site.stop("a")
    assert over.exists()
    await site.restart("a")
    again = site.agents["a"].saves.active("h")
    assert again is not None
    await ended(again)
    assert not over.exists()
    assert site.agents["a"].vms["h"].definition.writable_paths() == (str(image),)
    await site.check("a", "h")


# --- trouble --------------------------------------------------------------------------------------------------


class Died(BaseException):
    """The agent is gone: nothing more is done."""


WISHES: dict[str, dict[str, Any]] = {
    "precopy": PRECOPY, "background": {"way": "background"}, "pause": {"pause": True}, "held": HELD,
}  # fmt: skip
ALWAYS = (F.WANTED, F.CONFIGURED, F.STARTED, F.WHOLE, F.RESUMED, F.KEPT, F.CLEANUP)
OLD_BACKGROUND = ("7.2", "background")
PLACES = [
    *((way, fact) for way in ("precopy", "background", "pause") for fact in ALWAYS),
    ("pause", F.STOPPED),
    ("held", F.STANDS),
]
DEATHS = [(version, *place) for version in ("7.2", "11.1") for place in PLACES if (version, place[0]) != OLD_BACKGROUND]


@pytest.mark.parametrize(("version", "way", "fact"), DEATHS)
@pytest.mark.proves("S53", "S123")
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
    await check_guest_runs(site)
    committed = fact in (F.KEPT, F.CLEANUP) or (fact is F.RESUMED and way == "pause")
    assert wire["outcome"] == ("saved" if committed else "none")
    assert committed or "restarted" in wire["error"]["message"]
    assert (wire["error"] is None) is committed
    assert names(site) == ["before", *(["two"] if committed else [])]
    (listed,) = await site.command("a", "query-jobs")
    assert (listed["id"], listed["status"]) == (job.job, "concluded")
    wire = await chore(site, "snapshot-verify")
    assert wire["whole"]
    plan = await chore(site, "snapshot-prune", dry_run=True)
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


@pytest.mark.proves("S56")
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


@pytest.mark.proves("S56")
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
