"""The rescue tools for a source, on real QEMUs of both generations: memory compared page by page."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rescue_guests import SLOW, VERSIONS, Guest, Starter, begin_postcopy, equal, renounced, went_on
from vmferry.agent import rescue
from vmferry.core.facts import Fact
from vmferry.engine.image import Image
from vmferry.engine.incoming import Incoming
from vmferry.engine.shared import IncomingOptions
from vmferry.engine.stand_in import ThrowAwaySink
from vmferry.errors import GuestHeld, QemuError, RescueRefused
from vmferry.qmp.errors import QmpCommandError
from vmferry.testing.hosts import NEWEST, OLDEST
from vmferry.testing.stream_peers import MIB, TlsPair, unix_listener

pytestmark = pytest.mark.real

FORBIDS_WRITE_BYTE = 201  # see vmferry.vm.image_locks


@pytest.fixture
def start() -> Iterator[Starter]:
    """Starts QEMUs; all are ended afterwards."""
    with Starter() as starter:
        yield starter


# --- bring back -------------------------------------------------------------------------------------------------


@pytest.mark.proves("S26", "S41", "S59", "S60")
@pytest.mark.parametrize("version", VERSIONS)
def test_x20_a_source_whose_destination_died_before_it_ran_has_its_guest_back(
    version: str, start: Starter, record_property: Callable[[str, object], None]
) -> None:
    source, destination = start(version), start(version, incoming=True, more=("-S",))
    begin_postcopy(source, destination)
    proof = destination.proof_that_it_never_ran()
    with pytest.raises(RescueRefused, match="that is not so"):  # it lives, so it might still be started
        source.with_machine(lambda machine: rescue.bring_back(machine, proof))
    assert source.peer.status == "postcopy-active"
    destination.kill()
    source.peer.until_status("postcopy-paused")
    before = source.memory()
    report = source.with_machine(lambda machine: rescue.bring_back(machine, proof))
    assert (report.status, report.run_state, report.pages) == ("completed", "postmigrate", 0)
    assert equal(before, source.memory())
    record_property("bring_back_ms", report.ms)
    print(f"\nbring back, QEMU {version}: {report.ms:.1f} ms from the order to completed")
    source.peer.execute("cont")
    assert source.peer.is_alive()


@pytest.mark.proves("S41", "S59")
@pytest.mark.parametrize("version", VERSIONS)
def test_p15_a_source_in_postcopy_active_is_paused_first_and_then_runs(version: str, start: Starter) -> None:
    """The destination's host renounced, and its end of the connection is still open."""
    source = start(version)
    source.peer.set_up("postcopy-ram", max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
    incoming = Incoming(Image())
    listener, uri = unix_listener(source.peer.folder / "in")
    incoming.listen(listener)
    try:
        source.peer.migrate(uri)
        source.peer.until_status("active")
        source.peer.execute("migrate-start-postcopy")
        source.peer.until_status("postcopy-active")
        before = source.memory()
        report = source.with_machine(lambda machine: rescue.bring_back(machine, renounced(), then_run=True))
        assert (report.status, report.run_state) == ("completed", "running")
        assert "postcopy-paused" in source.peer.statuses()
        assert source.peer.is_alive()
        source.peer.execute("stop")
        assert went_on(before, source.memory())
    finally:
        assert incoming.stop().threads_left == ()


@pytest.mark.proves("S59")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("what", ["tls", "preempt"])
def test_a_source_with_tls_or_a_preempt_channel_comes_back_too(what: str, version: str, start: Starter) -> None:
    source, destination = start(version), start(version, incoming=True, more=("-S",))
    if what == "tls":
        tls = TlsPair(start.folder)
        source.peer.use_tls(tls)
        destination.peer.execute("object-add", tls.destination_object())
        destination.peer.execute("migrate-set-parameters", {"tls-creds": tls.destination_object()["id"]})
    else:
        for guest in (source, destination):
            guest.peer.set_up("postcopy-ram", "postcopy-preempt")
    begin_postcopy(source, destination)
    destination.kill()
    source.peer.until_status("postcopy-paused")
    before = source.memory()
    proof = destination.proof_that_it_never_ran()
    report = source.with_machine(lambda machine: rescue.bring_back(machine, proof))
    assert report.status == "completed"
    assert equal(before, source.memory())
    source.peer.execute("cont")
    assert source.peer.is_alive()


@pytest.mark.proves("S59")
def test_a_stand_in_that_dies_is_followed_by_a_second_one(start: Starter) -> None:
    """At each step of the handshake. Not with QEMU 7.2: see the next test."""
    source, destination = start(NEWEST), start(NEWEST, incoming=True, more=("-S",))
    begin_postcopy(source, destination)
    destination.kill()
    source.peer.until_status("postcopy-paused")
    before = source.memory()
    for heard in (b"", b"\x08\x00\x0a", b"\x08\x00\x0a\x00"):
        listener, uri = unix_listener(source.peer.folder / f"in-{len(heard)}")
        with listener:
            source.peer.migrate(uri, resume=True)
            with listener.accept()[0] as sock:
                sock.settimeout(20)
                assert len(heard) == 0 or sock.recv(len(heard))
        source.peer.until_status("postcopy-paused")
    source.with_machine(
        lambda machine: rescue.bring_back(machine, destination.proof_that_it_never_ran(), then_run=True)
    )
    assert source.peer.is_alive()
    source.peer.execute("stop")
    assert went_on(before, source.memory())


@pytest.mark.proves("S58")
def test_an_old_source_whose_recovery_broke_half_way_is_said_to_be_beyond_this_tool(start: Starter) -> None:
    """QEMU 7.2 stays in postcopy-recover: no pause, no yank, no other resume (protocol, section 10)."""
    source, destination = start(OLDEST), start(OLDEST, incoming=True, more=("-S",))
    begin_postcopy(source, destination)
    destination.kill()
    source.peer.until_status("postcopy-paused")
    listener, uri = unix_listener(source.peer.folder / "in")
    with listener:
        source.peer.migrate(uri, resume=True)
        listener.accept()[0].close()
    source.peer.until_status("postcopy-recover")
    with pytest.raises(GuestHeld, match="refuses to leave") as held:
        source.with_machine(lambda machine: rescue.bring_back(machine, destination.proof_that_it_never_ran()))
    assert (held.value.guest, held.value.retry) == ("paused", "no")
    assert (source.peer.status, source.peer.runstate) == ("postcopy-recover", "finish-migrate")


def test_a_source_that_dies_is_told(start: Starter) -> None:
    source, destination = start(NEWEST), start(NEWEST, incoming=True, more=("-S",))
    begin_postcopy(source, destination)
    destination.kill()
    source.peer.until_status("postcopy-paused")
    proof = destination.proof_that_it_never_ran()
    asked = 0

    def stands() -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:  # at the last moment before QEMU is told
            source.kill()
        return True

    # Whether the kernel's word of its end or our own question to it is first, is up to the machine: told it is.
    with pytest.raises((QemuError, RescueRefused), match=r"gone|ended|closed|lost"):
        source.with_machine(lambda machine: rescue.bring_back(machine, dataclasses.replace(proof, stands=stands)))
    assert asked == 2


# --- throw away -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def somebody_else_has(image: Path) -> Iterator[None]:
    """Locks the image as a QEMU does that lets nobody else write it."""
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        wish = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, FORBIDS_WRITE_BYTE, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wish)
        yield
    finally:
        os.close(fd)


