"""Where the pages of a guest that is saved go: its one commit, and what was set aside for it."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vmferry.agent.snapshot_sink import SnapshotSink
from vmferry.engine.frozen import SnapshotWords
from vmferry.errors import RepositoryError
from vmferry.store.config import KeyFile
from vmferry.store.errors import StorePermanent
from vmferry.store.manifest import Head
from vmferry.store.memory import MemoryStore
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository, Shape
from vmferry.testing.failing_store import Call, FailingStore, Fault
from vmferry.wire.events import DeviceSection, RamBlock

PAGES = 64
WORDS = SnapshotWords(vm="g", host="a", job="1" * 32, machine="pc-q35-7.2", was_running=True, way="precopy")


class Saved:
    """A guest of 64 pages: all of them in a first pass, and the first ones again, set aside while it stands."""

    def __init__(self, folder: Path, key: KeyFile | None = None) -> None:
        self.fault: Fault | None = None
        self.times = 1000
        self.faulty = ("put", "packs/")
        self.store = FailingStore(MemoryStore(), self._fault_of)
        self.repository = Repository.create(self.store, key=key, shape=Shape(pack_bytes=1 << 16))
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
        if (call.method, call.name.split("/")[0] + "/") != self.faulty or not self.times:
            return None
        self.times -= self.fault is not None
        return self.fault

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


@pytest.mark.parametrize("key", [None, KeyFile(bytes(range(32)))], ids=["open", "encrypted"])
def test_a_commit_keeps_the_last_version_of_each_page(tmp_path: Path, key: KeyFile | None) -> None:
    saved = Saved(tmp_path / "spill", key)
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


class Slow:
    """What happens while a commit waits for the store."""

    def __init__(self, saved: Saved, name: str, method: str) -> None:
        saved.sink._end_uploads()
        self.saved = saved
        saved.faulty, saved.fault = (method, name), Fault.SLOW
        self.result: list[object] = []
        self.commit = threading.Thread(target=self._commit)
        self.commit.start()
        saved.store.is_waiting.wait()
        saved.fault = None
        self.abort = threading.Thread(target=saved.sink.abort)
        self.abort.start()
        saved.sink._is_over.wait()

    def _commit(self) -> None:
        try:
            self.result.append(self.saved.sink.commit("one", WORDS))
        except Exception as error:  # noqa: BLE001
            self.result.append(error)

    def go_on(self) -> object:
        self.saved.store.may_go_on.set()
        for thread in (self.commit, self.abort):
            thread.join()
        return self.result[0]


def test_a_snapshot_that_is_seen_is_not_taken_back_by_whoever_cleans_up(saved: Saved) -> None:
    """1. the manifest is put  2. a person cancels, and the lock is given back  3. the snapshot is found, and told as
    saved  4. the commit looks for its lock, and deletes the manifest."""
    slow = Slow(saved, "snapshots/", "put")
    assert isinstance(slow.go_on(), Head)
    saved.check()
    assert saved.store.list("locks/") == []


def test_a_manifest_that_was_put_is_seen_through_although_nobody_waits(saved: Saved) -> None:
    """1. it is put  2. the look for the lock is not answered  3. a person cancels  4. the lock is looked for again."""
    slow = Slow(saved, "snapshots/", "put")
    saved.faulty, saved.fault, saved.times = ("size", "locks/"), Fault.REFUSED, 3
    assert isinstance(slow.go_on(), Head)
    assert saved.times == 0
    saved.check()


def test_a_commit_that_is_given_up_before_its_manifest_leaves_none(saved: Saved) -> None:
    """And what was set aside is not closed while it is read."""
    error = Slow(saved, "packs/", "put").go_on()
    assert isinstance(error, RepositoryError)
    assert "given up" in str(error)
    assert not saved.sink.may_be_there
    assert saved.repository.snapshots() == []
    assert saved.store.list("locks/") == []


def test_what_is_set_aside_takes_no_memory(tmp_path: Path) -> None:
    """A guest that writes faster than it is saved is stopped, and its last pass may be all of its memory."""
    repository = Repository.create(MemoryStore())
    sink = SnapshotSink(repository, vm="g", spill_folder=tmp_path / "spill")
    sink.image.add_block(RamBlock("pc.ram", (1 << 20) * 4096, None))
    sink.spill()
    numbers = np.arange(1 << 20)
    tracemalloc.start()
    try:
        sink.put_zeros("pc.ram", numbers)
        assert tracemalloc.get_traced_memory()[0] < 1 << 20, "and not 8 bytes per page"
    finally:
        tracemalloc.stop()
    sink.image.is_device_state_whole = True
    sink.commit("one", WORDS)
    (info,) = repository.snapshots()
    assert info.head is not None
    assert info.head.counts.zero == 1 << 20
