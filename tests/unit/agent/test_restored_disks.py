"""Disks that restores made: who needs each, and that none is taken away that somebody needs."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmferry.agent import restored_disks
from vmferry.agent.restore_definition import GuestIdentity, Overlay
from vmferry.agent.restored_disks import RemoveArguments, RestoredDisks
from vmferry.agent.restoring import RestoreWanted
from vmferry.agent.vms import DiskRef
from vmferry.errors import Busy, RepositoryError, UsageError
from vmferry.jobs.journal import Entry, JobState
from vmferry.vm import image_locks
from vmferry.vm.image_locks import USES_BASE

JOB = "1f" * 16


def _made(**members: Any) -> Any:
    return SimpleNamespace(**members)


class Bed:
    """An agent with one disk that an earlier restore of web2 has left."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "web2-1f1f1f1f-0.qcow2"
        self.path.write_bytes(b"written by the guest")
        self.entries: list[tuple[Entry, str]] = []
        self.elsewhere: list[GuestIdentity] = []
        self.silent: tuple[str, ...] = ()
        self.heads: list[Any] = []
        self.jobs: dict[str, Any] = {}
        self.vms: dict[str, Any] = {}
        self.agent: Any = _made(
            restores=SimpleNamespace(at_work=list, by_id=self.jobs.get),
            saves=SimpleNamespace(at_work=list, by_id=self.jobs.get),
            config=SimpleNamespace(name="host-a", qemu="/nowhere/qemu"),
            vms=self.vms,
            journal=SimpleNamespace(append=self._append),
            snapshot_store=SimpleNamespace(with_repository=self._with_repository, place="/repository"),
        )
        self.disks = self.agent.restores.disks = RestoredDisks(self.agent, ask=self._ask)

    async def _append(self, kind: Entry, subject: str) -> None:
        self.entries.append((kind, subject))

    async def _ask(self, agent: Any) -> tuple[list[GuestIdentity], tuple[str, ...]]:
        return self.elsewhere, self.silent

    async def _with_repository(self, work: Any) -> Any:
        return work(SimpleNamespace(snapshots=lambda: self.heads))

    def wanted(self, job: str = JOB, *, path: str = "", backing: str = "/images/a.img") -> RestoreWanted:
        overlay = Overlay(path or str(self.path), backing, "raw")
        return RestoreWanted(
            job=job, vm="web2", snapshot="5" * 32, name="monday", lazy=True, runs=True, definition={}, directory="/x",
            overlays=(overlay,),
        )  # fmt: skip

    def state(self, **more: Any) -> JobState:
        found = os.stat(self.path)
        body = {**{k: getattr(self.wanted(), k) for k in self.wanted().__slots__}}
        body["overlays"] = [{"path": str(self.path), "backing": "/images/a.img", "backing_format": "raw"}]
        images = {str(self.path): [found.st_dev, found.st_ino]}
        return JobState(JOB, "restore", body, images=images, ended={}, **more)

    def head(self, **disk: Any) -> None:
        self.heads = [SimpleNamespace(snapshot="6" * 32, head=SimpleNamespace(name="tuesday", disks=[disk]))]

    async def needed(self) -> str:
        (wire,) = await restored_disks.listed(self.agent, None)
        assert (wire["path"], wire["vm"], wire["name"]) == (str(self.path), "web2", "monday")
        assert wire["allocated_bytes"] > 0
        return str(wire["needed"])

    async def refused(self, words: str, *, force: bool = False) -> None:
        """It is told why, and the file stays."""
        assert words in await self.needed()
        with pytest.raises(Busy, match="stays"):
            await restored_disks.remove(self.agent, RemoveArguments(path=str(self.path), force=force))
        assert self.path.exists()


@pytest.fixture
async def bed(tmp_path: Path) -> Bed:
    made = Bed(tmp_path)
    await made.disks.take_up(made.state())
    return made


async def test_one_that_nobody_needs_is_listed_and_taken_away_by_name(bed: Bed) -> None:
    assert await bed.needed() == ""
    assert bed.entries == [], "the journal keeps the job for it"
    with pytest.raises(UsageError, match="no restore and no save of this host made"):
        await restored_disks.remove(bed.agent, RemoveArguments(path="/etc/passwd"))
    wire = await restored_disks.remove(bed.agent, RemoveArguments(path=str(bed.path)))
    assert wire == {"path": str(bed.path), "removed": True}
    assert not bed.path.exists()
    assert bed.entries == [(Entry.IMAGES_GONE, JOB)]
    assert await restored_disks.listed(bed.agent, None) == []


