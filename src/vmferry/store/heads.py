"""Heads of manifests: read side by side, and kept for the next who asks, for they never change.

Listing snapshots, and looking for one by its name, need every head, and each is a request to the store.

Rule 1: bounded by the bytes of the heads, as they are stored. What does not fit is read again; nothing that was kept
        makes room for it, for whoever lists asks for all of them in one order, and then nothing would be found again.
Rule 2: a head is found by its snapshot's id and its manifest's size and time: one that was brought back from a copy, or
        that somebody else put in its place, is looked at.
Rule 3: only first parts are read ahead, as bytes, and few of them: whatever a manifest claims of itself, what it takes
        in memory is for the one who looks at it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from vmferry.limits import STORE_HEADS_AT_ONCE, STORE_HEADS_KEPT_BYTES
from vmferry.store.backend import Entry
from vmferry.store.manifest import Head


class KeptHeads:
    """Threads may call at the same time."""

    def __init__(self, bytes_max: int = STORE_HEADS_KEPT_BYTES) -> None:
        self._left = bytes_max
        self._kept: dict[str, tuple[Entry, Head, int]] = {}
        self._lock = threading.Lock()

    def get(self, snapshot: str, entry: Entry) -> Head | None:
        """The head, if it is kept and of this very manifest."""
        with self._lock:
            found = self._kept.get(snapshot)
        return found[1] if found is not None and found[0] == entry else None

    def keep(self, snapshot: str, entry: Entry, head: Head, size_bytes: int) -> None:
        """A head that was read, and the bytes that it has in the store."""
        with self._lock:
            self._drop(snapshot)
            if size_bytes <= self._left:
                self._kept[snapshot] = entry, head, size_bytes
                self._left -= size_bytes

    def keep_only(self, snapshots: Collection[str]) -> None:
        """What is not among these any more makes room."""
        with self._lock:
            for snapshot in self._kept.keys() - set(snapshots):
                self._drop(snapshot)

    def _drop(self, snapshot: str) -> None:
        found = self._kept.pop(snapshot, None)
        if found is not None:
            self._left += found[2]


class FirstReads:
    """Reads the first parts of these heads, at most `STORE_HEADS_AT_ONCE` at a time, for one who takes them in order.

    At its end it waits for the reads that have begun. One thread; `read` is called in others.
    """

    def __init__(self, read: Callable[[str], bytes], snapshots: Sequence[str]) -> None:
        self._read = read
        self._waiting = list(reversed(snapshots))
        self._begun: dict[str, Future[bytes]] = {}
        at_once = min(len(snapshots), STORE_HEADS_AT_ONCE)
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="heads") if at_once > 1 else None
        for _ in range(at_once):
            self._begin_next()

    def take(self, snapshot: str) -> bytes:
        """The next one's. Raises what its read raised."""
        begun = self._begun.pop(snapshot, None)
        if begun is None:
            return self._read(snapshot)
        try:
            return begun.result()
        finally:
            self._begin_next()

    def __enter__(self) -> FirstReads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _begin_next(self) -> None:
        if self._threads is not None and self._waiting:
            snapshot = self._waiting.pop()
            self._begun[snapshot] = self._threads.submit(self._read, snapshot)
