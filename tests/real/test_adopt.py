"""A QEMU that somebody started by hand is taken over, moved, and never touched when that is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmferry.qmp.blocking import BlockingClient
from vmferry.testing import bootsector
from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import PAIRS, AgentHost, MakePair, TwoAgents
from vmferry.testing.serial_log import SerialReader

pytestmark = pytest.mark.real


class ByHand:
    """A QEMU with a boot-sector guest, started as a person would; a second QMP socket is for the test."""

    def __init__(self, host: AgentHost, folder: Path, *more: str, disk: str = "disk.img", name: str = "hand") -> None:
        self.folder = folder / name
        self.folder.mkdir()
        bootsector.write_image(self.folder / "disk.img", ram_mib=16, delay_loops_per_page=20_000)
        self.qmp, self.own, self.serial = (self.folder / name for name in ("qmp", "own", "serial.log"))
        words = [str(host.qemu), "-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg", "-m", "32776k"]
        words += ["-drive", f"file={disk},format=raw,if=ide,cache=none", "-serial", f"file:{self.serial}"]
        for path in (self.qmp, self.own):
            words += ["-qmp", f"unix:{path},server=on,wait=off"]
        self.process: subprocess.Popen[bytes] = host.net.popen([*words, *more], cwd=self.folder)
        self.wait_letters(2)

    def wait_letters(self, count: int) -> None:
        with SerialReader.follow(self.serial) as console:
            console.wait_bytes(count, timeout_s=20)

    def ask(self, command: str, **arguments: object) -> object:
        """A command over the test's own QMP socket."""
        with BlockingClient(str(self.own)) as qemu:
            return qemu.execute(command, arguments)

    def runs_on(self) -> None:
        self.wait_letters(len(self.serial.read_bytes()) + 2)


@pytest.fixture
def pair(make_pair: MakePair) -> TwoAgents:
    return make_pair()


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_an_adopted_qemu_moves_and_comes_back(
    source: str, destination: str, make_pair: MakePair, tmp_path: Path
) -> None:
    pair = make_pair(source, destination)
    guest = ByHand(pair.a, tmp_path)
    wire = pair.a.ok("adopt", "legacy", "--qmp", str(guest.qmp))
    assert (wire["origin"], wire["pid"], wire["run_state"]) == ("adopted", guest.process.pid, "running")
    assert wire["machine"].startswith("pc-q35-")
    assert guest.ask("query-migrate-capabilities") == guest.ask("query-migrate-capabilities")
    assert pair.b.ok("migrate", "legacy", "host-b")["outcome"] == "destination"
    guest.process.wait(20)
    with pair.b.console("legacy") as console:
        console.wait_bytes(4, timeout_s=30)
    assert pair.running_on("legacy") == ["host-b"]
    assert pair.a.ok("migrate", "legacy", "host-a")["outcome"] == "destination"
    with pair.a.console("legacy") as console:
        console.wait_bytes(4, timeout_s=30)
    letters = guest.serial.read_bytes() + pair.letters(pair.b.vm_directory("legacy"), pair.a.vm_directory("legacy"))
    assert count_passes(letters) > 6


@pytest.mark.parametrize("restarts", [False, True])
def test_an_adopted_qemu_is_as_it_was_after_a_cancel(restarts: bool, pair: TwoAgents, tmp_path: Path) -> None:
    """Also when the agent that changed its options is not the one that ends the migration."""
    guest = ByHand(pair.a, tmp_path)
    guest.ask("migrate-set-capabilities", capabilities=[{"capability": "xbzrle", "state": True}])
    guest.ask("migrate-set-parameters", **{"downtime-limit": 123})
    before = guest.ask("query-migrate-capabilities"), guest.ask("query-migrate-parameters")
    objects = guest.ask("qom-list", path="/objects")
    pair.a.ok("adopt", "legacy", "--qmp", str(guest.qmp))
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "legacy", "host-b", "--detach", "--set", "max-bandwidth=2M")
        follow.status("active")
        during = guest.ask("query-migrate-parameters")
        assert isinstance(during, dict)
        assert during["tls-creds"].startswith("vmferry-tls-")
    if restarts:
        pair.a.kill()
        pair.a.restart()
    pair.a.ok("cancel", "legacy")
    assert (guest.ask("query-migrate-capabilities"), guest.ask("query-migrate-parameters")) == before
    assert guest.ask("qom-list", path="/objects") == objects
    guest.runs_on()


def test_refused_adopts_touch_nothing(pair: TwoAgents, tmp_path: Path) -> None:
    guest = ByHand(pair.a, tmp_path)
    missing = pair.a.refused("adopt", "legacy", "--qmp", str(tmp_path / "nothing"), code=17)
    assert "no QEMU listens on" in missing["message"]
    not_qemu = pair.a.refused("adopt", "legacy", "--qmp", str(pair.b.socket), code=3)
    assert "is not a QEMU" in not_qemu["message"]
    bad = pair.a.refused("adopt", "no/name", "--qmp", str(guest.qmp), code=2)
    assert "no/name" in bad["message"]
    pair.a.ok("adopt", "legacy", "--qmp", str(guest.qmp))
    twice = pair.a.refused("adopt", "other", "--qmp", str(guest.own), code=9)
    assert "as legacy" in twice["message"]
    name = pair.b.refused("adopt", "legacy", "--qmp", str(guest.own), code=9)
    assert "has a VM named legacy already" in name["message"]
    guest.runs_on()
    assert [row["vm"] for row in pair.a.ok("ls")["vms"]] == ["legacy"]


def test_a_qemu_whose_monitor_is_taken_is_not_adopted(pair: TwoAgents, tmp_path: Path) -> None:
    guest = ByHand(pair.a, tmp_path)
    with BlockingClient(str(guest.qmp)):
        error = pair.a.refused("adopt", "legacy", "--qmp", str(guest.qmp), code=17)
    assert "another client" in error["message"]
    guest.runs_on()
    assert pair.a.ok("ls")["vms"] == []


def test_what_no_other_host_could_build_is_refused_at_once(pair: TwoAgents, tmp_path: Path) -> None:
    """A disk whose writes are in a temporary file of this very QEMU."""
    guest = ByHand(pair.a, tmp_path, disk="disk.img,snapshot=on")
    error = pair.a.refused("adopt", "legacy", "--qmp", str(guest.qmp), code=3)
    assert "snapshot=on" in error["message"]
    guest.runs_on()
    assert pair.a.ok("ls")["vms"] == []


def test_a_local_disk_is_no_disk_to_migrate(pair: TwoAgents, tmp_path: Path) -> None:
    guest = ByHand(pair.a, tmp_path, disk=str(tmp_path / "hand" / "disk.img"))
    pair.a.ok("adopt", "legacy", "--qmp", str(guest.qmp), "--local-disks")
    error = pair.a.refused("migrate", "legacy", "host-b", code=8)
    assert "disk.img" in error["message"]
    guest.runs_on()
