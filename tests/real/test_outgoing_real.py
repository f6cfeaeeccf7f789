"""Our own source against real destinations of both QEMU generations: the guest goes on, and its memory is the same."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.engine.image import Image
from vmferry.engine.incoming import Incoming
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import NEWEST, OLDEST
from vmferry.testing.stream_peers import MIB, WAIT_S, QemuPeer, Region, TlsPair, low_ram, unix_listener

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

VERSIONS = sorted({OLDEST, NEWEST}, key=[OLDEST, NEWEST].index)
GIB = 1024 * MIB
OLD_MACHINE = "pc-i440fx-7.2"
AT_ONCE, ON_ORDER, NEVER = (OutgoingOptions(postcopy=each) for each in ("at-once", "on-order", "never"))
WAYS = [(source, there) for source in VERSIONS for there in VERSIONS]


def machine_of(*versions: str) -> str:
    """One that all of them have."""
    return OLD_MACHINE if OLDEST in versions else "pc"


def ram_of(peer: QemuPeer) -> list[Region]:
    """All ordinary memory of a pc: what goes beyond 3 GiB is above 4 GiB."""
    if peer.ram_bytes <= 3 * GIB:
        return low_ram(peer.ram_bytes)
    return [*low_ram(3 * GIB), Region("pc.ram", 3 * GIB, 4 * GIB, peer.ram_bytes - 3 * GIB)]


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


@dataclass
class Run:
    """One image on its way to one destination."""

    image: Image
    peer: QemuPeer
    letters: bytes
    """What the guest had written when it was stopped."""
    outgoing: Outgoing = field(init=False)
    _number: int = 0

    def start(self, options: OutgoingOptions, *capabilities: str, tls: TlsPair | None = None, **parameters: Any) -> str:
        """The destination's address."""
        postcopy = [] if options.postcopy == "never" else ["postcopy-ram"]
        preempt = ["postcopy-preempt"] if options.preempt else []
        multifd = ["multifd"] if options.channels else []
        if options.channels:
            parameters["multifd_channels"] = options.channels
        if tls is not None:
            self.peer.execute("object-add", tls.destination_object())
            parameters["tls_creds"] = tls.destination_object()["id"]
        self.peer.set_up(*postcopy, *preempt, *multifd, *capabilities, **parameters)
        secure = {} if tls is None else {"tls": tls.client(), "server_name": tls.hostname}
        self.outgoing = Outgoing(self.image, options=options, **secure)  # type: ignore[arg-type]
        path = self.peer.folder / "in"
        self.peer.migrate_incoming(f"unix:{path}")
        self.outgoing.start(lambda: connect(path))
        return str(path)

    def until_alive(self) -> None:
        """The guest goes on exactly where it was: with the next letter, and the one after it. Raises LogError."""
        serial = self.peer.folder / "serial"

        def passes() -> int:
            return count_passes(self.letters + (serial.read_bytes() if serial.exists() else b""))

        wanted = count_passes(self.letters) + 2
        self.peer.until(lambda: passes() >= wanted, f"{wanted} passes", WAIT_S)

    def until_paused(self, round_no: int) -> None:
        assert self.outgoing.ledger.wait(Fact.LINK_LOST, timeout_s=WAIT_S, round_no=round_no)
        assert self.outgoing.outcome().status is S.POSTCOPY_PAUSED
        self.peer.until_status("postcopy-paused")

    def recover(self, dial: Callable[[Path], socket.socket] = connect) -> None:
        self._number += 1
        path = self.peer.folder / f"again{self._number}"
        self.peer.execute("migrate-recover", {"uri": f"unix:{path}"})
        self.outgoing.recover(lambda: dial(path))

    def finish(self, *, compare: bool = True) -> None:
        """It completes, the memory is the same, and the guest goes on where it was."""
        assert self.outgoing.ledger.wait(Fact.PEER_ACK, Fact.ERROR, timeout_s=WAIT_S) is Fact.PEER_ACK, str(
            self.outgoing.error
        )
        self.peer.until_status("completed")
        if compare:
            assert self.peer.runstate == "paused"
            assert self.peer.differing_pages(self.image, ram_of(self.peer)) == []
            self.peer.execute("cont")
        self.until_alive()
        self.outgoing.saw_running()
        outcome = self.outgoing.stop()
        assert (outcome.status, outcome.threads_left) == (S.COMPLETED, ())


