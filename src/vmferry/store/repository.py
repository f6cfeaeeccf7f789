"""A repository: objects of six kinds in a backend, and what can be done with them.

Theory of operation
-------------------
    config                what kind of repository this is                 written once, when it is made
    packs/XX/ID           pages                                           new names only, never changed
    index/ID              which pages are in which packs                  new names only, never changed
    snapshots/ID          a manifest: what a snapshot is                  new names only, never changed
    locks/KIND-ID         who works on it                                 short-lived
    pins/JOB              a guest that still has memory in a snapshot     until it is whole or ended, whatever its age

A save writes in this order, and each step is durable before the next begins. A crash leaves:

    1. lock            a lock that gets stale; `prune` waits for that, then deletes it
    2. packs           packs that no index names: `prune` deletes them
    3. index           an index that no manifest needs; its pages count as known for the next save, until `prune`
    4. manifest        THE COMMIT. From here on the snapshot is there
    5. look for the lock    (see `lock`: only who was stopped for half an hour finds it gone)
    6. lock deleted    a lock that gets stale; the snapshot is whole

Finished snapshots are never touched by a save, so nothing that happens to one can hurt them. `forget` deletes one
manifest, which is one step. `prune` has an order of its own, see there. docs/repository.md tells the same to users.

Rule 1: what a listing shows is believed only as far as its name is one of ours; strange names are left alone.
Rule 2: whoever takes a lock looks first whether the config is still the one that the repository was opened with. An
        agent that starts before a file system is mounted opens what lies below; with the keys of that it would write
        objects that nobody can read.
Rule 3: everything that was read is checked before it is used; what does not fit is `Damaged`, with its name.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from vmferry.clock import Clock, SystemClock
from vmferry.limits import (
    STORE_FRAME_PAGES,
    STORE_HEAD_BYTES_MAX,
    STORE_INDEX_PAGES,
    STORE_INDEX_PAGES_MAX,
    STORE_LOCK_STALE_S,
    STORE_MANIFEST_BYTES_MAX,
    STORE_PACK_BYTES,
    STORE_ZSTD_LEVEL,
)
from vmferry.store import config as config_object
from vmferry.store import lock as locks
from vmferry.store import pins
from vmferry.store.backend import Backend, Entry, again
from vmferry.store.config import Config, Key, Secrets
from vmferry.store.envelope import MANIFEST, head_end
from vmferry.store.errors import (
    Damaged,
    ObjectExists,
    ObjectMissing,
    OtherRepository,
    StorePermanent,
    StoreTransient,
    UnknownSnapshot,
)
from vmferry.store.heads import FirstReads, KeptHeads
from vmferry.store.index import Index, index_name, read_index
from vmferry.store.lock import Lock
from vmferry.store.manifest import Head, Manifest, manifest_name, read_head, read_manifest
from vmferry.store.pack import pack_name
from vmferry.store.page_ids import PageIds

_ID: Final = re.compile(r"[0-9a-f]{32}")
_FIRST_READ_BYTES: Final = 64 << 10
_INDEX_BYTES_MAX: Final = STORE_HEAD_BYTES_MAX + STORE_INDEX_PAGES_MAX * 40


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One snapshot in a listing."""

    snapshot: str
    size_bytes: int
    """The manifest's; pages are shared."""
    head: Head | None
    damage: str = ""
    """Why there is no head."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How objects are made by this process; no part of the format."""

    pack_bytes: int = STORE_PACK_BYTES
    index_pages: int = STORE_INDEX_PAGES
    level: int = STORE_ZSTD_LEVEL


