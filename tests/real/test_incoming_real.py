"""Real QEMUs of both generations as sources of vmferry's own incoming endpoint: memory page by page, and what the
source does when this side fails (protocol, 15.3)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.engine.image import Image
from vmferry.engine.incoming import Incoming
from vmferry.engine.shared import IncomingOptions
from vmferry.testing.hosts import NEWEST, OLDEST, QEMUS
from vmferry.testing.stream_peers import MIB, QemuPeer, Region, TlsPair, low_ram, unix_listener

pytestmark = pytest.mark.real

WAIT_S = 30.0
SLOW: dict[str, Any] = {"max_bandwidth": 20 * MIB, "max_postcopy_bandwidth": 10 * MIB}
FAST: dict[str, Any] = {}
every_qemu = pytest.mark.parametrize("version", QEMUS)
# Machine types of both generations on the newer QEMU; the older one has only its own.
MACHINES = [(OLDEST, "pc"), (NEWEST, "pc"), (NEWEST, "pc-i440fx-7.2"), (OLDEST, "q35"), (NEWEST, "q35")]


@dataclass
class Pair:
    """A QEMU and the endpoint that it migrates into."""

    peer: QemuPeer
    incoming: Incoming
    image: Image
    uri: str

    def wait(self, *facts: Fact, round_no: int = 0) -> Fact:
        found = self.incoming.ledger.wait(*facts, timeout_s=WAIT_S, round_no=round_no)
        assert found is not None, ([each.fact.value for each in self.incoming.ledger.log], self.peer.status)
        return found

    def migrate(self) -> None:
        self.peer.migrate(self.uri)

    def to_postcopy(self, fact: Fact = Fact.PACKAGE_LOADED) -> None:
        """Into postcopy as soon as the stream has begun."""
        self.migrate()
        self.wait(Fact.SETUP_DONE)
        self.peer.execute("migrate-start-postcopy")
        self.wait(fact)

    def until_pages_came(self) -> None:
        """Until some more memory has arrived than there is now."""
        owed = self.image.owed_pages()
        self.peer.until(lambda: self.image.owed_pages() < owed, "more pages", 30)

    def check(self, regions: list[Region] | None = None) -> None:
        """The move is complete on both sides, and memory is the same."""
        assert self.wait(Fact.ALL_SENT, Fact.ERROR) is Fact.ALL_SENT, self.incoming.error
        assert self.peer.until_status("completed", "failed") == "completed"
        assert self.peer.runstate == "postmigrate"
        outcome = self.incoming.stop()
        assert (outcome.status, outcome.error, outcome.threads_left) == (S.COMPLETED, None, ())
        assert self.image.has_all_pages
        assert self.peer.differing_pages(self.image, regions) == []


@contextmanager
def pair(version: str, peer: dict[str, Any] | None = None, **options: Any) -> Iterator[Pair]:
    """A running guest, and an endpoint that listens. No thread is left behind."""
    threads = threading.active_count()
    with QemuPeer(version, **(peer or {})) as source:
        image = Image()
        incoming = Incoming(image, options=IncomingOptions(**options))
        listener, uri = unix_listener(source.folder / "stream")
        incoming.listen(listener)
        try:
            yield Pair(source, incoming, image, uri)
        finally:
            left = incoming.stop().threads_left
            image.close()
        assert left == ()
    assert threading.active_count() == threads


# --- the ways of a whole move -------------------------------------------------------------------------------


@pytest.mark.conforms("3", "18", "46")
@pytest.mark.proves("S19", "S65")
@pytest.mark.parametrize(("version", "machine"), MACHINES)
def test_precopy(version: str, machine: str) -> None:
    with pair(version, {"machine": machine}) as it:
        it.peer.set_up()
        it.migrate()
        it.check()
        assert it.image.machine.startswith("pc-")
        assert it.image.description is not None


@pytest.mark.conforms("16", "17", "46")
@pytest.mark.proves("S24", "S27", "S31", "S38")
@pytest.mark.parametrize(("version", "machine"), MACHINES[:3])
def test_postcopy_with_the_proof_held_back(version: str, machine: str) -> None:
    with pair(version, {"machine": machine}, hold_proof=True) as it:
        it.peer.set_up("postcopy-ram")
        it.to_postcopy(Fact.LOADED)
        if it.peer.number >= (10, 2):
            assert it.peer.until_status("postcopy-device") == "postcopy-device"
            assert it.incoming.ledger.status is S.POSTCOPY_DEVICE
            it.peer.until_status("postcopy-device")
        it.incoming.give_proof()
        it.wait(Fact.PACKAGE_LOADED)
        ram = it.image.blocks["pc.ram"]
        for page in range(0, ram.count, 499):
            it.incoming.request(ram, page)
        it.check()
        assert "postcopy-active" in it.peer.statuses()


@pytest.mark.conforms("20", "21", "22")
@pytest.mark.proves("S18")
@pytest.mark.parametrize("how", ["cut", "migrate-pause"])
@every_qemu
def test_postcopy_that_pauses_twice_and_recovers(version: str, how: str) -> None:
    with pair(version, {"touch_mib": 60}) as it:
        it.peer.set_up("postcopy-ram", **SLOW)
        it.to_postcopy()
        ram = it.image.blocks["pc.ram"]
        for round_no in (1, 2):
            it.peer.until_status("postcopy-active")
            # QEMU 7.2 tells so before it has made sure that its package went out; a break until then is a failure.
            it.until_pages_came()
            if how == "cut":
                it.incoming.cut()
            else:
                it.peer.execute("migrate-pause")
            it.wait(Fact.LINK_LOST, round_no=round_no)
            assert it.incoming.ledger.status is S.POSTCOPY_PAUSED
            it.peer.until_status("postcopy-paused")
            missing = it.image.owed_pages()
            assert missing > 0
            it.incoming.request(ram, ram.count - 1)
            if round_no == 2:
                it.peer.execute("migrate-set-parameters", {"max-bandwidth": 10 << 30, "max-postcopy-bandwidth": 0})
            it.peer.migrate(it.uri, resume=True)
            it.wait(Fact.RESUME_ACK, round_no=round_no)
        it.check()


@pytest.mark.conforms("23")
@pytest.mark.proves("S87")
@pytest.mark.parametrize("machine", ["pc", "pc-i440fx-7.2"])
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
@every_qemu
def test_multifd(version: str, machine: str, compression: str) -> None:
    with pair(version, {"machine": machine}, channels=2) as it:
        it.peer.set_up("multifd", multifd_channels=2, multifd_compression=compression)
        it.migrate()
        it.check()


@pytest.mark.conforms("26")
@pytest.mark.proves("S88")
@pytest.mark.parametrize(("version", "machine"), MACHINES[:3])
def test_preempt(version: str, machine: str) -> None:
    """Early and late connect; requests are answered on the channel of their own."""
    with pair(version, {"machine": machine}) as it:
        it.peer.set_up("postcopy-ram", "postcopy-preempt", max_bandwidth=20 * MIB)
        it.to_postcopy()
        ram = it.image.blocks["pc.ram"]
        for page in range(0, ram.count, 101):
            it.incoming.request(ram, page)
        it.check()
        assert it.incoming.counters().requests > 0


@pytest.mark.proves("S18", "S88")
@every_qemu
def test_preempt_that_pauses_and_recovers(version: str) -> None:
    with pair(version, {"touch_mib": 60}) as it:
        it.peer.set_up("postcopy-ram", "postcopy-preempt", **SLOW)
        it.to_postcopy()
        ram = it.image.blocks["pc.ram"]
        it.peer.until_status("postcopy-active")
        for page in range(0, ram.count, 211):
            it.incoming.request(ram, page)
        it.incoming.cut()
        it.wait(Fact.LINK_LOST)
        it.peer.until_status("postcopy-paused")
        it.peer.execute("migrate-set-parameters", {"max-bandwidth": 10 << 30, "max-postcopy-bandwidth": 0})
        it.peer.migrate(it.uri, resume=True)
        it.wait(Fact.RESUME_ACK, round_no=1)
        it.check()


@pytest.mark.conforms("27")
@pytest.mark.parametrize("mode", ["precopy", "postcopy", "multifd", "preempt"])
@every_qemu
def test_tls_on_every_channel(version: str, mode: str, tmp_path: Path) -> None:
    tls = TlsPair(tmp_path)
    with pair(version, {"ram_mib": 32, "touch_mib": 16}, tls=tls.server(), channels=2 * (mode == "multifd")) as it:
        capabilities = {"postcopy": ["postcopy-ram"], "multifd": ["multifd"],
                        "preempt": ["postcopy-ram", "postcopy-preempt"]}.get(mode, [])  # fmt: skip
        it.peer.set_up(*capabilities, multifd_channels=2)
        it.peer.use_tls(tls)
        if mode in ("postcopy", "preempt"):
            it.to_postcopy()
        else:
            it.migrate()
        it.check()


@every_qemu
def test_several_blocks(version: str) -> None:
    more = ["-object", "memory-backend-ram,id=d0,size=64M", "-device", "pc-dimm,memdev=d0",
            "-device", "VGA,id=vga0,vgamem_mb=64"]  # fmt: skip
    with pair(version, {"memory": "64M,slots=2,maxmem=1G", "more": more}) as it:
        it.peer.set_up()
        it.migrate()
        it.wait(Fact.LOADED)
        vram = next(each.name for each in it.image if each.name.endswith("vga.vram"))
        bar = it.peer.bar_of("vga0")
        it.check([*low_ram(64 * MIB), Region("d0", 0, 4 << 30, 64 * MIB), Region(vram, 0, bar, 64 * MIB)])


@pytest.mark.timeout(400)
def test_a_guest_of_4_gib() -> None:
    """Costs some 10 s, several times that on a busy host, and little memory: nearly all of its pages are zero."""
    with pair(NEWEST, {"ram_mib": 4096, "memory": "4G"}) as it:
        it.peer.set_up()
        it.migrate()
        assert it.incoming.ledger.wait(Fact.LOADED, Fact.ERROR, timeout_s=300) is Fact.LOADED
        it.check([*low_ram(3 << 30), Region("pc.ram", 3 << 30, 4 << 30, 1 << 30)])


# --- what the source does when this side fails (15.3) -------------------------------------------------------


@pytest.mark.proves("S30")
@every_qemu
def test_closing_during_precopy_leaves_the_guest_running(version: str) -> None:
    with pair(version) as it:
        it.peer.set_up(max_bandwidth=4 * MIB)
        it.migrate()
        it.wait(Fact.SETUP_DONE)
        it.incoming.cut()
        it.wait(Fact.ERROR)
        assert it.peer.until_status("failed", "completed") == "failed"
        assert it.peer.runstate == "running"
        assert it.peer.is_alive()


@every_qemu
def test_closing_instead_of_the_result_gives_the_guest_back(version: str) -> None:
    with pair(version, hold_result=True) as it:
        it.peer.set_up()
        it.migrate()
        it.wait(Fact.LOADED)
        assert it.peer.status == ("device" if it.peer.number >= (10, 0) else "active")
        assert it.peer.runstate == "finish-migrate"
        assert it.incoming.stop().status is S.FAILED
        assert it.peer.until_status("failed", "completed") == "failed"
        assert it.peer.until_runstate("running")
        assert it.peer.is_alive()


@pytest.mark.conforms("17")
@pytest.mark.proves("S24", "S30", "S35")
@every_qemu
def test_closing_before_the_proof(version: str) -> None:
    """A newer source takes its guest back; an older one has let go with the package, so this side is paused too."""
    with pair(version, hold_proof=True) as it:
        it.peer.set_up("postcopy-ram", **SLOW)
        it.to_postcopy(Fact.LOADED)
        if it.peer.number >= (10, 2):
            it.peer.until_status("postcopy-device")
        it.incoming.cut()
        if it.peer.number >= (10, 2):
            it.wait(Fact.ERROR)
            assert it.peer.until_status("failed", "postcopy-paused") == "failed"
            assert it.peer.until_runstate("running")
            assert it.peer.is_alive()
        else:
            it.wait(Fact.LINK_LOST)
            assert it.peer.until_status("failed", "postcopy-paused") == "postcopy-paused"


@every_qemu
def test_closing_after_the_proof_pauses_both(version: str) -> None:
    with pair(version, {"touch_mib": 60}) as it:
        it.peer.set_up("postcopy-ram", **SLOW)
        it.to_postcopy()
        it.peer.until_status("postcopy-active")
        it.incoming.cut()
        it.wait(Fact.LINK_LOST)
        assert it.peer.until_status("failed", "postcopy-paused", "completed") == "postcopy-paused"
        assert it.peer.runstate in ("finish-migrate", "paused", "postmigrate")


# --- cancel -------------------------------------------------------------------------------------------------


@pytest.mark.conforms("29")
@pytest.mark.proves("S12", "S13", "S17")
@pytest.mark.parametrize("phase", ["setup", "result", "barrier"])
@every_qemu
def test_cancel(version: str, phase: str) -> None:
    """By the source, while pages come, while the result is held, and with multifd. Its guest goes on; what came is
    worth nothing, whatever the owner says afterwards."""
    with pair(version, hold_result=True, channels=2 * (phase == "barrier")) as it:
        it.peer.set_up(*(["multifd"] if phase == "barrier" else []), **(FAST if phase == "result" else SLOW))
        it.migrate()
        it.wait(Fact.LOADED if phase == "result" else Fact.SETUP_DONE)
        it.peer.execute("migrate_cancel")
        # QEMU 7.2 cuts the channel before it says that it cancels; its thread may be faster, and call that failed.
        ways = ("cancelled",) if version == NEWEST else ("cancelled", "failed")
        assert it.peer.until_status("cancelled", "failed", "completed") in ways, it.peer.said()
        it.wait(Fact.ERROR)
        it.incoming.give_result()
        assert it.incoming.stop().status is S.FAILED
        assert it.peer.until_runstate("running")
        assert it.peer.is_alive()


@pytest.mark.proves("S12")
@every_qemu
def test_cancel_with_an_endpoint_that_does_not_read(version: str) -> None:
    """The stream is stuck in the socket; the source's cancel and this side's stop both end at once."""
    with pair(version) as it:
        listener, uri = unix_listener(it.peer.folder / "stuck")
        it.peer.set_up()
        it.peer.migrate(uri)
        sock, _ = listener.accept()
        with listener, sock:
            it.peer.until_status("active")
            it.peer.execute("migrate_cancel")
            assert it.peer.until_status("cancelled", "failed", timeout_s=5) == "cancelled"
        assert it.peer.is_alive()


@pytest.mark.proves("S12")
@every_qemu
def test_a_stop_with_a_source_that_is_stuck(version: str) -> None:
    with pair(version) as it:
        it.peer.set_up(max_bandwidth=4 * MIB)
        it.migrate()
        it.wait(Fact.SETUP_DONE)
        it.peer.process.send_signal(19)  # SIGSTOP
        assert it.incoming.stop(timeout_s=2).threads_left == ()
        it.peer.process.send_signal(18)
        assert it.peer.until_status("failed") == "failed"
        assert it.peer.is_alive()
