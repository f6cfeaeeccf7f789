"""How fast a repository of snapshots is, and how small: one thread, a local folder with a warm cache.

    python -m vmferry.bench.repository [--mib 256] [--encrypted] [--folder PLACE] [--json]

The memory is guest-like: what the running Python's installation has on disk (programs, libraries, text: what a guest's
page cache holds), tables of pointers as heaps have, 12 % duplicates, 40 % zeros. The second snapshot has 107 other
bytes in 4.5 % of its pages that are not zero, which is what was measured of a Linux guest ten seconds later.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from vmferry.store.config import KeyFile
from vmferry.store.local import LocalFolder
from vmferry.store.manifest import Block
from vmferry.store.page_ids import PAGE_BYTES, Pages
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository
from vmferry.store.writer import SnapshotWriter

RAM: Final = "pc.ram"
RUN: Final = 1024
"""Pages per call: 4 MiB."""
SINGLE_PAGES: Final = 5000


def guest_memory(mib: int, seed: int = 1) -> Pages:
    """See the module's text."""
    rng = np.random.default_rng(seed)
    count = mib * 256
    pages = np.zeros((count, PAGE_BYTES), np.uint8)
    busy = np.flatnonzero(np.repeat(rng.random(count // 64 + 1) > 0.4, 64)[:count])
    twice = rng.random(len(busy)) < 0.12
    unique = busy[~twice]
    heap = unique[: len(unique) // 4]
    pages[heap] = _pointers(rng, len(heap))
    material = _files((len(unique) - len(heap)) * PAGE_BYTES)
    pages[unique[len(heap) :]] = material.reshape(-1, PAGE_BYTES)
    pages[busy[twice]] = pages[rng.choice(unique, int(np.count_nonzero(twice)))]
    return pages


def later(pages: Pages, seed: int = 2) -> Pages:
    """The same guest ten seconds later."""
    rng = np.random.default_rng(seed)
    now = pages.copy()
    busy = np.flatnonzero(pages.view(np.uint64).any(axis=1))
    for number in rng.choice(busy, int(len(busy) * 0.045), replace=False).tolist():
        where = rng.choice(PAGE_BYTES, 107, replace=False)
        now[number, where] ^= rng.integers(1, 256, 107, dtype=np.uint8)
    return now


def measure(folder: Path, mib: int, *, is_encrypted: bool) -> dict[str, Any]:
    """All numbers."""
    key = KeyFile(bytes(range(64))) if is_encrypted else None
    backend = LocalFolder(folder)
    repository = Repository.create(backend, key=key)
    pages = guest_memory(mib)
    nonzero = int(np.count_nonzero(pages.view(np.uint64).any(axis=1))) * PAGE_BYTES
    first, write_s = _timed(lambda: _save(repository, pages))
    first_bytes = sum(entry.size_bytes for entry in backend.list(""))
    reader, open_s = _timed(lambda: SnapshotReader(repository, first))
    _, second_s = _timed(lambda: _save(repository, later(pages), reader))
    second_bytes = sum(entry.size_bytes for entry in backend.list("")) - first_bytes
    whole, read_s = _timed(lambda: _read(reader, pages))
    assert whole, "what was read is what was saved"
    reader.close()
    newest = repository.snapshots()[-1].snapshot
    report = {
        "mib": mib,
        "nonzero_mib": round(nonzero / (1 << 20), 1),
        "is_encrypted": is_encrypted,
        "write_mb_s": round(nonzero / write_s / 1e6, 1),
        "read_mb_s": round(nonzero / read_s / 1e6, 1),
        "snapshot_ratio": round(first_bytes / nonzero, 4),
        "second_snapshot_ratio": round(second_bytes / first_bytes, 4),
        "second_write_mb_s": round(nonzero / second_s / 1e6, 1),
        "open_ms": round(open_s * 1e3, 1),
    }
    with SnapshotReader(repository, first) as again:
        report |= _single(again, pages, "page")
    with SnapshotReader(repository, newest) as again:
        report |= _single_changed(again, "changed_page")
    return report


def _save(repository: Repository, pages: Pages, base: SnapshotReader | None = None) -> str:
    with SnapshotWriter(repository, [Block(RAM, len(pages) * PAGE_BYTES)], base=base) as writer:
        for first in range(0, len(pages), RUN):
            writer.put(RAM, first, pages[first : first + RUN])
        writer.commit("guest")
    return writer.snapshot


def _read(reader: SnapshotReader, pages: Pages) -> bool:
    return all(
        np.array_equal(reader.read(RAM, first, min(RUN, len(pages) - first)), pages[first : first + RUN])
        for first in range(0, len(pages), RUN)
    )


def _single(reader: SnapshotReader, pages: Pages, name: str) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    busy = np.flatnonzero(pages.view(np.uint64).any(axis=1))
    return _percentiles(reader, rng.choice(busy, min(SINGLE_PAGES, len(busy)), replace=False).tolist(), name)


def _single_changed(reader: SnapshotReader, name: str) -> dict[str, Any]:
    """Pages that are stored as differences."""
    table, changed = reader.table(RAM), []
    for k, at, rows in reader.source.split(table):
        changed += at[reader.source.indexes[k].are_differences(rows)].tolist()
    return _percentiles(reader, np.random.default_rng(4).permutation(changed)[:SINGLE_PAGES].tolist(), name)


def _percentiles(reader: SnapshotReader, numbers: Sequence[int], name: str) -> dict[str, Any]:
    took = []
    for number in numbers:
        _, one_s = _timed(lambda number=number: reader.page(RAM, number))  # type: ignore[misc]
        took.append(one_s * 1e6)
    p50, p99 = np.percentile(took, [50, 99]).tolist()
    return {f"{name}_p50_us": round(p50, 1), f"{name}_p99_us": round(p99, 1)}


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began_s = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began_s


def _pointers(rng: np.random.Generator, count: int) -> Pages:
    """Objects of 64 bytes: two pointers into a few areas, a small number, some bytes, zeros."""
    words = np.zeros((count, PAGE_BYTES // 64, 8), np.uint64)
    shape = words.shape[:2]
    areas = rng.integers(0, 1 << 16, 8, dtype=np.uint64) << np.uint64(24)
    for word in (0, 1):
        offset = rng.integers(0, 1 << 20, shape, dtype=np.uint64) << np.uint64(4)
        words[..., word] = np.uint64(0x7F00 << 32) | areas[rng.integers(0, 8, shape)] | offset
    words[..., 2] = rng.integers(0, 40, shape, dtype=np.uint64)
    words[..., 3] = rng.integers(0, 1 << 40, shape, dtype=np.uint64)
    return words.reshape(count, -1).view(np.uint8)


def _files(length: int) -> Pages:
    """So many bytes of the files of this Python's installation, the largest files first; repeated at an offset if
    there are too few, so that repeated pages are no duplicates."""
    places = [Path(sys.prefix), Path(sys.base_prefix, "lib"), Path(np.__file__).parent]
    paths = {path for place in places for path in place.rglob("*") if path.suffix in (".so", ".py", ".pyc", ".a", ".h")}
    found = bytearray()
    for path in sorted(paths, key=lambda path: (-path.stat().st_size, path.name)):
        found += path.read_bytes()
        if len(found) >= length:
            break
    turns = -(-length // max(1, len(found)))
    parts = [bytes(found[turn * 97 :]) + bytes(found[: turn * 97]) for turn in range(turns)]
    return np.frombuffer(b"".join(parts)[:length], np.uint8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="memory of the guest (default: 256)")
    parser.add_argument("--encrypted", action="store_true", help="an encrypted repository")
    parser.add_argument("--folder", type=Path, help="where to put it (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = measure(Path(folder, "repository"), options.mib, is_encrypted=options.encrypted)
    if options.json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{name:24} {value}" for name, value in report.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
