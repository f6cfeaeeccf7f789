"""Where the pages of a guest that is saved go: its one commit, and what was set aside for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vmferry.agent.snapshot_sink import SnapshotSink
from vmferry.engine.frozen import SnapshotWords
from vmferry.store.errors import StorePermanent
from vmferry.store.memory import MemoryStore
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository, Shape
from vmferry.testing.failing_store import Call, FailingStore, Fault
from vmferry.wire.events import DeviceSection, RamBlock

PAGES = 64
WORDS = SnapshotWords(vm="g", host="a", job="1" * 32, machine="pc-q35-7.2", was_running=True, way="precopy")


class Saved:
    """A guest of 64 pages: all of them in a first pass, and the first ones again, set aside while it stands."""

    def __init__(self, folder: Path) -> None:
        self.fault: Fault | None = None
        self.faulty = ("put", "packs/")
        self.store = FailingStore(MemoryStore(), self._fault_of)
        self.repository = Repository.create(self.store, shape=Shape(pack_bytes=1 << 16))
        self.sink = SnapshotSink(self.repository, vm="g", spill_folder=folder)
        self.sink.image.add_block(RamBlock("pc.ram", PAGES * 4096, None))
        self.first, self.last = (np.random.default_rng(seed).bytes(PAGES * 4096) for seed in (1, 2))
        self._put(self.first, PAGES)
        self.sink.spill()
        self._put(self.last, PAGES // 2)
        self.sink.image.devices.append(DeviceSection(3, "timer", 0, 2, b"x"))
        self.sink.image.is_device_state_whole = True

    def _put(self, data: bytes, count: int) -> None:
        self.sink.put("pc.ram", np.arange(count), np.frombuffer(data, np.uint8).reshape(-1, 4096)[:count])

    def _fault_of(self, call: Call) -> Fault | None:
        return self.fault if (call.method, call.name.split("/")[0] + "/") == self.faulty else None

    def check(self) -> None:
        """The snapshot is there, with the last version of each page."""
        (info,) = self.repository.snapshots()
        with SnapshotReader(self.repository, info.snapshot) as reader:
            half = PAGES * 4096 // 2
            assert reader.read("pc.ram", 0, PAGES).tobytes() == self.last[:half] + self.first[half:]


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Saved]:
    made = Saved(tmp_path / "spill")
    yield made
    made.store.may_go_on.set()
    made.sink.abort()


def test_a_commit_keeps_the_last_version_of_each_page(saved: Saved) -> None:
    saved.sink.commit("one", WORDS)
    saved.check()


@pytest.mark.parametrize("fault", [Fault.FULL, Fault.DENIED])
def test_a_commit_that_failed_is_never_carried_out_with_what_is_left(saved: Saved, fault: Fault) -> None:
    """1. what was set aside is put  2. the store is full  3. it has room again  4. pages of the first pass count."""
    saved.sink._end_uploads()
    saved.fault = fault
    with pytest.raises(StorePermanent) as caught:
        saved.sink.commit("one", WORDS)
    saved.fault = None
    with pytest.raises(StorePermanent) as again:
        saved.sink.commit("one", WORDS)
    assert again.value is caught.value
    assert not saved.sink.may_be_there
    assert saved.repository.snapshots() == []
