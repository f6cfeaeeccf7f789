"""The rescue tool for a destination, on real QEMUs of both generations: its pages come out of its source's memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.rescue_guests import RAM_MIB, SLOW, VERSIONS, Guest, Starter, begin_postcopy, equal, went_on
from vmferry.agent import guest_memory, rescue_feed
from vmferry.agent.guest_memory import Memory
from vmferry.agent.machine import Machine
from vmferry.errors import GuestHeld, RescueRefused, VmferryError
from vmferry.qmp.errors import QmpCommandError
from vmferry.testing.hosts import NEWEST, OLDEST
from vmferry.testing.qemus import ram_size
from vmferry.testing.relay import Relay
from vmferry.testing.stream_peers import MIB

pytestmark = pytest.mark.real


@pytest.fixture
def start() -> Iterator[Starter]:
    """Starts QEMUs; all are ended afterwards."""
    with Starter() as starter:
        yield starter


def shared_ram(kind: str, start: Starter, name: str) -> tuple[str, ...]:
    """Main memory in a file that others can map; each QEMU has one of its own."""
    size = f"size={ram_size(RAM_MIB).upper()},share=on"
    if kind == "memfd":
        return ("-object", f"memory-backend-memfd,id=ram,{size}")
    # Postcopy wants the file on tmpfs.
    return ("-object", f"memory-backend-file,id=ram,mem-path={start.shm_folder}/{name},{size}")


def pair(start: Starter, source: str, destination: str, *, kind: str = "", paused: bool = True) -> tuple[Guest, Guest]:
    """A source and a destination in postcopy-active; with `kind` their main memory is in shared files."""
    machine = "pc-i440fx-7.2" if source != destination else "pc"
    guests = []
    for version, name in ((source, "ram-a"), (destination, "ram-b")):
        more = shared_ram(kind, start, name) if kind else ()
        incoming = name == "ram-b"
        if incoming and paused:
            more = (*more, "-S")
        with_ram = f"{machine},memory-backend=ram" if kind else machine
        guests.append(start(version, more=more, machine=with_ram, incoming=incoming))
    begin_postcopy(*guests)
    return guests[0], guests[1]


def number(guest: Guest) -> tuple[int, int]:
    return guest.peer.number[0], guest.peer.number[1]


async def _remember(machine: Machine) -> Memory:
    found = await guest_memory.find(machine)
    assert found == guest_memory.GuestMemory.from_wire(found.to_wire())
    return await asyncio.to_thread(guest_memory.remember, found)


def kill_source(source: Guest, destination: Guest) -> Memory:
    """What the source's agent kept of it; the source is dead, its destination waits."""
    memory = source.with_machine(_remember)
    source.kill()
    destination.peer.until_status("postcopy-paused")
    return memory


def main_memory(memory: Memory) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Every page from 1 MiB on, as it was kept."""
    piece = max(memory.pieces, key=lambda each: each.used_bytes)
    data = os.pread(piece.fd, piece.used_bytes - MIB, piece.offset_bytes + MIB)
    return np.frombuffer(data, np.uint8).reshape(-1, 4096)


@pytest.mark.proves("S26")
@pytest.mark.parametrize(
    ("source_version", "version", "kind"),
    [(OLDEST, OLDEST, "memfd"), (NEWEST, NEWEST, "memfd"), (NEWEST, NEWEST, "file"), (OLDEST, NEWEST, "memfd")],
)
def test_x31_a_destination_lives_on_from_the_ram_file_of_its_dead_source(
    source_version: str, version: str, kind: str, start: Starter
) -> None:
    source, destination = pair(start, source_version, version, kind=kind)
    with contextlib.closing(kill_source(source, destination)) as memory:
        assert memory.missing == {}
        told: list[dict[str, Any]] = []
        report = destination.with_machine(
            lambda machine: rescue_feed.feed(machine, memory, source_version=number(source), tell=told.append)
        )
        assert (report.status, report.run_state) == ("completed", "paused")
        assert report.pages > 1000
        assert told[-1]["pages"] == report.pages
        assert equal(main_memory(memory), destination.memory())
    print(f"\nfeed from {kind}, QEMU {version}: {report.pages} pages in {report.ms:.0f} ms")
    destination.peer.execute("cont")
    assert destination.goes_on_from(source)


@pytest.mark.parametrize("version", VERSIONS)
def test_x31_a_guest_that_waits_for_its_pages_goes_on(version: str, start: Starter) -> None:
    source, destination = pair(start, version, version, kind="memfd", paused=False)
    with contextlib.closing(kill_source(source, destination)) as memory:
        destination.with_machine(lambda machine: rescue_feed.feed(machine, memory))  # nobody knows the version
        assert destination.peer.status == "completed"
        assert destination.goes_on_from(source)
        destination.peer.execute("stop")
        assert went_on(main_memory(memory), destination.memory())
    # An ordinary guest: it could be migrated again.
    assert not destination.peer.execute("query-migrate").get("blocked-reasons")


@pytest.mark.parametrize("version", VERSIONS)
def test_x32_a_destination_lives_on_from_the_memory_of_a_source_that_hangs(version: str, start: Starter) -> None:
    """Nobody asks the source's QEMU anything: the process is stopped, and its memory is private."""
    source, destination = pair(start, version, version)
    found = source.with_machine(guest_memory.find)
    assert all(block.file is None for block in found.blocks)
    source.peer.process.send_signal(signal.SIGSTOP)
    try:
        destination.peer.execute("migrate-pause")
        destination.peer.until_status("postcopy-paused")
        with contextlib.closing(guest_memory.read_living(found)) as memory:
            assert memory.missing == {}
            before = main_memory(memory)
            report = destination.with_machine(lambda machine: rescue_feed.feed(machine, memory))
        assert report.status == "completed"
        assert equal(before, destination.memory())
        print(f"\nfeed from /proc/PID/mem, QEMU {version}: {report.pages} pages in {report.ms:.0f} ms")
    finally:
        source.peer.process.send_signal(signal.SIGCONT)
    destination.peer.execute("cont")
    assert destination.goes_on_from(source)


