"""Writes the archive format that the Linux kernel unpacks as its first file system (cpio "newc", gzipped).

The format: per entry a 110-byte header of ASCII hex numbers, the name, the data, each padded to 4 bytes; the
entry "TRAILER!!!" ends it. The same input gives the same bytes: no times, no owners.
"""

from __future__ import annotations

import gzip
import stat
from dataclasses import dataclass

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory or device node; `mode` includes the type bits, `device` is (major, minor)."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    return Entry(name, stat.S_IFDIR | 0o755)


def file(name: str, data: bytes, *, executable: bool = False) -> Entry:
    return Entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data)


def character_device(name: str, major: int, minor: int) -> Entry:
    return Entry(name, stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: list[Entry]) -> bytes:
    """The gzipped archive. Parents must come before their children; the kernel does not make them."""
    raw = b"".join(_encode(number, entry) for number, entry in enumerate(entries, start=1))
    return gzip.compress(raw + _encode(0, Entry(_TRAILER, 0)), compresslevel=6, mtime=0)


def _encode(inode: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    uid = gid = mtime = checksum = 0
    device_major = device_minor = 0
    numbers = (inode, entry.mode, uid, gid, links, mtime, len(entry.data), device_major, device_minor)
    fields = (*numbers, *entry.device, len(name), checksum)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
