"""Snapshots go in and come out: what is stored once, what is refused, what memory and bytes it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unit.store.conftest import RAM, ManualClock, Store, memory, new_store, touched
from vmferry.agent.snapshot_sink import find, require_free
from vmferry.errors import RepositoryError
from vmferry.store.config import KeyFile, PassPhrase
from vmferry.store.envelope import MANIFEST, PREFIX
from vmferry.store.errors import (
    Damaged,
    ObjectExists,
    ObjectMissing,
    OtherRepository,
    RepositoryBusy,
    StoreTransient,
    UnknownSnapshot,
    WrongKey,
)
from vmferry.store.heads import KeptHeads
from vmferry.store.local import LocalFolder
from vmferry.store.manifest import Block, manifest_name
from vmferry.store.page_ids import PAGE_BYTES
from vmferry.store.prune import plan_prune
from vmferry.store.reader import SnapshotReader
from vmferry.store.rebuild import rebuild_indexes
from vmferry.store.repository import Repository, SnapshotInfo
from vmferry.store.verify import verify
from vmferry.store.writer import SnapshotWriter
from vmferry.testing.failing_store import FailingStore

KEYS = [None, PassPhrase("correct horse"), KeyFile(bytes(range(64)))]


@pytest.mark.parametrize("key", KEYS, ids=["open", "pass phrase", "key file"])
def test_what_was_saved_comes_back(clock: ManualClock, key: PassPhrase | KeyFile | None) -> None:
    store = new_store(clock, key)
    pages = memory(700)
    first = store.save(pages)
    second = store.later(first, touched(pages, 40))
    third = store.later(second, touched(store.saved[second], 40, seed=9))
    store.repository = Repository.open(store.backend, key=key, clock=clock)
    store.check(first, second, third)
    with SnapshotReader(store.repository, first) as reader:
        assert reader.device_state == b"devices of vm"
        assert reader.head.metadata == {"vm": "vm"}
        some = np.array([5, 3, 699, 3])
        assert np.array_equal(reader.read_some(RAM, some), pages[some])
        assert np.array_equal(reader.is_zero(RAM), ~pages.any(axis=1))
        assert len(reader.read(RAM, 10, 0)) == 0
    assert len(store.names("index/")) > 1, "several indexes are what is tested here"


@pytest.mark.parametrize("is_based", [False, True], ids=["first", "later"])
def test_of_a_page_that_comes_twice_in_one_call_the_last_one_counts(store: Store, is_based: bool) -> None:
    """Whatever the two are: new, known, zero, the same as each other, or little different from the base's."""
    before = memory(64)
    base = store.save(before)
    now = touched(before, 16)
    rng = np.random.default_rng(6)
    fresh = rng.integers(0, 256, (2, PAGE_BYTES), dtype=np.uint8)
    zero = np.zeros(PAGE_BYTES, np.uint8)
    changed = next(n for n in range(10, 64) if not np.array_equal(before[n], now[n]))
    pairs = [
        (1, fresh[0], fresh[1]), (2, fresh[0], zero), (3, zero, fresh[0]), (4, before[9], fresh[1]),
        (5, fresh[1], before[9]), (6, zero, zero), (7, fresh[0], fresh[0]), (changed, fresh[1], now[changed]),
    ]  # fmt: skip
    assert len({number for number, _, _ in pairs}) == len(pairs)
    for number, _, last in pairs:
        now[number] = last
    numbers = np.array([n for n, _, _ in pairs] + [n for n, _, _ in reversed(pairs)])
    content = np.stack([first for _, first, _ in pairs] + [last for _, _, last in reversed(pairs)])
    with (
        SnapshotReader(store.repository, base) as reader,
        SnapshotWriter(store.repository, [Block(RAM, 64 * PAGE_BYTES)], base=reader if is_based else None) as writer,
    ):
        writer.put(RAM, 0, before)
        others = np.setdiff1d(np.arange(64), numbers)
        writer.put_some(RAM, np.concatenate([others, numbers]), np.concatenate([now[others], content]))
        writer.commit("twice", device_state=b"devices of vm")
    store.saved[writer.snapshot] = now
    store.check(writer.snapshot)


