"""Guests that come back from snapshots, whole and lazily, on real QEMUs, through the agent and its command line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmferry.agent import touch_orders
from vmferry.engine.image import PAGE_BYTES, Image, MemoryFile
from vmferry.qmp.blocking import BlockingClient
from vmferry.store.local import LocalFolder
from vmferry.store.repository import Repository
from vmferry.testing.bootsector import count_passes
from vmferry.testing.guest_report import Chunk, analyse_chain
from vmferry.testing.hosts import (
    NEWEST,
    OLDEST,
    QEMUS,
    AgentHost,
    Guests,
    MakePair,
    TwoAgents,
    processes_of,
    wait_true,
)
from vmferry.testing.snapshots import WAIT_S, SpecGuest

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

MACHINE = "pc-q35-7.2"
MIB = 1 << 20
WAYS = [[], ["--lazy", "--wait"]]
WAY_NAMES = ["full", "lazy"]
_HOLE = (0xA0000, 0x100000)
"""What the chipset shows there is not what the block holds."""


@dataclass
class Saved:
    """A snapshot in a repository of its own, and what the guest's memory was."""

    name: str
    snapshot: str
    repository: Path
    image: Image
    serial: bytes
    saved_on: str

    def packs(self) -> list[Path]:
        return sorted(path for path in (self.repository / "packs").rglob("*") if path.is_file())

    def copy(self, to: Path) -> Saved:
        """The same in a repository that a test may damage."""
        shutil.copytree(self.repository, to)
        return Saved(self.name, self.snapshot, to, self.image, self.serial, self.saved_on)


def save_guest(folder: Path, version: str, spec: str, *, is_alive: Any, name: str = "monday") -> Saved:
    repository = Repository.create(LocalFolder(folder / "repository"))
    with SpecGuest(spec, qemu=QEMUS[version], version=version, machine=MACHINE) as guest:
        guest.until(lambda: is_alive(guest.serial), "sign of life", WAIT_S)
        snapshot, image = guest.save(repository, name)
        return Saved(name, snapshot, folder / "repository", image, guest.serial, version)


