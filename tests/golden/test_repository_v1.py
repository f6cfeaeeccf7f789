"""Repositories of version 1, written once and kept: every later version reads them.

python -m tests.golden.test_repository_v1 FOLDER      writes them (only for a new version, into a new folder)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vmferry.store.config import Key, KeyFile, PassPhrase
from vmferry.store.local import LocalFolder
from vmferry.store.manifest import Block
from vmferry.store.memory import MemoryStore
from vmferry.store.page_ids import PAGE_BYTES, Pages
from vmferry.store.reader import SnapshotReader
from vmferry.store.rebuild import rebuild_indexes
from vmferry.store.repository import Repository
from vmferry.store.verify import verify
from vmferry.store.writer import SnapshotWriter

KEPT = Path(__file__).parent / "repository-v1"
KEYS: dict[str, Key | None] = {
    "open": None, "open-checked": None, "pass-phrase": PassPhrase("golden"), "key-file": KeyFile(bytes(range(32))),
}  # fmt: skip
"""`open` is from before frames had checks (2026-11-26)."""


def first() -> Pages:
    """20 pages: numbered text, zeros, a duplicate, one that cannot be compressed."""
    text = b"".join((f"page {number} ".encode() * PAGE_BYTES)[:PAGE_BYTES] for number in range(20))
    pages = np.frombuffer(text, np.uint8).reshape(-1, PAGE_BYTES).copy()
    pages[5:8] = 0
    pages[9] = pages[8]
    pages[10] = np.random.Generator(np.random.PCG64(1)).integers(0, 256, PAGE_BYTES, dtype=np.uint8)
    return pages


def second() -> Pages:
    """The same with a few other bytes, some zeros gone."""
    pages = first()
    pages[3, 100:110] ^= 1
    pages[10, 0] ^= 255
    pages[6] = 6
    return pages


def write(folder: Path, key: Key | None) -> None:
    folder.parent.mkdir(exist_ok=True)
    repository = Repository.create(LocalFolder(folder), key=key)
    base = None
    for name, pages in (("first", first()), ("second", second())):
        with SnapshotWriter(repository, [Block("ram", len(pages) * PAGE_BYTES)], base=base) as writer:
            writer.put("ram", 0, pages)
            writer.commit(name, device_state=b"state of " + name.encode(), disks=[{"node": "d"}], metadata={"n": 1})
        base = base or SnapshotReader(repository, writer.snapshot)
    assert base is not None
    base.close()
    repository.backend.close()


def kept(kind: str) -> Repository:
    backend = MemoryStore()
    for path in sorted((KEPT / kind).rglob("*")):
        if path.is_file():
            backend.put(path.relative_to(KEPT / kind).as_posix(), path.read_bytes())
    return Repository.open(backend, key=KEYS[kind])


@pytest.mark.parametrize("kind", KEYS)
def test_version_1_is_read(kind: str) -> None:
    repository = kept(kind)
    assert verify(repository).problems == ()
    found = {info.head.name: info for info in repository.snapshots() if info.head}
    for name, pages in (("first", first()), ("second", second())):
        with SnapshotReader(repository, found[name].snapshot) as reader:
            assert np.array_equal(reader.read("ram", 0, len(pages)), pages)
            assert all(np.array_equal(reader.page("ram", number), page) for number, page in enumerate(pages))
            assert reader.device_state == b"state of " + name.encode()
            assert (reader.head.disks, reader.head.metadata) == ([{"node": "d"}], {"n": 1})
    counts = repository.manifest(found["second"].snapshot).head.counts
    assert (counts.pages, counts.zero, counts.differences) == (20, 2, 2)


@pytest.mark.parametrize("kind", KEYS)
def test_its_indexes_can_be_made_again(kind: str) -> None:
    repository = kept(kind)
    names = [entry.name for entry in repository.backend.list("index/")]
    for name in names:
        repository.backend.delete(name)
    assert len(rebuild_indexes(repository).indexes) == len(names)
    assert verify(repository).problems == ()


if __name__ == "__main__":
    for each, its_key in KEYS.items():
        write(Path(sys.argv[1]) / each, its_key)
