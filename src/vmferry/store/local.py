"""Objects as files of a local folder: the store that needs nothing else.

Theory of operation
-------------------
    put:  1. write tmp/RANDOM   2. fsync it   3. link it to its name, which fails if the name is taken
          4. fsync the folder of the name   5. unlink tmp/RANDOM
A crash before 3 leaves a file under tmp/; between 3 and 5 the object and, under tmp/, a second name of it. Folders are
made before that, and synced with their parents, so that no object is in a folder that a crash takes away.

Step 3 is a hard link because a rename replaces silently. File systems without hard links get the rename, after a look:
there two hosts that create one repository in the same moment are not told apart; all other names are random.

Reading keeps files open: opening one costs more than reading a page from it. A file that was deleted meanwhile can
still be read, as whoever opened it had a right to: objects never change. One that stands in its place is opened: a
person has brought a damaged object back from a copy, and nobody shall have to start anew for it to be seen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmferry.errors import RepositoryError
from vmferry.limits import STORE_OPEN_FILES_MAX
from vmferry.store.backend import LEFTOVERS, Entry, checked_name, checked_prefix, is_name
from vmferry.store.errors import Damaged, ObjectExists, ObjectMissing, StorePermanent, StoreTransient

_AGAIN: Final = frozenset({
    errno.EAGAIN, errno.EINTR, errno.EIO, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.EMFILE, errno.ENFILE,
    errno.ENOMEM,
})  # fmt: skip
"""EIO too: of a network file system it is how an outage looks."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_HINT: Final = (
    "'vmferry forget' what is not needed, then 'vmferry prune --empty-below 0': that only deletes. If nothing at all "
    "can be written, not even a lock, make a little room on that file system first"
)
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS})


