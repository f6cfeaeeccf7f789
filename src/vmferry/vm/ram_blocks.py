"""Where a QEMU process keeps its guest's memory: its blocks, their addresses in the process, the files behind them.

Theory of operation
-------------------
QEMU tells its RAM blocks as a table for people (`info ramblock`, over QMP x-query-ramblock). Newer versions add each
block's address in the process (HVA); QEMU 7.2 does not. There the address is found in /proc/PID/maps by what QEMU's
allocator leaves behind: a mapping of exactly the block's length, for anonymous memory beginning at a multiple of 2 MiB
and followed by one page without any rights (QEMU, util/mmap-alloc.c and util/oslib-posix.c).

Rule 1: the table is made for eyes and may change; what is not exactly as known is refused, never guessed at.
Rule 2: two blocks of one length, or two mappings of it, cannot be told apart: such blocks have no address.
Rule 3: everything but `open_file` only looks at text.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vmferry.errors import QemuError

_COLUMNS: Final = ["Block", "Name", "PSize", "Offset", "Used", "Total"]
_LINE = re.compile(
    r"\s*(?P<name>\S(?:.*\S)?)\s+(?P<size>\d+) (?P<unit>[KMG]i)?B"
    r"\s+0x(?P<offset>[0-9a-f]{16})\s+0x(?P<used>[0-9a-f]{16})\s+0x(?P<total>[0-9a-f]{16})"
    r"(?:\s+0x(?P<address>[0-9a-f]{16})\s+(?P<mode>ro|rw))?\s*"
)
_UNITS: Final = {None: 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_MAP = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<rights>[-r][-w][-x][ps]) (?P<offset>[0-9a-f]+)"
    r" (?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+)\s*(?P<path>.*)"
)
_GPA = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((?P<name>.+)\) is 0x(?P<address>[0-9a-f]+)\s*")
_ALIGNMENT: Final = 2 << 20
_GUARD_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class RamBlockLine:
    """One block as QEMU tells it. Sizes in bytes; `used_bytes` is what migrates. `address`: None before QEMU 8.1."""

    name: str
    page_bytes: int
    used_bytes: int
    total_bytes: int
    address: int | None = None


@dataclass(frozen=True, slots=True)
class MapLine:
    """One mapping of a process. `device`: (major, minor)."""

    start: int
    end: int
    rights: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str

    @property
    def is_shared(self) -> bool:
        """Writes go to the file."""
        return self.rights.endswith("s")

    def goes_on(self, before: MapLine) -> bool:
        """Whether this is the next piece of what `before` maps."""
        return (
            self.start == before.end
            and (self.device, self.inode, self.is_shared) == (before.device, before.inode, before.is_shared)
            and (self.inode == 0 or self.offset == before.offset + before.end - before.start)
        )


@dataclass(frozen=True, slots=True)
class FilePlace:
    """A block inside of a shared file: the first byte's offset there, and what names the file."""

    path: str
    offset_bytes: int
    device: tuple[int, int]
    inode: int


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """A block and where its content is. `address`: in the process, None if not known; `file`: None if private."""

    name: str
    used_bytes: int
    page_bytes: int
    address: int | None
    file: FilePlace | None


def parse_ramblock(text: str) -> tuple[RamBlockLine, ...]:
    """QEMU's table. Raises QemuError when it is not exactly of the known form."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or lines[0].split()[: len(_COLUMNS)] != _COLUMNS:
        raise QemuError("QEMU tells its RAM blocks in a form that is not known", retry="no", cause=text[:200])
    found = []
    for line in lines[1:]:
        match = _LINE.fullmatch(line)
        if match is None:
            raise QemuError(f"QEMU tells a RAM block in a form that is not known: {line.strip()!r}", retry="no")
        page_bytes = int(match["size"]) * _UNITS[match["unit"]]
        used, total = int(match["used"], 16), int(match["total"], 16)
        if not 0 < used <= total or used % 4096:
            raise QemuError(f"the RAM block {match['name']} has a length of {used} of {total} bytes", retry="no")
        address = int(match["address"], 16) if match["address"] else None
        found.append(RamBlockLine(match["name"], page_bytes, used, total, address))
    if not found or len({each.name for each in found}) != len(found):
        raise QemuError("QEMU tells no RAM block, or one of them twice", retry="no")
    return tuple(found)


def parse_maps(text: str) -> tuple[MapLine, ...]:
    """/proc/PID/maps. Raises QemuError when a line is not of the known form."""
    found = []
    for line in text.splitlines():
        match = _MAP.fullmatch(line)
        if match is None:
            raise QemuError(f"a line of /proc/PID/maps is not of the known form: {line!r}", retry="no")
        start, end, offset, major, minor = (int(match[k], 16) for k in ("start", "end", "offset", "major", "minor"))
        path = match["path"].removesuffix(" (deleted)")
        found.append(MapLine(start, end, match["rights"], offset, (major, minor), int(match["inode"]), path))
    return tuple(found)


def parse_gpa2hva(text: str) -> tuple[str, int]:
    """(name of the memory region, address) of what HMP's `gpa2hva` answers. Raises QemuError."""
    match = _GPA.fullmatch(text)
    if match is None:
        raise QemuError(f"QEMU does not tell where guest memory is: {text.strip()!r}", retry="no")
    return match["name"], int(match["address"], 16)


