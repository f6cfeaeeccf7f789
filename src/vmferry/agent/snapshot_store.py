"""The agent's repository of snapshots: opened once, in one place, and worked on in threads of its own.

Theory of operation
-------------------
`AgentConfig.repository` names it: nothing (a folder under the agent's own state, made when it is first needed), a
folder, or the address of an object store. `open_repository` gives the open one; everything that may wait for a disk or
a network goes through `run`, whose threads are few, named, and never the event loop's.

Rule 1: the rooms `store` and `engine` are imported when a snapshot is first asked for: an agent at rest has no numpy.
Rule 2: an error of the store stays what it is (`store.errors`), and the next call opens anew if none is open yet.
Rule 3: whoever is cancelled while it waits in `run` leaves its work to end by itself: threads cannot be stopped. Long
        work looks at a flag of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from vmferry import limits
from vmferry.errors import RepositoryError

if TYPE_CHECKING:
    from vmferry.agent.config import AgentConfig
    from vmferry.store.backend import Backend
    from vmferry.store.config import Key
    from vmferry.store.repository import Repository

P = ParamSpec("P")
T = TypeVar("T")


_M_ARENA_MAX = -8
"""glibc's number for it, in malloc.h."""


def _share_one_heap() -> None:
    """Threads that begin from now on share one heap. By default glibc gives each its own, which keeps what its thread
    has freed: three saves of one guest of 4 GiB took the agent to 226 MiB so, and take it to 167 MiB with one."""
    with contextlib.suppress(OSError, AttributeError):  # another libc has neither the trouble nor the call
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def is_address(repository: str) -> bool:
    """Whether it is the address of an object store, and no folder."""
    return "://" in repository and not repository.startswith("file://")


class SnapshotStore:
    """Owned by the agent; any thread may call `open_repository`."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        _share_one_heap()
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._repository: Repository | None = None
        # Made here, with no thread in it: the lock above is held while a store that hangs is opened, and the event loop
        # must never wait for it.
        self._threads = ThreadPoolExecutor(limits.SNAPSHOT_THREADS_MAX, thread_name_prefix="snapshot")

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self._config.repository or str(self._config.repository_folder)

    def open_repository(self) -> Repository:
        """The open repository, which is made if there is none. Waits for the store: never call it on the event loop.

        Raises RepositoryError in the words of `store.errors`: WrongKey, Damaged, StoreTransient (again may help),
        StorePermanent; or for an address whose library is not installed.
        """
        from vmferry.store.errors import ObjectExists, ObjectMissing
        from vmferry.store.repository import Repository

        with self._lock:
            if self._repository is None:
                key = self._key()
                if self._backend is None:
                    self._backend = self._open_backend()
                try:
                    self._repository = Repository.open(self._backend, key=key)
                except ObjectMissing:
                    try:
                        self._repository = Repository.create(self._backend, key=key)
                    except ObjectExists:  # another agent was faster
                        self._repository = Repository.open(self._backend, key=key)
            return self._repository

    async def run(self, work: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """Runs blocking work in one of the store's threads. Raises what it raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(work, *args, **more))

    async def with_repository(self, work: Callable[[Repository], T]) -> T:
        """The same with the open repository."""
        return await self.run(lambda: work(self.open_repository()))

    def close(self) -> None:
        """Takes no more work. What runs in a thread ends by itself, and the process does not wait for it here."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open_backend(self) -> Backend:
        from vmferry.store.local import LocalFolder

        where = self._config.repository
        if is_address(where):
            try:
                from vmferry.store.objects import ObjectStore
            except ImportError as error:
                raise RepositoryError(
                    f"{where} is an object store, and this host has no obstore",
                    hint="install vmferry[objects], or name a folder",
                    cause=error,
                ) from error
            options: dict[str, Any] = dict(self._config.repository_options)
            return ObjectStore(where, options)
        folder = Path(where.removeprefix("file://")) if where else self._config.repository_folder
        return LocalFolder(folder)

    def _key(self) -> Key | None:
        from vmferry.store.config import KeyFile

        path = self._config.repository_key
        if path is None:
            return None
        try:
            return KeyFile(path.read_bytes())
        except OSError as error:
            raise RepositoryError(f"the repository's key file cannot be read: {error}", cause=error) from error