class Repository:
    """An open repository. Several threads may read; who writes has a writer of his own.

    Make it with `create` or `open`. The backend stays the caller's.
    """

    def __init__(
        self,
        backend: Backend,
        config: Config,
        config_data: bytes,
        secrets: Secrets,
        clock: Clock,
        random: Callable[[int], bytes],
        shape: Shape,
    ) -> None:
        self.backend = backend
        self.config = config
        self.config_data = config_data
        """The config object as it was when the repository was opened."""
        self.seal = secrets.seal
        self.ids = PageIds(secrets.id_key)
        self.clock = clock
        self.random = random
        self.shape = shape
        self._heads = KeptHeads()

    @classmethod
    def create(
        cls,
        backend: Backend,
        *,
        key: Key | None = None,
        frame_pages: int = STORE_FRAME_PAGES,
        clock: Clock | None = None,
        random: Callable[[int], bytes] = os.urandom,
        shape: Shape | None = None,
    ) -> Repository:
        """Makes a repository. Raises ObjectExists when there is one; it was left as it is."""
        clock = clock or SystemClock()
        data = config_object.new_config(
            repository=random(16),
            created_s=clock.wall_s(),
            frame_pages=frame_pages,
            key=key,
            master=random(config_object.KEY_BYTES),
            salt=random(16),
        )
        backend.put(config_object.NAME, data)
        return cls.open(backend, key=key, clock=clock, random=random, shape=shape)

    @classmethod
    def open(
        cls,
        backend: Backend,
        *,
        key: Key | None = None,
        clock: Clock | None = None,
        random: Callable[[int], bytes] = os.urandom,
        shape: Shape | None = None,
    ) -> Repository:
        """Opens one. Raises ObjectMissing when there is none, WrongKey, Damaged."""
        size = backend.size(config_object.NAME)
        if size > _FIRST_READ_BYTES:
            raise Damaged(config_object.NAME, f"it has {size} bytes")
        data = backend.get(config_object.NAME, 0, size)
        config, secrets = config_object.read_config(data, key)
        return cls(backend, config, data, secrets, clock or SystemClock(), random, shape or Shape())

    # --- locks ------------------------------------------------------------------------------------------

    def shared(self, what: str, *, stale_s: float = STORE_LOCK_STALE_S, forgets: str = "") -> Lock:
        """A lock for saving or reading, or for forgetting a snapshot. Raises RepositoryBusy while somebody prunes;
        OtherRepository."""
        self._require_same()
        return locks.take(
            self.backend, self.clock, self.random, locks.Kind.SHARED, what, stale_s=stale_s, forgets=forgets
        )

    def exclusive(self, what: str, *, stale_s: float = STORE_LOCK_STALE_S) -> Lock:
        """A lock for taking away. Raises RepositoryBusy while anybody does anything; OtherRepository."""
        self._require_same()
        return locks.take(self.backend, self.clock, self.random, locks.Kind.EXCLUSIVE, what, stale_s=stale_s)

    def _require_same(self) -> None:
        """Raises OtherRepository (rule 2)."""
        name, length = config_object.NAME, len(self.config_data)
        try:
            found = again(lambda: self.backend.get(name, 0, length))
        except Damaged:  # it is shorter
            found = b""
        except ObjectMissing:
            raise Damaged(name, "it is missing") from None
        if found != self.config_data:
            raise OtherRepository(
                f"the repository that was opened ({self.config.repository[:8]}) is not the one that is there now: its "
                "config is another one"
            )

    # --- objects ----------------------------------------------------------------------------------------

    def put_new(self, name: str, data: bytes) -> None:
        """Puts an object whose name holds fresh random bytes; what is there after a lost answer is ours."""
        may_have_happened = False
        for last in (False, False, True):
            try:
                self._put_or_find(name, data)
                return
            except StoreTransient:
                may_have_happened = True
                if last:
                    raise
            except StorePermanent as error:
                error.may_have_happened |= may_have_happened
                raise

    def _put_or_find(self, name: str, data: bytes) -> None:
        try:
            self.backend.put(name, data)
        except ObjectExists:
            try:
                found = self.backend.get(name)
            except StorePermanent as error:
                error.may_have_happened = True
                raise
            if found != data:
                raise

    def indexes(self) -> dict[bytes, Entry]:
        """All index objects, by id."""
        return {bytes.fromhex(each): entry for each, entry in self._named("index/")}

    def packs(self) -> dict[bytes, Entry]:
        """All packs, by id."""
        found = {}
        for entry in again(lambda: self.backend.list("packs/")):
            text = entry.name.rpartition("/")[2]
            if _ID.fullmatch(text) and entry.name == pack_name(bytes.fromhex(text)):
                found[bytes.fromhex(text)] = entry
        return found

    def index(self, index_id: bytes) -> Index:
        """Raises Damaged, also when it is missing."""
        return read_index(self.seal, index_id, self.whole(index_name(index_id), _INDEX_BYTES_MAX))

    def manifest(self, snapshot: str) -> Manifest:
        """All of a manifest. Raises UnknownSnapshot, Damaged."""
        if not _ID.fullmatch(snapshot):
            raise UnknownSnapshot(f"{snapshot} is no snapshot's id")
        name = manifest_name(snapshot)
        try:
            # Its head first, a small read: it says whether the whole may be as large as it is.
            size = again(lambda: self.backend.size(name))
            self._head(snapshot, size, lambda: self._first_read(snapshot, size))
            data = self._bounded(name, STORE_MANIFEST_BYTES_MAX)
        except ObjectMissing as error:
            raise UnknownSnapshot(f"the repository has no snapshot {snapshot}", cause=error) from error
        return read_manifest(self.seal, snapshot, data)

    def whole(self, name: str, bytes_max: int) -> bytes:
        """An object that must be there. Raises Damaged when it is not, or is too large."""
        try:
            return self._bounded(name, bytes_max)
        except ObjectMissing:
            raise Damaged(name, "it is missing") from None

    def _bounded(self, name: str, bytes_max: int) -> bytes:
        """Raises ObjectMissing; Damaged when it is too large."""
        size = again(lambda: self.backend.size(name))
        if size > bytes_max:
            raise Damaged(name, f"it has {size} bytes, more than {bytes_max}")
        return again(lambda: self.backend.get(name, 0, size))

    def part(self, name: str, offset: int, length: int) -> bytes:
        """A part of an object that must be there. Raises Damaged when it is not."""
        try:
            return again(lambda: self.backend.get(name, offset, length))
        except ObjectMissing:
            raise Damaged(name, "it is missing") from None

    # --- snapshots --------------------------------------------------------------------------------------

    def snapshot_ids(self) -> dict[str, Entry]:
        """All manifests, readable or not."""
        return dict(self._named("snapshots/"))

    def snapshots(self) -> list[SnapshotInfo]:
        """Every snapshot, oldest first; damaged ones at the end, with what is wrong. Reads only heads."""
        return sorted(
            self.each_snapshot(), key=lambda info: (info.head is None, info.head.created_s if info.head else 0.0)
        )

    def each_snapshot(self) -> Iterator[SnapshotInfo]:
        """Every snapshot, one at a time, in no order: for whoever looks for some of them."""
        entries = self.snapshot_ids()
        self._heads.keep_only(entries.keys())
        kept = {snapshot: self._heads.get(snapshot, entry) for snapshot, entry in entries.items()}
        unread = [snapshot for snapshot, head in kept.items() if head is None]
        with FirstReads(lambda snapshot: self._first_read(snapshot, entries[snapshot].size_bytes), unread) as reads:
            for snapshot, entry in entries.items():
                with contextlib.suppress(ObjectMissing, UnknownSnapshot):  # forgotten since the listing
                    yield self._listed(snapshot, entry, kept[snapshot], reads)

    def snapshot(self, snapshot: str) -> SnapshotInfo:
        """One, by its id: no other is looked at. Raises UnknownSnapshot."""
        if _ID.fullmatch(snapshot):
            name = manifest_name(snapshot)
            with contextlib.suppress(ObjectMissing):
                size = again(lambda: self.backend.size(name))
                return self._info(snapshot, size, lambda: self._first_read(snapshot, size))[0]
        raise UnknownSnapshot(f"the repository has no snapshot {snapshot}")

    def require_snapshot(self, snapshot: str) -> None:
        """Raises UnknownSnapshot when it is not there; whether it can be read is not looked at."""
        try:
            if not _ID.fullmatch(snapshot):
                raise ObjectMissing(snapshot)
            again(lambda: self.backend.size(manifest_name(snapshot)))
        except ObjectMissing as error:
            raise UnknownSnapshot(f"the repository has no snapshot {snapshot}", cause=error) from error

    def forget(self, snapshot: str) -> None:
        """The snapshot is gone; its pages go with the next prune. Raises UnknownSnapshot, RepositoryBusy (also while a
        guest that was restored from it has memory in it yet), LockLost (it is still there)."""
        self.require_snapshot(snapshot)
        lock = self.shared(f"forget {snapshot}", forgets=snapshot)
        try:
            pins.require_free(self, snapshot)
            lock.check()  # `pins` has the schedule
            again(lambda: self.backend.delete(manifest_name(snapshot)))
        finally:
            lock.release()

    def _listed(self, snapshot: str, entry: Entry, head: Head | None, reads: FirstReads) -> SnapshotInfo:
        """`head`: it was kept. Raises ObjectMissing."""
        if head is not None:
            return SnapshotInfo(snapshot, entry.size_bytes, head)
        info, head_bytes = self._info(snapshot, entry.size_bytes, lambda: reads.take(snapshot))
        if info.head is not None:
            self._heads.keep(snapshot, entry, info.head, head_bytes)
        return info

    def _info(self, snapshot: str, size: int, first: Callable[[], bytes]) -> tuple[SnapshotInfo, int]:
        """And the bytes that its head has in the store. Raises ObjectMissing."""
        try:
            head, head_bytes = self._head(snapshot, size, first)
        except Damaged as error:
            self._require_same()  # with the keys of another repository everything looks damaged
            return SnapshotInfo(snapshot, size, None, str(error)), 0
        return SnapshotInfo(snapshot, size, head), head_bytes

    def _first_read(self, snapshot: str, size: int) -> bytes:
        """What most heads fit into."""
        name = manifest_name(snapshot)
        return again(lambda: self.backend.get(name, 0, min(size, _FIRST_READ_BYTES)))

    def _head(self, snapshot: str, size: int, first: Callable[[], bytes]) -> tuple[Head, int]:
        """The head, and the bytes that it has. `first` gives its first part."""
        name, data = manifest_name(snapshot), first()
        end = head_end(name, data, MANIFEST, size)
        if end > len(data):
            data = again(lambda: self.backend.get(name, 0, end))
        return read_head(self.seal, snapshot, data, size)[0], end

    def _named(self, prefix: str) -> list[tuple[str, Entry]]:
        entries = again(lambda: self.backend.list(prefix))
        named = [(entry.name.removeprefix(prefix), entry) for entry in entries]
        return [(name, entry) for name, entry in named if _ID.fullmatch(name)]