def capture(peer: QemuPeer) -> Image:
    """The image of a guest, whose source stays as it is: stopped, with the same memory."""
    image = Image()
    incoming = Incoming(image)
    listener, uri = unix_listener(peer.folder / "out")
    incoming.listen(listener)
    peer.set_up()
    peer.migrate(uri)
    assert incoming.ledger.wait(Fact.ALL_SENT, Fact.ERROR, timeout_s=WAIT_S) is Fact.ALL_SENT, str(incoming.error)
    assert incoming.stop().threads_left == ()
    peer.until_status("completed")
    peer.until_runstate("postmigrate")
    if peer.ram_bytes < GIB:  # large ones are compared once, at the other end
        assert peer.differing_pages(image, ram_of(peer)) == []
    return image


@pytest.fixture
def make_run() -> Iterator[Callable[..., Run]]:
    """`make_run(source, destination)`: a guest of the one, stopped and kept, and the other waiting for it."""
    with ExitStack() as stack:

        def make(source: str, there: str, *, machine: str = "", paused: bool = True, **more: Any) -> Run:
            machine = machine or machine_of(source, there)
            with QemuPeer(source, machine=machine, **more) as peer:
                image = capture(peer)
                letters = (peer.folder / "serial").read_bytes()
                peer.until_runstate("postmigrate")
            stack.callback(image.close)
            options = ["-S"] if paused else []
            there_peer = QemuPeer(
                there, machine=machine, incoming=True, **{**more, "more": [*more.get("more", []), *options]}
            )
            run = Run(image, stack.enter_context(there_peer), letters)
            stack.callback(lambda: run.outgoing.stop())
            return run

        yield make


# --- precopy ------------------------------------------------------------------------------------------------------


@pytest.mark.conforms("31", "32", "33", "45", "46")
@pytest.mark.proves("S26")
@pytest.mark.parametrize("description", ["kept", "empty"])
@pytest.mark.parametrize(("source", "there"), WAYS)
def test_a_precopy(make_run: Callable[..., Run], source: str, there: str, description: str) -> None:
    """A guest of either generation on either generation, also with a description that says nothing."""
    run = make_run(source, there)
    if description == "empty":
        run.image.description = None
    run.start(NEVER)
    run.finish()


@pytest.mark.conforms("43")
@pytest.mark.proves("S87")
@pytest.mark.parametrize(("source", "there"), WAYS)
def test_a_precopy_with_multifd(make_run: Callable[..., Run], source: str, there: str) -> None:
    run = make_run(source, there)
    run.start(OutgoingOptions(channels=2))
    run.finish()


@pytest.mark.conforms("27")
@pytest.mark.parametrize("there", VERSIONS)
@pytest.mark.parametrize(
    "options", [NEVER, AT_ONCE, OutgoingOptions(channels=2)], ids=["precopy", "postcopy", "multifd"]
)
def test_tls(make_run: Callable[..., Run], tmp_path: Path, there: str, options: OutgoingOptions) -> None:
    run = make_run(there, there)
    run.start(options, tls=TlsPair(tmp_path))
    run.finish()


@pytest.mark.parametrize("there", VERSIONS)
def test_a_guest_with_several_blocks(make_run: Callable[..., Run], there: str) -> None:
    more = ["-object", "memory-backend-ram,id=extra,size=8M,share=on"]
    more += ["-device", "ivshmem-plain,memdev=extra,master=on", "-device", "VGA"]
    run = make_run(there, there, more=more)
    assert len(run.image.blocks) > 3
    run.start(AT_ONCE)
    run.finish()