def test_x32_a_source_of_7_2_that_was_cancelled_in_postcopy_paused_still_has_the_pages(start: Starter) -> None:
    """QEMU 7.2 accepts the cancel and cancels for ever: nobody can resume it any more (X4)."""
    source, destination = pair(start, OLDEST, OLDEST)
    source.peer.execute("migrate-pause")
    source.peer.until_status("postcopy-paused")
    destination.peer.until_status("postcopy-paused")
    source.peer.execute("migrate_cancel")
    source.peer.until_status("cancelling")

    async def both(machine: Machine) -> tuple[Memory, str]:
        found = await guest_memory.find(machine)
        memory = await asyncio.to_thread(guest_memory.read_living, found)
        await rescue_feed.require_still(machine)
        return memory, machine.version_text

    memory, _ = source.with_machine(both)
    with contextlib.closing(memory):
        before = source.memory()
        destination.with_machine(lambda machine: rescue_feed.feed(machine, memory, source_version=(7, 2)))
        assert equal(before, destination.memory())
    destination.peer.execute("cont")
    assert destination.goes_on_from(source)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stand_in_that_dies_on_the_way_is_followed_by_a_second_one(version: str, start: Starter) -> None:
    source, destination = pair(start, version, version, kind="memfd")
    with contextlib.closing(kill_source(source, destination)) as memory:

        async def give_up_half_way(machine: Machine) -> None:
            begun = asyncio.Event()
            task = asyncio.create_task(
                rescue_feed.feed(machine, memory, tell=lambda _: begun.set(), source_version=number(source))
            )
            await begun.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        destination.with_machine(give_up_half_way)
        # On a busy host it may have been over before it was given up.
        if destination.peer.until_status("postcopy-paused", "completed") == "postcopy-paused":
            destination.with_machine(lambda machine: rescue_feed.feed(machine, memory))
        assert destination.peer.status == "completed"
        assert equal(main_memory(memory), destination.memory())
    destination.peer.execute("cont")
    assert destination.goes_on_from(source)


