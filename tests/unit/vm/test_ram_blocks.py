"""Where guest memory is, read from what QEMU 7.2 and 11.1 and the kernel really said (tests/unit/vm/recorded)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmferry.errors import QemuError
from vmferry.vm.ram_blocks import (
    BlockPlace,
    FilePlace,
    MapLine,
    RamBlockLine,
    locate,
    open_file,
    parse_gpa2hva,
    parse_maps,
    parse_ramblock,
)

RECORDED = Path(__file__).parent / "recorded"
MIB = 1 << 20
HEAD = "              Block Name    PSize              Offset               Used              Total"
LINE = "                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000"


def recorded(version: str) -> tuple[tuple[RamBlockLine, ...], tuple[MapLine, ...]]:
    blocks = parse_ramblock((RECORDED / f"ramblock-q{version}.txt").read_text())
    return blocks, parse_maps((RECORDED / f"maps-q{version}.txt").read_text())


@pytest.mark.parametrize("version", ["72", "111"])
def test_every_block_of_a_real_qemu_is_read(version: str) -> None:
    blocks, _ = recorded(version)
    assert {each.name: each.used_bytes for each in blocks} == {
        "m0": 64 * MIB,
        "0000:00:02.0/vga.vram": 16 * MIB,
        "/rom@etc/acpi/tables": 0x20000,
        "pc.bios": 0x40000,
        "pc.rom": 0x20000,
        "0000:00:02.0/vga.rom": 0x10000,
        "/rom@etc/table-loader": 0x1000,
        "/rom@etc/acpi/rsdp": 0x1000,
    }
    assert {each.page_bytes for each in blocks} == {4096}
    assert {each.name: each.total_bytes for each in blocks}["/rom@etc/acpi/tables"] == 2 * MIB
    assert all((each.address is None) == (version == "72") for each in blocks)


def test_a_newer_qemu_tells_addresses_and_the_kernel_the_file() -> None:
    places = {each.name: each for each in locate(*recorded("111"))}
    assert all(each.address is not None for each in places.values())
    main = places["m0"]
    assert main.address is not None
    assert main.address + MIB == parse_gpa2hva("Host virtual address for 0x100000 (m0) is 0x7f6ab40ff000\n")[1]
    assert main.file == FilePlace("/memfd:memory-backend-memfd", 0, (0, 1), 824)
    assert [name for name, each in places.items() if each.file is not None] == ["m0"]


def test_an_older_qemu_s_blocks_are_found_by_their_lengths_unless_two_have_the_same() -> None:
    places = {each.name: each for each in locate(*recorded("72"))}
    main, bios = places["m0"], places["pc.bios"]
    assert main.address is not None
    assert bios.address is not None
    # What the same process answered to gpa2hva: the firmware's last page is the last one below 4 GiB.
    assert main.address + MIB == parse_gpa2hva("Host virtual address for 0x100000 (m0) is 0x7fef540ff000\r\n")[1]
    assert bios.address + bios.used_bytes - 4096 == 0x7FEF9DE3F000
    assert main.file == FilePlace("/memfd:memory-backend-memfd", 0, (0, 1), 1874)
    unknown = [name for name, each in places.items() if each.address is None]
    assert unknown == ["0000:00:02.0/vga.rom", "/rom@etc/table-loader"]  # both of 64 KiB


def test_a_mapping_in_pieces_is_one_and_its_offset_counts() -> None:
    block = RamBlockLine("m0", 4096, 0x3000, 0x3000, 0x7001000)
    maps = parse_maps(
        "7000000-7002000 rw-s 00005000 00:1f 77 /dev/shm/ram (deleted)\n"
        "7002000-7004000 r--s 00007000 00:1f 77 /dev/shm/ram (deleted)\n"
    )
    assert locate([block], maps) == (
        BlockPlace("m0", 0x3000, 4096, 0x7001000, FilePlace("/dev/shm/ram", 0x6000, (0, 0x1F), 77)),
    )


@pytest.mark.parametrize(
    "second",
    [
        "7003000-7005000 rw-s 00008000 00:1f 77 /dev/shm/ram",  # a hole
        "7002000-7004000 rw-s 00009000 00:1f 77 /dev/shm/ram",  # another part of the file
        "7002000-7004000 rw-s 00007000 00:1f 78 /dev/shm/ram",  # another file
        "7002000-7004000 rw-p 00007000 00:1f 77 /dev/shm/ram",  # private
    ],
)
def test_a_block_that_is_not_mapped_as_told_is_refused(second: str) -> None:
    block = RamBlockLine("m0", 4096, 0x3000, 0x3000, 0x7000000)
    with pytest.raises(QemuError, match="m0 is not mapped"):
        locate([block], parse_maps(f"7000000-7002000 rw-s 00005000 00:1f 77 /dev/shm/ram\n{second}\n"))


def test_memory_that_nobody_may_read_is_no_memory() -> None:
    block = RamBlockLine("m0", 4096, 0x1000, 0x1000, 0x7000000)
    with pytest.raises(QemuError, match="not mapped"):
        locate([block], parse_maps("7000000-7002000 ---p 00000000 00:00 0\n"))


@pytest.mark.parametrize(
    ("maps", "address"),
    [
        ("7000000-7400000 rw-p 00000000 00:00 0\n7400000-7401000 ---p 00000000 00:00 0\n", 0x7000000),
        ("7000000-7400000 rw-p 00000000 00:00 0\n", None),  # no guard page
        ("7001000-7401000 rw-p 00000000 00:00 0\n7401000-7402000 ---p 00000000 00:00 0\n", None),  # not aligned
        ("7000000-7400000 r--p 00000000 00:00 0\n7400000-7401000 ---p 00000000 00:00 0\n", None),
        ("7001000-7401000 rw-s 00000000 00:01 9 /memfd:x\n", 0x7001000),
        ("7001000-7401000 rw-s 00001000 00:01 9 /memfd:x\n", None),
        ("7001000-7401000 rw-s 00000000 00:01 9 /a\n8001000-8401000 rw-s 00000000 00:01 8 /b\n", None),  # two fit
    ],
)
def test_what_counts_as_the_allocator_s_trace(maps: str, address: int | None) -> None:
    block = RamBlockLine("pc.ram", 4096, 4 * MIB, 4 * MIB)
    assert locate([block], parse_maps(maps))[0].address == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Block Name    PSize              Offset               Total",
        HEAD,  # no block
        f"{HEAD}\n{LINE}\n{LINE}",  # twice
        f"{HEAD}\n{LINE} more",
        f"{HEAD}\n{LINE}  0x00007ffb77e00000",  # an address without its mode
        f"{HEAD}\n" + LINE.replace("0x0000000004000000 0x0000000004000000", "0x0000000004000000 0x0000000003000000"),
        f"{HEAD}\n" + LINE.replace("0x0000000004000000 0x0000000004000000", "0x0000000000000010 0x0000000004000000"),
        f"{HEAD}\n" + LINE.replace("0x0000000004000000 0x0000000004000000", "0x0000000000000000 0x0000000004000000"),
        f"{HEAD}\n" + LINE.replace("4 KiB", "4 pages"),
    ],
)
def test_a_table_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(QemuError):
        parse_ramblock(text)


def test_huge_pages_and_names_with_spaces_are_known() -> None:
    text = f"{HEAD}\r\n" + LINE.replace("  4 KiB", "  2 MiB").replace("pc.ram", "a name") + "\r\n"
    assert parse_ramblock(text) == (RamBlockLine("a name", 2 * MIB, 64 * MIB, 64 * MIB),)


@pytest.mark.parametrize("text", ["7000000-7002000 rw-s 00000000 00:1f\n", "nonsense\n"])
def test_a_memory_map_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(QemuError):
        parse_maps(text)


@pytest.mark.parametrize("text", ["", "Memory at address 0x0 is not RAM\r\n", "No memory is mapped at address 0x1\r\n"])
def test_an_address_that_is_not_told_is_refused(text: str) -> None:
    with pytest.raises(QemuError):
        parse_gpa2hva(text)


def test_a_file_without_a_name_is_opened_by_its_inode() -> None:
    fd = os.memfd_create("ram")
    try:
        os.pwrite(fd, b"guest", 4096)
        found = os.fstat(fd)
        device = (os.major(found.st_dev), os.minor(found.st_dev))
        mine = open_file(os.getpid(), FilePlace("/memfd:ram", 0, device, found.st_ino))
        assert mine != fd
        os.close(fd)
        fd = mine
        assert os.pread(mine, 5, 4096) == b"guest"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(mine, b"x", 0)  # to read only
        with pytest.raises(FileNotFoundError):
            open_file(os.getpid(), FilePlace("/memfd:ram", 0, device, found.st_ino + 1_000_000))
    finally:
        os.close(fd)