def test_zeros_are_not_stored_and_equal_pages_once(store: Store) -> None:
    pages = memory(400)
    distinct = len({page.tobytes() for page in pages} - {bytes(PAGE_BYTES)})
    snapshot = store.save(pages)
    head = store.repository.manifest(snapshot).head
    zero = int(np.count_nonzero(~pages.any(axis=1)))
    assert zero > 20
    assert distinct < 400 - zero
    assert head.counts.zero == zero
    assert head.counts.known == 400 - zero - distinct
    assert sum(store.repository.index(index_id).rows for index_id in store.repository.indexes()) == distinct

    before = store.names("packs/")
    again = store.save(pages, name="another vm of the same image")
    assert store.names("packs/") == before, "not even one pack more"
    assert store.repository.manifest(again).head.counts.stored_bytes == 0
    store.check()


def test_a_changed_page_costs_its_changed_bytes(store: Store) -> None:
    pages = memory(600)
    first = store.save(pages)
    second = store.later(first, touched(pages, 60))
    counts = store.repository.manifest(second).head.counts
    assert counts.differences > 40
    assert counts.stored_bytes < 60 * 250, "30 bytes of each page were changed"
    assert store.repository.backend.size(manifest_name(second)) < 2000
    # The next one's differences are to the same whole pages: no chains.
    third = store.later(second, touched(store.saved[second], 60, seed=5))
    assert store.repository.manifest(third).head.counts.differences > 40
    store.check()


def test_pages_that_the_caller_knows_to_be_the_same_are_not_read_again(store: Store) -> None:
    pages = memory(300)
    first = store.save(pages)
    now = touched(pages, 10)
    changed = np.flatnonzero((now != pages).any(axis=1))
    with (
        SnapshotReader(store.repository, first) as base,
        SnapshotWriter(store.repository, [Block(RAM, 300 * PAGE_BYTES)], base=base) as writer,
    ):
        writer.keep(RAM, np.setdiff1d(np.arange(300), changed))
        assert writer.missing(RAM).tolist() == changed.tolist()
        writer.put_some(RAM, changed, now[changed])
        writer.commit("later")
    store.saved[writer.snapshot] = now
    store.check()


def test_a_page_that_comes_again_replaces_what_it_was(store: Store) -> None:
    pages = memory(50)
    with SnapshotWriter(store.repository, [Block(RAM, 50 * PAGE_BYTES)]) as writer:
        writer.put(RAM, 0, memory(50, seed=8))
        writer.put(RAM, 0, pages)
        writer.put(RAM, 10, pages[10:20])
        writer.put_some(RAM, np.array([30]), np.zeros((1, PAGE_BYTES), np.uint8))
        writer.commit("vm")
    store.saved[writer.snapshot] = pages.copy()
    store.saved[writer.snapshot][30] = 0
    store.check()


def test_pages_need_not_lie_side_by_side_in_memory(store: Store) -> None:
    wide = memory(100).repeat(2, axis=0)
    store.save(wide[::2], run=7)
    store.check()


def test_nothing_is_there_before_the_commit_and_after_an_abort(store: Store) -> None:
    with SnapshotWriter(store.repository, [Block(RAM, 100 * PAGE_BYTES)]) as writer:
        writer.put(RAM, 0, memory(100))
        assert store.repository.snapshots() == []
        with pytest.raises(UnknownSnapshot):
            SnapshotReader(store.repository, writer.snapshot)
    assert store.repository.snapshots() == []
    assert store.names("locks/") == []


def test_a_snapshot_with_pages_that_never_came_is_a_mistake(store: Store) -> None:
    with SnapshotWriter(store.repository, [Block(RAM, 10 * PAGE_BYTES)]) as writer:
        writer.put(RAM, 0, memory(9))
        with pytest.raises(AssertionError, match="every page has come"):
            writer.commit("vm")