@pytest.mark.proves("S53")
def test_p26_a_source_that_failed_and_sticks_still_feeds_the_guest_that_ran(start: Starter) -> None:
    """The proof never came back, the destination ran by itself and has the disk; then the connection broke (X8a)."""
    image = start.folder / "shared.img"
    image.write_bytes(bytes(MIB))
    disk = ("-drive", f"file={image},format=raw,if=ide,index=1")
    source, destination = start(NEWEST, more=disk), start(NEWEST, more=disk, incoming=True)
    for guest in (source, destination):
        guest.peer.set_up("postcopy-ram")
    source.peer.execute("migrate-set-parameters", {"max-bandwidth": SLOW, "max-postcopy-bandwidth": SLOW})
    destination.peer.migrate_incoming(f"unix:{destination.peer.folder}/in")
    with Relay(f"{destination.peer.folder}/in") as relay:
        proof = relay.to_client.at_pattern(bytes.fromhex("0002000400000042"), relay.to_client.hold)
        source.peer.migrate("tcp:{}:{}".format(*relay.address))
        source.peer.until_status("active")
        source.peer.execute("migrate-start-postcopy")
        proof.wait(20)
        destination.peer.until_runstate("running")
        relay.cut()
        source.peer.until_status("failed")
        destination.peer.until_status("postcopy-paused")
    assert source.peer.runstate == "finish-migrate"
    with pytest.raises(QmpCommandError):
        source.peer.migrate("tcp:127.0.0.1:1", resume=True)

    async def read(machine: Machine) -> Memory:
        await rescue_feed.require_still(machine)
        return await asyncio.to_thread(guest_memory.read_living, await guest_memory.find(machine))

    with contextlib.closing(source.with_machine(read)) as memory:
        before = main_memory(memory)
        report = destination.with_machine(lambda machine: rescue_feed.feed(machine, memory))
    assert (report.status, report.run_state) == ("completed", "running")
    assert destination.goes_on_from(source)
    destination.peer.execute("stop")
    assert went_on(before, destination.memory())


def test_a_source_that_qemu_started_again_is_no_source_of_pages(start: Starter) -> None:
    """A newer QEMU that has sent its last page takes its guest back when the connection breaks, though the other runs.
    What it has changed since must not reach the destination, also when it was stopped meanwhile."""
    small: dict[str, Any] = {"ram_mib": 16, "touch_mib": 6}  # so that the relay takes all of it
    source, destination = start(NEWEST, **small), start(NEWEST, incoming=True, **small)
    for guest in (source, destination):
        guest.peer.set_up("postcopy-ram")
    destination.peer.migrate_incoming(f"unix:{destination.peer.folder}/in")
    with Relay(f"{destination.peer.folder}/in") as relay:
        relay.to_target.throttle(4 * MIB)
        source.peer.migrate("tcp:{}:{}".format(*relay.address))
        source.peer.until_status("active")
        relay.to_target.throttle(MIB)  # seconds until the destination has all: time to hold back what it says of it
        source.peer.execute("migrate-start-postcopy")
        destination.peer.until_runstate("running")
        relay.to_client.hold()  # the destination may get everything, but its result never arrives
        source.peer.until(lambda: source.peer.execute("query-migrate")["ram"]["remaining"] == 0, "everything sent", 60)
        relay.cut()
        source.peer.until_status("failed")
        destination.peer.until_status("postcopy-paused", "completed")
    assert source.peer.until_runstate("running") == destination.peer.runstate == "running"
    source.peer.execute("stop")
    with pytest.raises(RescueRefused, match="has run since"):
        source.with_machine(rescue_feed.require_still)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_destination_that_dies_while_it_is_fed_is_told_and_the_memory_is_still_there(
    version: str, start: Starter
) -> None:
    source, destination = pair(start, version, version, kind="memfd")
    with contextlib.closing(kill_source(source, destination)) as memory:
        before = main_memory(memory)

        async def dies(machine: Machine) -> None:
            await rescue_feed.feed(machine, memory, tell=lambda _: destination.kill(), source_version=number(source))

        with pytest.raises(VmferryError) as error:
            destination.with_machine(dies)
        assert error.value.guest != "unharmed"
        assert (before == main_memory(memory)).all()


def test_who_lacks_a_page_that_cannot_be_had_is_told_so_and_waits_on(start: Starter) -> None:
    source, destination = pair(start, NEWEST, NEWEST)  # main memory is private, and too big to be copied
    with contextlib.closing(kill_source(source, destination)) as memory:
        assert list(memory.missing) == ["pc.ram"]
        with pytest.raises(GuestHeld) as held:
            destination.with_machine(lambda machine: rescue_feed.feed(machine, memory))
    assert held.value.retry == "no"
    assert "out of reach" in str(held.value.cause)
    assert destination.peer.until_status("postcopy-paused") == "postcopy-paused"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_destination_that_is_served_is_left_alone(version: str, start: Starter) -> None:
    source, destination = pair(start, version, version, kind="memfd")
    with contextlib.closing(source.with_machine(_remember)) as memory, pytest.raises(RescueRefused, match="postcopy"):
        destination.with_machine(lambda machine: rescue_feed.feed(machine, memory))
    assert (source.peer.status, destination.peer.status) == ("postcopy-active", "postcopy-active")
    source.peer.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
    source.peer.until_status("completed")


def test_a_source_whose_guest_runs_is_no_source_of_pages(start: Starter) -> None:
    source = start(NEWEST)
    with pytest.raises(RescueRefused, match="runs"):
        source.with_machine(rescue_feed.require_still)
