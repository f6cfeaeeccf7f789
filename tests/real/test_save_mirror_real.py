"""Real QEMUs of both generations, whose disks are copied while they are saved: the guest judges its disk, and so do
bytes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vmferry.qmp.blocking import BlockingClient
from vmferry.testing.guest_report import Chunk, analyse_chain
from vmferry.testing.hosts import NEWEST, PAIRS, QEMUS, AgentHost, Guests, MakePair, TwoAgents, boot, wait_true
from vmferry.testing.qemus import image_tool

pytestmark = [pytest.mark.real, pytest.mark.timeout(420)]

MIB = 1 << 20
WALKS_S = 90
FACTS = ("configured", "copying", "copies-ready", "started", "stands", "copied", "whole", "resumed", "commits", "kept")


def told(host: AgentHost, fact: str) -> int:
    return host.log().count(f"save fact={fact} ")


def until_told(host: AgentHost, fact: str, seen: int) -> None:
    wait_true(lambda: told(host, fact) > seen, why=fact)


def copy_of(wire: dict[str, Any]) -> dict[str, Any]:
    (disk,) = (each for each in wire["disks"] if each["way"] == "mirror")
    return dict(disk)


def copies_beside(image: Path) -> list[Path]:
    return sorted(image.parent.glob("*.stored.qcow2*"))


def check_unchanged(disk: dict[str, Any]) -> None:
    stat = Path(disk["path"]).stat()
    assert (stat.st_size, stat.st_mtime_ns) == (disk["size_bytes"], disk["mtime_ns"]), "nobody writes to it any more"


def clean_in_qemu(qmp: str, image: str) -> None:
    """Its disk is what it was, and nothing of a save is left. For as long as no agent has its session."""
    with BlockingClient(qmp, name="the guest's QEMU") as client:
        assert client.execute("query-jobs") == []
        nodes = client.execute("query-named-block-nodes", {"flat": True})
        assert [node["node-name"] for node in nodes if node["node-name"].startswith("vmferry")] == []
        files = [
            device["inserted"]["image"]["filename"] for device in client.execute("query-block") if "inserted" in device
        ]
        assert files == [image]
        assert client.execute("query-status")["status"] == "running"


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_a_working_guest_is_saved_and_what_was_kept_works_elsewhere(
    source: str, destination: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """The guest writes to its disk and checks it all the time; so does the one that is restored from the copy."""
    flags = ["--repository", str(tmp_path / "repository")]
    pair = make_pair(source, destination, clear_text=True, flags_a=flags, flags_b=flags)
    pair.a.ok("repository-init")
    pair.a.ok("run", guests.linux(), timeout_s=120)
    before, pid = pair.a.status("web1"), pair.a.qemu_pid("web1")
    with pair.a.console("web1") as console:
        console.wait_ready(timeout_s=WALKS_S)
        after = console.wait_walks(1, timeout_s=WALKS_S, region="disk")
        wire = pair.a.ok("save", "web1", "monday", "--disks", "mirror", timeout_s=120)
        after = console.wait_walks(2, timeout_s=WALKS_S, region="disk", after=after)
        again = pair.a.ok("save", "web1", "tuesday", "--disks", "mirror", timeout_s=120)
        console.wait_walks(1, timeout_s=WALKS_S, region="disk", after=after)
    for each in (wire, again):
        assert each["outcome"] == "saved", each
        whats = [row["what"] for row in each["timeline"]]
        order = ["copying", "copies-ready", "started", "STOP", "copied", "whole", "RESUME", "kept"]
        assert [what for what in whats if what in order] == order
        check_unchanged(copy_of(each))
    assert [each["path"] for each in pair.a.ok("disks")["disks"]] == sorted(copy_of(e)["path"] for e in (wire, again))
    now = pair.a.status("web1")
    assert (now["qmp"], now["run_state"]) == (before["qmp"], "running")
    assert pair.a.qemu_pid("web1") == pid
    for name, each in (("monday", wire), ("tuesday", again)):
        pair.b.ok("restore", name, "--as", f"{name}1", timeout_s=120)
        there = pair.b.vm_directory(f"{name}1") / "serial.log"
        wait_true(partial(_has_checked, there), timeout_s=WALKS_S, why="two checks of memory and disk")
        assert b"\nE " not in there.read_bytes()
        check_unchanged(copy_of(each))
        refused = pair.a.refused("disks", "--remove", copy_of(each)["path"], code=9)
        assert "needs it" in refused["message"] or "has it open" in refused["message"], refused
    pair.a.ok("forget", "monday")
    refused = pair.a.refused("disks", "--remove", copy_of(wire)["path"], code=9)
    assert "has it open" in refused["message"] or "lies on it" in refused["message"], refused
    pair.b.ok("stop", "monday1", "--force")
    refused = pair.a.refused("disks", "--remove", copy_of(wire)["path"], code=9)
    assert "monday1 on host-b lies on it" in refused["message"], "a guest that was powered off may be wanted again"
    (overlay,) = (each for each in pair.b.ok("disks")["disks"] if each["vm"] == "monday1")
    pair.b.ok("disks", "--remove", overlay["path"])
    pair.a.ok("disks", "--remove", copy_of(wire)["path"])
    assert not Path(copy_of(wire)["path"]).exists()
    report = analyse_chain([[Chunk(0.0, (pair.a.vm_directory("web1") / "serial.log").read_bytes())]])
    assert report.complaints() == []


def _has_checked(serial: Path) -> bool:
    return serial.exists() and all(serial.read_bytes().count(word) >= 2 for word in (b"\nW memory ", b"\nW disk "))


@pytest.mark.parametrize("version", QEMUS)
def test_the_copy_is_the_disk_of_that_instant(version: str, make_pair: MakePair, guests: Guests) -> None:
    """1. the guest writes while its disk is copied  2. it stands for its snapshot  3. the agent is killed there, so
    that the disk stays as it is: QEMU's own tool finds no difference. The next agent gives the guest back."""
    host = make_pair(version).a
    spec = guests.linux()
    host.ok("run", spec, timeout_s=120)
    image = guests.folder / "web1.img"
    qmp = host.status("web1")["qmp"]
    with host.console("web1") as console:
        console.wait_ready(timeout_s=WALKS_S)
        after = console.wait_walks(1, timeout_s=WALKS_S, region="disk")
        seen = told(host, "copied")
        host.execute("vm-save", vm="web1", name="one", disks="mirror", pause=True)
        until_told(host, "copied", seen)
        host.kill()
        with BlockingClient(qmp, name="the guest's QEMU") as client:
            assert client.execute("query-status")["status"] not in ("running", "guest-panicked")
        (copy,) = copies_beside(image)
        words = [str(image_tool(QEMUS[version])), "compare", "-U", "-f", "raw", "-F", "qcow2", str(image), str(copy)]
        compared = subprocess.run(words, capture_output=True, text=True, check=False)
        assert "Images are identical" in compared.stdout, compared
        assert image.read_bytes()[MIB : MIB + 4096] != bytes(4096), "the guest has written"
        host.restart()
        wait_true(lambda: not host.execute("query-jobs"), why="the save is walked back")
        assert host.status("web1")["run_state"] == "running"
        console.wait_walks(1, timeout_s=WALKS_S, region="disk", after=after)
    there = [each["name"] for each in host.ok("snapshots")["snapshots"]]
    assert copies_beside(image) == ([copy] if there == ["one"] or host.ok("disks")["disks"] else [])
    host.kill()
    clean_in_qemu(qmp, str(image))
    host.restart()


