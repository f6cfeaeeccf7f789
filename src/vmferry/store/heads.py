"""Heads of manifests that were read, kept for the next who asks: they never change.

Listing snapshots, and looking for one by its name, need every head, and each is a request to the store.

Rule 1: bounded by the bytes of the heads, as they are stored. What does not fit is read again; nothing that was kept
        makes room for it, for whoever lists asks for all of them in one order, and then nothing would be found again.
Rule 2: a head is found by its snapshot's id and its manifest's size and time: one that was brought back from a copy, or
        that somebody else put in its place, is looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from vmferry.limits import STORE_HEADS_KEPT_BYTES
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
