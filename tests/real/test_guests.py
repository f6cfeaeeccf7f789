"""The guests of the tests, on every QEMU of this machine: they run, they find nothing, and they would."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmferry.testing import bootsector, linux_guest
from vmferry.testing.host_tools import default_cache
from vmferry.testing.qemus import available
from vmferry.testing.serial_log import SerialReader, analyse

pytestmark = pytest.mark.real

QEMUS = available()
MACHINES = ("q35", "pc")
BOOT_S = 60
every_qemu = pytest.mark.parametrize("version", sorted(QEMUS))
every_machine = pytest.mark.parametrize("machine", MACHINES)


@pytest.fixture(scope="module")
def linux() -> linux_guest.LinuxGuest:
    return linux_guest.build(default_cache())


@contextmanager
def qemu(version: str, machine: str, *words: str, stdin: int = subprocess.DEVNULL) -> Iterator[None]:
    """Runs one machine without display and without default devices, and kills it in the end."""
    base = [str(QEMUS[version]), "-nodefaults", "-display", "none", "-accel", "tcg", "-machine", machine]
    process = subprocess.Popen([*base, *words], stdin=stdin)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def linux_words(guest: linux_guest.LinuxGuest, cmdline: str) -> list[str]:
    return ["-m", "192", "-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", cmdline]


@every_qemu
@every_machine
def test_linux_checks_memory_and_disk_and_finds_nothing(
    version: str, machine: str, linux: linux_guest.LinuxGuest, tmp_path: Path
) -> None:
    disk, log = tmp_path / "disk.img", tmp_path / "serial.log"
    with disk.open("wb") as image:
        image.truncate(16 << 20)
    cmdline = linux_guest.cmdline(
        disk="vda", dirty_mib_per_s=20, ram_mib=16, const_mib=4, disk_write_ms=10, disk_blocks=32
    )
    words = [*linux_words(linux, cmdline), "-serial", f"file:{log}", "-nic", "user,model=virtio-net-pci"]
    words += ["-drive", f"file={disk},format=raw,if=virtio,cache=none"]
    with SerialReader.follow(log) as reader, qemu(version, machine, *words):
        after = reader.wait_ready(timeout_s=BOOT_S)
        reader.wait_walks(2, timeout_s=BOOT_S, after=after)
        reader.wait_walks(2, region="disk", timeout_s=BOOT_S, after=after)
        reader.wait_ticks(100, timeout_s=BOOT_S, after=after)
        reader.wait_for(lambda line: line.kind == "S", timeout_s=BOOT_S, after=after)
    report = analyse(reader.chunks(), [])
    assert report.complaints() == []
    assert report.ticks >= 100
    status = [line.words for line in reader.lines() if line.kind == "S"]
    assert int(status[-1][1]) > 0, "no page was dirtied"
    assert int(status[-1][2]) > 0, "no block was written"


@every_qemu
def test_linux_tells_at_once_when_its_memory_is_damaged(
    version: str, linux: linux_guest.LinuxGuest, tmp_path: Path
) -> None:
    """The guest damages one page of its own; a judge that has never found anything may be blind."""
    path = tmp_path / "serial.sock"
    words = linux_words(linux, linux_guest.cmdline(fault_after_s=1, ram_mib=8, const_mib=8))
    words += ["-chardev", f"socket,id=console,path={path}", "-serial", "chardev:console"]
    with SerialReader.listen(path) as reader, qemu(version, "q35", *words):
        after = reader.wait_for(lambda line: line.kind == "E", timeout_s=BOOT_S)
        reader.wait_walks(2, timeout_s=BOOT_S, after=after)
        reader.wait_ticks(1, timeout_s=BOOT_S, after=after)
    report = analyse(reader.chunks(), [])
    assert report.memory_errors == 1, "the damage is told once, not in every walk"
    assert report.errors_counted_by_guest == 1
    assert "region=b page=1 word=100" in report.error_lines[0]


@every_qemu
def test_linux_finds_a_write_that_the_disk_has_forgotten(
    version: str, linux: linux_guest.LinuxGuest, tmp_path: Path
) -> None:
    """The disk gets an older state of itself: what a destination with a stale disk would see."""
    disk, log = tmp_path / "disk.img", tmp_path / "serial.log"
    with disk.open("wb") as image:
        image.truncate(16 << 20)
    cmdline = linux_guest.cmdline(disk="vda", disk_write_ms=10, disk_blocks=8, ram_mib=4, const_mib=0)
    words = [*linux_words(linux, cmdline), "-serial", f"file:{log}"]
    words += ["-drive", f"file={disk},format=raw,if=virtio,cache=none"]
    with SerialReader.follow(log) as reader, qemu(version, "q35", *words):
        after = reader.wait_walks(2, region="disk", timeout_s=BOOT_S)
        with disk.open("r+b", buffering=0) as image:
            image.seek(1 << 20)
            older = image.read(8 * 4096)
        after = reader.wait_walks(2, region="disk", timeout_s=BOOT_S, after=after)
        with disk.open("r+b", buffering=0) as image:
            image.seek(1 << 20)
            image.write(older)
        reader.wait_for(lambda line: line.words[:2] == ("E", "disk"), timeout_s=BOOT_S, after=after)


@every_qemu
@every_machine
@pytest.mark.parametrize("drive", ["ide", "virtio"])
def test_the_boot_sector_counts_without_end(version: str, machine: str, drive: str, tmp_path: Path) -> None:
    image, log = tmp_path / "boot.img", tmp_path / "serial.log"
    bootsector.write_image(image, ram_mib=32, delay_loops_per_page=100)
    words = ["-m", "64", "-serial", f"file:{log}", "-drive", f"file={image},format=raw,if={drive}"]
    with SerialReader.follow(log) as reader, qemu(version, machine, *words):
        reader.wait_bytes(60, timeout_s=BOOT_S)
    assert bootsector.count_passes(b"".join(chunk.data for chunk in reader.chunks())) >= 59


@every_qemu
def test_the_boot_sector_touches_every_page(version: str, tmp_path: Path) -> None:
    """QEMU is stopped and its memory is read: all pages have been counted up, to within one pass."""
    image, log, dump = tmp_path / "boot.img", tmp_path / "serial.log", tmp_path / "memory"
    bootsector.write_image(image, ram_mib=8, delay_loops_per_page=1000)
    base = [str(QEMUS[version]), "-nodefaults", "-display", "none", "-accel", "tcg", "-machine", "pc"]
    words = [
        "-m",
        "16",
        "-serial",
        f"file:{log}",
        "-drive",
        f"file={image},format=raw,if=ide",
        "-qmp",
        "stdio",
    ]
    with SerialReader.follow(log) as reader:
        process = subprocess.Popen([*base, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            reader.wait_bytes(10, timeout_s=BOOT_S)
            save = {"val": 1 << 20, "size": 7 << 20, "filename": str(dump)}
            commands: list[dict[str, object]] = [{"execute": "qmp_capabilities"}, {"execute": "stop"}]
            commands += [{"execute": "pmemsave", "arguments": save}, {"execute": "quit"}]
            process.communicate("".join(json.dumps(command) for command in commands), timeout=30)
        finally:
            process.kill()
            process.wait()
    passes = bootsector.count_passes(b"".join(chunk.data for chunk in reader.chunks()))
    counts = set(dump.read_bytes()[:: bootsector.PAGE_BYTES])
    assert counts <= {passes % 256, (passes + 1) % 256}


def test_both_versions_are_here() -> None:
    """Migrations between two versions are part of the promise; tools/setup_machine.py provides the newer."""
    assert len(QEMUS) >= 2, QEMUS