def fail_while_locked(source: Guest, image: Path, lock: contextlib.ExitStack) -> None:
    """A precopy that broke after everything was sent, when somebody else had taken the disk (X15)."""
    source.peer.set_up()
    incoming = Incoming(Image(), options=IncomingOptions(hold_result=True))
    listener, uri = unix_listener(source.peer.folder / "in")
    incoming.listen(listener)
    try:
        source.peer.migrate(uri)
        assert incoming.ledger.wait(Fact.LOADED, Fact.ERROR, timeout_s=20) is Fact.LOADED
        lock.enter_context(somebody_else_has(image))
        incoming.cut()
        source.peer.until_status("failed")
    finally:
        assert incoming.stop().threads_left == ()


@pytest.fixture
def disk(start: Starter) -> tuple[Path, tuple[str, ...]]:
    """An image that is locked as usual, and how a QEMU gets it."""
    path = start.folder / "second.img"
    path.write_bytes(bytes(MIB))
    return path, ("-drive", f"file={path},format=raw,if=ide,index=1")


@pytest.mark.proves("S56", "S59", "S61")
def test_x15_a_source_stuck_in_finish_migrate_is_led_out_and_runs_when_its_disk_is_free(
    start: Starter, disk: tuple[Path, tuple[str, ...]]
) -> None:
    source = start(NEWEST, more=disk[1])
    with contextlib.ExitStack() as lock:
        fail_while_locked(source, disk[0], lock)
        assert source.peer.runstate == "finish-migrate"
        before = source.memory()
        lock.close()
        with pytest.raises(QmpCommandError):  # the disk is free, and QEMU refuses to start for ever
            source.peer.execute("cont")
    source.peer.set_up("postcopy-ram", "release-ram", max_bandwidth=SLOW)
    options = source.peer.execute("query-migrate-parameters"), source.peer.execute("query-migrate-capabilities")
    with somebody_else_has(disk[0]), pytest.raises(GuestHeld) as held:
        source.with_machine(lambda machine: rescue.throw_away(machine, renounced(), then_run=True))
    assert (held.value.guest, held.value.retry) == ("paused", "after-fix")
    assert "lock" in str(held.value)
    assert source.peer.runstate == "postmigrate"
    assert equal(before, source.memory())
    assert options == (
        source.peer.execute("query-migrate-parameters"), source.peer.execute("query-migrate-capabilities"),
    )  # fmt: skip
    source.peer.execute("cont")
    assert source.peer.is_alive()


