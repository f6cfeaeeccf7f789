"""Notices a directory the moment it is made: the runtime directory of a QEMU that is just being started.

Reading a guest's console must begin before the guest runs there, or the time of its first tick is lost.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

_IN_CLOEXEC, _IN_CREATE, _IN_MOVED_TO = 0o2000000, 0x100, 0x80
_EVENT = struct.Struct("iIII")
_READ_BYTES = 65536


class Arrivals:
    """Entries that appear in a directory from now on, by inotify. A context manager; one thread."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self._directory, self._prefix = directory, prefix
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(_IN_CLOEXEC)
        mask = _IN_CREATE | _IN_MOVED_TO
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(directory), mask) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot watch {directory}: {os.strerror(number)}")

    def next(self, *, unless_ends: int, timeout_s: float) -> Path | None:
        """The next entry with the prefix; None when the process `unless_ends` ended first, or at the deadline."""
        pidfd = os.pidfd_open(unless_ends)
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        try:
            while True:
                ready = {descriptor for descriptor, _ in poll.poll(timeout_s * 1000)}
                if self._fd in ready:
                    for name in _names(os.read(self._fd, _READ_BYTES)):
                        if name.startswith(self._prefix):
                            return self._directory / name
                if not ready or pidfd in ready:
                    return None
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """Ends the watch."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _names(data: bytes) -> list[str]:
    """The names in a piece of inotify's stream."""
    names, at = [], 0
    while at < len(data):
        length = _EVENT.unpack_from(data, at)[3]
        at += _EVENT.size
        names.append(os.fsdecode(data[at : at + length].rstrip(b"\0")))
        at += length
    return names