class _File:
    """An open file, closed when the last thread that uses it lets it go."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._path = path
        self._is = _identity(os.fstat(self.fd))

    def is_replaced(self) -> bool:
        """Whether the name leads to another file now. A name that leads to none is no other file."""
        try:
            return _identity(os.stat(self._path)) != self._is
        except OSError:
            return False

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it was never opened
            os.close(self.fd)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


class LocalFolder:
    """A `Backend` on a folder, which is made if it is not there (its parent must be).

    Raises StorePermanent when the folder cannot be used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _File] = OrderedDict()
        self._signs = (root / LEFTOVERS, root / "config")
        try:
            self._make(root / LEFTOVERS)
        except OSError as error:
            raise StorePermanent(f"{root} cannot hold a store: {error.strerror}", cause=error) from error

    def put(self, name: str, data: bytes) -> None:
        """See `Backend`."""
        target = self.root / checked_name(name)
        temporary = self.root / LEFTOVERS / secrets.token_hex(16)
        with self._translated(name):
            self._require_here()
            try:
                self._make(temporary.parent)
                self._make(target.parent)
                with open(temporary, "xb", buffering=0) as file:
                    _write_all(file.fileno(), data)
                    os.fsync(file.fileno())
                self._link(temporary, target)
            finally:
                with contextlib.suppress(OSError):  # what is left is under tmp/, where prune finds it
                    temporary.unlink()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Backend`."""
        with self._translated(name):
            file = self._file(name)
            if not length:
                size = os.fstat(file.fd).st_size
                if offset > size:
                    raise Damaged(name, f"it ends at byte {size}, before {offset}")
                length = size - offset if length is None else 0
            wanted = length
            data = os.pread(file.fd, wanted, offset)
            while len(data) < wanted:  # one read gives 2 GiB at most, and may be cut short by a signal
                more = os.pread(file.fd, wanted - len(data), offset + len(data))
                if not more:
                    raise Damaged(name, f"it ends at byte {os.fstat(file.fd).st_size}, before {offset + wanted}")
                data += more
            return data

    def size(self, name: str) -> int:
        """See `Backend`."""
        with self._translated(name):
            return os.stat(self.root / checked_name(name)).st_size

    def list(self, prefix: str) -> list[Entry]:
        """See `Backend`."""
        checked_prefix(prefix)
        found: list[Entry] = []
        with self._translated(prefix or "the store"):
            self._require_here()
            for folder, _, files in os.walk(self.root / prefix, onerror=_raise_unless_gone):
                for file in files:
                    path = Path(folder, file)
                    name = path.relative_to(self.root).as_posix()
                    if not is_name(name):
                        continue
                    with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                        stat = path.stat()
                        found.append(Entry(name, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda entry: entry.name)

    def delete(self, name: str) -> None:
        """See `Backend`."""
        path = self.root / checked_name(name)
        with self._lock:
            self._open.pop(name, None)
        with self._translated(name):
            try:
                path.unlink()
                _sync_folder(path.parent)
            except FileNotFoundError:
                self._require_here()

    def close(self) -> None:
        """See `Backend`."""
        with self._lock:
            self._open.clear()

    def _file(self, name: str) -> _File:
        with self._lock:
            file = self._open.get(name)
            if file is not None:
                self._open.move_to_end(name)
        if file is not None and not file.is_replaced():
            return file
        file = _File(str(self.root / checked_name(name)))
        with self._lock:
            self._open[name] = file
            if len(self._open) > STORE_OPEN_FILES_MAX:
                self._open.popitem(last=False)
        return file

    def _require_here(self) -> None:
        """Raises StoreTransient when the folder itself is gone."""
        if not any(sign.exists() for sign in self._signs):
            raise StoreTransient(
                f"the repository's folder {self.root} is gone: nothing of what was in it is there",
                hint="is it mounted? Bring it back, and what waits for it goes on",
            )

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """The kernel's words -> the contract's."""
        try:
            yield
        except OSError as error:
            raise self._as_contract(name, error) from error

    def _as_contract(self, name: str, error: OSError) -> RepositoryError:
        try:
            if isinstance(error, FileNotFoundError):
                self._require_here()
                return ObjectMissing(name)
            if isinstance(error, FileExistsError):
                return ObjectExists(name)
        except StoreTransient as gone:
            return gone
        except OSError as worse:  # the look for the folder failed as well
            error = worse
        text = f"{name}: {error.strerror}"
        if error.errno in _FULL:
            return StorePermanent(f"{text} ({self.root})", hint=_FULL_HINT, cause=error)
        return (StoreTransient if error.errno in _AGAIN else StorePermanent)(text, cause=error)

    def _link(self, temporary: Path, target: Path) -> None:
        """The object has its name, durably, when this returns or raises FileExistsError: that may be ours, of a put
        whose sync failed. Raises StoreTransient when it is there, and nobody knows for how long."""
        try:
            link_or_rename(temporary, target)
        except FileExistsError:
            self._sync_name(target)
            raise
        self._sync_name(target)

    def _sync_name(self, target: Path) -> None:
        try:
            _sync_folder(target.parent)
        except OSError as error:
            name = target.relative_to(self.root).as_posix()
            raise StoreTransient(
                f"{name}: it is there, but might not outlive a crash of the host: {error.strerror}", cause=error
            ) from error

    def _make(self, folder: Path) -> None:
        """Makes a folder and what is missing above it, each durable before something is put into it."""
        if folder.is_dir():
            return
        if folder != self.root:
            self._make(folder.parent)
        with contextlib.suppress(FileExistsError):  # somebody else made it just now
            folder.mkdir(mode=0o700)
        _sync_folder(folder.parent)


def link_or_rename(temporary: Path, target: Path) -> None:
    """Gives a file its name; what has that name stays. Raises OSError, FileExistsError if something has.

    Where there are no hard links the old name is gone afterwards, and a name that somebody takes between the look and
    the rename is lost."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        temporary.rename(target)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _raise_unless_gone(error: OSError) -> None:
    """`os.walk` passes over what it cannot read, and a pruner would take every pack for one that nobody needs."""
    if not isinstance(error, FileNotFoundError):  # never made, or deleted since its parent was read
        raise error


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