# --- postcopy -----------------------------------------------------------------------------------------------------


@pytest.mark.conforms("33", "34", "37", "46")
@pytest.mark.proves("S25", "S28")
@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize(("source", "there"), WAYS)
def test_a_postcopy_at_once(make_run: Callable[..., Run], source: str, there: str, preempt: bool) -> None:
    run = make_run(source, there)
    run.start(OutgoingOptions(postcopy="at-once", preempt=preempt))
    run.finish()


@pytest.mark.conforms("37", "38")
@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("there", VERSIONS)
def test_a_guest_that_runs_while_its_memory_follows(make_run: Callable[..., Run], there: str, preempt: bool) -> None:
    """The background waits for pages that are not here, so that the guest gets there first."""
    run = make_run(there, there, paused=False)
    block = run.image.blocks["pc.ram"]
    have = block.have.copy()
    block.have[1000:12000] = False
    run.start(OutgoingOptions(postcopy="at-once", preempt=preempt))
    assert run.outgoing.ledger.wait(Fact.PACKAGE_LOADED, Fact.ERROR, timeout_s=WAIT_S) is Fact.PACKAGE_LOADED
    run.peer.until_runstate("running")
    block.have[:] = have
    run.image.announce_pages()
    run.finish(compare=False)
    assert run.outgoing.outcome().requests > 0


@pytest.mark.conforms("35")
@pytest.mark.parametrize("there", VERSIONS)
def test_a_postcopy_after_a_precopy_part(make_run: Callable[..., Run], there: str) -> None:
    run = make_run(there, there)
    block = run.image.blocks["pc.ram"]
    block.have[8000:] = False
    run.image.is_device_state_whole = False
    run.start(ON_ORDER)
    assert run.outgoing.ledger.wait(Fact.SETUP_DONE, Fact.ERROR, timeout_s=WAIT_S) is Fact.SETUP_DONE
    block.dirty[np.arange(0, 4000, 2)] = True  # 2000 rows to discard, more than one command takes
    block.have[:] = True
    run.outgoing.start_postcopy()
    run.image.is_device_state_whole = True
    run.image.announce_pages()
    run.finish()


@pytest.mark.conforms("43")
@pytest.mark.skipif(NEWEST == OLDEST, reason="only newer versions take multifd and postcopy together")
@pytest.mark.parametrize("machine", ["pc", OLD_MACHINE])
@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
def test_multifd_and_postcopy(make_run: Callable[..., Run], machine: str, preempt: bool) -> None:
    run = make_run(NEWEST, NEWEST, machine=machine)
    run.start(OutgoingOptions(postcopy="at-once", channels=2, preempt=preempt))
    run.finish()


# --- recovery -----------------------------------------------------------------------------------------------------


def half_way(run: Run, options: OutgoingOptions) -> None:
    """In postcopy, with pages that have not come."""
    block = run.image.blocks["pc.ram"]
    block.have[6000:] = False
    run.start(options)
    assert run.outgoing.ledger.wait(Fact.PACKAGE_LOADED, Fact.ERROR, timeout_s=WAIT_S) is Fact.PACKAGE_LOADED
    run.peer.until_status("postcopy-active")


@pytest.mark.conforms("40")
@pytest.mark.proves("S18")
@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("there", VERSIONS)
def test_two_cuts_and_two_recoveries(make_run: Callable[..., Run], there: str, preempt: bool) -> None:
    run = make_run(there, there)
    half_way(run, OutgoingOptions(postcopy="at-once", preempt=preempt))
    for round_no in (1, 2):
        run.outgoing.cut()
        run.until_paused(round_no)
        run.recover()
        assert run.outgoing.ledger.wait(Fact.RESUME_ACK, timeout_s=WAIT_S, round_no=round_no)
        run.peer.until_status("postcopy-active")
    run.image.blocks["pc.ram"].have[:] = True
    run.image.announce_pages()
    run.finish()


