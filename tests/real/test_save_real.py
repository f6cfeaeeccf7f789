"""Real QEMUs of both generations are saved while they run: the guest, its memory page by page, and what loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vmferry.agent.save_disks import with_overlays
from vmferry.agent.vms import VmDefinition
from vmferry.agent.wants import Overlay
from vmferry.engine.frozen import thaw
from vmferry.qmp.blocking import BlockingClient
from vmferry.store.local import LocalFolder
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository
from vmferry.testing import analyzer
from vmferry.testing.guest_report import Chunk, GuestReport, analyse_chain
from vmferry.testing.host_tools import default_cache
from vmferry.testing.hosts import NEWEST, PAIRS, QEMUS, AgentHost, Guests, MakePair, boot, run_cli, wait_true
from vmferry.testing.qemus import image_tool
from vmferry.testing.serial_log import SerialReader
from vmferry.testing.stream_loader import StreamLoader, differing_pages, read_ram
from vmferry.vm import spec as vm_spec

pytestmark = pytest.mark.real

MIB = 1 << 20
WALKS_S = 90


def repository(host: AgentHost) -> Repository:
    return Repository.open(LocalFolder(host.state / "repository"))


def kept_ram(host: AgentHost, snapshot: str) -> npt.NDArray[np.uint8]:
    """pc.ram as the repository has it."""
    with SnapshotReader(repository(host), snapshot, is_locked=False) as reader:
        pages = len(reader.table("pc.ram"))
        return np.concatenate([reader.read("pc.ram", at, min(4096, pages - at)) for at in range(0, pages, 4096)])


def definition_of(host: AgentHost, snapshot: str) -> dict[str, Any]:
    with SnapshotReader(repository(host), snapshot, is_locked=False) as reader:
        found = reader.head.metadata["definition"]
    assert isinstance(found, dict)
    return found


def read_only(spec: str) -> str:
    """The same spec, whose guest cannot write to its disk."""
    path = Path(spec)
    path.write_text(path.read_text() + "readonly = true\n")
    return spec


def until_told(host: AgentHost, fact: str, seen: int) -> None:
    wait_true(lambda: host.log().count(f"save fact={fact} ") > seen, why=fact)


def _is_told(host: AgentHost, words: str) -> bool:
    return words in host.log()


def _is_over(host: AgentHost, job: str) -> bool:
    return bool(host.execute("job-status", job=job)["over"])


def report_of(folder: Path) -> GuestReport:
    return analyse_chain([[Chunk(0.0, (folder / "serial.log").read_bytes())]])


def check_errors(report: GuestReport) -> None:
    assert (report.memory_errors, report.disk_errors, report.other_errors) == (0, 0, 0), report


@pytest.mark.parametrize(
    ("source", "loader", "way"), [*((*pair, "precopy") for pair in PAIRS), (NEWEST, NEWEST, "background")]
)
def test_a_saved_linux_guest_goes_on_and_what_was_kept_runs_in_a_plain_qemu(
    source: str, loader: str, way: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    pair = make_pair(source)
    host = pair.a
    host.ok("run", guests.linux(disk=False))
    with host.console("web1") as console:
        console.wait_ready(timeout_s=WALKS_S)
        after = console.wait_walks(1, timeout_s=WALKS_S)
        wire = host.ok("save", "web1", "one", "--way", way, timeout_s=120)
        assert (wire["outcome"], wire["way"]) == ("saved", way), wire
        console.wait_walks(2, timeout_s=WALKS_S, after=after)
    assert host.status("web1")["run_state"] == "running"
    assert report_of(host.vm_directory("web1")).complaints() == []
    file = tmp_path / "one.stream"
    host.ok("export", "one", str(file))
    looked = run_cli("inspect-stream", str(file), "--json")
    assert looked.code == 0, looked.err
    definition = definition_of(host, wire["snapshot"])
    with StreamLoader(definition, file, QEMUS[loader], pair.folder / "loader") as guest:
        kept = kept_ram(host, wire["snapshot"])
        assert differing_pages(guest.ram(kept.size), kept) == []
        guest.run()
        with SerialReader.follow(guest.folder / "serial.log") as console:
            console.wait_walks(2, timeout_s=WALKS_S)
    check_errors(report_of(pair.folder / "loader"))
    assert host.ok("verify")["whole"]


@pytest.mark.parametrize("way", [[], ["--lazy", "--wait"]], ids=["full", "lazy"])
def test_an_imported_linux_guest_is_restored_with_its_spec(
    make_pair: MakePair, guests: Guests, tmp_path: Path, way: list[str]
) -> None:
    """Saved, exported, forgotten, imported: its own checks of memory and disk go on, and the stored disk stays."""
    host = make_pair(NEWEST).a
    spec = guests.linux()
    host.ok("run", spec)
    with host.console("web1") as console:
        console.wait_ready(timeout_s=WALKS_S)
        console.wait_walks(1, timeout_s=WALKS_S)
        wire = host.ok("save", "web1", "one", "--disks", "external-snapshot", timeout_s=120)
    assert wire["outcome"] == "saved", wire
    before = (host.vm_directory("web1") / "serial.log").read_bytes()
    file = tmp_path / "one.stream"
    host.ok("export", "one", str(file))
    host.ok("stop", "web1", "--force")
    host.ok("forget", "one")
    host.ok("import", str(file), "theirs")
    for words, said in (([], "--spec FILE"), (["--spec", spec], "--accept unchecked-disk")):
        refused = host.refused("restore", "theirs", *words, code=8)
        assert said in refused["message"] + refused["hint"]
    (disk,) = (each.path for each in vm_spec.load(spec).disk)
    stored = Path(disk).read_bytes()
    with_disk = ("--accept", "unchecked-disk", *way)
    for memory in ("64M", "256M"):
        other = Path(spec).with_name("other.toml")
        other.write_text(Path(spec).read_text().replace('memory = "128M"', f'memory = "{memory}"'))
        assert vm_spec.load(other).memory == memory
        done = host.cli("restore", "theirs", "--spec", str(other), *with_disk, timeout_s=120)
        assert done.code != 0, "memory of another size"
        assert "pc.ram" in done.err or "memory" in done.err, done.err
        assert host.ok("ls")["vms"] == [], "nothing of it is left"
    wire = host.ok("restore", "theirs", "--spec", spec, *with_disk, timeout_s=120)
    assert wire["detail"] == "completed"
    serial = host.vm_directory("web1") / "serial.log"
    with SerialReader.follow(serial) as console:
        console.wait_walks(2, timeout_s=WALKS_S)
    wait_true(lambda: serial.read_bytes().count(b"\nW disk ") >= 2, timeout_s=WALKS_S, why="two checks of the disk")
    report = analyse_chain([[Chunk(0.0, before)], [Chunk(0.0, serial.read_bytes())]])
    check_errors(report)
    assert Path(disk).read_bytes() == stored, "the guest writes to an overlay"


@pytest.mark.parametrize("version", QEMUS)
def test_every_page_of_a_paused_guest_is_kept_as_it_is(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    pair = make_pair(version)
    host = pair.a
    boot(host, read_only(guests.boot(ram_mib=24)))
    with BlockingClient(host.status("web1")["monitor"], name="the monitor") as monitor:
        monitor.execute("stop")
        host.refused("save", "web1", "one", "--way", "background", code=8)
        wire = host.ok("save", "web1", "one")
        assert host.status("web1")["run_state"] == "postmigrate", "it stands, as it did"
        kept = kept_ram(host, wire["snapshot"])
        assert differing_pages(read_ram(monitor, tmp_path / "ram", kept.size), kept) == []
        assert np.count_nonzero(kept.any(axis=1)) * 4096 > 22 * MIB
        monitor.execute("cont")
    with host.console("web1") as console:
        console.wait_bytes(4, timeout_s=20)


@pytest.mark.parametrize("version", QEMUS)
def test_qemus_own_script_reads_what_is_exported(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """Its devices, its description, and every page of its memory."""
    script = analyzer.fetch(default_cache())
    host = make_pair(version).a
    boot(host, read_only(guests.boot(ram_mib=24)))
    wire = host.ok("save", "web1", "one", "--way", "precopy", "--pause")
    file = tmp_path / "one.stream"
    host.ok("export", "one", str(file))
    with SnapshotReader(repository(host), wire["snapshot"], is_locked=False) as reader:
        devices = {f"{device.idstr} ({device.section_id})" for device in thaw(reader.device_state).devices}
    assert len(devices) > 20
    for what, members in (("state", devices), ("desc", {"devices", "page_size"})):
        done = subprocess.run(
            [sys.executable, script, "-d", what, "-f", file], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        read = json.loads(done.stdout)
        assert not members - set(read), set(read)
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, script, "-x", "-f", file], cwd=out, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    kept = kept_ram(host, wire["snapshot"])
    theirs = np.frombuffer((out / "pc.ram").read_bytes(), np.uint8).reshape(-1, 4096)
    assert theirs.shape == kept.shape
    assert differing_pages(theirs, kept) == []


@pytest.mark.parametrize("version", QEMUS)
def test_disks_of_the_same_instant(version: str, make_pair: MakePair, guests: Guests, tmp_path: Path) -> None:
    """The guest writes to its disk and checks it all the time; so does what was kept of it, on top of the old image.
    And with its new files the guest still moves."""
    pair = make_pair(version)
    host, spec = pair.a, guests.linux()
    host.ok("run", spec)
    host.refused("save", "web1", "one", code=8)
    with host.console("web1") as console:
        console.wait_ready(timeout_s=WALKS_S)
        after = console.wait_walks(1, timeout_s=WALKS_S, region="disk")
        wire = host.ok("save", "web1", "one", "--disks", "external-snapshot", timeout_s=120)
        (disk,) = (each for each in wire["disks"] if each["way"] == "external-snapshot")
        console.wait_walks(2, timeout_s=WALKS_S, region="disk", after=after)
    stat = Path(disk["path"]).stat()
    assert (stat.st_size, stat.st_mtime_ns) == (disk["size_bytes"], disk["mtime_ns"]), "it is not written to any more"
    file = tmp_path / "one.stream"
    host.ok("export", "one", str(file))
    over = tmp_path / "restored.qcow2"
    tool = image_tool(QEMUS[version])
    subprocess.run([tool, "create", "-q", "-f", "qcow2", "-b", disk["path"], "-F", disk["format"], over], check=True)
    definition = with_overlays(
        VmDefinition.from_wire(definition_of(host, wire["snapshot"])),
        (Overlay(disk["node"], disk["path"], disk["format"], str(over), "x"),),
    )
    with StreamLoader(definition.to_wire(), file, QEMUS[version], pair.folder / "loader") as guest:
        guest.run()
        with SerialReader.follow(guest.folder / "serial.log") as console:
            console.wait_walks(2, timeout_s=WALKS_S, region="disk")
    check_errors(report_of(pair.folder / "loader"))
    folders = [host.vm_directory("web1")]
    moved = host.ok("migrate", "web1", "host-b", timeout_s=120)
    assert moved["outcome"] == "destination"
    folders.append(pair.b.vm_directory("web1"))
    with pair.b.console("web1") as console:
        console.wait_walks(2, timeout_s=WALKS_S, region="disk")
    assert pair.judge(*folders).complaints() == []
    pair.b.ok("stop", "web1", "--force")
    for each in (pair.a, pair.b):  # one knows its save, the other sees the file
        refused = each.refused("run", spec, code=8)
        assert f'path = "{disk["overlay"]}"' in refused["hint"], refused
    assert Path(disk["path"]).stat().st_mtime_ns == disk["mtime_ns"]


@pytest.mark.parametrize("version", QEMUS)
def test_a_file_of_qemus_own_is_kept_and_comes_out_again(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    pair = make_pair(version)
    host = pair.a
    boot(host, guests.boot(ram_mib=24))
    qmp = host.status("web1")["qmp"]
    host.kill()  # its QEMU is to migrate into a file, which is no business of the agent's
    file = tmp_path / "qemu.stream"
    with BlockingClient(qmp, name="the guest's QEMU") as client:
        client.execute("migrate", {"uri": f"exec:cat > {file}"})
        wait_true(lambda: client.execute("query-migrate").get("status") == "completed", why="the file is written")
        client.execute("cont")
    host.restart()
    wire = host.ok("import", str(file), "theirs")
    assert wire["machine"] == host.status("web1")["machine"]
    back = tmp_path / "ours.stream"
    host.ok("export", "theirs", str(back))
    differences = run_cli("inspect-stream", str(file), str(back), "--json").json["differences"]
    assert not [each for each in differences if "page" not in str(each).lower()], differences
    kept = kept_ram(host, wire["snapshot"])
    definition = host.status("web1")
    assert len(kept) * 4096 == definition["memory_bytes"]


@pytest.mark.parametrize(("version", "way"), [*((version, "precopy") for version in QEMUS), (NEWEST, "background")])
@pytest.mark.proves("S53")
def test_a_killed_agent_never_costs_a_guest_or_a_finished_snapshot(
    version: str, way: str, make_pair: MakePair, guests: Guests
) -> None:
    """SIGKILL as soon as the log tells a fact, for each fact, of the same guest."""
    pair = make_pair(version)
    host = pair.a
    writes = way == "precopy"
    boot(host, guests.boot(ram_mib=24) if writes else read_only(guests.boot(ram_mib=24)))
    serial = host.vm_directory("web1") / "serial.log"
    wish = {"vm": "web1", "way": way, "disks": "external-snapshot" if writes else "refuse"}
    host.execute("vm-save", name="before", job="3e" * 16, **wish)
    wait_true(lambda: host.execute("job-status", job="3e" * 16)["over"], why="the first save is over")
    for fact in ("configured", "started", *(("stands", "disks") if writes else ()), "whole", "resumed", "kept"):
        seen = host.log().count(f"save fact={fact} ")
        host.execute("vm-save", name=fact, **wish)
        until_told(host, fact, seen)
        host.kill()
        host.restart()
        wait_true(lambda: not host.execute("query-jobs"), why="the save is walked back")
        assert host.status("web1")["run_state"] == "running"
        letters = len(serial.read_bytes())
        with host.console("web1") as console:
            console.wait_bytes(letters + 1, timeout_s=20)
        names = [each["name"] for each in host.ok("snapshots")["snapshots"]]
        assert names[0] == "before"
        if fact == "kept":
            assert fact in names
        assert host.ok("verify")["whole"]
        host.ok("prune", "--dry-run")
    done = host.ok("save", "web1", "after", "--way", way, "--disks", wish["disks"])
    assert done["outcome"] == "saved"


@pytest.mark.proves("S123")
def test_a_killed_agent_leaves_nothing_of_what_it_did_to_the_repository(
    make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """SIGKILL as soon as the log tells that the job has begun, or, of a prune, that its plan is there. Each job is told
    to its end by the next agent: as failed, or as done if it was."""
    host = make_pair(NEWEST).a
    boot(host, read_only(guests.boot(ram_mib=48, memory_mib=64)))
    assert host.ok("save", "web1", "one")["outcome"] == "saved"
    given, file = tmp_path / "given.stream", tmp_path / "one.stream"
    host.ok("export", "one", str(given))
    wishes: list[tuple[str, str, dict[str, Any]]] = [
        ("verify", "begun", {}),
        ("export", "begun", {"name": "one", "file": str(file)}),
        ("import", "begun", {"name": "two", "file": str(given)}),
        ("prune", "planned", {"auto-finalize": False, "drop-pins": "host-c"}),
    ]
    folder = host.state / "repository"
    (folder / "pins").mkdir(exist_ok=True)
    pin = folder / "pins" / ("e" * 32)
    pin.write_text(json.dumps({"job": "e" * 32, "snapshot": "5" * 32, "host": "host-c", "vm": "gone"}))
    for kind, fact, wish in wishes:
        job = host.execute(f"snapshot-{kind}", **wish, **{"auto-dismiss": False})["job"]
        told = f"job={job} {kind} fact={fact}"
        wait_true(partial(_is_told, host, told), why=told)
        host.kill()
        host.restart()
        wait_true(partial(_is_over, host, job), why=f"the {kind} has an end")
        wire = host.execute("job-status", job=job)
        if wire["outcome"] != "done":
            assert (wire["status"], wire["error"]["code"]) == ("failed", "failed"), wire
            assert "restarted" in wire["error"]["message"]
        (listed,) = host.execute("query-jobs")
        assert (listed["id"], listed["status"]) == (job, "concluded")
        host.ok("job", "dismiss", job)
        assert not list(tmp_path.glob(".*")), "no part of a file"
        names = {each["name"] for each in host.ok("snapshots")["snapshots"]}
        assert names - {"two"} == {"one"}
        assert ("two" in names) >= (kind == "import" and wire["outcome"] == "done")
    assert pin.exists(), "nobody gave leave"
    if file.exists():
        assert file.read_bytes() == given.read_bytes(), "under its name a file is whole"
    assert host.ok("verify")["whole"]
    dropped = host.ok("prune", "--drop-pins", "host-c", "--yes")
    assert [each["vm"] for each in dropped["dropped_pins"]] == ["gone"]
    host.ok("export", "one", str(tmp_path / "again.stream"))


@pytest.mark.parametrize(("version", "way"), [*((version, "precopy") for version in QEMUS), (NEWEST, "background")])
def test_a_cancelled_guest_goes_on(version: str, way: str, make_pair: MakePair, guests: Guests) -> None:
    """Five times, at once and later: pages that QEMU protected or marked must all be let go of."""
    host = make_pair(version).a
    boot(host, read_only(guests.boot(ram_mib=48, memory_mib=64)))
    serial = host.vm_directory("web1") / "serial.log"
    for number in range(5):
        seen = host.log().count("save fact=started ")
        job = host.execute("vm-save", vm="web1", name=f"no{number}", way=way)["job"]
        if number:
            until_told(host, "started", seen)
        host.execute("job-cancel", id=job)
        wait_true(lambda: not host.execute("query-jobs"), why="it is over")
        letters = len(serial.read_bytes())
        with host.console("web1") as console:
            console.wait_bytes(letters + 2, timeout_s=30)
    assert host.ok("snapshots")["snapshots"] == []
    assert host.ok("save", "web1", "yes", "--way", way)["outcome"] == "saved"