@pytest.mark.parametrize("version", QEMUS)
@pytest.mark.proves("S53")
def test_an_agent_that_is_killed_while_disks_are_copied(version: str, make_pair: MakePair, guests: Guests) -> None:
    """SIGKILL as soon as the log tells a fact, for each fact, of the same guest: it goes on on its own disk, and QEMU
    has nothing of the save any more."""
    host = make_pair(version).a
    boot(host, guests.boot(ram_mib=24))
    status = host.status("web1")
    (image,) = (Path(each["path"]) for each in _disks(host) if not each["readonly"])
    serial = host.vm_directory("web1") / "serial.log"
    for fact in FACTS:
        seen = told(host, fact)
        host.execute("vm-save", vm="web1", name=fact, disks="mirror")
        until_told(host, fact, seen)
        host.kill()
        host.restart()
        wait_true(lambda: not host.execute("query-jobs"), why="the save is walked back")
        host.kill()
        clean_in_qemu(status["qmp"], str(image))
        host.restart()
        letters = len(serial.read_bytes())
        with host.console("web1") as console:
            console.wait_bytes(letters + 1, timeout_s=20)
        names = {each["name"] for each in host.ok("snapshots")["snapshots"]}
        assert fact in names or fact != "kept"
        needed = {Path(each["path"]).name: each["needed"] for each in host.ok("disks")["disks"]}
        assert {path.name for path in copies_beside(image)} == set(needed), "nothing is there that nobody tells of"
        for name in names:
            assert any(why == f"the snapshot {name} needs it" for why in needed.values()), (name, needed)
        assert host.ok("verify")["whole"]
    assert host.ok("save", "web1", "after", "--disks", "mirror")["outcome"] == "saved"