def test_the_listing_reads_heads_only_and_tells_what_is_damaged(store: Store) -> None:
    first = store.save(memory(100), name="old")
    store.clock.at_s += 60
    second = store.save(memory(100, seed=3), name="new")
    listed = store.repository.snapshots()
    assert [(info.snapshot, info.head and info.head.name) for info in listed] == [(first, "old"), (second, "new")]
    broken = bytearray(store.backend.get(manifest_name(first)))
    broken[PREFIX.size + 5] ^= 1
    store.backend.delete(manifest_name(first))
    store.backend.put(manifest_name(first), bytes(broken))
    store.backend.put("snapshots/strange", b"left alone")
    listed = store.repository.snapshots()
    assert [info.snapshot for info in listed] == [second, first]
    assert listed[1].head is None
    assert first in listed[1].damage
    store.repository.forget(first)
    assert [info.snapshot for info in store.repository.snapshots()] == [second]
    assert store.names("snapshots/")[-1] == "snapshots/strange"


def looked_at(store: Store, deed: Callable[[Repository], object]) -> list[str]:
    """The manifests that are read meanwhile."""
    failing = FailingStore(store.backend, lambda call: None)
    store.repository.backend = failing
    deed(store.repository)
    store.repository.backend = store.backend
    return sorted(call.name for call in failing.calls if call.method == "get" and call.name.startswith("snapshots/"))


def test_a_snapshot_is_found_by_its_id_without_a_look_at_any_other(store: Store) -> None:
    snapshots = [store.save(memory(8, seed=number), name=f"vm{number}") for number in range(9)]
    found: list[SnapshotInfo] = []
    names = looked_at(store, lambda repository: found.append(find(repository, snapshots[4])))
    assert names == [manifest_name(snapshots[4])]
    assert [info.head and info.head.name for info in found] == ["vm4"]
    assert found == [info for info in store.repository.snapshots() if info.snapshot == snapshots[4]]
    for word in ("vm9", "0" * 32):
        with pytest.raises(UnknownSnapshot):
            find(store.repository, word)


def test_heads_are_read_once_and_a_manifest_that_is_another_one_again(store: Store, clock: ManualClock) -> None:
    snapshots = [store.save(memory(8, seed=number), name=f"vm{number}") for number in range(9)]
    assert len(looked_at(store, lambda repository: find(repository, "vm7"))) == 9
    assert looked_at(store, lambda repository: find(repository, "vm3")) == []
    assert looked_at(store, lambda repository: require_free(repository, "another")) == []
    assert {info.snapshot for info in store.repository.snapshots()} == set(snapshots)
    name = manifest_name(snapshots[2])
    data = store.backend.get(name)
    store.backend.delete(name)
    clock.at_s += 1
    store.backend.put(name, b"x" * len(data))
    assert looked_at(store, Repository.snapshots) == [name]
    assert store.repository.snapshots()[-1].head is None, "and it is found damaged"


def test_no_more_heads_are_kept_than_have_room(store: Store) -> None:
    store.repository._heads = KeptHeads(1500)
    for number in range(9):
        store.save(memory(8, seed=number), name=f"vm{number}")
    assert len(looked_at(store, Repository.snapshots)) == 9
    again = looked_at(store, Repository.snapshots)
    assert 4 < len(again) < 9, "some are kept, and they stay"
    assert looked_at(store, Repository.snapshots) == again
    for snapshot in list(store.repository.snapshot_ids()):
        store.repository.forget(snapshot)
    store.save(memory(8))
    assert len(looked_at(store, Repository.snapshots)) == 1
    assert looked_at(store, Repository.snapshots) == [], "what was forgotten made room"


def test_a_host_whose_clock_says_nothing_saves_nothing_that_nobody_could_read(store: Store, clock: ManualClock) -> None:
    clock.at_s = 1e18
    with pytest.raises(RepositoryError, match="clock"):
        store.save(memory(8))
    assert store.repository.snapshots() == []