@pytest.fixture(scope="module", params=sorted({OLDEST, NEWEST}))
def boot(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """The boot-sector guest, saved on each of the QEMUs."""
    folder = tmp_path_factory.mktemp("boot")
    spec = Guests(folder).boot("web1", memory_mib=48, ram_mib=24)
    saved = save_guest(folder, request.param, spec, is_alive=lambda serial: count_passes(serial) >= 2)
    yield saved
    saved.image.close()


@pytest.fixture(scope="module")
def old_boot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """The boot-sector guest of the older QEMU, with more memory, so that something is left to be sent."""
    folder = tmp_path_factory.mktemp("old-boot")
    spec = Guests(folder).boot("web1", memory_mib=96, ram_mib=64, delay=2_000)
    saved = save_guest(folder, OLDEST, spec, is_alive=lambda serial: count_passes(serial) >= 2)
    yield saved
    saved.image.close()


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """The Linux guest of the older QEMU, with a disk."""
    folder = tmp_path_factory.mktemp("linux")
    spec = Guests(folder).linux("web1", memory_mib=128)
    saved = save_guest(folder, OLDEST, spec, is_alive=lambda serial: serial.count(b"\nT ") >= 20)
    yield saved
    saved.image.close()


def agents(make_pair: MakePair, saved: Saved, version: str = NEWEST) -> TwoAgents:
    """Two hosts with the same repository."""
    flags = ["--repository", str(saved.repository)]
    return make_pair(version, version, clear_text=True, flags_a=flags, flags_b=flags)


def restored(host: AgentHost, saved: Saved, *words: str, vm: str = "web1") -> dict[str, Any]:
    return host.ok("restore", saved.name, "--as", vm, *words)


def differing_pages(host: AgentHost, vm: str, saved: Saved, folder: Path) -> list[int]:
    """Numbers of pages whose content in the guest, which is paused, differs from the saved guest's."""
    block = saved.image.blocks["pc.ram"]
    store, path = block.store, folder / "memory"
    assert isinstance(store, MemoryFile)
    found: list[int] = []
    with BlockingClient(host.status(vm)["monitor"]) as monitor:
        for first, stop in ((0, _HOLE[0]), (_HOLE[1], block.wire.used_length)):
            arguments = {"val": first, "size": stop - first, "filename": str(path)}
            monitor.execute("pmemsave", arguments, deadline_s=60)
            theirs = np.fromfile(path, np.uint8).reshape(-1, PAGE_BYTES)
            path.unlink()
            mine = store.pages[first // PAGE_BYTES : stop // PAGE_BYTES]
            found += (np.flatnonzero((mine != theirs).any(axis=1)) + first // PAGE_BYTES).tolist()
    return found


def memory_mb(host: AgentHost) -> float:
    """The largest size that the host's agent ever had."""
    assert host.process is not None
    found = [pid for pid, words in processes_of(host.folder).items() if "vmferry.cli.main agent" in words]
    sizes = [re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in found]
    return max(int(size[1]) * 1024 / 1e6 for size in sizes if size is not None)


def _ticks(serial: Path, count: int) -> bool:
    return serial.exists() and serial.read_bytes().count(b"\nT ") >= count


def goes_on(host: AgentHost, vm: str, saved: Saved, *, passes: int = 2) -> None:
    """The boot-sector guest goes on exactly where it was saved. Raises LogError if it does not."""
    serial = host.vm_directory(vm) / "serial.log"
    before = count_passes(saved.serial)
    wait_true(
        lambda: serial.exists() and count_passes(saved.serial + serial.read_bytes()) >= before + passes,
        timeout_s=60,
        why=f"{vm} does not go on",
    )


def a_stored_page(saved: Saved, share: float) -> tuple[Path, int]:
    """A place in a pack, at this share of all bytes of packs."""
    packs = saved.packs()
    at = int(sum(path.stat().st_size for path in packs) * share)
    for path in packs:
        if at < path.stat().st_size:
            return path, at
        at -= path.stat().st_size
    raise AssertionError("there is no pack")


def flip(path: Path, at: int, count: int = 64) -> bytes:
    """Damages some bytes; what was there."""
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(count)
        file.seek(at)
        file.write(bytes(byte ^ 0xA5 for byte in before))
    return before


def put_back(path: Path, at: int, before: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(before)


# --- the same guest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", sorted({OLDEST, NEWEST}))
@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_the_memory_is_the_saved_guests_page_by_page(
    make_pair: MakePair, boot: Saved, tmp_path: Path, version: str, way: list[str]
) -> None:
    pair = agents(make_pair, boot, version)
    wire = restored(pair.a, boot, "--paused", *way)
    assert (wire["detail"], wire["state"], wire["resume_ms"]) == ("completed", "concluded", None)
    assert pair.a.status("web1")["run_state"] == "paused"
    assert differing_pages(pair.a, "web1", boot, tmp_path) == []
    with BlockingClient(pair.a.status("web1")["monitor"]) as monitor:
        monitor.execute("cont")
    goes_on(pair.a, "web1", boot)


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_a_linux_guest_finds_its_memory_and_its_disk_right(make_pair: MakePair, linux: Saved, way: list[str]) -> None:
    """Saved on the older QEMU, restored on the newer: its own checks go on, of memory and of the disk's overlay."""
    stored = {path: path.read_bytes() for path in linux.repository.parent.glob("*.img")}
    pair = agents(make_pair, linux)
    wire = restored(pair.a, linux, *way)
    assert wire["detail"] == "completed"
    assert pair.a.status("web1")["run_state"] == "running"
    serial = pair.a.vm_directory("web1") / "serial.log"
    words = (b"\nW memory ", b"\nW disk ")
    wait_true(
        lambda: serial.exists() and all(serial.read_bytes().count(word) >= 2 for word in words),
        timeout_s=90,
        why="two checks of memory and disk",
    )
    (overlay,) = wire["overlays"]
    assert Path(overlay).exists()
    report = analyse_chain([[Chunk(0.0, linux.serial)], [Chunk(0.0, serial.read_bytes())]])
    assert report.complaints() == []
    assert {path: path.read_bytes() for path in stored} == stored, "the stored disk is as it was"


@pytest.mark.skipif(OLDEST == NEWEST, reason="one QEMU")
def test_ten_lazy_restores_at_the_same_time(make_pair: MakePair, linux: Saved) -> None:
    pair = agents(make_pair, linux)
    names = [f"web{number}" for number in range(10)]
    started = [pair.a.cli_start("restore", linux.name, "--lazy", "--wait", "--as", vm, "--json") for vm in names]
    ended = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * 10, ended
    for vm in names:
        serial = pair.a.vm_directory(vm) / "serial.log"
        wait_true(partial(_ticks, serial, 30), timeout_s=90, why=f"{vm} ticks")
        words = serial.read_bytes()
        assert b"\nE " not in words, f"{vm} found an error"
    assert len(list((pair.a.state / "disks").glob("*.qcow2"))) == 10, "each has a disk of its own"
    assert memory_mb(pair.a) <= 200
    for vm in names:
        pair.a.ok("stop", vm, "--force")


@pytest.mark.skipif(OLDEST == NEWEST, reason="one QEMU")
def test_first_touches_are_remembered_and_a_damaged_file_of_them_is_ignored(
    make_pair: MakePair, old_boot: Saved
) -> None:
    pair = agents(make_pair, old_boot)
    restored(pair.a, old_boot, "--lazy", "--wait")
    file = pair.a.state / "first-touches" / old_boot.snapshot
    wait_true(file.exists, why="the order of first touches is remembered")
    order = touch_orders.read(file.read_bytes())
    assert order is not None, "and can be read"
    assert len(order) > 0
    assert set(order.names) <= set(old_boot.image.blocks)
    restored(pair.a, old_boot, "--lazy", "--wait", vm="web2")
    again = touch_orders.read(file.read_bytes())
    assert again is not None
    assert again.codes.tolist() == order.codes.tolist(), "the first one counts"
    flip(file, file.stat().st_size - 40, 8)
    restored(pair.a, old_boot, "--lazy", "--wait", vm="web3")
    goes_on(pair.a, "web3", old_boot)
    assert "damaged, and ignored" in pair.a.log()
    assert touch_orders.read(file.read_bytes()), "and another one was written"


def test_another_host_restores_it_when_it_is_asked(make_pair: MakePair, old_boot: Saved) -> None:
    pair = agents(make_pair, old_boot)
    wire = restored(pair.a, old_boot, "--lazy", "--wait", "--on", "host-b", vm="web7")
    assert (wire["host"], wire["detail"]) == ("host-b", "completed")
    assert pair.running_on("web7") == ["host-b"]
    goes_on(pair.b, "web7", old_boot)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_refused_on_every_host(make_pair: MakePair, old_boot: Saved) -> None:
    pair = agents(make_pair, old_boot)
    restored(pair.a, old_boot)
    before = pair.a.qemus()
    assert "has a VM named web1 already" in pair.a.refused("restore", old_boot.name, code=9)["message"]
    assert "host-a has a VM named web1" in pair.b.refused("restore", old_boot.name, code=9)["message"]
    wire = restored(pair.b, old_boot, vm="web2")
    assert any("web1 on host-a has the same UUID" in note for note in wire["notes"]), "the same guest is named"
    assert pair.a.qemus() == before


def test_a_stored_disk_that_was_changed_or_is_missing_is_refused(make_pair: MakePair, tmp_path: Path) -> None:
    spec = Guests(tmp_path).boot("web1", memory_mib=32, ram_mib=8)
    saved = save_guest(tmp_path, OLDEST, spec, is_alive=lambda serial: count_passes(serial) >= 2)
    saved.image.close()
    pair = agents(make_pair, saved)
    disk = tmp_path / "web1.img"
    content = disk.read_bytes()
    disk.write_bytes(content)
    assert "was changed since the snapshot" in pair.a.refused("restore", saved.name, code=8)["message"]
    disk.unlink()
    assert "is not there" in pair.a.refused("restore", saved.name, code=8)["message"]
    assert pair.a.qemus() == {}


HOSTILE = {
    "manifest": ("snapshots", 200, "snapshots/"),
    "index": ("index", 100, "index/"),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("deed", ["flipped", "cut", "missing"])
def test_nothing_is_started_on_a_damaged_repository(
    make_pair: MakePair, old_boot: Saved, tmp_path: Path, what: str, deed: str
) -> None:
    saved = old_boot.copy(tmp_path / "damaged")
    folder, at, named = HOSTILE[what]
    (path,) = (each for each in (saved.repository / folder).rglob("*") if each.is_file())
    if deed == "flipped":
        flip(path, at, 8)
    elif deed == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    pair = agents(make_pair, saved)
    error = pair.a.refused("restore", saved.name, "--lazy", code=25)
    if (what, deed) != ("manifest", "missing"):
        damage = str(error["message"]) + str(error["hint"])
        assert named in damage or "no snapshot" in damage, "the object is named"
    assert pair.a.qemus() == {}
    assert not list((pair.a.state / "disks").glob("*")), "no overlay is left"
    assert pair.a.execute("vm-list", local=True)["vms"] == []


@pytest.mark.parametrize("deed", ["missing", "cut"])
@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_a_pack_that_is_not_there_starts_nothing(
    make_pair: MakePair, old_boot: Saved, tmp_path: Path, deed: str, way: list[str]
) -> None:
    saved = old_boot.copy(tmp_path / "damaged")
    path = saved.packs()[0]
    if deed == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000])
    pair = agents(make_pair, saved)
    error = pair.a.refused("restore", saved.name, *way, code=25)
    assert path.name in error["message"], "the object is named"
    assert pair.a.qemus() == {}


# --- on the way -----------------------------------------------------------------------------------------------------


def job_of(host: AgentHost, vm: str) -> dict[str, Any]:
    (found,) = (job for job in host.execute("query-jobs") if job["vm"] == vm)
    return dict(found)


def hold_half_way(pair: TwoAgents, saved: Saved, *, vm: str = "web1") -> tuple[Path, int, bytes]:
    """A lazy restore whose guest runs, and cannot get all of its pages."""
    path, at = a_stored_page(saved, 0.5)
    before = flip(path, at)
    wire = restored(pair.a, saved, "--lazy", vm=vm)
    assert wire["resume_ms"] is not None
    wait_true(lambda: job_of(pair.a, vm)["status"] == "paused", timeout_s=60, why="the job says that pages do not come")
    return path, at, before


def until_whole(host: AgentHost, vm: str) -> None:
    wait_true(lambda: not any(job["vm"] == vm for job in host.execute("query-jobs")), timeout_s=90, why="it is over")


@pytest.mark.proves("S53")
def test_a_damaged_page_is_never_handed_out_and_the_guest_goes_on_when_it_is_mended(
    make_pair: MakePair, old_boot: Saved, tmp_path: Path
) -> None:
    saved = old_boot.copy(tmp_path / "damaged")
    pair = agents(make_pair, saved)
    path, at, before = hold_half_way(pair, saved)
    job = job_of(pair.a, "web1")
    assert path.name in job["reason"], "the damaged object is named"
    assert "verify" in job["reason"], "and what can be done"
    assert pair.a.refused("migrate", "web1", "host-b", code=9)["code"] == "busy"
    put_back(path, at, before)
    until_whole(pair.a, "web1")
    goes_on(pair.a, "web1", saved)


@pytest.mark.proves("S53", "S123")
def test_an_agent_that_dies_half_way_serves_the_rest_after_its_restart(
    make_pair: MakePair, old_boot: Saved, tmp_path: Path
) -> None:
    saved = old_boot.copy(tmp_path / "damaged")
    pair = agents(make_pair, saved)
    path, at, before = hold_half_way(pair, saved)
    job = job_of(pair.a, "web1")
    qemus = pair.a.qemus()
    pair.a.kill()
    pair.a.restart()
    assert job_of(pair.a, "web1")["id"] == job["id"]
    put_back(path, at, before)
    until_whole(pair.a, "web1")
    assert pair.a.qemus().keys() == qemus.keys(), "the same process"
    goes_on(pair.a, "web1", saved)
    assert pair.a.execute("restore-status", job=job["id"])["detail"] == "completed"


def test_an_agent_that_dies_in_a_full_restore_leaves_nothing(
    make_pair: MakePair, old_boot: Saved, tmp_path: Path
) -> None:
    saved = old_boot.copy(tmp_path / "damaged")
    pair = agents(make_pair, saved)
    flip(*a_stored_page(saved, 0.5))
    wire = pair.a.ok("restore", saved.name, "--detach")
    wait_true(lambda: job_of(pair.a, "web1")["status"] == "paused", timeout_s=60, why="it waits")
    pair.a.kill()
    pair.a.restart()
    until_whole(pair.a, "web1")
    found = pair.a.execute("restore-status", job=wire["job"])
    assert (found["detail"], found["error"]["code"]) == ("failed", "qemu")
    assert pair.a.qemus() == {}
    assert not list((pair.a.state / "disks").glob("*"))


def test_a_cancel_leaves_nothing_and_is_refused_once_the_guest_runs(
    make_pair: MakePair, old_boot: Saved, tmp_path: Path
) -> None:
    saved = old_boot.copy(tmp_path / "damaged")
    pair = agents(make_pair, saved)
    path, at, before = hold_half_way(pair, saved)
    assert "runs already" in pair.a.refused("job", "cancel", job_of(pair.a, "web1")["id"], code=22)["message"]
    wire = pair.a.ok("restore", saved.name, "--as", "web2", "--detach", "--no-auto-dismiss")
    wait_true(lambda: job_of(pair.a, "web2")["status"] == "paused", timeout_s=60, why="it waits")
    pair.a.ok("job", "cancel", wire["job"])
    wait_true(lambda: job_of(pair.a, "web2")["status"] == "concluded", timeout_s=60, why="it is over")
    assert job_of(pair.a, "web2")["detail"] == "cancelled"
    pair.a.ok("job", "dismiss", wire["job"])
    assert [vm["vm"] for vm in pair.a.execute("vm-list", local=True)["vms"]] == ["web1"]
    assert len(list((pair.a.state / "disks").glob("*"))) == 1, "the overlay of the guest that runs"
    put_back(path, at, before)
    until_whole(pair.a, "web1")


def test_a_guest_that_ends_half_way_ends_its_restore(make_pair: MakePair, old_boot: Saved, tmp_path: Path) -> None:
    saved = old_boot.copy(tmp_path / "damaged")
    pair = agents(make_pair, saved)
    hold_half_way(pair, saved)
    job = job_of(pair.a, "web1")["id"]
    pair.a.ok("stop", "web1", "--force")
    until_whole(pair.a, "web1")
    assert pair.a.execute("restore-status", job=job)["detail"] == "lost"


# --- from one command to the other ---------------------------------------------------------------------------------


@pytest.mark.skipif(OLDEST == NEWEST, reason="one QEMU")
@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_what_was_saved_on_the_older_qemu_is_restored_on_the_newer(
    make_pair: MakePair, guests: Guests, tmp_path: Path, way: list[str]
) -> None:
    """`vmferry save` there, `vmferry restore` here: the Linux guest's own checks of memory and disk go on."""
    flags = ["--repository", str(tmp_path / "repository")]
    pair = make_pair(OLDEST, NEWEST, clear_text=True, flags_a=flags, flags_b=flags)
    assert pair.a.ok("repository-init")["created"]
    pair.a.ok("run", guests.linux("web1", memory_mib=128), timeout_s=120)
    serial = pair.a.vm_directory("web1") / "serial.log"
    wait_true(partial(_ticks, serial, 20), timeout_s=90, why="it ticks")
    pair.a.ok("save", "web1", "monday", "--disks", "external-snapshot", timeout_s=120)
    assert "host-a has a VM named web1" in pair.b.refused("restore", "monday", code=9)["message"]
    wire = pair.b.ok("restore", "monday", "--as", "web2", *way, timeout_s=120)
    assert wire["detail"] == "completed"
    assert any("web1 on host-a has the same UUID" in note for note in wire["notes"])
    there = pair.b.vm_directory("web2") / "serial.log"
    words = (b"\nW memory ", b"\nW disk ")
    wait_true(
        lambda: there.exists() and all(there.read_bytes().count(word) >= 2 for word in words),
        timeout_s=90,
        why="two checks of memory and disk",
    )
    assert b"\nE " not in there.read_bytes()
    before = serial.read_bytes()
    wait_true(lambda: len(serial.read_bytes()) > len(before), why="the guest that was saved goes on, too")
    (disk,) = pair.b.ok("disks")["disks"]
    assert (disk["vm"], disk["name"]) == ("web2", "monday")
    assert "has it open" in disk["needed"]
    pair.b.refused("disks", "--remove", disk["path"], code=9)
    assert pair.b.ok("stop", "web2", "--force", "--remove-disks")["disks"] == {"removed": [disk["path"]], "left": []}
    assert not Path(disk["path"]).exists()