@pytest.mark.proves("S59")
def test_x8g_throw_away_and_run_in_one_order(start: Starter, disk: tuple[Path, tuple[str, ...]]) -> None:
    source = start(NEWEST, more=disk[1])
    with contextlib.ExitStack() as lock:
        fail_while_locked(source, disk[0], lock)
    before = source.memory()
    told: list[dict[str, Any]] = []
    report = source.with_machine(
        lambda machine: rescue.throw_away(machine, renounced(), then_run=True, tell=told.append)
    )
    assert (report.status, report.run_state) == ("completed", "running")
    assert told[-1]["bytes"] == report.bytes > 10 * MIB
    print(f"\nthrow-away, QEMU {NEWEST}: {report.ms:.0f} ms for {report.bytes >> 20} MiB")
    assert source.peer.is_alive()
    source.peer.execute("stop")
    assert went_on(before, source.memory())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_source_that_is_not_stuck_is_left_alone(
    version: str, start: Starter, disk: tuple[Path, tuple[str, ...]]
) -> None:
    """QEMU 7.2 runs on although it could not take its disk back, so there is nothing to rescue."""
    source = start(version, more=disk[1])
    with pytest.raises(RescueRefused, match="none"):
        source.with_machine(lambda machine: rescue.throw_away(machine, renounced()))
    with pytest.raises(RescueRefused, match="none"):
        source.with_machine(lambda machine: rescue.bring_back(machine, renounced()))
    with contextlib.ExitStack() as lock:
        if version == OLDEST:
            fail_while_locked(source, disk[0], lock)
    if version == OLDEST:
        assert source.peer.runstate == "running"
        with pytest.raises(RescueRefused, match="running"):
            source.with_machine(lambda machine: rescue.throw_away(machine, renounced()))
    assert source.peer.is_alive()


@pytest.mark.proves("S59")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_sink_takes_a_whole_migration_and_the_guest_can_be_continued(version: str, start: Starter) -> None:
    """What a throw-away is made of, on both generations: QEMU 7.2 has no failed source in finish-migrate."""
    source = start(version)
    source.peer.set_up(off=("return-path",))
    listener, uri = unix_listener(source.peer.folder / "in")
    with listener:
        source.peer.migrate(uri)
        sink = ThrowAwaySink(listener.accept()[0])
    sink.start()
    try:
        source.peer.until_status("completed")
        assert sink.wait(20)
    finally:
        outcome = sink.stop()
    assert outcome.is_complete
    assert outcome.bytes > 10 * MIB
    assert source.peer.runstate == "postmigrate"
    source.peer.execute("cont")
    assert source.peer.is_alive()
