"""Saves of a real agent with fake QEMUs, whose disks are copied: what is kept and left behind, and who ends what."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.save_mirror_sites import VERSIONS, begin, check_untouched, left, save, stored
from tests.save_sites import DISK, ended, names, repository, until_fact, with_disk
from vmferry import limits
from vmferry.agent import images, save_disks, save_mirrors, save_ways
from vmferry.agent.machine import Machine
from vmferry.agent.save import SaveJob
from vmferry.agent.snapshot_sink import find
from vmferry.core.saving import SaveFact
from vmferry.engine.frozen import FrozenDisk
from vmferry.errors import PlanRefused, UsageError
from vmferry.store.errors import StorePermanent, StoreTransient
from vmferry.store.local import LocalFolder
from vmferry.testing.fake_site import SETTLE_S, MakeSite

F = SaveFact

# --- what is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("wish", [{}, {"pause": True}], ids=["runs", "pause"])
async def test_the_guest_stays_on_its_disk_and_the_snapshot_names_a_copy(
    make_site: MakeSite, version: str, wish: dict[str, Any]
) -> None:
    site, image = await with_disk(make_site, version)
    wire = await save(site, **wish)
    assert (wire["outcome"], wire["error"]) == ("saved", None), wire
    assert (wire["goes_on_in"], wire["copies"]) == ({}, {str(image): str(stored(site))})
    info = find(repository(site), "one")
    assert info.head is not None
    (disk,) = (FrozenDisk.from_wire(each) for each in info.head.disks)
    seen = stored(site).stat()
    assert (disk.path, disk.guest_path, disk.way, disk.format) == (str(stored(site)), str(image), "mirror", "qcow2")
    assert (disk.size_bytes, disk.mtime_ns) == (seen.st_size, seen.st_mtime_ns)
    assert (disk.virtual_bytes, disk.chain, disk.overlay) == (1 << 16, (), "")
    assert seen.st_mode & 0o777 == 0o600
    whats = [row["what"] for row in wire["timeline"]]
    order = ["copying", "copies-ready", "STOP", "copied", "whole"]
    assert [what for what in whats if what in order] == order, "the guest stands for the rest only"
    assert wire["progress"]["percent"] == 100
    await check_untouched(site, image)
    assert left(site) == {stored(site).name}
    assert (await save(site, "two", **wish))["outcome"] == "saved"
    await check_untouched(site, image)


async def test_a_restore_lies_on_the_copy(make_site: MakeSite) -> None:
    site, image = await with_disk(make_site)
    await save(site)
    await site.command("a", "vm-stop", vm="h", force=True)
    image.unlink()
    found = await site.command("a", "vm-restore", name="one", paused=True)
    job = site.agents["a"].restores.by_id(found["job"])
    assert job is not None
    (overlay,) = job.wanted.overlays
    assert (overlay.backing, overlay.backing_format) == (str(stored(site)), "qcow2")
    async with asyncio.timeout(SETTLE_S):
        await job.ended.wait()


async def test_copies_go_where_a_person_says(make_site: MakeSite, tmp_path: Path) -> None:
    site, image = await with_disk(make_site)
    folder = tmp_path / "copies"
    with pytest.raises(PlanRefused, match="no file can be made in") as caught:
        await begin(site, disks_dir=str(folder))
    assert "--disks-dir" in caught.value.hint
    folder.mkdir()
    assert (await save(site, **{"disks-dir": str(folder)}))["copies"] == {
        str(image): str(folder / "h-disk0.one.stored.qcow2")
    }
    assert left(site) == set()
    await check_untouched(site, image)


async def test_several_disks_end_at_the_same_pause(make_site: MakeSite) -> None:
    site = await make_site()
    paths = [site.directory / f"{name}.img" for name in ("one", "two")]
    for path in paths:
        path.write_bytes(bytes(1 << 16))
    await site.run_vm("h", more="".join(DISK.format(path=path) for path in paths))
    site.director.script("a", {"drain": "hold"})
    job = await begin(site)
    await site.director.reached("a", "drain")
    statuses = {each["status"] for each in await job.kept.require_machine().execute("query-jobs")}
    assert "concluded" not in statuses, "none ends before all of them have everything"
    site.director.go("a", "drain")
    wire = await ended(job)
    assert wire["outcome"] == "saved"
    assert len(wire["copies"]) == 2


# --- what is refused ------------------------------------------------------------------------------------------


async def test_what_is_refused_before_anything_is_done(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site, image = await with_disk(make_site)

    async def refused(words: str, **wish: Any) -> PlanRefused:
        with pytest.raises(PlanRefused, match=words) as caught:
            await begin(site, **wish)
        assert left(site) <= {stored(site).name}
        await check_untouched(site, image)
        return caught.value

    error = await refused("writes to", disks="refuse")
    assert "mirror" in error.hint
    assert "external-snapshot" in error.hint
    await refused("in the background", way="background")
    stored(site).write_bytes(b"somebody's")
    await refused("exists already")
    assert stored(site).read_bytes() == b"somebody's"
    stored(site).unlink()
    with monkeypatch.context() as context:
        room = images.room
        context.setattr(images, "room", lambda path, *, qemu: _with_room(room(path, qemu=qemu), free_bytes=1000))
        await refused(r"need \d+ bytes .* and 1000 \(")
    with monkeypatch.context() as context:
        _opened(context, format="vmdk")
        await refused("is vmdk")
    with monkeypatch.context() as context:
        _opened(context, encrypted=True)
        await refused("is encrypted")
    with monkeypatch.context() as context:
        context.setattr(images, "tool_of", lambda qemu: None)
        await refused("no qemu-img")
    for wish in ({"disks": "external-snapshot", "disks_dir": "/x"}, {"disks_dir": "copies"}):
        with pytest.raises(UsageError, match="--disks-dir"):
            await begin(site, **wish)
    definition = site.agents["a"].vms["h"].definition
    spec = definition.spec
    object.__setattr__(definition, "spec", None)
    with pytest.raises(PlanRefused, match="not started from a spec"):
        await begin(site)
    object.__setattr__(definition, "spec", spec)
    assert await site.command("a", "query-jobs") == []


def _with_room(report: Any, *, free_bytes: int) -> Any:
    object.__setattr__(report, "free_bytes", free_bytes)
    return report


def _opened(context: pytest.MonkeyPatch, **image: Any) -> None:
    execute = Machine.execute

    async def executing(self: Machine, command: str, *arguments: Any, **more: Any) -> Any:
        answer = await execute(self, command, *arguments, **more)
        for each in answer if command == "query-block" else ():
            each["inserted"]["image"] |= image
        return answer

    context.setattr(Machine, "execute", executing)


async def test_a_disk_that_another_job_has_is_refused(make_site: MakeSite) -> None:
    site, image = await with_disk(make_site)
    machine = site.agents["a"].vms["h"].require_machine()
    (device,) = [each for each in await machine.execute("query-block") if each.get("inserted")]
    await machine.execute("blockdev-add", {"driver": "null-co", "node-name": "mine", "size": 1 << 16})
    wish = {"job-id": "theirs", "device": device["inserted"]["node-name"], "target": "mine", "sync": "full"}
    await machine.execute("blockdev-mirror", {**wish, "auto-finalize": False, "auto-dismiss": False})
    with pytest.raises(PlanRefused, match=r"has the job theirs \(mirror\)"):
        await begin(site)
    await machine.execute("job-cancel", {"id": "theirs"})
    assert (await save(site))["outcome"] == "saved", "one that is over is in nobody's way"
    assert [each["id"] for each in await machine.execute("query-jobs")] == ["theirs"], "and stays"
    await machine.execute("job-dismiss", {"id": "theirs"})
    await machine.execute("blockdev-del", {"node-name": "mine"})
    await check_untouched(site, image)


def test_a_device_needs_a_folder_for_its_copy() -> None:
    """Both ways say what can be done for one."""
    disk = save_ways._Disk(0, "/dev/mapper/web1", "raw", save_disks.Open("n", 1, True, "raw", False))
    kept: Any = None

    class Kept:
        name = "web1"

        @staticmethod
        def require_machine() -> Any:
            return Asked()

    class Asked:
        @staticmethod
        async def execute(command: str) -> list[Any]:
            return []

    kept = Kept()
    for plan, way in ((save_ways._plan_overlays, "external-snapshot"), (save_ways._plan_copies, "mirror")):
        wish = save_ways.Wish(job="1f" * 16, name="one", disks=way)
        more: dict[str, Any] = {"qemu": "/nowhere/qemu", "state_dir": Path("/nowhere")} if way == "mirror" else {}
        with pytest.raises(PlanRefused, match="is a device") as caught:
            asyncio.run(plan(kept, wish, [disk], **more))
        assert "--disks-dir DIR" in caught.value.hint


# --- trouble --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("step", ["mirror", "drain"])
async def test_a_copy_that_fails_fails_the_save_and_nothing_else(make_site: MakeSite, version: str, step: str) -> None:
    site, image = await with_disk(make_site, version)
    site.director.script("a", {step: "fail"})
    wire = await save(site)
    assert wire["outcome"] == "none"
    assert f"{image} could not be copied" in wire["error"]["message"]
    assert f"scripted failure at {step}" in wire["error"]["message"], "QEMU's own reason"
    assert wire["error"]["guest"] == "unharmed"
    assert names(site) == []
    assert left(site) == set()
    await check_untouched(site, image)
    site.director.script("a")
    assert (await save(site))["outcome"] == "saved"


@pytest.mark.parametrize("wish", [{}, {"auto-finalize": False}], ids=["memory", "leave"])
async def test_a_copy_that_fails_after_it_was_ready_is_noticed_at_once(
    make_site: MakeSite, wish: dict[str, Any]
) -> None:
    """While the memory goes, and while a person's leave is awaited."""
    site, image = await with_disk(make_site)
    site.director.script("a", {} if wish else {"active": "hold"})
    job = await begin(site, **wish)
    await (until_fact(site, job, F.STANDS) if wish else site.director.reached("a", "active"))
    (copy,) = job.wanted.copies
    await job.kept.require_machine().execute("job-cancel", {"id": copy.job})
    wire = await ended(job)
    assert "Operation canceled" in wire["error"]["message"]
    assert (names(site), left(site)) == ([], set())
    site.director.script("a")
    await check_untouched(site, image)


