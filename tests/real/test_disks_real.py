"""Local disks go with the guest: real QEMUs, images with holes, and a guest that writes all through the move."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from vmferry.testing.hosts import PAIRS, QEMUS, Guests, MakePair, TwoAgents, boot, stopped, wait_true
from vmferry.testing.qemus import image_tool
from vmferry.testing.specs import with_local_disks

pytestmark = pytest.mark.real

MIB = 1 << 20


@pytest.mark.proves("S96", "S114")
@pytest.mark.parametrize(("source", "destination"), PAIRS)
@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_a_guest_goes_with_its_disk_and_loses_nothing(
    source: str, destination: str, mode: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    pair = make_pair(source, destination, flags_b=["--disk-dir", str(folder)])
    spec = with_local_disks(guests.linux())
    image = tmp_path / "web1.img"
    pair.a.ok("run", spec)
    with pair.a.console("web1") as console:
        console.wait_ready(timeout_s=60)
        console.wait_walks(1, timeout_s=60, region="disk")
    refused = pair.a.refused("migrate", "web1", "host-b", code=8)
    assert "--disks copy" in str(refused)
    plan = pair.a.ok("plan", "web1", "host-b", "--disks", "copy")
    assert plan["possible"], plan
    assert plan["disks"][0]["there"] == str(folder / "web1.img")
    folders = [pair.a.vm_directory("web1")]
    wire = pair.a.ok("migrate", "web1", "host-b", "--mode", mode, "--disks", "copy", timeout_s=120)
    assert (wire["status"], wire["outcome"]) == ("completed", "destination"), wire
    folders.append(pair.b.vm_directory("web1"))
    with pair.b.console("web1") as console:
        console.wait_walks(2, timeout_s=60, region="disk")
    report = pair.judge(*folders)
    assert report.complaints() == []
    assert image.exists(), "the source's image is kept"
    here, copied = image.stat(), (folder / "web1.img").stat()
    assert copied.st_size == here.st_size
    assert [row["disk"] for row in wire["disks"]] == ["disk0"]


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_disks_of_both_formats_are_equal_at_the_switch_with_a_guest_that_writes(
    source: str, destination: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """The Linux guest writes to its first disk all the time; a second one, with holes, and a CD-ROM go beside it."""
    folder = tmp_path / "there"
    folder.mkdir()
    pair = make_pair(source, destination, flags_b=["--disk-dir", str(folder)])
    second, cdrom = tmp_path / "second.img", tmp_path / "cd.iso"
    with second.open("wb") as file:
        for at in range(0, 64 * MIB, 8 * MIB):
            file.seek(at)
            file.write(os.urandom(MIB))
        file.truncate(256 * MIB)
    cdrom.write_bytes(os.urandom(MIB))
    more = f'[[disk]]\npath = "{second}"\nshared = false\n'
    more += f'[[disk]]\npath = "{cdrom}"\ncdrom = true\ninterface = "ide"\nshared = false\n'
    pair.a.ok("run", with_local_disks(guests.linux(), more))
    with pair.a.console("web1") as console:
        console.wait_ready(timeout_s=60)
        console.wait_walks(1, timeout_s=60, region="disk")
    folders = [pair.a.vm_directory("web1")]
    words = ("--disks", "copy", "--verify-disks", "--mode", "precopy")
    wire = pair.a.ok("migrate", "web1", "host-b", *words, timeout_s=120)
    assert wire["outcome"] == "destination", wire
    assert [row["disk"] for row in wire["disks"]] == ["disk0", "disk1"], "what cannot be written is not copied"
    assert any("read and compared" in row["what"] for row in wire["timeline"])
    folders.append(pair.b.vm_directory("web1"))
    with pair.b.console("web1") as console:
        console.wait_walks(2, timeout_s=60, region="disk")
    assert pair.judge(*folders).complaints() == []
    here, copied = second.stat(), (folder / "second.img").stat()
    assert second.read_bytes() == (folder / "second.img").read_bytes()
    assert abs(copied.st_blocks - here.st_blocks) <= here.st_blocks * 0.05, "holes stay holes"


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_qcow2_goes_as_qcow2(
    source: str, destination: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    pair = make_pair(source, destination, flags_b=["--disk-dir", str(folder)])
    raw, image, top = tmp_path / "content.img", tmp_path / "data.qcow2", tmp_path / "top.qcow2"
    with raw.open("wb") as file:
        file.write(os.urandom(5 * MIB))
        file.seek(40 * MIB)
        file.write(os.urandom(5 * MIB))
        file.truncate(128 * MIB)
    tool = str(image_tool(QEMUS[source]))
    options = ["-o", "cluster_size=131072"]
    subprocess.run([tool, "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(image)], check=True)
    more = f'[[disk]]\npath = "{image}"\nformat = "qcow2"\nshared = false\n'
    boot(pair.a, with_local_disks(guests.boot(), more))
    assert "only raw" in str(pair.a.refused("migrate", "web1", "host-b", "--disks", "copy", "--verify-disks", code=8))
    wire = pair.a.ok("migrate", "web1", "host-b", "--disks", "copy", "--mode", "precopy", timeout_s=120)
    assert wire["outcome"] == "destination", wire
    pair.b.ok("stop", "web1", "--force")
    copied = folder / "data.qcow2"
    compared = subprocess.run([tool, "compare", "-f", "qcow2", "-F", "raw", str(copied), str(raw)], check=False)
    assert compared.returncode == 0
    described = json.loads(
        subprocess.run([tool, "info", "--output=json", str(copied)], check=True, capture_output=True).stdout
    )
    assert (described["format"], described["cluster-size"]) == ("qcow2", 131072)
    assert abs(copied.stat().st_blocks - image.stat().st_blocks) <= image.stat().st_blocks * 0.05
    subprocess.run([tool, "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "qcow2", str(top)], check=True)
    more = f'[[disk]]\npath = "{top}"\nformat = "qcow2"\nshared = false\n'
    boot(pair.a, with_local_disks(guests.boot("web2"), more))
    assert str(image) in str(pair.a.refused("migrate", "web2", "host-b", "--disks", "copy", code=8))


SLOW_DISKS = ("--disks", "copy", "--set", "max-bandwidth=4M", "--detach", "--mode", "precopy")


def moving(make_pair: MakePair, guests: Guests, tmp_path: Path, version: str) -> tuple[TwoAgents, Path, str]:
    """A guest on host-a whose disk takes some seconds, and its job."""
    folder = tmp_path / "there"
    folder.mkdir()
    pair = make_pair(version, flags_b=["--disk-dir", str(folder)])
    big = tmp_path / "big.img"
    big.write_bytes(os.urandom(16 * MIB))
    boot(pair.a, with_local_disks(guests.boot(), f'[[disk]]\npath = "{big}"\nshared = false\n'))
    job = str(pair.a.ok("migrate", "web1", "host-b", *SLOW_DISKS)["job"])
    wait_true(lambda: copied_bytes(pair, job) > MIB, why="the disk is on its way")
    return pair, folder, job


def copied_bytes(pair: TwoAgents, job: str) -> int:
    wire = pair.a.execute("job-status", job=job)
    return sum(int(row["current-progress"]) for row in wire.get("disks") or ())


def ended(pair: TwoAgents, job: str) -> dict[str, Any]:
    def result() -> dict[str, Any] | None:
        wire: dict[str, Any] = pair.a.execute("job-status", job=job)
        return wire if wire["over"] else None

    found: dict[str, Any] = wait_true(result, timeout_s=90, why="the job ends")
    return found


@pytest.mark.parametrize("version", QEMUS)
@pytest.mark.parametrize("who", ["host-a", "host-b"])
def test_an_agent_is_killed_while_disks_are_copied(
    version: str, who: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """The mirrors are the QEMUs' own: the new agent goes on with them."""
    pair, folder, job = moving(make_pair, guests, tmp_path, version)
    host = pair.a if who == "host-a" else pair.b
    host.kill()
    host.restart()
    pair.a.ok("set", "web1", "max-bandwidth=1G")
    wire = ended(pair, job)
    assert wire["outcome"] == "destination", wire
    assert pair.running_on("web1") == ["host-b"]
    assert (tmp_path / "big.img").read_bytes() == (folder / "big.img").read_bytes()


