"""Memory of a process is read while it lives, and what would outlive it is kept. The process is this one."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from vmferry import limits
from vmferry.agent import guest_memory
from vmferry.agent.guest_memory import GuestMemory
from vmferry.errors import QemuError
from vmferry.vm import spawn as vm_spawn
from vmferry.vm.ram_blocks import BlockPlace, FilePlace
from vmferry.vm.spawn import ProcessIdentity

PAGES = 3
SIZE = PAGES * 4096
CONTENT = bytes(range(256)) * (SIZE // 256)


class Ram:
    """A piece of this process's memory, in a shared file or private."""

    def __init__(self, name: str, *, shared: bool) -> None:
        self.name = name
        self.fd = os.memfd_create(name) if shared else -1
        if shared:
            os.ftruncate(self.fd, SIZE + 4096)
        self.map = mmap.mmap(self.fd, SIZE, flags=mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE, offset=0)
        self.map[:] = CONTENT

    def place(self) -> BlockPlace:
        view = ctypes.c_char.from_buffer(self.map)
        address = ctypes.addressof(view)
        del view
        file = None
        if self.fd >= 0:
            found = os.fstat(self.fd)
            file = FilePlace("/memfd", 0, (os.major(found.st_dev), os.minor(found.st_dev)), found.st_ino)
        return BlockPlace(self.name, SIZE, 4096, address, file)

    def close(self) -> None:
        self.map.close()
        if self.fd >= 0:
            os.close(self.fd)


@pytest.fixture
def ram() -> Iterator[tuple[Ram, Ram]]:
    made = Ram("main", shared=True), Ram("rom", shared=False)
    yield made
    for each in made:
        each.close()


def found(*places: BlockPlace) -> GuestMemory:
    identity = vm_spawn.identify(os.getpid())
    assert identity is not None
    return GuestMemory(identity, places)


def pages(memory: guest_memory.Memory) -> dict[str, bytes]:
    image = memory.image()
    try:
        for block in image:
            assert block.have.all()
        return {block.name: np.asarray(block.store.read(0, block.count)).tobytes() for block in image}
    finally:
        image.close()


def test_a_living_process_is_read_as_it_is_now(ram: tuple[Ram, Ram]) -> None:
    memory = guest_memory.read_living(found(*(each.place() for each in ram)))
    try:
        assert pages(memory) == {"main": CONTENT, "rom": CONTENT}
        ram[1].map[:2] = b"xy"
        assert pages(memory)["rom"] == b"xy" + CONTENT[2:]
        assert memory.sizes == {"main": SIZE, "rom": SIZE}
    finally:
        memory.close()
    memory.close()


def test_what_was_kept_outlives_the_mapping_and_the_file(ram: tuple[Ram, Ram]) -> None:
    memory = guest_memory.remember(found(*(each.place() for each in ram)))
    try:
        for each in ram:
            each.map[:1] = b"\xee"
        # The file is the same one; the copy is one.
        assert pages(memory) == {"main": b"\xee" + CONTENT[1:], "rom": CONTENT}
        assert memory.missing == {}
    finally:
        memory.close()


def test_what_is_too_big_or_nowhere_is_named(ram: tuple[Ram, Ram], monkeypatch: pytest.MonkeyPatch) -> None:
    lost = BlockPlace("lost", 4096, 4096, None, None)
    gone = BlockPlace("gone", SIZE, 4096, ram[0].place().address, FilePlace("/memfd", 0, (0, 0), 1))
    monkeypatch.setattr(limits, "RESCUE_COPY_BYTES_MAX", SIZE - 1)
    memory = guest_memory.remember(found(ram[0].place(), ram[1].place(), lost, gone))
    try:
        assert [piece.name for piece in memory.pieces] == ["main"]
        assert {name: text.split()[-1] for name, text in memory.missing.items()}.keys() == {"rom", "lost", "gone"}
        assert "too big" in memory.missing["rom"]
        assert memory.sizes["rom"] == SIZE
    finally:
        memory.close()


def test_another_process_with_the_same_number_is_not_read(ram: tuple[Ram, Ram]) -> None:
    mine = found(ram[0].place())
    other = GuestMemory(
        ProcessIdentity(os.getpid(), mine.identity.start_time_ticks + 1, mine.identity.boot_id), mine.blocks
    )
    before = len(os.listdir("/proc/self/fd"))
    for read in (guest_memory.read_living, guest_memory.remember):
        with pytest.raises(QemuError, match="is gone"):
            read(other)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_never_was_is_gone() -> None:
    with pytest.raises(QemuError, match="is gone"):
        guest_memory.read_living(GuestMemory(ProcessIdentity(1 << 22, 1, ""), ()))


def test_memory_that_ends_early_is_no_copy(ram: tuple[Ram, Ram]) -> None:
    place = ram[1].place()
    assert place.address is not None
    wrong = BlockPlace("rom", 4096, 4096, 4096, None)  # nothing is mapped there
    with pytest.raises(QemuError, match="ended while"):
        guest_memory.remember(found(wrong))


def test_what_was_found_can_be_written_down(ram: tuple[Ram, Ram]) -> None:
    here = found(*(each.place() for each in ram))
    assert GuestMemory.from_wire(here.to_wire()) == here
    assert here.sizes == {"main": SIZE, "rom": SIZE}