async def test_one_that_runs_after_its_disk_for_ever_is_given_up(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SAVE_COPY_TIMES", 0)
    monkeypatch.setattr(limits, "SAVE_COPY_MORE_BYTES", -1)
    site, image = await with_disk(make_site)
    site.director.script("a", {"mirror": "hold"})
    wire = await save(site)
    assert "faster than it is copied" in wire["error"]["message"]
    assert "external-snapshot" in wire["error"]["hint"]
    assert left(site) == set()
    await check_untouched(site, image)


@pytest.mark.parametrize(
    ("status", "done", "whole", "first", "near"),
    [
        ("running", 0, 0, 0, False),
        ("running", 10 << 20, 10 << 20, 0, False),
        ("running", 8 << 20, 16 << 20, 16 << 20, False),
        ("running", 20 << 20, 24 << 20, 16 << 20, True),
        ("running", 20 << 20, 84 << 20, 16 << 20, False),
        ("ready", 0, 0, 0, True),
        ("standby", 16 << 20, 16 << 20, 16 << 20, True),
    ],
)
def test_a_guest_that_never_stops_writing_is_near_enough(
    status: str, done: int, whole: int, first: int, near: bool
) -> None:
    """Never before all of the disk was sent once: a small disk is not copied while the guest stands."""
    state = {"status": status, "current-progress": done, "total-progress": whole}
    assert save_mirrors.is_near(state, first) is near


async def test_a_rest_that_takes_longer_than_a_guest_may_stand(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SAVE_DRAIN_S", 0.05)
    site, image = await with_disk(make_site)
    site.director.script("a", {"drain": "hold"})
    wire = await save(site)
    assert "still lacked" in wire["error"]["message"]
    assert (names(site), left(site)) == ([], set())
    await check_untouched(site, image)


async def test_a_copy_never_takes_the_room_that_the_guest_itself_needs(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An image that cannot grow stops its guest. Only on a file system of the copies' own they may meet its end."""
    site, image = await with_disk(make_site)
    site.director.script("a", {"mirror": "hold"})
    job = await begin(site)
    await site.director.reached("a", "mirror")
    monkeypatch.setattr(save_mirrors, "_free_bytes", lambda folder: limits.SAVE_COPY_LEAVES_BYTES - 1)
    wire = await ended(job)
    assert "has to write, too" in wire["error"]["message"]
    assert left(site) == set()
    await check_untouched(site, image)
    monkeypatch.setattr(save_mirrors, "is_shared", lambda folder, others: False)
    site.director.script("a")
    assert (await save(site))["outcome"] == "saved"


def test_what_is_on_one_file_system(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert save_mirrors.is_shared(str(tmp_path), ["/not/there", str(tmp_path / "a")])
    assert not save_mirrors.is_shared(str(tmp_path), ["/not/there", "/proc"])
    assert not save_mirrors.is_shared("/not/there", ["/not/there", "/proc"])


async def test_no_image_is_made_over_anothers(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. the name is free as the save begins  2. somebody takes it."""
    site, image = await with_disk(make_site)
    make = images.make

    async def making(path: str, **more: Any) -> tuple[int, int]:
        found = await make(path, **more)
        await asyncio.to_thread(Path(path).write_bytes, b"somebody's")
        return found

    monkeypatch.setattr(images, "make", making)
    wire = await save(site)
    assert "cannot get its name" in wire["error"]["message"]
    assert wire["error"]["side"] == "source"
    assert stored(site).read_bytes() == b"somebody's"
    assert left(site) == {stored(site).name}
    await check_untouched(site, image)


async def test_a_copy_that_was_exchanged_is_in_no_snapshot(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, image = await with_disk(make_site)
    site.director.script("a", {"active": "hold"})
    job = await begin(site)
    await site.director.reached("a", "active")
    other = site.directory / "other"
    other.write_bytes(b"somebody's")
    other.rename(stored(site))
    site.director.go("a", "active")
    wire = await ended(job)
    assert "not the file that was made for it" in wire["error"]["message"]
    assert names(site) == []
    assert stored(site).read_bytes() == b"somebody's"
    await check_untouched(site, image)


@pytest.mark.parametrize("step", ["mirror", "drain", "active"])
async def test_a_qemu_that_dies_leaves_no_copy(make_site: MakeSite, step: str) -> None:
    site, _ = await with_disk(make_site)
    site.director.script("a", {step: "die"})
    wire = await save(site)
    assert wire["outcome"] == "none"
    assert (names(site), left(site)) == ([], set())


@pytest.mark.parametrize("fact", [F.WANTED, F.COPYING, F.COPIES_READY, F.STARTED, F.STANDS, F.COPIED, F.COMMITS])
async def test_a_cancel_at_each_moment(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, fact: SaveFact) -> None:
    site, image = await with_disk(make_site)
    note = SaveJob.note

    def noting(self: SaveJob, found: SaveFact, **rest: Any) -> None:
        note(self, found, **rest)
        if found is fact:
            note(self, F.CANCEL, by="person")

    monkeypatch.setattr(SaveJob, "note", noting)
    wire = await save(site)
    assert (wire["status"], wire["outcome"]) == ("cancelled", "none")
    assert (names(site), left(site)) == ([], set())
    await check_untouched(site, image)


async def test_a_commit_that_is_refused_leaves_no_copy(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site, image = await with_disk(make_site)
    _put(monkeypatch, StorePermanent("no room for the manifest"))
    wire = await save(site)
    assert "no room for the manifest" in wire["error"]["message"]
    assert wire["copies"] == {}, "they were taken away again"
    assert (names(site), left(site)) == ([], set())
    await check_untouched(site, image)


@pytest.mark.parametrize("is_there", [True, False], ids=["it-is-there", "nobody-knows"])
async def test_a_copy_that_a_snapshot_may_name_stays(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """The answer to the commit is lost."""
    site, image = await with_disk(make_site)
    _put(monkeypatch, StoreTransient("the store does not answer"), puts=is_there)
    if not is_there:
        monkeypatch.setattr(SaveJob, "_find", _unanswered)
    wire = await save(site)
    assert wire["outcome"] == ("saved" if is_there else "unknown"), wire
    assert left(site) == {stored(site).name}
    assert is_there or any("a snapshot may have it" in note for note in wire["notes"])
    await check_untouched(site, image)


def _unanswered(self: SaveJob, repository: Any) -> Any:
    raise StoreTransient("the store does not answer")


def _put(monkeypatch: pytest.MonkeyPatch, error: Exception, *, puts: bool = False) -> None:
    put = LocalFolder.put

    def failing(self: LocalFolder, name: str, data: bytes) -> None:
        if not name.startswith("snapshots/"):
            put(self, name, data)
            return
        if puts:
            put(self, name, data)
        raise error

    monkeypatch.setattr(LocalFolder, "put", failing)