@pytest.mark.parametrize("version", QEMUS)
def test_the_destinations_qemu_is_killed_while_disks_are_copied(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    pair, folder, job = moving(make_pair, guests, tmp_path, version)
    os.kill(pair.b.qemu_pid("web1"), signal.SIGKILL)
    wire = ended(pair, job)
    assert (wire["outcome"], wire["status"]) == ("source", "failed"), wire
    assert pair.running_on("web1") == ["host-a"]
    assert not list(folder.iterdir())
    with pair.a.console("web1") as console:
        console.wait_bytes(len(b"".join(c.data for c in console.chunks())) + 2, timeout_s=20)


@pytest.mark.parametrize("version", QEMUS)
def test_the_sources_qemu_is_killed_while_disks_are_copied(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    pair, folder, job = moving(make_pair, guests, tmp_path, version)
    os.kill(pair.a.qemu_pid("web1"), signal.SIGKILL)
    assert ended(pair, job)["outcome"] == "lost"
    wait_true(lambda: not pair.b.qemus(), why="the place is given up")
    wait_true(lambda: not list(folder.iterdir()), why="its images are gone")
    assert (tmp_path / "big.img").stat().st_size == 16 * MIB


@pytest.mark.parametrize("version", QEMUS)
def test_a_cancel_and_a_second_try(version: str, make_pair: MakePair, guests: Guests, tmp_path: Path) -> None:
    pair, folder, job = moving(make_pair, guests, tmp_path, version)
    pair.a.ok("cancel", "web1")
    assert ended(pair, job)["status"] == "cancelled"
    assert not list(folder.iterdir())
    assert pair.running_on("web1") == ["host-a"]
    wire = pair.a.ok("migrate", "web1", "host-b", "--disks", "copy", "--verify-disks", timeout_s=120)
    assert wire["outcome"] == "destination", wire


@pytest.mark.proves("S92", "S99", "S114")
@pytest.mark.parametrize("version", QEMUS)
def test_one_disk_is_paused_and_the_whole_move_waits_for_it(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    pair, folder, job = moving(make_pair, guests, tmp_path, version)
    big = f"{job[:8]}-disk-1"

    def state(disk: int) -> str:
        listed = {each["id"]: each for each in pair.a.execute("query-jobs")}
        return str(listed[f"{job}-disk-{disk}"]["status"])

    pair.a.ok("job", "pause", big)
    wait_true(lambda: state(1) == "paused", why="the disk is not copied any more")
    pair.a.ok("set", "web1", "max-bandwidth=1G")
    wait_true(lambda: state(0) == "ready", why="the other disk is copied")
    assert "job-refused" in str(pair.a.refused("job", "complete", big, code=22))
    assert state(1) == "paused"
    pair.a.kill()
    pair.a.restart()
    wait_true(lambda: state(1) == "paused", why="the new agent has found it")
    pair.a.ok("job", "resume", big)
    assert ended(pair, job)["outcome"] == "destination"
    assert (tmp_path / "big.img").read_bytes() == (folder / "big.img").read_bytes()


@pytest.mark.proves("S12")
@pytest.mark.parametrize("version", QEMUS)
def test_a_destination_whose_host_stands_still(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """Its QEMU takes nothing any more and its connection stays open: a cancel is over in seconds all the same."""
    pair, folder, job = moving(make_pair, guests, tmp_path, version)
    with stopped(pair.b.qemu_pid("web1")):
        began_s = time.monotonic()
        pair.a.ok("cancel", "web1")
        assert time.monotonic() - began_s < 15
        assert pair.a.status("web1")["run_state"] == "running"
    wait_true(lambda: not list(folder.iterdir()), why="its images are gone")
    assert ended(pair, job)["outcome"] == "source"


@pytest.mark.proves("S96", "S114")
@pytest.mark.parametrize("version", QEMUS)
@pytest.mark.parametrize("state", ["ready", "draining"])
@pytest.mark.parametrize("who", ["source-agent", "destination-agent", "source-qemu", "destination-qemu"])
def test_whoever_dies_when_the_disks_are_handed_over_the_guest_has_one_disk(
    version: str, state: str, who: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """`ready`: the guest is paused and all mirrors are equal. `draining`: they are asked to end, and the destination's
    QEMU, which stands still, does not let them."""
    folder = tmp_path / "there"
    folder.mkdir()
    pair = make_pair(version, flags_b=["--disk-dir", str(folder)])
    pair.a.ok("run", with_local_disks(guests.linux()))
    with pair.a.console("web1") as console:
        console.wait_walks(1, timeout_s=60, region="disk")
    words = ("--disks", "copy", "--mode", "precopy", "--no-auto-finalize", "--no-auto-dismiss", "--detach")
    job = str(pair.a.ok("migrate", "web1", "host-b", *words)["job"])
    wait_true(lambda: pair.a.execute("job-status", job=job)["status"] == "pre-switchover", why="the guest is paused")
    here, there = pair.a.qemu_pid("web1"), pair.b.qemu_pid("web1")
    with stopped(there) if state == "draining" else contextlib.nullcontext():
        if state == "draining":
            pair.a.ok("job", "finalize", "web1")
            wait_true(lambda: "row=M-drain" in pair.a.log(), why="the mirrors are asked to end")
        match who:
            case "source-agent":
                pair.a.kill()
                pair.a.restart()
            case "destination-agent":
                pair.b.kill()
                pair.b.restart()
            case "source-qemu":
                os.kill(here, signal.SIGKILL)
            case _:
                os.kill(there, signal.SIGKILL)
    if state == "ready" and who.endswith("agent"):
        pair.a.ok("job", "finalize", "web1")
    wire = ended(pair, job)
    if who == "source-qemu":
        assert wire["outcome"] == "lost", wire
        wait_true(lambda: not pair.b.qemus() and not list(folder.iterdir()), why="the place is given up")
    else:
        side = {"source": pair.a, "destination": pair.b}[wire["outcome"]]
        assert who != "destination-qemu" or side is pair.a
        with side.console("web1") as console:
            console.wait_walks(2, timeout_s=60, region="disk")
        lives = [host.vm_directory("web1") for host in (pair.a, pair.b) if host is pair.a or side is pair.b]
        assert pair.judge(*lives).complaints() == []
        assert pair.running_on("web1") == [side.name]
    for host in (pair.a, pair.b):
        for row in host.ok("jobs")["jobs"]:
            host.ok("job", "dismiss", row["id"])
