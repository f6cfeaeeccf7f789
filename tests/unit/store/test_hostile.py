"""A damaged or hostile repository: every damage is named, no wrong page comes out, nothing takes unbounded memory."""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store.conftest import RAM, ManualClock, Numbered, Store, memory, new_store, touched
from vmferry.store import envelope
from vmferry.store.config import Key, PassPhrase
from vmferry.store.envelope import INDEX, MANIFEST, seal_object
from vmferry.store.errors import Damaged, UnknownSnapshot
from vmferry.store.index import index_name
from vmferry.store.manifest import manifest_name
from vmferry.store.memory import MemoryStore
from vmferry.store.page_ids import PAGE_BYTES
from vmferry.store.reader import SnapshotReader
from vmferry.store.rebuild import rebuild_indexes
from vmferry.store.verify import verify
from vmferry.testing.failing_store import FailingStore

CLOCK = ManualClock()
Get = Callable[[str, int, int | None], bytes]


def filled(key: Key | None) -> Store:
    store = new_store(CLOCK, key)
    first = store.save(memory(150))
    store.later(first, touched(memory(150), 40))
    return store


OPEN, SECRET = filled(None), filled(PassPhrase("x"))


def damaged_copy(store: Store, name: str, change: Callable[[bytes], bytes | None]) -> Store:
    assert isinstance(store.backend, MemoryStore)
    backend = store.backend.copy()
    data = change(backend.get(name))
    backend.delete(name)
    if data is not None:
        backend.put(name, data)
    other = new_store(CLOCK)  # only its shell: the repository is the damaged one
    other.backend = backend
    other.repository.backend = backend
    other.repository.seal, other.repository.ids = store.repository.seal, store.repository.ids
    other.repository.config = store.repository.config
    other.repository.config_data = store.repository.config_data
    other.repository.random = Numbered(b"later")
    other.saved = dict(store.saved)
    return other


def suffering(store: Store) -> set[str]:
    """Each page of each snapshot is what was saved, or there is an error that names an object: whose there is one."""
    found = set()
    for snapshot, pages in store.saved.items():
        try:
            reader = SnapshotReader(store.repository, snapshot)
        except (Damaged, UnknownSnapshot):
            found.add(snapshot)
            continue
        with reader:
            for number, page in enumerate(pages):
                try:
                    assert np.array_equal(reader.page(RAM, number), page)
                except Damaged as error:
                    assert error.name.startswith("packs/")  # noqa: PT017
                    found.add(snapshot)
            try:
                assert np.array_equal(reader.read(RAM, 0, len(pages)), pages)
                assert snapshot not in found, "by run and one by one the same"
            except Damaged as error:
                assert error.name.startswith("packs/")  # noqa: PT017
                assert snapshot in found
    return found


CHANGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "twice": lambda data: data + data,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("store", [OPEN, SECRET], ids=["open", "encrypted"])
def test_whatever_is_wrong_with_an_object_is_named(store: Store, change: str) -> None:
    for name in [*store.names("packs/"), *store.names("index/"), *store.names("snapshots/")]:
        other = damaged_copy(store, name, CHANGES[change])
        suffer = suffering(other)
        if change == "missing" and name.startswith("snapshots/"):
            assert suffer == {name.removeprefix("snapshots/")}
            continue  # forgotten, as far as verify can see
        verdict = verify(other.repository)
        assert name in {problem.name for problem in verdict.problems}, f"{change}: {name}"
        assert verdict.damaged_snapshots == suffer, f"{change}: {name}"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([OPEN, SECRET]), st.data())
def test_any_flipped_bit_is_named(store: Store, data: st.DataObject) -> None:
    names = [*store.names("packs/"), *store.names("index/"), *store.names("snapshots/")]
    name = data.draw(st.sampled_from(names))
    at = data.draw(st.integers(0, store.backend.size(name) * 8 - 1))

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        return bytes(changed)

    other = damaged_copy(store, name, flip)
    verdict = verify(other.repository)
    # A zstd frame has bits that mean nothing; then what comes out is right, and nothing else was promised.
    if name not in {problem.name for problem in verdict.problems}:
        assert name.startswith("packs/")
        assert store is OPEN
        other.check()
    assert suffering(other) == verdict.damaged_snapshots


def test_a_whole_repository_is_found_whole() -> None:
    for store in (OPEN, SECRET):
        seen: list[tuple[int, int]] = []
        verdict = verify(store.repository, lambda done, of, seen=seen: seen.append((done, of)))  # type: ignore[misc]
        assert verdict.problems == ()
        assert (verdict.snapshots, verdict.packs, verdict.orphans) == (2, len(store.names("packs/")), 0)
        assert verdict.read_bytes == sum(entry.size_bytes for entry in store.backend.list("packs/"))
        assert seen[-1] == (verdict.read_bytes, verdict.read_bytes)


