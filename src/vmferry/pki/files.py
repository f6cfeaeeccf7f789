"""Files that hold keys: private directories, atomic writes, and a write that never replaces a file.

Rule 1: a file appears under its name only when it is whole; a crash leaves the old state or the new one.
Rule 2: nothing here ever widens a mode: directories are 0700, keys 0600, certificates 0644.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

KEY_MODE = 0o600
CERTIFICATE_MODE = 0o644
DIRECTORY_MODE = 0o700


def make_private_directory(path: Path) -> None:
    """Make `path` so that only this user can enter it; it may exist. Raises OSError."""
    path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    path.chmod(DIRECTORY_MODE)


def write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Write `path` whole, or raise FileExistsError and leave what is there alone."""
    draft = _draft(path, content, mode)
    try:
        # A hard link is the one atomic "create with this content unless the name is taken".
        os.link(draft, path)
    finally:
        draft.unlink()
    _sync_directory(path.parent)


def replace(path: Path, content: bytes, *, mode: int) -> None:
    """Write `path` whole, in place of what is there. Raises OSError, and then the old file still stands."""
    draft = _draft(path, content, mode)
    try:
        draft.rename(path)
    except OSError:
        draft.unlink()
        raise
    _sync_directory(path.parent)


def write_volatile(path: Path, content: bytes, *, mode: int) -> None:
    """Write a new file that need not outlive a crash: no fsync. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _draft(path: Path, content: bytes, mode: int) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return draft


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
