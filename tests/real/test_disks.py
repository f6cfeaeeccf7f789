"""Local disks go with the guest: real QEMUs, images with holes, and a guest that writes all through the move."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.testing.hosts import PAIRS, Guests, MakePair, TwoAgents

pytestmark = pytest.mark.real

MIB = 1 << 20


def local(spec: str, more: str = "") -> str:
    """The same spec with its disk local to the host."""
    path = Path(spec)
    path.write_text(path.read_text().replace("[[disk]]\n", "[[disk]]\nshared = false\n") + more)
    return spec


def there(pair: TwoAgents, tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.mark.parametrize(("source", "destination"), PAIRS)
@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_a_guest_goes_with_its_disk_and_loses_nothing(
    source: str, destination: str, mode: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    pair = make_pair(source, destination, flags_b=["--disk-dir", str(folder)])
    spec = local(guests.linux())
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
    print(wire["downtime_ms"], wire["total_ms"], here.st_blocks, copied.st_blocks)
