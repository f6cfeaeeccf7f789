"""The judge in court: the Linux guest is moved by bare QEMU commands, well and badly, and must tell which.

None of vmferry's own code moves anything here; this is about the guest and the reading of its logs.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from vmferry.testing import linux_guest
from vmferry.testing.host_tools import default_cache
from vmferry.testing.qemus import available, ram_size
from vmferry.testing.serial_log import SerialReader, analyse

pytestmark = pytest.mark.real

QEMUS = available()
OLDEST, NEWEST = next(iter(QEMUS)), list(QEMUS)[-1]
MACHINE = f"pc-q35-{OLDEST}"
TIMEOUT_S = 60
EVENTS = [{"capability": "events", "state": True}]
# A page that the guest never changes (guest/memory.c): its number, generation 0, a sum, the region's salt.
CONSTANT_PAGE = re.compile(rb"..\0{6}\0{8}.{8}" + (0xB0B000000000000B).to_bytes(8, "little"), re.DOTALL)


class Side:
    """One QEMU with its console and a bare QMP session on a socket that it connects to."""

    def __init__(self, name: str, version: str, folder: Path, *, disk: Path | None, incoming: bool) -> None:
        guest = linux_guest.build(default_cache())
        cmdline = linux_guest.cmdline(
            disk="vda" if disk else None, dirty_mib_per_s=10, ram_mib=8, const_mib=4, disk_blocks=16
        )
        words = ["-nodefaults", "-display", "none", "-accel", "tcg", "-machine", MACHINE]
        words += ["-m", ram_size(128)]
        words += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", cmdline]
        words += ["-serial", f"file:{folder / name}.log", "-qmp", f"unix:{folder / name}.qmp"]
        if disk is not None:
            words += ["-drive", f"file={disk},format=raw,if=virtio,cache=none"]
        if incoming:
            words += ["-incoming", "defer"]
        self.console = SerialReader.follow(folder / f"{name}.log")
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(folder / f"{name}.qmp"))
            door.listen(1)
            door.settimeout(TIMEOUT_S)
            self.process = subprocess.Popen([str(QEMUS[version]), *words])
            self._link = door.accept()[0]
        self._link.settimeout(TIMEOUT_S)
        self._answers = self._link.makefile("r")
        self._answers.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        self._link.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        return self._next("return", lambda _: True)

    def wait_migrated(self) -> None:
        wanted = ("completed", "failed")
        event = self._next("event", lambda said: said.get("data", {}).get("status") in wanted)
        assert event["data"]["status"] == "completed"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._answers.close()
        self._link.close()
        self.console.close()

    def _next(self, key: str, good: Any) -> Any:
        for line in self._answers:
            said = json.loads(line)
            assert "error" not in said, said
            if key in said and good(said):
                return said
        raise AssertionError("QEMU closed its QMP session")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as stack:

        def start(name: str, version: str, *, disk: Path | None = None, incoming: bool = False) -> Side:
            side = Side(name, version, tmp_path, disk=disk, incoming=incoming)
            stack.callback(side.close)
            return side

        yield start


def move(source: Side, destination: Side, stream: Path) -> None:
    for side in (source, destination):
        side.command("migrate-set-capabilities", capabilities=EVENTS)
    destination.command("migrate-incoming", uri=f"unix:{stream}")
    source.command("migrate", uri=f"unix:{stream}")
    source.wait_migrated()


@pytest.mark.parametrize(("old", "new"), [(OLDEST, OLDEST), (OLDEST, NEWEST), (NEWEST, OLDEST), (NEWEST, NEWEST)])
def test_a_good_migration_leaves_nothing_but_a_pause(old: str, new: str, started: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as image:
        image.truncate(16 << 20)
    source = started("source", old, disk=disk)
    source.console.wait_walks(2, timeout_s=TIMEOUT_S)
    destination = started("destination", new, disk=disk, incoming=True)
    move(source, destination, tmp_path / "stream")
    destination.console.wait_walks(2, timeout_s=TIMEOUT_S)
    destination.console.wait_walks(2, region="disk", timeout_s=TIMEOUT_S)
    report = analyse(source.console.chunks(), destination.console.chunks())
    assert report.complaints() == []
    assert min(report.ticks_per_side) > 50
    assert report.switch_gap_ms is not None
    assert report.walks_after >= 2
    assert report.disk_walks_after >= 2


def test_a_source_that_is_woken_after_the_switch_is_found(started: Any, tmp_path: Path) -> None:
    source = started("source", OLDEST)
    source.console.wait_ticks(20, timeout_s=TIMEOUT_S)
    destination = started("destination", OLDEST, incoming=True)
    move(source, destination, tmp_path / "stream")
    destination.console.wait_ticks(20, timeout_s=TIMEOUT_S)
    so_far = len(source.console.lines())
    source.command("cont")
    source.console.wait_ticks(20, after=so_far, timeout_s=TIMEOUT_S)
    report = analyse(source.console.chunks(), destination.console.chunks())
    assert report.overlap is True
    assert report.ticks_duplicated >= 19
    assert "the guest ran on both sides" in report.complaints()


def test_memory_that_is_changed_on_the_way_is_found(started: Any, tmp_path: Path) -> None:
    """The saved state gets one bit of one checked page flipped before it is loaded."""
    source = started("source", OLDEST)
    source.console.wait_walks(1, timeout_s=TIMEOUT_S)
    source.command("stop")
    saved = tmp_path / "state"
    source.command("migrate-set-capabilities", capabilities=EVENTS)
    source.command("migrate", uri=f"exec:cat > {saved}")
    source.wait_migrated()
    state = bytearray(saved.read_bytes())
    page = CONSTANT_PAGE.search(state)
    assert page is not None
    state[page.start() + 400] ^= 0x10
    saved.write_bytes(state)
    destination = started("destination", OLDEST, incoming=True)
    destination.command("migrate-set-capabilities", capabilities=EVENTS)
    destination.command("migrate-incoming", uri=f"exec:cat {saved}")
    destination.wait_migrated()
    destination.command("cont")  # it was saved while stopped
    destination.console.wait_for(lambda line: line.words[:2] == ("E", "memory"), timeout_s=TIMEOUT_S)
    destination.console.wait_ticks(1, timeout_s=TIMEOUT_S)
    report = analyse(source.console.chunks(), destination.console.chunks())
    assert report.memory_errors == 1
    assert "region=b" in report.error_lines[0]