def locate(blocks: Sequence[RamBlockLine], maps: Sequence[MapLine]) -> tuple[BlockPlace, ...]:
    """Each block with its address and its file, as far as they are known for certain.

    Raises QemuError when a block is not mapped where QEMU says: then nothing of all this can be believed.
    """
    found = _addresses_by_length(blocks, maps)
    places = []
    for block in blocks:
        address = block.address if block.address is not None else found.get(block.name)
        file = None
        if address is not None:
            run = _run_at(maps, address, block.used_bytes)
            if run is None:
                raise QemuError(f"the RAM block {block.name} is not mapped at {address:#x}", retry="no")
            if run.is_shared and run.inode:
                file = FilePlace(run.path, run.offset + address - run.start, run.device, run.inode)
        places.append(BlockPlace(block.name, block.used_bytes, block.page_bytes, address, file))
    return tuple(places)


def _run_at(maps: Sequence[MapLine], address: int, length: int) -> MapLine | None:
    """The mapping that holds these bytes, its pieces joined; None if they are not all mapped readable."""
    joined: MapLine | None = None
    for piece in maps:
        if joined is not None and piece.goes_on(joined):
            joined = MapLine(
                joined.start, piece.end, joined.rights, joined.offset, joined.device, joined.inode, joined.path
            )
        elif piece.start <= address < piece.end:
            joined = piece
        elif joined is not None:
            break
        if joined is not None and address + length <= joined.end:
            return joined if joined.rights.startswith("r") else None
    return None


def _addresses_by_length(blocks: Iterable[RamBlockLine], maps: Sequence[MapLine]) -> dict[str, int]:
    """Blocks without a told address whose length fits exactly one mapping, and whose mapping fits no other block."""
    unknown = [block for block in blocks if block.address is None]
    lengths = Counter(block.total_bytes for block in unknown)
    found = {}
    for block in unknown:
        fits = [each.start for each, after in zip(maps, [*maps[1:], None], strict=True) if _fits(each, after, block)]
        if len(fits) == 1 and lengths[block.total_bytes] == 1:
            found[block.name] = fits[0]
    return found


def _fits(mapping: MapLine, after: MapLine | None, block: RamBlockLine) -> bool:
    if mapping.end - mapping.start != block.total_bytes or not mapping.rights.startswith("rw"):
        return False
    if mapping.inode:
        return mapping.offset == 0
    has_guard = after is not None and after.start == mapping.end and after.rights.startswith("---")
    return (
        mapping.start % _ALIGNMENT == 0 and has_guard and after is not None and after.end - after.start >= _GUARD_BYTES
    )


def open_file(pid: int, place: FilePlace) -> int:
    """A descriptor (to read) of the file behind a block, also of one without a name (memfd). The caller closes it.

    Raises OSError when this user may not, or when process `pid` holds no descriptor of it any more.
    """
    directory = f"/proc/{pid}/fd"
    for entry in os.listdir(directory):
        try:
            found = os.stat(f"{directory}/{entry}")
            if found.st_ino != place.inode or (os.major(found.st_dev), os.minor(found.st_dev)) != place.device:
                continue
            return os.open(f"{directory}/{entry}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # closed since the directory was read
    raise FileNotFoundError(f"process {pid} holds no descriptor of {place.path}")