def test_a_head_longer_than_the_first_read_is_read_in_a_second(store: Store) -> None:
    with SnapshotWriter(store.repository, [Block(RAM, PAGE_BYTES)]) as writer:
        writer.put(RAM, 0, memory(1))
        writer.commit("vm", metadata={"text": "x" * 100_000})
    (info,) = store.repository.snapshots()
    assert info.head is not None
    assert len(info.head.metadata["text"]) == 100_000


def test_unknown_snapshots_and_repositories(store: Store, clock: ManualClock) -> None:
    for snapshot in ("0" * 32, "../config", ""):
        with pytest.raises(UnknownSnapshot):
            store.repository.manifest(snapshot)
        with pytest.raises(UnknownSnapshot):
            store.repository.forget(snapshot)
    with pytest.raises(ObjectExists):
        Repository.create(store.backend)
    store.backend.delete("config")
    with pytest.raises(ObjectMissing):
        Repository.open(store.backend)
    store.backend.put("config", b" " * 100_000)
    with pytest.raises(Damaged, match="config"):
        Repository.open(store.backend)


def test_the_wrong_key_opens_nothing(clock: ManualClock) -> None:
    store = new_store(clock, PassPhrase("right"))
    for wrong in (None, PassPhrase("wrong"), KeyFile(bytes(32))):
        with pytest.raises(WrongKey):
            Repository.open(store.backend, key=wrong)
    with pytest.raises(WrongKey):
        Repository.open(new_store(clock).backend, key=PassPhrase("right"))


def test_an_encrypted_repository_shows_nothing_of_a_guest(clock: ManualClock) -> None:
    store = new_store(clock, PassPhrase("secret"))
    pages = memory(200)
    pages[7, :32] = np.frombuffer(b"the password is in this page....", np.uint8)
    first = store.save(pages, name="payroll")
    for entry in store.backend.list(""):
        data = store.backend.get(entry.name)
        for word in (b"password", b"payroll", b"devices of", b"pc.ram", pages[3].tobytes()):
            assert word not in data, entry.name
    # Nor do ids: the same guest elsewhere has other ones.
    other = new_store(clock, PassPhrase("secret"))
    other.repository.random = lambda length: b"\1" * length
    assert store.repository.ids.of(pages).tobytes() != new_store(clock).repository.ids.of(pages).tobytes()
    assert first


def test_objects_are_bound_to_their_names(clock: ManualClock) -> None:
    """A store that hands out one object for another is found out, with a key and without."""
    for key in (None, PassPhrase("x")):
        store = new_store(clock, key)
        first, second = store.save(memory(150)), store.save(memory(150, seed=4))
        data = store.backend.get(manifest_name(first))
        store.backend.delete(manifest_name(second))
        store.backend.put(manifest_name(second), data)
        with pytest.raises(Damaged, match=second):
            store.repository.manifest(second)
        (a, b, *_) = store.names("packs/")
        swapped = store.backend.get(a)
        store.backend.delete(b)
        store.backend.put(b, swapped)
        with pytest.raises(Damaged):
            store.check()


def test_two_save_at_the_same_time(store: Store) -> None:
    """Neither knows of the other's new pages; both snapshots are whole."""
    pages, others = memory(300), touched(memory(300), 50)
    block = [Block(RAM, 300 * PAGE_BYTES)]
    with SnapshotWriter(store.repository, block) as one, SnapshotWriter(store.repository, block) as two:
        for first in range(0, 300, 50):
            one.put(RAM, first, pages[first : first + 50])
            two.put(RAM, first, others[first : first + 50])
        two.commit("two")
        one.commit("one")
    store.saved = {one.snapshot: pages, two.snapshot: others}
    store.check()


def test_nobody_saves_or_reads_while_somebody_takes_away(store: Store) -> None:
    first = store.save(memory(20))
    lock = store.repository.exclusive("prune by a test")
    for begin in (
        lambda: SnapshotReader(store.repository, first),
        lambda: SnapshotWriter(store.repository, [Block(RAM, PAGE_BYTES)]),
        lambda: store.repository.forget(first),
    ):
        with pytest.raises(RepositoryBusy, match="prune by a test"):
            begin()
    assert SnapshotReader(store.repository, first, is_locked=False).head.name == "vm"
    lock.release()
    store.check()