async def test_one_that_is_gone_or_another_file_is_not_listed_and_not_touched(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    state = bed.state()
    other = tmp_path / "other"
    other.write_bytes(b"somebody's")
    other.rename(bed.path)
    await bed.disks.take_up(state)
    assert await restored_disks.listed(bed.agent, None) == []
    assert bed.entries == [(Entry.IMAGES_GONE, JOB)]
    assert bed.path.read_bytes() == b"somebody's"


async def test_a_journal_of_another_version_keeps_no_agent_from_starting(bed: Bed) -> None:
    state = bed.state()
    state.body = {"vm": "web2"}
    fresh = RestoredDisks(bed.agent, ask=bed._ask)
    await fresh.take_up(state)
    assert await fresh.here() == []
    assert bed.entries == []


async def test_one_of_a_vm_that_is_kept_stays(bed: Bed) -> None:
    """Also of a VM whose QEMU has ended: it may be wanted again."""
    disks = (DiskRef(str(bed.path), False, False, "raw"),)
    bed.vms["web2"] = SimpleNamespace(name="web2", definition=SimpleNamespace(name="web2", disks=disks))
    await bed.refused("web2 needs it", force=True)


async def test_one_that_a_kept_vms_disk_may_lie_on_stays(bed: Bed) -> None:
    disks = (DiskRef("/images/top.qcow2", False, False, "qcow2"),)
    bed.vms["web9"] = SimpleNamespace(name="web9", definition=SimpleNamespace(name="web9", disks=disks))
    await bed.refused("/images/top.qcow2 of web9 lies on is not known")


async def test_a_folder_that_is_not_mounted_says_nothing_of_what_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "disks"
    folder.mkdir()
    bed = Bed(folder)
    state = bed.state()
    folder.rename(tmp_path / "away")
    await bed.disks.take_up(state)
    assert await restored_disks.listed(bed.agent, None) == []
    assert bed.entries == [], "the journal keeps the job"
    (tmp_path / "away").rename(folder)
    assert await bed.needed() == ""


@pytest.mark.parametrize("force", [False, True])
async def test_where_locks_tell_nothing_a_person_has_to_say_so(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.setattr(image_locks, "in_use", lambda path: None)
    if not force:
        await bed.refused("nobody can say whether a process has it open")
    else:
        await restored_disks.remove(bed.agent, RemoveArguments(path=str(bed.path), force=True))
        assert not bed.path.exists()


async def test_one_that_a_qemu_opens_at_the_last_moment_stays(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_locks, "in_use", lambda path: frozenset())
    lock = image_locks.WriteLock.take(str(bed.path))
    assert lock is not None
    with pytest.raises(Busy, match="a process has it open"):
        await restored_disks.remove(bed.agent, RemoveArguments(path=str(bed.path), force=True))
    assert bed.path.exists()
    lock.release()


async def test_one_under_another_restores_stays(bed: Bed, tmp_path: Path) -> None:
    top = tmp_path / "web3.qcow2"
    top.write_bytes(b"x")
    found = os.stat(top)
    wanted = bed.wanted("2f" * 16, path=str(top), backing=str(bed.path))
    bed.disks.remember(restored_disks.of_job(wanted, {str(top): (found.st_dev, found.st_ino)}))
    with pytest.raises(Busy, match=r"web3\.qcow2 lies on it"):
        await restored_disks.remove(bed.agent, RemoveArguments(path=str(bed.path), force=True))
    await restored_disks.remove(bed.agent, RemoveArguments(path=str(top)))
    await restored_disks.remove(bed.agent, RemoveArguments(path=str(bed.path)))
    assert not bed.path.exists()


async def test_one_under_a_disk_of_another_host_stays(bed: Bed) -> None:
    """Also when the guest there was powered off: its host tells what its disks lie on."""
    bed.elsewhere = [GuestIdentity("web7", "host-b", bases=(str(bed.path),))]
    await bed.refused("a disk of web7 on host-b lies on it", force=True)
    (mine,) = await bed.disks.bases()
    assert (mine.vm, mine.host, mine.bases) == ("web2", "host-a", ("/images/a.img",))


async def test_one_that_a_process_has_open_stays(bed: Bed) -> None:
    with bed.path.open("rb") as file:
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, USES_BASE, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        await bed.refused("a process has it open", force=True)
    assert await bed.needed() == ""


async def test_one_of_a_vm_of_another_host_stays(bed: Bed) -> None:
    bed.elsewhere = [GuestIdentity("web2", "host-b", writable=(str(bed.path),))]
    await bed.refused("web2 on host-b needs it", force=True)


@pytest.mark.parametrize("where", ["path", "chain"])
async def test_one_that_a_snapshot_needs_stays(bed: Bed, where: str) -> None:
    below = {"path": str(bed.path)}
    bed.head(**(below if where == "path" else {"path": "/top", "chain": [below]}))
    await bed.refused("the snapshot tuesday needs it", force=True)


async def test_what_could_not_be_asked_keeps_it_until_a_person_says_so(bed: Bed) -> None:
    bed.silent = ("host-b was not asked",)
    await bed.refused("host-b was not asked")
    bed.silent = ()

    async def away(work: Any) -> Any:
        raise RepositoryError("no answer")

    bed.agent.snapshot_store.with_repository = away
    await bed.refused("no answer")
    await restored_disks.remove(bed.agent, RemoveArguments(path=str(bed.path), force=True))
    assert not bed.path.exists()


async def test_one_of_a_restore_at_work_stays(bed: Bed) -> None:
    bed.jobs[JOB] = object()
    await bed.refused("its restore is at work", force=True)


async def test_disks_go_with_a_guest_that_is_stopped_for_good(bed: Bed) -> None:
    for vm, path in (("web9", str(bed.path)), ("web2", "/another")):
        told = await bed.disks.remove_all(vm, [path])
        assert told == {"removed": [], "left": [f"{path}: no restore of host-a made it for {vm}"]}
    bed.head(path=str(bed.path))
    told = await bed.disks.remove_all("web2", [str(bed.path)])
    assert told == {"removed": [], "left": [f"{bed.path}: the snapshot tuesday needs it"]}
    bed.heads = []
    assert await bed.disks.remove_all("web2", [str(bed.path)]) == {"removed": [str(bed.path)], "left": []}
    assert not bed.path.exists()