def test_damage_names_the_snapshots_that_suffer_and_no_others() -> None:
    store = new_store(CLOCK)
    whole = store.save(memory(60))
    broken = store.save(memory(60, seed=3))
    mine = set(store.repository.packs()) - set(
        store.repository.index(bytes.fromhex(store.repository.manifest(whole).head.indexes[0].index)).pack_ids
    )
    name = store.repository.packs()[mine.pop()].name
    other = damaged_copy(store, name, CHANGES["missing"])
    (problem,) = verify(other.repository).problems
    assert (problem.name, problem.snapshots) == (name, (broken,))


@pytest.mark.parametrize("change", ["cut", "longer", "empty", "twice"])
def test_packs_of_another_size_are_noticed_before_a_page_is_read_and_only_where_they_are_used(change: str) -> None:
    store = new_store(CLOCK)
    whole = store.save(memory(60))
    broken = store.save(memory(60, seed=3))
    with SnapshotReader(store.repository, broken) as reader:
        reader.require_sizes()
    mine = set(store.repository.packs()) - set(
        store.repository.index(bytes.fromhex(store.repository.manifest(whole).head.indexes[0].index)).pack_ids
    )
    name = store.repository.packs()[mine.pop()].name
    other = damaged_copy(store, name, CHANGES[change])
    with SnapshotReader(other.repository, broken) as reader, pytest.raises(Damaged, match="not the size") as raised:
        reader.require_sizes()
    assert raised.value.name == name
    with SnapshotReader(other.repository, whole) as reader:
        reader.require_sizes()


# --- lengths that lie ------------------------------------------------------------------------------------


def forged(kind: int, name: str, head: object, lengths: list[tuple[int, int]], rest: bytes = b"") -> bytes:
    """Without encryption the seal's key is there for everybody: an attacker can say anything in a head."""
    sealed = OPEN.repository.seal.close(name, 0, msgspec.json.encode({"head": head, "sections": lengths}))
    return envelope.prefix(kind, len(sealed)) + sealed + rest


@pytest.mark.parametrize(
    ("head", "lengths"),
    [
        ({"packs": 1 << 40, "frames": 1, "rows": 1, "bases": 0}, [(16, 1 << 45), (16, 6), (16, 16)]),
        ({"packs": 1, "frames": 1, "rows": 1, "bases": 0}, [(16, 1 << 50), (16, 6), (16, 16)]),
        ({"packs": 1, "frames": 1, "rows": 1, "bases": 0}, [(1 << 50, 32), (16, 6), (16, 16)]),
        ({"packs": 1, "frames": 1, "rows": 1, "bases": 0}, [(-5, 32), (16, 6), (16, 16)]),
        ({"packs": True, "frames": 1, "rows": 1, "bases": 0}, [(16, 32), (16, 6), (16, 16)]),
        ({"packs": 0, "frames": 0, "rows": 0, "bases": 0}, []),
        ({}, [(16, 1)]),
    ],
)
def test_an_index_that_lies_about_lengths_is_refused(head: object, lengths: list[tuple[int, int]]) -> None:
    index_id = bytes(16)
    name = index_name(index_id)
    room = sum(max(0, sealed) for sealed, _ in lengths if sealed < 1000)
    store = damaged_copy(OPEN, "config", lambda data: data)
    store.backend.put(name, forged(INDEX, name, head, lengths, bytes(room)))
    with pytest.raises(Damaged, match=index_id.hex()):
        store.repository.index(index_id)


def manifest_with(**changes: object) -> dict[str, object]:
    head: dict[str, object] = {
        "name": "x", "created_s": 0.0, "blocks": [{"name": "a", "size_bytes": PAGE_BYTES, "page_bytes": 4096}],
        "indexes": [], "counts": {}, "disks": [], "metadata": {},
    }  # fmt: skip
    return head | changes


@pytest.mark.parametrize(
    "head",
    [
        manifest_with(blocks=[{"name": "a", "size_bytes": 1 << 60, "page_bytes": 4096}]),
        manifest_with(blocks=[{"name": "a", "size_bytes": 4095, "page_bytes": 4096}]),
        manifest_with(blocks=[{"name": "a", "size_bytes": -4096, "page_bytes": 4096}]),
        manifest_with(blocks=[{"name": "a", "size_bytes": 4096, "page_bytes": 0}]),
        manifest_with(blocks=[{"name": "a", "size_bytes": 4096}] * 2),
        manifest_with(blocks=[]),
        manifest_with(indexes=[["zz", 5]]),
        manifest_with(indexes=[["00" * 16, -5]]),
        manifest_with(indexes=[["00" * 15, 5]]),
        manifest_with(indexes=[["00" * 16, 1 << 62]]),
        manifest_with(name=5),
        manifest_with(created_s=1e18),
        manifest_with(created_s=-1.0),
        manifest_with(more="fields"),
    ],
)
def test_a_manifest_that_lies_is_refused(head: object) -> None:
    snapshot = "ab" * 16
    name = manifest_name(snapshot)
    store = damaged_copy(OPEN, "config", lambda data: data)
    store.backend.put(name, forged(MANIFEST, name, head, [(16, 0), (16, 4)], bytes(32)))
    with pytest.raises(Damaged, match=snapshot):
        store.repository.manifest(snapshot)
    assert snapshot in {info.snapshot for info in store.repository.snapshots() if info.head is None}