def test_a_snapshot_whose_folder_is_gone_is_not_damaged_and_goes_on_when_it_is_back(
    tmp_path: Path, clock: ManualClock
) -> None:
    folder = LocalFolder(tmp_path / "store")
    store = new_store(clock, backend=folder)
    snapshot = store.save(memory(64))
    with SnapshotReader(store.repository, snapshot) as reader:
        folder.root.rename(tmp_path / "away")
        folder.close()
        with pytest.raises(StoreTransient, match="is gone"):
            reader.read(RAM, 0, 64)
        with pytest.raises(StoreTransient, match="is gone"):
            store.save(memory(8))
        with pytest.raises(StoreTransient, match="is gone"):
            Repository.open(folder)
        (tmp_path / "away").rename(folder.root)
        assert np.array_equal(reader.read(RAM, 0, 64), store.saved[snapshot])
    assert store.names("locks/") == []


@pytest.mark.parametrize("key", [None, KeyFile(bytes(range(64)))], ids=["open", "encrypted"])
def test_a_repository_that_was_opened_before_the_mount_writes_nothing_into_the_one_that_was_mounted(
    tmp_path: Path, clock: ManualClock, key: KeyFile | None
) -> None:
    """Its keys are those of the empty one that lies below the mount: nobody could read what it would save."""
    real = new_store(clock, key, LocalFolder(tmp_path / "real"))
    kept = real.save(memory(16))
    early = Store(real.backend, clock, Repository.create(LocalFolder(tmp_path / "place"), clock=clock))
    early.repository.shared("look").release()
    (tmp_path / "place").rename(tmp_path / "below")
    (tmp_path / "real").rename(tmp_path / "place")
    there = LocalFolder(tmp_path / "place")
    before = there.list("")
    for deed in (
        lambda: early.save(memory(16, seed=3)), lambda: early.repository.forget(kept),
        lambda: plan_prune(early.repository), lambda: verify(early.repository),
        early.repository.snapshots, lambda: SnapshotReader(early.repository, kept),
        lambda: early.repository.exclusive("prune"),
    ):  # fmt: skip
        with pytest.raises(OtherRepository) as caught:
            deed()
        assert "restart" in caught.value.hint
    assert there.list("") == before
    real.repository = Repository.open(there, key=key, clock=clock)
    real.check(kept)
    there.delete("config")
    with pytest.raises(Damaged, match="missing"):
        real.repository.shared("look")


def test_the_config_can_be_read_by_a_person(store: Store) -> None:
    shown = json.loads(store.backend.get("config"))
    assert (shown["format"], shown["version"], shown["chunker"]) == ("vmferry-repository", 1, "pages-4096")
    assert shown["encryption"] is None


def test_kinds_of_objects_are_not_mixed_up(store: Store) -> None:
    snapshot = store.save(memory(20))
    data = store.backend.get(manifest_name(snapshot))
    assert data[5] == MANIFEST
    with pytest.raises(Damaged):
        store.repository.index(bytes.fromhex(snapshot))


@pytest.mark.parametrize("work", [verify, rebuild_indexes])
def test_whoever_reads_indexes_hears_between_two_of_them_that_it_is_enough(
    clock: ManualClock, work: Callable[[Repository, Callable[[int, int], None]], object]
) -> None:
    store = new_store(clock)
    store.save(memory(700))
    indexes = [entry.name for entry in store.backend.list("index/")]
    assert len(indexes) > 2
    backend = FailingStore(store.backend, lambda call: None)
    repository = Repository.open(backend, clock=clock)
    told: list[tuple[int, int]] = []

    def enough(done: int, whole: int) -> None:
        told.append((done, whole))
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(repository, enough)
    read = {call.name for call in backend.calls if call.method == "get" and call.name.startswith(("index/", "packs/"))}
    assert len(read) == 1, "the first index, and nothing else"
    assert read <= {*indexes}
    assert told == [(0, 0), (0, 0)]
    assert not list(store.backend.list("locks/")), "its lock is given back"
