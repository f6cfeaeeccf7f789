"""Snapshots that restores hold open: each once for all restores of it, under one lock that one task renews.

Theory of operation
-------------------
A snapshot's indexes and page tables are shared by its restores; the last one that gives it back closes it. Who may be
away is the repository, and then its lock gets stale, and others may prune:

    1. the repository is away from this host for longer than a lock lives
    2. another host prunes: it deletes the lock, and puts pages of half-empty packs elsewhere
    3. the repository is back; the pages are where no table of this reader looks for them
So a lock that is found lost is not only taken anew: the snapshot is opened anew under the new one, and what is read
from then on is read where it is now. Pages that were read before are the same pages, for they go by their content.

Rule 1: a lock is no thread's but its owner's: only the task `renew-…` renews one, and nobody meanwhile.
Rule 2: threads may read while the snapshot is opened anew: each read is of one reader from its beginning to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.errors import RepositoryError

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.touch_orders import TouchOrders
    from vmferry.engine.frozen import FrozenDisk, FrozenState
    from vmferry.engine.lazy import Touches
    from vmferry.store.reader import SnapshotReader
    from vmferry.store.repository import Repository

log = logging.getLogger("vmferry.agent")


class HeldSnapshot:
    """A snapshot's pages for the engine (`engine.lazy.SnapshotPages`), wherever in the repository they are now."""

    def __init__(self, repository: Repository, snapshot: str) -> None:
        """In a thread of the store. Raises RepositoryError."""
        from vmferry.store.reader import SnapshotReader

        self.snapshot = snapshot
        self._open: Callable[[], SnapshotReader] = lambda: SnapshotReader(repository, snapshot)
        self._newest: SnapshotReader | None = self._open()
        self.head, self.device_state = self._newest.head, self._newest.device_state

    @property
    def _reader(self) -> SnapshotReader:
        reader = self._newest
        if reader is None:
            raise RepositoryError(f"the snapshot {self.snapshot} is not open any more", retry="after-fix")
        return reader

    def require_sizes(self) -> None:
        """Raises Damaged for a pack that has not the size that it should have."""
        self._reader.require_sizes()

    def page(self, block: str, number: int) -> Any:
        """One page. Raises RepositoryError, as the next ones."""
        return self._reader.page(block, number)

    def read_some(self, block: str, pages: Any) -> Any:
        """These pages, one per row."""
        return self._reader.read_some(block, pages)

    def is_zero(self, block: str) -> Any:
        """Which pages are zero."""
        return self._reader.is_zero(block)

    def keep_lock(self) -> bool:
        """In a thread. Renews the lock, or opens the snapshot anew if it was lost: then it is True. Raises
        RepositoryError: it is as before, and is tried again."""
        from vmferry.store.errors import Damaged, LockLost

        try:
            self._reader.renew_if_due()
        except LockLost as error:
            log.warning("snapshot=%s effect=renew-lock result=%s; it is opened anew", self.snapshot, error)
        else:
            return False
        try:
            self._newest = self._open()
        except Damaged:  # what is there still is not to be taken away too
            self._reader.lock_again()
            raise
        return True

    def close(self) -> None:
        """Gives the lock back; again is fine. Raises RepositoryError: it gets stale by itself.

        Its tables are let go at once: whoever read from it may be one of a circle, and stay until somebody looks for
        those, with 35 MB for a guest of 4 GiB."""
        reader, self._newest = self._newest, None
        if reader is not None:
            reader.close()


@dataclass(slots=True)
class Opened:
    """A snapshot that was read as far as it can be before its pages are."""

    reader: HeldSnapshot
    state: FrozenState
    order: Touches | None
    disks: tuple[FrozenDisk, ...] = ()


@dataclass(slots=True)
class _Shared:
    """One that is open for some restores."""

    opening: asyncio.Task[Opened]
    users: int = 0
    renewing: asyncio.Task[None] | None = None
    """Its lock's one owner."""
    is_over: asyncio.Event = field(default_factory=asyncio.Event)


class OpenSnapshots:
    """Owned by the agent's restores. `on_new`: a snapshot was opened anew, and what failed may be tried again."""

    def __init__(self, agent: Agent, orders: TouchOrders, *, on_new: Callable[[str], None]) -> None:
        self._agent, self._orders, self._on_new = agent, orders, on_new
        self._shared: dict[str, _Shared] = {}

    async def open(self, snapshot: str) -> Opened:
        """The snapshot, read as far as it can be before its pages are; `release` gives it back. Raises
        RepositoryError."""
        shared = self._shared.get(snapshot)
        if shared is None:
            opening = asyncio.create_task(
                self._agent.snapshot_store.with_repository(
                    lambda repository: _open(repository, snapshot, self._orders)
                ),
                name=f"open-{snapshot[:8]}",
            )
            shared = self._shared[snapshot] = _Shared(opening)
            self._agent.keep_task(opening)
            shared.renewing = asyncio.create_task(self._renew(shared, snapshot), name=f"renew-{snapshot[:8]}")
            self._agent.keep_task(shared.renewing)
        shared.users += 1
        try:
            return await asyncio.shield(shared.opening)
        except BaseException:
            self.release(snapshot)
            raise

    def release(self, snapshot: str) -> None:
        """Somebody who opened it does not need it any more."""
        shared = self._shared.get(snapshot)
        if shared is None:
            return
        shared.users -= 1
        if shared.users <= 0:
            del self._shared[snapshot]
            shared.is_over.set()  # `_renew` closes it: a repository that hangs holds nobody up

    async def close(self) -> None:
        """The agent ends: locks are given back."""
        for shared in self._shared.values():
            if shared.opening.done() and not shared.opening.cancelled() and shared.opening.exception() is None:
                await asyncio.to_thread(shared.opening.result().reader.close)

    async def _renew(self, shared: _Shared, snapshot: str) -> None:
        """The one owner of an open snapshot's lock, whatever its restores do.

        1. two restores of a snapshot renew its lock at once  2. each deletes what the other took for the lock
        3. none is left, and another host may prune."""
        await asyncio.wait({shared.opening})
        if shared.opening.cancelled() or shared.opening.exception() is not None:
            return
        reader, run = shared.opening.result().reader, self._agent.snapshot_store.run
        while not shared.is_over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.RESTORE_RENEW_S):
                    await shared.is_over.wait()
                    break
            try:
                is_new = await run(reader.keep_lock)
            except Exception as error:  # noqa: BLE001 - without an owner it gets stale, and is never taken anew
                log.warning("snapshot=%s effect=renew-lock result=%r", snapshot, error)
            else:
                if is_new:
                    self._on_new(snapshot)
        try:
            await run(reader.close)
        except RepositoryError as error:  # its lock gets stale by itself
            log.warning("snapshot=%s effect=close result=%s", snapshot, error)


def _open(repository: Repository, snapshot: str, orders: TouchOrders) -> Opened:
    """In a thread of the store. Raises RepositoryError."""
    from vmferry.engine.frozen import FrozenDisk, thaw

    reader = HeldSnapshot(repository, snapshot)
    try:
        reader.require_sizes()
        disks = tuple(FrozenDisk.from_wire(each) for each in reader.head.disks)
        return Opened(reader, thaw(reader.device_state), orders.get(snapshot), disks)
    except BaseException:
        reader.close()
        raise
