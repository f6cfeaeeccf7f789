"""Objects in this process's memory: for tests, and for a repository that is thrown away."""

from __future__ import annotations

import threading

from vmferry.clock import Clock, SystemClock
from vmferry.store.backend import Entry, checked_name, checked_prefix
from vmferry.store.errors import Damaged, ObjectExists, ObjectMissing


class MemoryStore:
    """A `Backend`. Every method holds one lock for as long as it runs."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, float]] = {}

    def put(self, name: str, data: bytes) -> None:
        """See `Backend`."""
        with self._lock:
            if checked_name(name) in self._objects:
                raise ObjectExists(name)
            self._objects[name] = (bytes(data), self._clock.wall_s())

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Backend`."""
        with self._lock:
            if checked_name(name) not in self._objects:
                raise ObjectMissing(name)
            data = self._objects[name][0]
        end = len(data) if length is None else offset + length
        if end > len(data) or offset > len(data):
            raise Damaged(name, f"it ends at byte {len(data)}, before {end}")
        return data[offset:end]

    def size(self, name: str) -> int:
        """See `Backend`."""
        return len(self.get(name))

    def list(self, prefix: str) -> list[Entry]:
        """See `Backend`."""
        checked_prefix(prefix)
        with self._lock:
            objects = sorted(self._objects.items())
        return [Entry(name, len(data), at_s) for name, (data, at_s) in objects if name.startswith(prefix)]

    def delete(self, name: str) -> None:
        """See `Backend`."""
        with self._lock:
            self._objects.pop(checked_name(name), None)

    def copy(self) -> MemoryStore:
        """Another store with the same objects, with their times."""
        other = MemoryStore(self._clock)
        with self._lock:
            other._objects = dict(self._objects)
        return other

    def close(self) -> None:
        """See `Backend`; the objects stay, so that a test can open the store again."""
