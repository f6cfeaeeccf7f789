"""A guest goes with its disks and comes back with what changed: real QEMUs, and a guest that writes all the time."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmferry.testing.hosts import NEWEST, OLDEST, QEMUS, Guests, MakePair, TwoAgents, boot, wait_true
from vmferry.testing.qemus import image_tool
from vmferry.testing.specs import with_local_disks

pytestmark = pytest.mark.real

MIB = 1 << 20
GONE = ("--disks", "copy", "--mode", "precopy")


def apart(make_pair: MakePair, tmp_path: Path, *versions: str) -> tuple[TwoAgents, Path]:
    """Two agents, of which host-b has its disks in a folder of its own, and that folder."""
    folder = tmp_path / "there"
    folder.mkdir()
    return make_pair(*versions, flags_b=["--disk-dir", str(folder)]), folder


def gone(make_pair: MakePair, guests: Guests, tmp_path: Path, source: str, destination: str) -> TwoAgents:
    """A Linux guest that writes to its disk all the time has gone to host-b with it, and with a large one."""
    pair, _ = apart(make_pair, tmp_path, source, destination)
    second = tmp_path / "second.img"
    second.write_bytes(os.urandom(64 * MIB))
    pair.a.ok("run", with_local_disks(guests.linux(), f'[[disk]]\npath = "{second}"\nshared = false\n'))
    with pair.a.console("web1") as console:
        console.wait_ready(timeout_s=60)
        console.wait_walks(1, timeout_s=60, region="disk")
    wire = pair.a.ok("migrate", "web1", "host-b", *GONE, timeout_s=120)
    assert wire["outcome"] == "destination", wire
    assert len(wire["images_left"]) == 2
    return pair


def sent_bytes(wire: dict[str, Any]) -> int:
    return sum(int(disk["current-progress"]) for disk in wire["disks"])


@pytest.mark.proves("S96", "S114")
@pytest.mark.parametrize(("source", "destination"), [(OLDEST, OLDEST), (NEWEST, NEWEST)])
@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_a_guest_comes_back_with_what_changed_and_goes_again(
    source: str, destination: str, mode: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    pair = gone(make_pair, guests, tmp_path, source, destination)
    folders = [pair.b.vm_directory("web1")]
    with pair.b.console("web1") as console:
        console.wait_walks(2, timeout_s=60, region="disk")
    plan = pair.b.ok("fail-back", "web1", "--plan")
    assert plan["possible"], plan
    assert (plan["destination"], plan["disks"][1]["changed_bytes"]) == ("host-a", 0)
    assert plan["disks"][1]["there"] == str(tmp_path / "second.img")
    wire = pair.b.ok("fail-back", "web1", "--mode", mode, "--verify-disks", timeout_s=120)
    assert (wire["status"], wire["outcome"]) == ("completed", "destination"), wire
    assert any("read and compared" in row["what"] for row in wire["timeline"])
    total = sum((tmp_path / name).stat().st_size for name in ("web1.img", "second.img"))
    assert sent_bytes(wire) < total * 0.05, wire["disks"]
    folders.append(pair.a.vm_directory("web1"))
    with pair.a.console("web1") as console:
        console.wait_walks(2, timeout_s=60, region="disk")
    assert pair.judge(*folders).complaints() == []
    assert (tmp_path / "second.img").read_bytes() == (tmp_path / "there" / "second.img").read_bytes()
    again = pair.a.ok("fail-back", "web1", "--verify-disks", timeout_s=120)  # and the other way round, the same
    assert again["outcome"] == "destination", again
    assert sent_bytes(again) < total * 0.05
    assert pair.running_on("web1") == ["host-b"]


@pytest.mark.proves("S96", "S114")
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_a_qcow2_image_comes_back_and_is_whole(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    pair, _ = apart(make_pair, tmp_path, version)
    tool = str(image_tool(QEMUS[version]))
    spec = Path(with_local_disks(guests.linux()))
    raw, image = tmp_path / "web1.img", tmp_path / "web1.qcow2"
    subprocess.run([tool, "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)], check=True)
    text = spec.read_text().replace(str(raw), str(image)).replace("[[disk]]\n", '[[disk]]\nformat = "qcow2"\n')
    spec.write_text(text)
    pair.a.ok("run", str(spec))
    with pair.a.console("web1") as console:
        console.wait_walks(1, timeout_s=60, region="disk")
    pair.a.ok("migrate", "web1", "host-b", *GONE, timeout_s=120)
    folders = [pair.b.vm_directory("web1")]
    with pair.b.console("web1") as console:
        console.wait_walks(2, timeout_s=60, region="disk")
    wire = pair.b.ok("fail-back", "web1", timeout_s=120)
    assert (wire["outcome"], wire["disks"][0]["type"]) == ("destination", "backup"), wire
    folders.append(pair.a.vm_directory("web1"))
    with pair.a.console("web1") as console:
        console.wait_walks(2, timeout_s=60, region="disk")
    assert pair.judge(*folders).complaints() == []
    pair.a.ok("stop", "web1", "--force")
    subprocess.run([tool, "check", "-q", "-f", "qcow2", str(image)], check=True)


@pytest.mark.proves("S96", "S114")
def test_an_image_that_somebody_has_touched_is_no_base(make_pair: MakePair, guests: Guests, tmp_path: Path) -> None:
    pair = gone(make_pair, guests, tmp_path, NEWEST, NEWEST)
    with (tmp_path / "second.img").open("r+b") as file:
        file.write(b"x")
    refused = pair.b.refused("fail-back", "web1", code=8)
    assert "disk1" in str(refused)
    assert "touched" in str(refused)
    assert (tmp_path / "second.img").read_bytes()[:1] == b"x"
    assert pair.running_on("web1") == ["host-b"]
    other = guests.boot("web2")
    boot(pair.a, other)
    assert "did not come here with its disks" in str(pair.a.refused("fail-back", "web2", code=8))


@pytest.mark.proves("S96", "S114")
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("who", ["destination-qemu", "source-agent", "destination-agent"])
def test_a_way_back_that_breaks_can_be_gone_again(
    version: str, who: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """While the last rounds wait for the memory. The guest stays, or arrives; the second try sends little again."""
    pair = gone(make_pair, guests, tmp_path, version, version)
    folders = [pair.b.vm_directory("web1")]
    pair.b.ok("fail-back", "web1", "--mode", "precopy", "--set", "max-bandwidth=16M", "--detach")
    wait_true(lambda: "fact=started" in pair.b.log(), why="memory moves")
    match who:
        case "destination-qemu":
            (qemu,) = pair.a.qemus()
            os.kill(qemu, signal.SIGKILL)
        case "source-agent":
            pair.b.kill()
            pair.b.restart()
        case "destination-agent":
            pair.a.kill()
            pair.a.restart()
    pair.b.cli("set", "web1", "max-bandwidth=1G")
    wait_true(lambda: over(pair), timeout_s=60, why="it ends")
    if pair.running_on("web1") == ["host-b"]:
        wire = pair.b.ok("fail-back", "web1", "--verify-disks", timeout_s=120)
        assert wire["outcome"] == "destination", wire
        assert sent_bytes(wire) < 0.05 * 64 * MIB
    folders.append(pair.a.vm_directory("web1"))
    with pair.a.console("web1") as console:
        console.wait_walks(2, timeout_s=60, region="disk")
    assert pair.judge(*folders).complaints() == []
    assert pair.running_on("web1") == ["host-a"]


def over(pair: TwoAgents) -> bool:
    """Nothing of the VM's migration goes on."""
    return all(not host.ok("jobs")["jobs"] for host in (pair.a, pair.b))


