"""Overlays: images that take what a guest writes, so that those under them stay as they are.

They are made as every image of a job is (`images`): under a name of the job's, then journalled by device and inode,
then given their own names, so that whoever takes one away knows that it is the job's. None is made by QEMU itself,
which truncates what it finds and follows a link that somebody laid there meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.agent import images
from vmferry.agent.images import Identity, run_tool, temporary, tool_of
from vmferry.errors import Unfit
from vmferry.jobs.journal import Entry, JournalStore


@dataclass(frozen=True, slots=True)
class Layer:
    """An overlay that is wanted."""

    path: str
    backing: str
    backing_format: str
    size_bytes: int | None = None
    """What the guest sees; None: as the image under it, which nobody has open then."""


async def make_all(
    layers: Sequence[Layer], *, job: str, qemu: str, journal: JournalStore, made: dict[str, Identity]
) -> None:
    """All of them. Raises Unfit: some may be there then, and `made` has what the job made, for `images.remove`."""
    if not layers:
        return
    # All of them have come to an end before one's failure is told: no file appears after that.
    found = await asyncio.gather(*(make_overlay(each, job=job, qemu=qemu) for each in layers), return_exceptions=True)
    made |= {each.path: one for each, one in zip(layers, found, strict=True) if isinstance(one, tuple)}
    for one in found:
        if isinstance(one, BaseException):
            raise one
    await journal.append(Entry.IMAGE_MADE, job, {path: list(identity) for path, identity in made.items()})
    for each in layers:
        images.publish(each.path, job=job)


async def make_overlay(layer: Layer, *, job: str, qemu: str) -> Identity:
    """Makes it under its temporary name; `images.publish` gives it its own. Raises Unfit; nothing is left then."""
    program = tool_of(qemu)
    if program is None:
        raise Unfit("there is no qemu-img to make an overlay with", hint="install qemu-utils")
    name = temporary(layer.path, job)
    try:
        Path(layer.path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Made empty first: qemu-img writes over what is there, and this fails where something is.
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise Unfit(f"the overlay {layer.path} cannot be made: {error.strerror}", cause=error) from error
    try:
        await _create(program, layer, name)
        found = os.stat(name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return found.st_dev, found.st_ino


async def _create(program: str, layer: Layer, name: str) -> None:
    words = ["create", "-q", "-f", "qcow2", "-b", layer.backing, "-F", layer.backing_format]
    if layer.size_bytes is not None:
        words.append("-u")  # the image under it is a running guest's: it is not opened
    words += ["--", name, *([] if layer.size_bytes is None else [str(layer.size_bytes)])]
    await run_tool(program, *words, what=f"make {layer.path}")
