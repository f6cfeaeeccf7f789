"""The agent's repository of snapshots: opened once, in one place, and worked on in threads of its own.

Theory of operation
-------------------
`AgentConfig.repository` names it: nothing (a folder under the agent's own state, made when it is first needed), a
folder, or the address of an object store. `open_repository` gives the open one; everything that may wait for a disk or
a network goes through `run`, whose threads are few, named, and never the event loop's.

A place that somebody configured is never made a repository unasked (`make_repository` is the word for it):

    1. the agent asks before the file system of its repository is mounted, and makes a new one in the mount point
    2. it is mounted; the agent goes on with the keys of the other one, and writes what nobody can ever read

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
import os
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


def _made(backend: Backend, key: Key | None) -> Repository:
    """A new one. Raises RepositoryError."""
    from vmferry.store.errors import ObjectExists
    from vmferry.store.repository import Repository

    try:
        return Repository.create(backend, key=key)
    except ObjectExists:  # another agent was faster
        return _opened(backend, key)


def _opened(backend: Backend, key: Key | None) -> Repository:
    """The one that is there. Raises ObjectMissing, and what else a store raises."""
    from vmferry.store.errors import WrongKey
    from vmferry.store.repository import Repository

    try:
        return Repository.open(backend, key=key)
    except WrongKey as error:
        hint = "--repository-key names the key file of an encrypted repository; an agent takes no pass phrase"
        raise WrongKey(error.message, hint=hint) from error


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
        """The open repository; the agent's own is made if there is none. Waits for the store: never call it on the
        event loop.

        Raises RepositoryError in the words of `store.errors`: WrongKey, Damaged, StoreTransient (again may help),
        StorePermanent; or for a configured place that has none, or an address whose library is not installed.
        """
        from vmferry.store.errors import ObjectMissing

        with self._lock:
            try:
                return self._there(self._require_config)
            except ObjectMissing as error:
                if self._config.repository:
                    raise self._none(error) from error
                return self._make()

    def make_repository(self) -> tuple[Repository, bool]:
        """The repository of the configured place, made there if there is none; and whether it was. In a thread.

        Raises RepositoryError as `open_repository`, and for a place that has something else in it; nothing was made."""
        from vmferry.store.errors import ObjectMissing

        with self._lock:
            try:
                return self._there(self._require_room), False
            except ObjectMissing:
                assert self._backend is not None, "it says that there is none"
                others = [] if self._folder is not None else [entry.name for entry in self._backend.list("")]
                if others:
                    raise self._not_empty(others) from None
                return self._make(), True

    def _there(self, require: Callable[[], None]) -> Repository:
        """The open one, or the one of this place, which is opened. Under the lock. `require` looks at the place before
        anything is opened there, for that makes a folder. Raises ObjectMissing, and what else a store raises."""
        if self._repository is None:
            key = self._key()
            if self._backend is None:
                require()
                self._backend = self._open_backend()
            self._repository = _opened(self._backend, key)
        return self._repository

    def _make(self) -> Repository:
        """Where `_there` has found none."""
        assert self._backend is not None, "it says that there is none"
        self._repository = _made(self._backend, self._key())
        return self._repository

    @property
    def _folder(self) -> Path | None:
        """None: it is an object store."""
        where = self._config.repository
        if is_address(where):
            return None
        return Path(where.removeprefix("file://")) if where else self._config.repository_folder

    def _require_config(self) -> None:
        """Raises RepositoryError for a configured folder without a repository."""
        from vmferry.store import config as config_object

        if not self._config.repository or self._folder is None:
            return
        try:
            os.stat(self._folder / config_object.NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._none(error) from error
        except OSError:  # whoever opens it says what is wrong
            return

    def _require_room(self) -> None:
        """Raises RepositoryError for a folder that is somebody else's."""
        from vmferry.store import config as config_object
        from vmferry.store.backend import LEFTOVERS

        folder = self._folder
        if folder is None:
            return
        with contextlib.suppress(OSError):  # whoever opens it says what is wrong
            names = os.listdir(folder)
            others = [
                name for name in names if name not in (LEFTOVERS.rstrip("/"), "lost+found") and not name.startswith(".")
            ]
            if others and config_object.NAME not in names:
                raise self._not_empty(others)

    def _none(self, cause: Exception) -> RepositoryError:
        return RepositoryError(
            f"there is no repository in {self.place}",
            retry="after-fix",
            hint="is its file system mounted? 'vmferry repository-init' makes a new one there",
            cause=cause,
        )

    def _not_empty(self, names: list[str]) -> RepositoryError:
        return RepositoryError(
            f"{self.place} has no repository's configuration, and something else in it: {', '.join(sorted(names)[:3])}",
            retry="after-fix",
            hint="name an empty place",
        )

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

        where, folder = self._config.repository, self._folder
        if folder is None:
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
