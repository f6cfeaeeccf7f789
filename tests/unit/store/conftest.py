"""Small guests whose memory looks like memory: text, tables, zeros, duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from vmferry.store import config
from vmferry.store.backend import Backend
from vmferry.store.config import Key
from vmferry.store.manifest import Block
from vmferry.store.memory import MemoryStore
from vmferry.store.page_ids import PAGE_BYTES, Pages
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository, Shape
from vmferry.store.writer import SnapshotWriter

RAM = "pc.ram"
SMALL = Shape(pack_bytes=100_000, index_pages=150)
"""Several packs and indexes for a guest of some hundred pages."""


@dataclass
class ManualClock:
    """Time that a test moves."""

    at_s: float = 1_000_000.0

    def now_s(self) -> float:
        return self.at_s

    def wall_s(self) -> float:
        return self.at_s


@dataclass
class Numbered:
    """Bytes that look random and are the same in every run."""

    label: bytes = b""
    count: int = 0

    def __call__(self, length: int) -> bytes:
        self.count += 1
        return hashlib.shake_256(self.label + self.count.to_bytes(8, "little")).digest(length)


def memory(pages: int, seed: int = 1) -> Pages:
    """Memory of a guest: an eighth is zero, an eighth are duplicates, the rest can be compressed, some not at all."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 24, (pages, PAGE_BYTES), dtype=np.uint8)
    kinds = rng.integers(0, 8, pages)
    found[kinds == 0] = 0
    found[kinds == 1] = found[0]
    hard = np.flatnonzero(kinds == 2)
    found[hard] = rng.integers(0, 256, (len(hard), PAGE_BYTES), dtype=np.uint8)
    return found


def touched(pages: Pages, count: int, seed: int = 2) -> Pages:
    """The same guest a little later: `count` pages have a few other bytes."""
    rng = np.random.default_rng(seed)
    later = pages.copy()
    for number in rng.choice(len(pages), count, replace=False):
        where = rng.integers(0, PAGE_BYTES, 30)
        later[number, where] = rng.integers(1, 256, 30, dtype=np.uint8)
    return later


@dataclass
class Store:
    """A repository, and what is in it."""

    backend: Backend
    clock: ManualClock
    repository: Repository
    saved: dict[str, Pages] = field(default_factory=dict)

    def save(self, pages: Pages, base: SnapshotReader | None = None, name: str = "vm", run: int = 100) -> str:
        """Saves; the snapshot's id."""
        block = Block(RAM, len(pages) * PAGE_BYTES)
        with SnapshotWriter(self.repository, [block], base=base) as writer:
            for first in range(0, len(pages), run):
                writer.put(RAM, first, pages[first : first + run])
            writer.commit(name, device_state=b"devices of " + name.encode(), metadata={"vm": name})
        self.saved[writer.snapshot] = pages
        return writer.snapshot

    def later(self, snapshot: str, pages: Pages, name: str = "vm") -> str:
        """Saves with another snapshot as base."""
        with SnapshotReader(self.repository, snapshot) as base:
            return self.save(pages, base, name)

    def check(self, *snapshots: str) -> None:
        """Each of these (all, if none is named) is whole: every page, by run and one by one."""
        for snapshot in snapshots or tuple(self.saved):
            pages = self.saved[snapshot]
            with SnapshotReader(self.repository, snapshot) as reader:
                assert np.array_equal(reader.read(RAM, 0, len(pages)), pages), "by run"
                for number in range(0, len(pages), 7):
                    assert np.array_equal(reader.page(RAM, number), pages[number]), f"page {number}"

    def names(self, prefix: str) -> list[str]:
        return [entry.name for entry in self.backend.list(prefix)]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> Store:
    return new_store(clock)


def new_store(
    clock: ManualClock, key: Key | None = None, backend: Backend | None = None, *, has_frame_check: bool = True
) -> Store:
    """A new repository, in memory if nothing else is said. `has_frame_check`: False for one as it was made before
    frames had checks."""
    backend = backend or MemoryStore(clock)
    random: Callable[[int], bytes] = Numbered()
    repository = Repository.create(backend, key=key, clock=clock, random=random, shape=SMALL)
    if not has_frame_check:
        older = without_frame_check(repository.config_data)
        backend.delete(config.NAME)
        backend.put(config.NAME, older)
        repository = Repository.open(backend, key=key, clock=clock, random=random, shape=SMALL)
    return Store(backend, clock, repository)


def without_frame_check(data: bytes) -> bytes:
    """The config of a repository without encryption, as it was written before frames had checks."""
    found = msgspec.structs.replace(msgspec.json.decode(data, type=config.Config), frame_check=None, proof="")
    proof = hashlib.sha256(msgspec.json.encode(found, order="deterministic")).hexdigest()
    return msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(found, proof=proof)), indent=1)
