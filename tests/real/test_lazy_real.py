"""Real QEMUs whose guests run while their memory is in a repository that is lost and comes back."""

from __future__ import annotations

import dataclasses
import socket
import threading
from pathlib import Path

import pytest

from vmferry.core.facts import Fact
from vmferry.engine import frozen
from vmferry.engine.image import Image
from vmferry.engine.incoming import Incoming
from vmferry.engine.lazy import LazySource, Trouble, image_of
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.store.local import LocalFolder
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository
from vmferry.testing.bootsector import count_passes
from vmferry.testing.failing_store import Call, FailingStore, Fault
from vmferry.testing.hosts import NEWEST, OLDEST
from vmferry.testing.snapshots import put
from vmferry.testing.stream_peers import WAIT_S, QemuPeer, unix_listener
from vmferry.wire.events import RamBlock

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

VERSIONS = sorted({OLDEST, NEWEST}, key=[OLDEST, NEWEST].index)
MACHINE = "pc-i440fx-7.2"


@dataclasses.dataclass
class Kept:
    """A guest in a repository, on a store that can be lost."""

    repository: Repository
    snapshot: str
    letters: bytes
    is_lost: threading.Event


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    is_lost = threading.Event()

    def fault_of(call: Call) -> Fault | None:
        return Fault.REFUSED if is_lost.is_set() else None

    store = FailingStore(LocalFolder(tmp_path_factory.mktemp("kept") / "repository"), fault_of)
    repository = Repository.create(store)
    with QemuPeer(OLDEST, machine=MACHINE, ram_mib=96, touch_mib=80) as peer:
        image = Image()
        incoming = Incoming(image)
        listener, uri = unix_listener(peer.folder / "out")
        incoming.listen(listener)
        peer.set_up(downtime_limit=2_000_000)
        peer.migrate(uri)
        assert incoming.ledger.wait(Fact.ALL_SENT, Fact.ERROR, timeout_s=WAIT_S) is Fact.ALL_SENT, str(incoming.error)
        incoming.stop()
        peer.until_runstate("postmigrate")
        letters = (peer.folder / "serial").read_bytes()
    words = frozen.SnapshotWords(
        vm="web1", host="test", job="0" * 32, machine=MACHINE, was_running=True, way="precopy"
    )  # fmt: skip
    snapshot = put(repository, image, "monday", words=words, disks=[])
    image.close()
    return Kept(repository, snapshot, letters, is_lost)


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


@pytest.mark.proves("S18")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_guest_waits_for_a_repository_that_is_lost_and_goes_on_when_it_is_back(kept: Kept, version: str) -> None:
    """QEMU hears nothing of it: its channel stays up, a CPU waits for its page, and the page comes."""
    troubles: list[Trouble | None] = []
    news = threading.Condition()

    def hear(trouble: Trouble | None) -> None:
        with news:
            troubles.append(trouble)
            news.notify_all()

    with (
        SnapshotReader(kept.repository, kept.snapshot) as reader,
        QemuPeer(version, machine=MACHINE, ram_mib=96, incoming=True) as peer,
    ):
        blocks = [RamBlock(block.name, block.size_bytes) for block in reader.head.blocks]
        image = image_of(blocks, reader, is_lazy=True)
        frozen.thaw(reader.device_state).fill(image)
        source = LazySource(image, reader, on_trouble=hear)
        outgoing = Outgoing(
            image, options=OutgoingOptions(postcopy="at-once"), on_absent=source.on_absent, on_request=source.on_request
        )
        peer.set_up("postcopy-ram")
        peer.migrate_incoming(f"unix:{peer.folder}/in")
        try:
            source.start()  # and nothing is read ahead: whatever the guest needs it asks for
            outgoing.start(lambda: connect(peer.folder / "in"))
            loaded = outgoing.ledger.wait(Fact.PACKAGE_LOADED, Fact.ERROR, timeout_s=WAIT_S)
            assert loaded is Fact.PACKAGE_LOADED, str(outgoing.error)
            kept.is_lost.set()
            with news:
                assert news.wait_for(lambda: bool(troubles) and troubles[-1] is not None, WAIT_S)
                assert troubles[-1] is not None
                assert troubles[-1].guest_waits
            assert peer.status == "postcopy-active"
            kept.is_lost.clear()
            source.go()
            assert outgoing.ledger.wait(Fact.PEER_ACK, Fact.ERROR, timeout_s=WAIT_S) is Fact.PEER_ACK
            peer.until_status("completed")
            serial = peer.folder / "serial"
            wanted = count_passes(kept.letters) + 2
            peer.until(
                lambda: serial.exists() and count_passes(kept.letters + serial.read_bytes()) >= wanted,
                "further passes",
                WAIT_S,
            )
            assert Fact.LINK_LOST not in outgoing.ledger.log
        finally:
            kept.is_lost.clear()
            outgoing.stop()
            assert source.stop() == ()
            image.close()
    assert troubles[-1] is None
