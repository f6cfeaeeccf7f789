"""A guest's memory as an agent can reach it without QEMU's help: found while QEMU answers, read when it does not.

Theory of operation
-------------------
`find` asks a QEMU for its RAM blocks and /proc for where they are. `read_living` opens the memory of a living process
(/proc/PID/mem); it needs nothing of QEMU once the blocks are known. `remember` prepares for the death of the process:
it takes a descriptor of each shared RAM file, which keeps even a nameless one alive, and copies the small blocks that
are private (firmware, tables, video memory). Both give a `Memory`: descriptors and offsets, of which `image` makes what
an endpoint can send from.

Rule 1: memory is worth reading only while its guest stands still. Who calls makes sure of that (in postcopy the
        source's guest was stopped for good, so its memory does not change any more).
Rule 2: a process is asked by its identity, before and after its memory was opened: a process id that was reused is
        noticed.
Rule 3: a block that cannot be reached is named with the reason and is not in the image: whoever needs its pages
        learns it before anything is sent.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.agent.machine import Machine
from vmferry.errors import QemuError, Unfit
from vmferry.qmp.errors import QmpCommandError
from vmferry.vm import ram_blocks
from vmferry.vm import spawn as vm_spawn
from vmferry.vm.ram_blocks import BlockPlace, FilePlace, RamBlockLine
from vmferry.vm.spawn import ProcessIdentity

if TYPE_CHECKING:
    from vmferry.engine.image import Image

log = logging.getLogger("vmferry.agent")

_PROBE_ADDRESS = 0x100000
"""Main memory of every PC: where QEMU itself says that it is must agree with what was found."""
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """The blocks of one process's guest and where they are; plain values, fit for a journal."""

    identity: ProcessIdentity
    blocks: tuple[BlockPlace, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Used length in bytes, by block."""
        return {block.name: block.used_bytes for block in self.blocks}

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> GuestMemory:
        """What `to_wire` gave."""
        blocks = []
        for each in wire["blocks"]:
            file = each["file"]
            place = None if file is None else FilePlace(**{**file, "device": tuple(file["device"])})
            blocks.append(BlockPlace(**{**each, "file": place}))
        return cls(ProcessIdentity(**wire["identity"]), tuple(blocks))


@dataclass(frozen=True, slots=True)
class Piece:
    """One block's content: `fd` at `offset_bytes`. The descriptor belongs to the `Memory`."""

    name: str
    used_bytes: int
    page_bytes: int
    fd: int
    offset_bytes: int


@dataclass(slots=True)
class Memory:
    """What can be read of a guest's memory. `missing`: blocks out of reach, with the reason."""

    identity: ProcessIdentity
    pieces: list[Piece] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Used length in bytes of every block, the missing ones too."""

    def image(self) -> Image:
        """An image that reads from here. It has descriptors of its own; close it."""
        from vmferry.engine.image import ForeignMemory, Image, ImageBlock
        from vmferry.wire.events import RamBlock

        image = Image()
        for piece in self.pieces:
            store = ForeignMemory(os.dup(piece.fd), piece.offset_bytes)
            page_bytes = None if piece.page_bytes == 4096 else piece.page_bytes
            block = ImageBlock(RamBlock(piece.name, piece.used_bytes, page_bytes), store)
            block.have[:] = True
            block.touched[:] = True
            image.blocks[piece.name] = block
        return image

    def close(self) -> None:
        """Gives the descriptors back. May be called twice."""
        for fd in {piece.fd for piece in self.pieces}:
            os.close(fd)
        self.pieces.clear()


async def find(machine: Machine) -> GuestMemory:
    """Asks QEMU and /proc. Changes nothing. Raises QemuError when QEMU does not answer, or not as it is known to."""
    lines = await block_lines(machine)
    text = await asyncio.to_thread(_maps, machine)
    places = ram_blocks.locate(lines, ram_blocks.parse_maps(text))
    if any(line.address is None for line in lines):
        await _check(machine, places)
    return GuestMemory(machine.identity, places)


async def sizes(machine: Machine) -> dict[str, int]:
    """Used length in bytes of every block of the guest, by name. Raises like `find`."""
    return {line.name: line.used_bytes for line in await block_lines(machine)}


async def block_lines(machine: Machine) -> tuple[RamBlockLine, ...]:
    """The blocks as QEMU tells them. Raises QemuError."""
    return ram_blocks.parse_ramblock(await _table(machine))


async def _table(machine: Machine) -> str:
    try:
        return str((await machine.execute("x-query-ramblock"))["human-readable-text"])
    except QmpCommandError as error:
        if error.qmp_class != "CommandNotFound":
            raise
        return str(await machine.execute("human-monitor-command", {"command-line": "info ramblock"}))


def _maps(machine: Machine) -> str:
    try:
        return Path(f"/proc/{machine.pid}/maps").read_text()
    except OSError as error:
        raise QemuError(
            f"the memory map of process {machine.pid} cannot be read: {error.strerror}", cause=error
        ) from error


async def _check(machine: Machine, places: tuple[BlockPlace, ...]) -> None:
    """Addresses that were concluded must agree with the one that QEMU tells of main memory. Raises QemuError."""
    text = str(await machine.execute("human-monitor-command", {"command-line": f"gpa2hva {_PROBE_ADDRESS:#x}"}))
    name, address = ram_blocks.parse_gpa2hva(text)
    for place in places:
        if place.name == name and place.address is not None and place.address + _PROBE_ADDRESS != address:
            raise QemuError(
                f"{machine.vm}: block {name} was looked for at {place.address:#x}; it is elsewhere", retry="no"
            )


def read_living(found: GuestMemory) -> Memory:
    """The memory of the living process. Blocks; run it in a thread. Raises QemuError when exactly that process is gone,
    Unfit when this user may not read it."""
    pid = found.identity.pid
    try:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if isinstance(error, FileNotFoundError | ProcessLookupError):
            raise QemuError(f"process {pid} is gone, and its memory with it", retry="no", cause=error) from error
        raise Unfit(f"the memory of process {pid} cannot be read: {error.strerror}", cause=error) from error
    memory = Memory(found.identity, sizes=found.sizes)
    try:
        _require_alive(found.identity)  # after the opening: so it was this process that was opened
        for block in found.blocks:
            if block.address is None:
                memory.missing[block.name] = "its address in the process is not known"
            else:
                memory.pieces.append(Piece(block.name, block.used_bytes, block.page_bytes, fd, block.address))
    except BaseException:
        os.close(fd)
        raise
    if not memory.pieces:
        os.close(fd)
    return memory


def remember(found: GuestMemory) -> Memory:
    """What will outlive the process: descriptors of its shared files, copies of its small private blocks.

    Blocks; run it in a thread, and only while the guest stands still. Raises like `read_living`; nothing is held then.
    """
    living = read_living(found)
    kept = Memory(found.identity, missing=dict(living.missing), sizes=found.sizes)
    files = {block.name: block.file for block in found.blocks}
    left_bytes = limits.RESCUE_COPY_BYTES_MAX
    try:
        for piece in living.pieces:
            place = files[piece.name]
            if place is not None:
                try:
                    fd = ram_blocks.open_file(found.identity.pid, place)
                except OSError as error:
                    kept.missing[piece.name] = f"its file {place.path} cannot be opened: {error}"
                    continue
                kept.pieces.append(Piece(piece.name, piece.used_bytes, piece.page_bytes, fd, place.offset_bytes))
            elif piece.used_bytes > left_bytes:
                kept.missing[piece.name] = "it is private memory of the process and too big to be copied"
            else:
                left_bytes -= piece.used_bytes
                kept.pieces.append(Piece(piece.name, piece.used_bytes, piece.page_bytes, _copy(piece), 0))
        _require_alive(found.identity)
    except OSError as error:
        kept.close()
        raise QemuError(f"process {found.identity.pid} ended while its memory was read", cause=error) from error
    except BaseException:
        kept.close()
        raise
    finally:
        living.close()
    return kept


def _copy(piece: Piece) -> int:
    fd = os.memfd_create(f"vmferry {piece.name}", os.MFD_CLOEXEC)
    try:
        for at in range(0, piece.used_bytes, _COPY_BYTES):
            wanted = min(_COPY_BYTES, piece.used_bytes - at)
            data = os.pread(piece.fd, wanted, piece.offset_bytes + at)
            if len(data) != wanted:
                raise OSError(f"memory ends at {piece.offset_bytes + at + len(data):#x}")
            os.pwrite(fd, data, at)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_alive(identity: ProcessIdentity) -> None:
    pidfd = vm_spawn.open_process(identity)
    if pidfd is None:
        raise QemuError(f"process {identity.pid} is gone, and its memory with it", retry="no")
    os.close(pidfd)