def _disks(host: AgentHost) -> list[dict[str, Any]]:
    with BlockingClient(host.status("web1")["monitor"], name="the monitor") as monitor:
        found = [device["inserted"] for device in monitor.execute("query-block") if "inserted" in device]
    return [{"path": each["image"]["filename"], "readonly": each["ro"]} for each in found]


@contextlib.contextmanager
def small_folder(folder: Path, size: int) -> Iterator[Path]:
    """A file system of that many bytes."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False)
    if done.returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("version", QEMUS)
def test_a_target_that_gets_full_is_told_and_the_guest_does_not_notice(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    spec = guests.linux()
    image = guests.folder / "web1.img"
    with image.open("r+b") as file:  # behind what the guest writes to
        file.seek(16 * MIB)
        for _ in range(240):
            file.write(os.urandom(MIB))
    with small_folder(tmp_path / "small", 200 * MIB) as folder:
        host = make_pair(version).a  # it sees what was mounted before
        host.ok("run", spec, timeout_s=120)
        with host.console("web1") as console:
            console.wait_ready(timeout_s=WALKS_S)
            after = console.wait_walks(1, timeout_s=WALKS_S, region="disk")
            wish = ("save", "web1", "one", "--disks", "mirror", "--disks-dir", str(folder))
            assert "are free there" in host.refused(*wish, code=8)["message"]
            subprocess.run(["mount", "-o", f"remount,size={260 * MIB}", folder], check=True)
            copy, filler = folder / "web1-disk0.one.stored.qcow2", folder / "filler"
            ended = _filled_meanwhile(host, copy, filler)
            assert ended["error"]["code"] == "failed", ended
            assert "No space left on device" in ended["error"]["message"]
            assert [path.name for path in folder.iterdir()] == ["filler"]
            console.wait_walks(2, timeout_s=WALKS_S, region="disk", after=after)
            filler.unlink()
            assert host.ok(*wish, timeout_s=120)["outcome"] == "saved"
            words = [str(image_tool(QEMUS[version])), "check", "--output=json", str(copy)]
            checked = json.loads(subprocess.run(words, capture_output=True, text=True, check=False).stdout)
            assert checked["check-errors"] == 0, checked
            assert not checked.get("leaks", 0), checked
        report = analyse_chain([[Chunk(0.0, (host.vm_directory("web1") / "serial.log").read_bytes())]])
        assert report.complaints() == []


def _is_over(host: AgentHost, job: str) -> bool:
    return bool(host.execute("job-status", job=job)["over"])


def _filled_meanwhile(host: AgentHost, copy: Path, filler: Path) -> dict[str, Any]:
    """How a save ends on whose folder somebody else takes the room as soon as the copy has its name. A copy that was
    whole before that is forgotten, and it is tried again."""

    def fill(may_stop: threading.Event) -> None:
        while not copy.exists() and not may_stop.is_set():
            time.sleep(0.0002)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 30 * MIB)

    for _ in range(5):
        may_stop = threading.Event()
        thread = threading.Thread(target=fill, args=(may_stop,), name="filler")
        thread.start()
        try:
            wish = {"vm": "web1", "name": "one", "disks": "mirror", "disks-dir": str(copy.parent)}
            job = host.execute("vm-save", **wish)["job"]
            wait_true(partial(_is_over, host, job), timeout_s=60, why="it has an end")
        finally:
            may_stop.set()
            thread.join()
        ended = host.execute("job-status", job=job)
        if ended["error"] is not None:
            return dict(ended)
        filler.unlink()
        host.ok("forget", "one")
        host.ok("disks", "--remove", str(copy))
    raise AssertionError("each of the copies was whole before the room was taken")


@contextlib.contextmanager
def block_device(file: Path, size: int) -> Iterator[str]:
    """A device of the host with so many bytes of noise."""
    file.write_bytes(os.urandom(size))
    done = subprocess.run(["losetup", "-f", "--show", str(file)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("no loop device can be made here")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_a_device_is_copied_into_a_file(make_pair: MakePair, guests: Guests, tmp_path: Path) -> None:
    with block_device(tmp_path / "device.img", 32 * MIB) as device:
        spec = Path(guests.linux())
        spec.write_text(spec.read_text().replace(str(guests.folder / "web1.img"), device))
        host = make_pair(NEWEST).a
        host.ok("run", str(spec), timeout_s=120)
        with host.console("web1") as console:
            console.wait_ready(timeout_s=WALKS_S)
            assert "--disks-dir" in host.refused("save", "web1", "one", "--disks", "mirror", code=8)["hint"]
            wire = host.ok("save", "web1", "one", "--disks", "mirror", "--disks-dir", str(tmp_path), timeout_s=120)
            console.wait_walks(1, timeout_s=WALKS_S, region="disk")
        assert wire["copies"] == {device: str(tmp_path / "web1-disk0.one.stored.qcow2")}
        host.ok("restore", "one", "--as", "web2", timeout_s=120)
        there = host.vm_directory("web2") / "serial.log"
        wait_true(partial(_has_checked, there), timeout_s=WALKS_S, why="two checks of memory and disk")
        assert b"\nE " not in there.read_bytes()
        for vm in ("web1", "web2"):
            host.ok("stop", vm, "--force")


def _free_bytes(folder: Path) -> int:
    seen = os.statvfs(folder)
    return seen.f_bavail * seen.f_frsize


def test_a_cancel_while_a_disk_is_copied(make_pair: MakePair, guests: Guests) -> None:
    pair: TwoAgents = make_pair(NEWEST)
    host = pair.a
    spec = guests.linux()
    image = guests.folder / "web1.img"
    with image.open("r+b") as file:
        file.seek(16 * MIB)
        for _ in range(240):
            file.write(os.urandom(MIB))
    host.ok("run", spec, timeout_s=120)
    with host.console("web1") as console:
        console.wait_ready(timeout_s=WALKS_S)
        seen = told(host, "copying")
        job = host.execute("vm-save", vm="web1", name="one", disks="mirror")["job"]
        until_told(host, "copying", seen)
        host.execute("job-cancel", id=job)
        wait_true(lambda: not host.execute("query-jobs"), why="it is over")
        assert host.execute("job-status", job=job)["status"] == "cancelled"
        assert copies_beside(image) == []
        console.wait_walks(1, timeout_s=WALKS_S, region="disk")
    host.ok("save", "web1", "one", "--disks", "mirror", timeout_s=120)
    moved = host.ok("migrate", "web1", "host-b", timeout_s=120)
    assert moved["outcome"] == "destination", "it has one disk, as ever, and moves with it"
    pair.b.ok("stop", "web1", "--force")
