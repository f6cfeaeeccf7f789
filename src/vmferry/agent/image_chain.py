"""What an image lies on: every file that a QEMU opens with it.

A stored disk is right only if nothing under it was changed, so each file of its chain is recorded with its size and its
time of change. qemu-img reads the chain, as QEMU itself does; it takes no lock, and writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from dataclasses import dataclass
from typing import Any, Final

from vmferry.agent.images import run_tool, tool_of

FLAT: Final = ("raw", "file")
"""Formats of images that lie on nothing."""


@dataclass(frozen=True, slots=True)
class Image:
    """One file of a chain, as it is now."""

    path: str
    format: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Look:
    """What tells whether an image was changed."""

    size_bytes: int
    """Of a device what it holds; 0 where that is not known."""
    mtime_ns: int
    is_file: bool
    """Else it is a device, whose time says nothing: writes do not change it, and each boot makes it anew."""


def look(path: str) -> Look:
    """An image as it is now. Raises OSError when there is none."""
    seen = os.stat(path)
    size = seen.st_size
    if stat.S_ISBLK(seen.st_mode):
        with contextlib.suppress(OSError):
            # Not blocking: a drive without a disk in it.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                size = os.lseek(descriptor, 0, os.SEEK_END)
            finally:
                os.close(descriptor)
    return Look(size, seen.st_mtime_ns, stat.S_ISREG(seen.st_mode))


async def under(path: str, format: str, *, qemu: str) -> tuple[Image, ...] | None:
    """The files under an image, the nearest first; None: there is no qemu-img to say so.

    Raises Unfit when it does not, OSError when one of them is gone."""
    if format in FLAT:
        return ()
    program = tool_of(qemu)
    if program is None:
        return None
    found = []
    for above, image in _pairs(await _asked(program, path, format)):
        data = ((above.get("format-specific") or {}).get("data") or {}).get("data-file")
        if data:
            found.append(await _seen(os.path.join(os.path.dirname(str(above["filename"])), str(data)), "raw"))
        if image is not None:
            found.append(await _seen(str(image["filename"]), str(image["format"])))
    return tuple(found)


def _pairs(images: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each image with the one under it."""
    return list(zip(images, [*images[1:], None], strict=True))


async def _seen(path: str, format: str) -> Image:
    found = await asyncio.to_thread(look, path)
    return Image(path, format, found.size_bytes, found.mtime_ns)


async def _asked(program: str, path: str, format: str) -> list[dict[str, Any]]:
    words = ("info", "-U", "--backing-chain", "--output=json", "-f", format, "--", path)
    return list(json.loads(await run_tool(program, *words, what=f"say what {path} lies on")))
