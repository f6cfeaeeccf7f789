"""In which order guests touched the pages of snapshots: recorded at a lazy restore, read ahead in it at the next ones.

A file per snapshot in the agent's own state, not an object of the repository: a repository's objects are written once
and are all needed, while this is a guess that belongs to a host (its processor, its QEMU), may be lost at any time, and
must never make a restore fail. So everything that is not exactly as it was written counts as nothing.

    MAGIC, number of blocks (u32), each name (u16 length, bytes), number of touches (u64),
    one u64 per touch: block << 40 | page; SHA-256 of all that
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmferry import limits

if TYPE_CHECKING:
    from vmferry.engine.lazy import Touches

log = logging.getLogger("vmferry.agent")

MAGIC: Final = b"vmferry first touches 1\n"
_BLOCKS: Final = struct.Struct("<I")
_NAME: Final = struct.Struct("<H")
_COUNT: Final = struct.Struct("<Q")
_DIGEST_BYTES: Final = 32
_ID: Final = re.compile(r"[0-9a-f]{32}")


def write(touches: Touches) -> bytes:
    """The file's bytes: each page once, where it was first touched."""
    parts = [MAGIC, _BLOCKS.pack(len(touches.names))]
    for name in touches.names:
        raw = name.encode("utf-8", "surrogateescape")
        parts += [_NAME.pack(len(raw)), raw]
    codes = touches.distinct()[: limits.RESTORE_ORDER_PAGES_MAX]
    parts += [_COUNT.pack(len(codes)), codes.astype("<u8").tobytes()]
    data = b"".join(parts)
    return data + hashlib.sha256(data).digest()


def read(data: bytes) -> Touches | None:
    """The touches of a file; None if it is not exactly as it was written."""
    import numpy as np

    from vmferry.engine.lazy import Touches

    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not body.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
        return None
    try:
        at = len(MAGIC)
        (blocks,) = _BLOCKS.unpack_from(body, at)
        at += _BLOCKS.size
        names = []
        for _ in range(blocks):
            (length,) = _NAME.unpack_from(body, at)
            at += _NAME.size
            names.append(body[at : at + length].decode("utf-8", "surrogateescape"))
            at += length
        (count,) = _COUNT.unpack_from(body, at)
        codes = np.frombuffer(body, "<u8", count, at + _COUNT.size)
    except (struct.error, ValueError):
        return None
    found = Touches(names, codes.astype(np.uint64))
    return found if found.is_sound else None


def joined(first: Touches | None, then: Touches) -> Touches:
    """What was touched over one connection, and then over the next one; each page once."""
    import numpy as np

    from vmferry.engine.lazy import Touches

    if first is None or first.names != then.names:
        return then
    both = Touches(then.names, np.concatenate([first.codes, then.codes]))
    return Touches(then.names, both.distinct()[: limits.RESTORE_ORDER_PAGES_MAX])


class TouchOrders:
    """The files of one agent. All calls wait for the disk; none raises for what the disk says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, snapshot: str) -> Touches | None:
        """In which order its pages were touched first; None if nobody knows."""
        with contextlib.suppress(OSError):
            data = (self.folder / snapshot).read_bytes()
            found = read(data)
            if found is None:
                log.warning("snapshot=%s result=its order of first touches is damaged, and ignored", snapshot)
            return found
        return None

    def has(self, snapshot: str) -> bool:
        """Whether there is a file."""
        return (self.folder / snapshot).exists()

    def put(self, snapshot: str, touches: Touches) -> None:
        """Remembers the order, unless one of more pages is known, and forgets the oldest ones beyond the limit."""
        assert _ID.fullmatch(snapshot), "a snapshot's id"
        known = self.get(snapshot)
        if known is not None and len(known) >= min(len(touches.distinct()), limits.RESTORE_ORDER_PAGES_MAX):
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = self.folder / f"{snapshot}.new"
            temporary.write_bytes(write(touches))
            temporary.replace(self.folder / snapshot)
            files = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            for old in files[: -limits.RESTORE_ORDERS_MAX]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("snapshot=%s result=its order of first touches is not remembered: %s", snapshot, error)

    def forget(self, snapshot: str) -> None:
        """The snapshot is gone."""
        with contextlib.suppress(OSError):
            os.unlink(self.folder / snapshot)