@pytest.mark.proves("S114")
def test_the_images_left_are_removed_when_their_time_is_over(
    make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    pair, _ = apart(make_pair, tmp_path, NEWEST)
    boot(pair.a, with_local_disks(guests.boot()))
    image = tmp_path / "web1.img"
    pair.a.ok("migrate", "web1", "host-b", *GONE, "--source-disks", "remove", "--grace", "3s", timeout_s=120)
    assert image.exists()
    assert pair.b.ok("fail-back", "web1", "--plan")["possible"]
    pair.a.kill()
    pair.a.restart()  # it is the journal that knows
    wait_true(lambda: not image.exists(), timeout_s=20, why="the grace time is over")
    assert pair.running_on("web1") == ["host-b"]
    assert "disk-not-left" in str(pair.b.cli("fail-back", "web1", "--plan", "--json").out)
    assert "--disks copy" in str(pair.b.refused("fail-back", "web1", code=8))


@pytest.mark.proves("S96", "S114")
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_a_second_try_sends_what_was_written_since_the_first(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """The first one breaks when the disks are there and the memory is on its way."""
    pair, folder = apart(make_pair, tmp_path, version)
    second = tmp_path / "second.img"
    second.write_bytes(os.urandom(64 * MIB))
    pair.a.ok("run", with_local_disks(guests.linux(), f'[[disk]]\npath = "{second}"\nshared = false\n'))
    with pair.a.console("web1") as console:
        console.wait_ready(timeout_s=60)
    folders = [pair.a.vm_directory("web1")]
    job = str(pair.a.ok("migrate", "web1", "host-b", *GONE, "--no-auto-dismiss", "--detach")["job"])
    wait_true(lambda: "fact=disks-ready" in pair.a.log(), why="the disks are there")
    pair.a.cli("set", "web1", "max-bandwidth=2M")
    wait_true(lambda: "fact=started" in pair.a.log(), why="memory moves")
    os.kill(pair.b.qemu_pid("web1"), signal.SIGKILL)
    wait_true(lambda: pair.a.execute("job-status", job=job)["over"], timeout_s=60, why="it has failed")
    first = pair.a.execute("job-status", job=job)
    assert (first["status"], first["outcome"]) == ("failed", "source"), first
    wire = pair.a.ok("migrate", "web1", "host-b", *GONE, "--verify-disks", timeout_s=120)
    assert wire["outcome"] == "destination", wire
    assert sent_bytes(wire) < sent_bytes(first) * 0.05, (first["disks"], wire["disks"])
    folders.append(pair.b.vm_directory("web1"))
    with pair.b.console("web1") as console:
        console.wait_walks(2, timeout_s=60, region="disk")
    assert pair.judge(*folders).complaints() == []
    assert second.read_bytes() == (folder / "second.img").read_bytes()
    pair.a.ok("job", "dismiss", job)


@pytest.mark.proves("S114")
def test_a_cancel_keeps_no_copy(make_pair: MakePair, guests: Guests, tmp_path: Path) -> None:
    pair, folder = apart(make_pair, tmp_path, NEWEST)
    boot(pair.a, with_local_disks(guests.boot()))
    pair.a.ok("migrate", "web1", "host-b", *GONE, "--set", "max-bandwidth=1M", "--detach")
    wait_true(lambda: "fact=started" in pair.a.log(), why="memory moves")
    pair.a.ok("cancel", "web1")
    wait_true(lambda: not list(folder.iterdir()), why="its images are gone")
    assert pair.running_on("web1") == ["host-a"]
    assert pair.a.ok("plan", "web1", "host-b", "--disks", "copy")["disks"][0]["changed_bytes"] is None
