"""Host probes: the pure parts, and what they say about things that are not there."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import QemuError
from vmferry.pki import authority
from vmferry.vm import image_locks, probe, probe_host, probe_qemu

LOCKS = """\
1: OFDLCK ADVISORY  READ -1 fe:00:77 203 203
2: OFDLCK ADVISORY  READ -1 fe:00:77 201 201
3: OFDLCK ADVISORY  READ -1 fe:00:77 100 101
4: POSIX  ADVISORY  WRITE 812 00:19:99 0 EOF
5: -> POSIX  ADVISORY  WRITE 813 00:19:99 0 EOF
6: FLOCK  ADVISORY  WRITE 5 fe:00:5 0 EOF
nonsense
"""


def test_locks_are_read_and_translated() -> None:
    lines = image_locks.parse(LOCKS)
    assert len(lines) == 6
    assert lines[3].end is None
    assert lines[3].covers(10**9)
    mine = tuple(line for line in lines if line.inode == 77)
    assert image_locks.permissions(mine, image_locks.USES_BASE) == {"consistent-read", "write"}
    assert image_locks.permissions(mine, image_locks.FORBIDS_BASE) == {"write", "resize"}
    assert image_locks.permissions(lines[3:], image_locks.USES_BASE) == frozenset()


def test_fdinfo_lines_read_like_proc_locks() -> None:
    text = "pos:\t0\nflags:\t02100002\nino:\t77\nlock:\t1: OFDLCK ADVISORY  READ -1 fe:00:77 100 101\n"
    assert image_locks.parse(text)[0].covers(101)


@given(st.text(max_size=200))
def test_no_text_makes_the_parser_fail(text: str) -> None:
    assert isinstance(image_locks.parse(text), tuple)


def test_a_lock_of_ours_is_seen_with_its_holder(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(b"x")
    with image.open("rb+") as holder:
        assert image_locks.image_locks(str(image)).can_write
        for byte in (100, 101, 201):
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(holder, fcntl.F_OFD_SETLK, lock)
        locks = image_locks.image_locks(str(image))
        assert locks.can_write is False
        assert [writer.pid for writer in locks.writers] == [os.getpid()]
        assert locks.uses == frozenset({"consistent-read", "write"})
        assert locks.forbids == frozenset({"write"})
        assert locks.foreign == frozenset()
        paths = [str(image), str(tmp_path / "none")]
        assert image_locks.written_by(os.getpid(), paths) == {str(image)}
        assert image_locks.written_by(os.getppid(), paths) == frozenset()
    assert image_locks.written_by(os.getpid(), [str(image)]) == frozenset()
    assert image_locks.image_locks(str(image)) == image_locks.ImageLocks(frozenset(), frozenset(), ())


def test_what_nobody_here_holds_is_foreign() -> None:
    locks = image_locks.ImageLocks(frozenset({"write"}), frozenset(), ())
    assert locks.foreign == frozenset({"write"})
    assert locks.can_write is False
    unknown = image_locks.ImageLocks(None, None, ())
    assert unknown.foreign is None
    assert unknown.can_write is None


async def test_disks_that_cannot_be_used(tmp_path: Path) -> None:
    missing = await probe_host.disk(str(tmp_path / "none"))
    assert not missing.exists
    assert probe.disk_check(missing).ok is False
    assert "mount" in probe.disk_check(missing).fix
    directory = await probe_host.disk(str(tmp_path))
    assert probe.disk_check(directory).detail == "is neither a file nor a block device"


async def test_a_disk_without_qemu_img_is_still_described(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(4096))
    facts = await probe_host.disk(str(image), qemu_img="/no/such/qemu-img")
    assert (facts.kind, facts.size_bytes, facts.writable) == ("file", 4096, True)
    assert "cannot be started" in facts.problem


def test_two_writers_are_bad_news() -> None:
    writers = tuple(image_locks.LockHolder(pid, "qemu", frozenset({"write"}), frozenset()) for pid in (1, 2))
    locks = image_locks.ImageLocks(frozenset({"write"}), frozenset(), writers)
    facts = probe_host.DiskFacts("/a", True, "file", 1, 1, "raw", True, True, None, (1, 2), locks)
    found = probe.disk_check(facts)
    assert found.ok is False
    assert "pid 1" in found.detail
    assert "pid 2" in found.detail


def test_meminfo() -> None:
    text = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    500 kB\nHugePages_Total:       0\n\n"
    assert probe_host.parse_meminfo(text) == probe_host.Memory(1000 * 1024, 500 * 1024)
    assert probe_host.memory().total_bytes > 0


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert probe_host.free_port(port, port, address="127.0.0.1") is None
    assert probe_host.free_port(port, port, address="127.0.0.1") == port


def test_the_boot_sector_is_one_sector() -> None:
    sector = probe_host.boot_sector(b"hello")
    assert len(sector) == 512
    assert sector.endswith(b"\x55\xaa")
    assert sector[struct.unpack_from("<H", sector, 6)[0] - 0x7C00 :].startswith(b"hello\0")
    with pytest.raises(AssertionError):
        probe_host.boot_sector(b"x" * 600)


@pytest.mark.parametrize(("offset", "ok"), [((5.0, 1.0), True), ((-3000.0, 1.0), False), ((1500.0, 2000.0), None)])
def test_clock_offsets(offset: tuple[float, float], ok: bool | None) -> None:
    found = probe.offset_check(probe_host.ClockOffset("b", *offset))
    assert found.ok is ok
    assert bool(found.fix) == (ok is False)


def test_certificates(tmp_path: Path) -> None:
    now = datetime(2026, 6, 1, tzinfo=UTC)
    missing = probe.certificate_check(tmp_path, now=now)
    assert missing.ok is False
    assert "vmferry pki" in missing.fix
    authority.init(tmp_path, {"a": []}, now=now)
    assert probe.certificate_check(tmp_path / "a", now=now).ok
    late = probe.certificate_check(tmp_path / "a", now=now.replace(year=2040))
    assert late.ok is False
    assert "ended" in late.detail


def test_cpu_models() -> None:
    models = probe_qemu.cpu_models([
        {"name": "b", "unavailable-features": ["x"], "migration-safe": True, "alias-of": "b-v1"},
        {"name": "a"},
    ])  # fmt: skip
    assert models[0] == probe_qemu.CpuModel("a", None, None)
    assert models[1].unavailable == ("x",)


async def test_a_program_that_is_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="is not there"):
        await probe_qemu.qemu_facts(str(tmp_path / "none"))
    with pytest.raises(QemuError, match="is not a QEMU"):
        await probe_qemu.qemu_facts("/bin/echo")
    with pytest.raises(QemuError, match="failed"):
        await probe_qemu.qemu_facts("/bin/false")
    usable = await probe_host.kvm_boot("/no/such/qemu")
    assert usable.works is None


def test_the_cpu_is_its_model_and_what_it_can_do() -> None:
    text = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: sse2 avx\n\nprocessor\t: 1\nmodel name\t: other\n"
    assert probe_host.parse_cpuinfo(text) == "AMD EPYC [avx sse2]"
    assert probe_host.parse_cpuinfo(text.replace("sse2 avx", "avx sse2")) == "AMD EPYC [avx sse2]"
    assert probe_host.parse_cpuinfo("processor\t: 0\n") is None, "another architecture"
    assert probe_host.cpu() == probe_host.cpu()
