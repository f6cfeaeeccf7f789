"""A guest of 512 bytes that starts in no time, dirties memory and counts on the serial port.

Theory of operation
-------------------
The machine code is made here, instruction by instruction; no assembler is needed. The BIOS loads it to
0x7c00 in 16-bit mode. It opens the A20 gate, enters 32-bit flat mode without interrupts, writes 'A' to COM1,
and then for ever: adds one to the first byte of each page from 1 MiB to `ram_mib`, with an optional delay per
page, and writes the next letter ('B' to 'Z', then 'B' again). So every byte of the log says that one whole
pass was made, and after k passes each of these pages starts with the byte k modulo 256.

Rule 1: the letters have a fixed order, so lost, doubled and reordered output show (`count_passes`).
"""

from __future__ import annotations

import struct
from pathlib import Path

LOAD_ADDRESS = 0x7C00
SECTOR_BYTES = 512
FIRST_LETTER, FIRST_PASS_LETTER, LAST_LETTER = b"A", b"B", b"Z"
PAGE_BYTES = 4096
MIB = 1 << 20
_COM1 = 0x3F8
_CODE_SEGMENT, _DATA_SEGMENT = 0x08, 0x10
# Flat 4 GiB: limit 0xfffff in pages, base 0; access 0x9a = code, 0x92 = data; flags 0xc = 32 bits, pages.
_FLAT_CODE = bytes.fromhex("ffff0000009acf00")
_FLAT_DATA = bytes.fromhex("ffff00000092cf00")


class LogError(AssertionError):
    """The letters are not those of one uninterrupted life of the guest."""


def write_image(path: Path, *, ram_mib: int, delay_loops_per_page: int = 0, size_bytes: int = MIB) -> None:
    """Writes a raw disk image that boots this guest. `size_bytes`: whole sectors; floppies want 1440 KiB."""
    assert size_bytes % SECTOR_BYTES == 0
    sector = boot_sector(ram_mib=ram_mib, delay_loops_per_page=delay_loops_per_page)
    with path.open("wb") as image:
        image.write(sector)
        image.truncate(size_bytes)


def count_passes(data: bytes) -> int:
    """How many whole passes the log (of both sides, joined) reports. Raises LogError if letters are wrong.

    What the firmware may have written before the first 'A' is not looked at.
    """
    start = data.find(FIRST_LETTER)
    if start < 0:
        return 0
    letters = data[start + 1 :]
    cycle = bytes(range(FIRST_PASS_LETTER[0], LAST_LETTER[0] + 1))
    for index, letter in enumerate(letters):
        wanted = cycle[index % len(cycle)]
        if letter != wanted:
            raise LogError(f"pass {index + 1} wrote {chr(letter)!r}, not {chr(wanted)!r}")
    return len(letters)


