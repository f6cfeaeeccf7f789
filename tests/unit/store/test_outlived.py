"""Differences that have outlived their bases: nobody needs them, and nobody may take one for a page."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from tests.unit.store.conftest import RAM, ManualClock, Numbered, Store, memory, new_store, touched
from vmferry.store.errors import Damaged
from vmferry.store.manifest import Block
from vmferry.store.memory import MemoryStore
from vmferry.store.page_ids import PAGE_BYTES, Pages
from vmferry.store.prune import execute, plan_prune
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Shape
from vmferry.store.verify import verify
from vmferry.store.writer import SnapshotWriter

ONE_PACK = Shape(pack_bytes=10_000_000, index_pages=1_000_000)
"""A save is one pack."""
HOURS_S = 36_000.0
WAIT_S = 10.0


def noise(rng: np.random.Generator, pages: int) -> Pages:
    return rng.integers(0, 256, (pages, PAGE_BYTES), dtype=np.uint8)


def outlived(clock: ManualClock, label: bytes, *, has_frame_check: bool = True) -> tuple[Store, str, Pages]:
    """A store with one snapshot, whose first 16 pages are stored whole somewhere, and as differences without a base
    somewhere else.

    1. `a1`; `a2` is a little different, and has other pages beside, which stay needed
    2. `b1` of another VM has the changed pages whole   3. all these are forgotten, and the repository is pruned"""
    store = new_store(clock, has_frame_check=has_frame_check)
    store.repository.random, store.repository.shape = Numbered(label), ONE_PACK
    rng = np.random.default_rng(5)
    first, beside, more = noise(rng, 16), noise(rng, 40), noise(rng, 120)
    changed = first.copy()
    changed[:, 100:110] ^= 9
    a1 = store.save(np.concatenate([first, np.zeros_like(beside)]), name="a1")
    a2 = store.later(a1, np.concatenate([changed, beside]), name="a2")
    b1 = store.save(np.concatenate([changed, beside, more]), name="b1")
    c1 = store.save(more[:30], name="c1")
    kept = np.concatenate([changed, beside])
    b2 = store.save(kept, name="b2")
    for snapshot in (a1, a2, b1):
        store.repository.forget(snapshot)
        del store.saved[snapshot]
    clock.at_s += HOURS_S
    execute(store.repository, plan_prune(store.repository))
    store.check(c1)
    return store, b2, kept


@pytest.mark.parametrize("has_frame_check", [True, False])
@pytest.mark.parametrize("label", [b"x0", b"x1", b"x2", b"x3"])
def test_a_page_is_found_where_it_is_whole(clock: ManualClock, label: bytes, has_frame_check: bool) -> None:
    store, snapshot, _ = outlived(clock, label, has_frame_check=has_frame_check)
    store.check(snapshot)
    assert verify(store.repository).problems == ()
    for below in (0.5, 1.0):
        clock.at_s += HOURS_S
        execute(store.repository, plan_prune(store.repository, empty_below=below))
        store.check()


@pytest.mark.parametrize("label", [b"x0", b"x1", b"x2", b"x3"])
def test_a_save_counts_on_no_such_difference(clock: ManualClock, label: bytes) -> None:
    store, before, kept = outlived(clock, label)
    after = store.later(before, kept, name="b3")
    store.check(after)
    store.repository.forget(before)
    del store.saved[before]
    for below in (0.5, 1.0):
        clock.at_s += HOURS_S
        execute(store.repository, plan_prune(store.repository, empty_below=below))
        store.check()
    assert verify(store.repository).problems == ()


def test_whoever_comes_while_bases_are_looked_for_waits(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. one thread begins to look for all bases of an index  2. another one knows of none, and may not look again so
    soon  3. it took pages for damaged of which nothing was wrong"""
    store = new_store(clock)
    pages = memory(200)
    second = store.later(store.save(pages), touched(pages, 100))
    with SnapshotReader(store.repository, second) as reader:
        source, begun, go = reader.source, threading.Event(), threading.Event()
        find = source.find_anywhere

        def slow(*arguments: object, **more: object) -> object:
            begun.set()
            assert go.wait(WAIT_S)
            return find(*arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(source, "find_anywhere", slow)
        found: list[Pages | Damaged] = []

        def read() -> None:
            try:
                found.append(reader.read(RAM, 0, 200))
            except Damaged as error:
                found.append(error)

        readers = [threading.Thread(target=read, name=f"reader-{number}") for number in range(3)]
        readers[0].start()
        assert begun.wait(WAIT_S)
        for each in readers[1:]:
            each.start()
        go.set()
        for each in readers:
            each.join(WAIT_S)
        assert [isinstance(each, Damaged) for each in found] == [False] * 3
        assert all(np.array_equal(each, store.saved[second]) for each in found if not isinstance(each, Damaged))


def test_a_damaged_base_costs_room_and_no_save(clock: ManualClock) -> None:
    backend = MemoryStore(clock)
    store = new_store(clock, backend=backend)
    pages = memory(200)
    first = store.save(pages)
    for name in store.names("packs/"):
        whole = bytearray(backend.get(name))
        whole[40] ^= 1
        backend.delete(name)
        backend.put(name, bytes(whole))
    later = touched(pages, 150)
    changed = np.flatnonzero((later != pages).any(axis=1))
    block = Block(RAM, later.nbytes)
    with (
        SnapshotReader(store.repository, first) as base,
        SnapshotWriter(store.repository, [block], base=base) as writer,
    ):
        writer.put(RAM, 0, later)
        writer.commit("vm")
    assert "packs/" in writer.base_damage
    with SnapshotReader(store.repository, writer.snapshot) as reader:
        assert np.array_equal(reader.read_some(RAM, changed), later[changed])


def test_a_writer_that_has_ended_lets_go_of_what_it_knew(store: Store) -> None:
    pages = memory(50)
    base = SnapshotReader(store.repository, store.save(pages))
    writer = SnapshotWriter(store.repository, [Block(RAM, pages.nbytes)], base=base)
    circle: list[object] = [writer]
    circle.append(circle)
    tables = weakref.ref(base)
    base.close()
    gc.disable()
    try:
        writer.abort()
        del base, circle
        assert tables() is None
    finally:
        gc.enable()
    writer.abort()