@pytest.mark.proves("S18")
@pytest.mark.parametrize("there", VERSIONS)
def test_a_connection_that_is_lost_again_before_it_has_resumed(make_run: Callable[..., Run], there: str) -> None:
    run = make_run(there, there)
    half_way(run, AT_ONCE)
    run.outgoing.cut()
    run.until_paused(1)

    mine, theirs = socket.socketpair()
    run.recover(lambda _: mine)
    with theirs, connect(run.peer.folder / "again1") as onward:
        theirs.settimeout(WAIT_S)
        onward.settimeout(WAIT_S)
        onward.sendall(theirs.recv(1 << 16))
        answer = onward.recv(1 << 16)
        theirs.sendall(answer[:-9])  # a bitmap, but not all of it
    assert run.outgoing.ledger.wait(Fact.LINK_LOST, timeout_s=WAIT_S, round_no=2)
    assert run.outgoing.outcome().status is S.POSTCOPY_PAUSED
    if run.peer.number < (9, 1):
        # It reads on from a connection that it has given up, and crashes; nothing that a source does can help it.
        assert run.peer.process.wait(WAIT_S) < 0
        return
    run.until_paused(2)
    run.recover()
    assert run.outgoing.ledger.wait(Fact.RESUME_ACK, timeout_s=WAIT_S, round_no=2)
    run.image.blocks["pc.ram"].have[:] = True
    run.image.announce_pages()
    run.finish()


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.conforms("41")
@pytest.mark.proves("S26", "S30", "S53")
@pytest.mark.parametrize("there", VERSIONS)
def test_a_destination_that_is_lost_before_it_has_loaded_loses_nothing(
    make_run: Callable[..., Run], there: str
) -> None:
    """The package is cut in two: it failed, the image is whole, and runs elsewhere."""
    run = make_run(there, there)
    mine, theirs = socket.socketpair()
    run.peer.set_up("postcopy-ram")
    path = run.peer.folder / "in"
    run.peer.migrate_incoming(f"unix:{path}")
    run.outgoing = Outgoing(run.image, options=AT_ONCE)
    run.outgoing.start(lambda: mine)
    data = bytearray()
    with theirs, connect(path) as onward:
        theirs.settimeout(WAIT_S)
        while b"timer" not in data:  # a device of the package
            data += theirs.recv(4096)
        onward.sendall(data[:-100])
    assert run.outgoing.ledger.wait(Fact.CLEANUP, timeout_s=WAIT_S)
    assert run.outgoing.stop().status is S.FAILED
    run.peer.process.kill()
    for block in run.image:
        assert block.have.all()
        block.sent[:] = False
    with QemuPeer(there, machine=run.peer.machine, incoming=True, more=["-S"]) as again:
        second = Run(run.image, again, run.letters)
        second.start(AT_ONCE)
        second.finish()


@pytest.mark.proves("S53")
@pytest.mark.parametrize("there", VERSIONS)
def test_a_killed_destination(make_run: Callable[..., Run], there: str) -> None:
    run = make_run(there, there)
    run.image.is_device_state_whole = False  # so it is in the middle
    run.start(NEVER)
    assert run.outgoing.ledger.wait(Fact.SETUP_DONE, Fact.ERROR, timeout_s=WAIT_S) is Fact.SETUP_DONE
    run.peer.process.kill()
    assert run.outgoing.ledger.wait(Fact.CLEANUP, timeout_s=WAIT_S)
    outcome = run.outgoing.stop()
    assert (outcome.status, outcome.threads_left) == (S.FAILED, ())
    assert run.image.has_all_pages


@pytest.mark.parametrize("options", [AT_ONCE, OutgoingOptions(channels=2)], ids=["postcopy", "multifd"])
def test_a_guest_of_4_gib(make_run: Callable[..., Run], options: OutgoingOptions) -> None:
    """Above 3 GiB the same block goes on at another address."""
    run = make_run(NEWEST, NEWEST, ram_mib=4096)
    assert run.image.total_bytes > 4096 * MIB
    run.start(options)
    run.finish()
