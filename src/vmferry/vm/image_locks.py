"""QEMU's image locks: which bytes are locked, what they mean, and who holds them.

Theory of operation
-------------------
A QEMU that has an image open locks single bytes of it with OFD locks, always as read locks, one for each
permission. Byte 100+n says 'I use permission n', byte 200+n says 'I do not let others use permission n'. To
see whether a lock would be refused, the kernel is asked with F_OFD_GETLK, which also works for other hosts
on filesystems that share locks. Who holds it is in /proc/PID/fdinfo, for this host only: an OFD lock has no
pid of its own.

Rule 1: asking takes no lock; the image is opened read-only and closed again, which drops nobody's OFD lock.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import struct
from collections.abc import Collection
from pathlib import Path

USES_BASE, FORBIDS_BASE = 100, 200
# QEMU's block permissions by bit number. The fifth, 'graph-mod', is gone since QEMU 7.2.
PERMISSIONS: tuple[str, ...] = ("consistent-read", "write", "write-unchanged", "resize", "graph-mod")
_LOCK = re.compile(
    r"(?:lock:\s*)?\d+: (?:-> )?(OFDLCK|POSIX|FLOCK|LEASE)\s+\S+\s+(READ|WRITE)\s+(-?\d+) "
    r"([0-9a-f]+):([0-9a-f]+):(\d+) (\d+) (\d+|EOF)"
)
# struct flock on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = "hhqqi4x"


@dataclasses.dataclass(frozen=True, slots=True)
class LockLine:
    """One line of /proc/locks or of a lock: entry in fdinfo. `end` is the last byte, None is end of file."""

    kind: str
    mode: str
    pid: int
    inode: int
    start: int
    end: int | None

    def covers(self, byte: int) -> bool:
        """Whether `byte` is inside."""
        return self.start <= byte and (self.end is None or byte <= self.end)


@dataclasses.dataclass(frozen=True, slots=True)
class LockHolder:
    """A process of this host with locks on the image."""

    pid: int
    command: str
    uses: frozenset[str]
    forbids: frozenset[str]

    @property
    def is_writer(self) -> bool:
        """Whether it holds the right to change the image."""
        return "write" in self.uses


@dataclasses.dataclass(frozen=True, slots=True)
class ImageLocks:
    """What is locked (by anybody, also on other hosts where the filesystem tells), and by whom here.

    `foreign` is what is locked although no process of this host holds it. None in `uses` and `forbids` is
    unknown: the filesystem or the kernel could not be asked.
    """

    uses: frozenset[str] | None
    forbids: frozenset[str] | None
    holders: tuple[LockHolder, ...]

    @property
    def writers(self) -> tuple[LockHolder, ...]:
        """The processes of this host that may change the image; more than one is a split brain."""
        return tuple(holder for holder in self.holders if holder.is_writer)

    @property
    def foreign(self) -> frozenset[str] | None:
        """Permissions in use that no process of this host accounts for."""
        if self.uses is None:
            return None
        return self.uses.difference(*(holder.uses for holder in self.holders))

    @property
    def can_write(self) -> bool | None:
        """Whether a QEMU that wants to write, alone, would get its locks now; None is unknown."""
        if self.uses is None or self.forbids is None:
            return None
        return "write" not in self.forbids and "write" not in self.uses


def image_locks(path: str) -> ImageLocks:
    """Ask the kernel about the locks on an image. Raises OSError when the file cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        uses, forbids = _asked(descriptor, USES_BASE), _asked(descriptor, FORBIDS_BASE)
    finally:
        os.close(descriptor)
    return ImageLocks(uses, forbids, lock_holders(status.st_dev, status.st_ino))


def in_use(path: str) -> frozenset[str] | None:
    """The permissions that somebody uses, on any host that shares the filesystem's locks; None if it cannot tell.

    Raises OSError when the file cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _asked(descriptor, USES_BASE)
    finally:
        os.close(descriptor)


class WriteLock:
    """A writer's locks on an image, as QEMU takes them: while they are held no QEMU can open it for writing.

    `take` gives one or None when somebody else has the image; `release` gives it back, and so does the end of this
    process.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def take(cls, path: str) -> WriteLock | None:
        """Raises OSError when the file cannot be opened or its filesystem has no such locks."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        bytes_to_hold = [base + PERMISSIONS.index("write") for base in (USES_BASE, FORBIDS_BASE)]
        try:
            # First ours, then a look at the others', as QEMU does it: of two at the same time none gets through.
            for byte in bytes_to_hold:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, 0, byte, 1, 0))
            for base in (USES_BASE, FORBIDS_BASE):
                found = _asked(descriptor, base)
                if found is None or "write" in found:
                    os.close(descriptor)
                    return None
        except OSError:
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    def release(self) -> None:
        """Gives the locks back. A second time changes nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def lock_holders(device: int, inode: int) -> tuple[LockHolder, ...]:
    """The processes of this host that hold QEMU locks on this file, lowest pid first."""
    found: list[LockHolder] = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            lines = _locks_of(int(name), device, inode)
            uses, forbids = permissions(lines, USES_BASE), permissions(lines, FORBIDS_BASE)
            if uses or forbids:
                found.append(LockHolder(int(name), _command(int(name)), uses, forbids))
    return tuple(sorted(found, key=lambda holder: holder.pid))


def written_by(pid: int, paths: Collection[str]) -> frozenset[str]:
    """Those of the images that this process holds the write lock on. What cannot be looked at is not among them."""
    found: set[str] = set()
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            continue
        if "write" in permissions(_locks_of(pid, status.st_dev, status.st_ino), USES_BASE):
            found.add(path)
    return frozenset(found)


def parse(text: str) -> tuple[LockLine, ...]:
    """The lines of /proc/locks, or the `lock:` lines of an fdinfo file. Others are passed over."""
    found: list[LockLine] = []
    for line in text.splitlines():
        match = _LOCK.match(line.strip())
        if match is not None:
            kind, mode, pid, _major, _minor, inode, start, end = match.groups()
            last = None if end == "EOF" else int(end)
            found.append(LockLine(kind, mode, int(pid), int(inode), int(start), last))
    return tuple(found)


def permissions(lines: tuple[LockLine, ...], base: int) -> frozenset[str]:
    """Which permissions these locks stand for, from `base` on."""
    return frozenset(
        name
        for bit, name in enumerate(PERMISSIONS)
        if any(line.kind == "OFDLCK" and line.covers(base + bit) for line in lines)
    )


def _asked(descriptor: int, base: int) -> frozenset[str] | None:
    """The permissions whose byte somebody has locked: the kernel names what a write lock would meet."""
    found: set[str] = set()
    for bit, name in enumerate(PERMISSIONS):
        wish = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, base + bit, 1, 0)
        try:
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wish)
        except OSError:
            return None
        if struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK:
            found.add(name)
    return frozenset(found)


def _locks_of(pid: int, device: int, inode: int) -> tuple[LockLine, ...]:
    """The locks that one process holds on the file. A process that ends meanwhile holds none."""
    found: list[LockLine] = []
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return ()
    for descriptor in descriptors:
        try:
            status = os.stat(f"/proc/{pid}/fd/{descriptor}")
            if (status.st_dev, status.st_ino) == (device, inode):
                found += parse(Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text())
        except OSError:
            continue
    return tuple(found)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