def test_a_manifest_that_is_larger_than_what_it_describes_is_not_read_whole() -> None:
    """Its head tells, before memory is taken for the rest: a page's table of a GiB, a device state of two."""
    snapshot, store = "ef" * 16, damaged_copy(OPEN, "config", lambda data: data)
    name = manifest_name(snapshot)
    reads: list[int] = []
    for lengths, rest in ([(16, 0), (1 << 20, 4)], (1 << 20) + 16), ([(16, 2 << 30), (16, 4)], 32):
        store.backend.delete(name)
        store.backend.put(name, forged(MANIFEST, name, manifest_with(), lengths, bytes(rest)))
        failing = FailingStore(store.backend, lambda call: None)
        get = failing.get

        def counted(name: str, offset: int = 0, length: int | None = None, get: Get = get) -> bytes:
            data = get(name, offset, length)
            reads.append(len(data))
            return data

        failing.get = counted  # type: ignore[method-assign]
        store.repository.backend = failing
        with pytest.raises(Damaged, match="do not fit"):
            store.repository.manifest(snapshot)
        store.repository.backend = store.backend
    assert max(reads) <= 64 << 10


def test_a_table_that_speaks_of_rows_that_no_index_has_is_refused() -> None:
    snapshot = "cd" * 16
    name = manifest_name(snapshot)
    for number in (0, 5, 0xFFFFFFFE):
        data = seal_object(
            OPEN.repository.seal, name, MANIFEST, manifest_with(), [b"", struct.pack("<I", number)],
        )  # fmt: skip
        store = damaged_copy(OPEN, "config", lambda data: data)
        store.backend.put(name, data)
        with pytest.raises(Damaged, match="no index has"):
            store.repository.manifest(snapshot)


def test_a_head_that_is_deep_or_large_is_refused() -> None:
    snapshot = "ef" * 16
    name = manifest_name(snapshot)
    for plain in (b"[" * 100_000, b'{"head":' * 50_000, b"\xff" * 10):
        sealed = OPEN.repository.seal.close(name, 0, plain)
        store = damaged_copy(OPEN, "config", lambda data: data)
        store.backend.put(name, envelope.prefix(MANIFEST, len(sealed)) + sealed)
        with pytest.raises(Damaged, match=snapshot):
            store.repository.manifest(snapshot)
    store = damaged_copy(OPEN, "config", lambda data: data)
    store.backend.put(name, envelope.prefix(MANIFEST, 1 << 31) + bytes(100))
    with pytest.raises(Damaged, match="its head would have"):
        store.repository.manifest(snapshot)


@pytest.mark.parametrize("change", ["missing", "cut"])
def test_a_save_does_not_rely_on_a_pack_that_is_gone_or_cut(change: str) -> None:
    """It stores those pages again, and is whole."""
    for name in OPEN.names("packs/"):
        other = damaged_copy(OPEN, name, CHANGES[change])
        other.saved = {}
        other.save(memory(150))
        other.check()


# --- indexes made again ----------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [OPEN, SECRET], ids=["open", "encrypted"])
@pytest.mark.parametrize("change", ["missing", "cut"])
def test_lost_indexes_come_back_byte_by_byte(store: Store, change: str) -> None:
    for name in store.names("index/"):
        other = damaged_copy(store, name, CHANGES[change])
        assert verify(other.repository).damaged_snapshots
        rebuilt = rebuild_indexes(other.repository)
        assert rebuilt.failed == ()
        assert [index_name(each) for each in rebuilt.indexes] == [name]
        assert other.backend.get(name) == store.backend.get(name)
        other.check()
    assert isinstance(store.backend, MemoryStore)
    everything = damaged_copy(store, store.names("index/")[0], CHANGES["missing"])
    for name in everything.names("index/"):
        everything.backend.delete(name)
    rebuild_indexes(everything.repository)
    assert verify(everything.repository).problems == ()
    everything.check()
    assert rebuild_indexes(everything.repository).indexes == ()


def test_no_index_is_made_from_pages_that_were_damaged_meanwhile() -> None:
    """Without encryption a frame has no check of its own: the ids of damaged pages must not become the right ones."""
    for name in OPEN.names("packs/"):
        other = damaged_copy(OPEN, name, lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:])
        for index in other.names("index/"):
            other.backend.delete(index)
        rebuilt = rebuild_indexes(other.repository)
        if not rebuilt.failed:  # a bit of zstd's that means nothing
            other.check()
            continue
        assert name in {error.name for error in rebuilt.failed} or name in str(rebuilt.failed)
        suffering(other)


def test_no_index_is_made_when_a_pack_in_the_middle_is_missing() -> None:
    other = damaged_copy(OPEN, "config", lambda data: data)
    index_id = min(other.repository.indexes(), key=lambda each: -len(other.repository.index(each).pack_ids))
    packs = other.repository.index(index_id).pack_ids
    assert len(packs) >= 2
    other.backend.delete(other.repository.packs()[packs[0]].name)
    other.backend.delete(index_name(index_id))
    rebuilt = rebuild_indexes(other.repository)
    assert index_id not in rebuilt.indexes
    assert index_name(index_id) in {error.name for error in rebuilt.failed}