def boot_sector(*, ram_mib: int, delay_loops_per_page: int = 0) -> bytes:
    """The 512 bytes. `ram_mib`: dirty up to here (2..3072), leave a MiB of the machine's RAM to the firmware.

    `delay_loops_per_page`: turns of a two-instruction loop after each page, 0 = as fast as it goes.
    """
    assert 2 <= ram_mib <= 3072, ram_mib
    assert 0 <= delay_loops_per_page < 1 << 32, delay_loops_per_page
    # The real-mode part has a fixed length, so the addresses behind it are known before it is made.
    descriptors_at = LOAD_ADDRESS + len(_real_mode(0, 0))
    descriptors = bytes(8) + _FLAT_CODE + _FLAT_DATA
    pointer_at = descriptors_at + len(descriptors)
    pointer = struct.pack("<HI", len(descriptors) - 1, descriptors_at)
    protected_at = pointer_at + len(pointer)
    code = (
        _real_mode(pointer_at, protected_at)
        + descriptors
        + pointer
        + _protected_mode(ram_mib * MIB, delay_loops_per_page)
    )
    # The partition table's place (446..509) stays free: some firmware looks at it before it boots a disk.
    assert len(code) <= 446, len(code)
    return code.ljust(SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"


def _real_mode(pointer_at: int, protected_at: int) -> bytes:
    """16-bit code: A20 on, descriptor table loaded, protected mode on, jump to 32-bit code."""
    code = b"\xfa"  # cli                 no interrupts for ever: there is no table of handlers
    code += b"\x31\xc0"  # xor ax, ax
    code += b"\x8e\xd8"  # mov ds, ax          addresses below 64 KiB now mean what they say
    code += b"\xe4\x92"  # in al, 0x92         the fast A20 gate
    code += b"\x0c\x02"  # or al, 2            bit 1: A20 on
    code += b"\x24\xfe"  # and al, 0xfe        bit 0 would reset the machine
    code += b"\xe6\x92"  # out 0x92, al
    code += b"\x0f\x01\x16" + struct.pack("<H", pointer_at)  # lgdt [pointer]
    code += b"\x0f\x20\xc0"  # mov eax, cr0
    code += b"\x66\x83\xc8\x01"  # or eax, 1           protection enable
    code += b"\x0f\x22\xc0"  # mov cr0, eax
    code += b"\x66\xea" + struct.pack("<IH", protected_at, _CODE_SEGMENT)  # jmp far code:protected
    return code


def _protected_mode(end_bytes: int, delay_loops: int) -> bytes:
    """32-bit code: set up, write 'A', then pass after pass. Position-independent: all jumps are short."""
    setup = b"\x66\xb8" + struct.pack("<H", _DATA_SEGMENT)  # mov ax, data
    setup += b"\x8e\xd8"  # mov ds, ax
    setup += b"\x8e\xd0"  # mov ss, ax
    setup += b"\xbc" + struct.pack("<I", LOAD_ADDRESS)  # mov esp, 0x7c00     below the code
    setup += b"\xb3" + FIRST_LETTER  # mov bl, 'A'
    next_pass = _send_letter()
    next_pass += b"\xfe\xc3"  # inc bl
    next_pass += b"\x80\xfb" + bytes([LAST_LETTER[0] + 1])  # cmp bl, 'Z' + 1
    next_pass += b"\x75\x02"  # jne over the next instruction
    next_pass += b"\xb3" + FIRST_PASS_LETTER  # mov bl, 'B'
    next_pass += b"\xbe" + struct.pack("<I", MIB)  # mov esi, 1 MiB
    page = b"\xfe\x06"  # inc byte [esi]
    if delay_loops:
        page += b"\xb9" + struct.pack("<I", delay_loops)  # mov ecx, delay
        page += b"\x49"  # dec ecx
        page += b"\x75\xfd"  # jnz to the dec
    page += b"\x81\xc6" + struct.pack("<I", PAGE_BYTES)  # add esi, 4096
    page += b"\x81\xfe" + struct.pack("<I", end_bytes)  # cmp esi, end
    page += b"\x72" + _backwards(len(page) + 2)  # jb page
    body = next_pass + page
    return setup + body + b"\xeb" + _backwards(len(body) + 2)  # jmp next_pass


def _send_letter() -> bytes:
    """Waits until COM1 takes a byte, then sends bl."""
    code = b"\x66\xba" + struct.pack("<H", _COM1 + 5)  # mov dx, line status register
    code += b"\xec"  # in al, dx
    code += b"\xa8\x20"  # test al, 0x20       transmitter empty
    code += b"\x74\xfb"  # jz to the in
    code += b"\x66\xba" + struct.pack("<H", _COM1)  # mov dx, data register
    code += b"\x88\xd8"  # mov al, bl
    code += b"\xee"  # out dx, al
    return code


def _backwards(distance_bytes: int) -> bytes:
    """The operand of a short jump to `distance_bytes` before its end."""
    assert 0 < distance_bytes <= 128, distance_bytes
    return struct.pack("<b", -distance_bytes)
