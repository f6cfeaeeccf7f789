"""Images on which others lie: what is written to one damages them, so no guest is started on one unawares.

Theory of operation
-------------------
    1. a guest is saved with its disks: its images stay as they are, and it goes on in new files on top of them
    2. it is powered off, and its host forgets it; the spec from which it was started names its old images
    3. it is started from that spec: it begins in the past, and its first write changes what the new files, the snapshot
       and every restore of that lie on

What lies on an image is known from the saves and restores of this agent, and from the headers of the files beside the
image: a save puts the new files there, whichever host it was. A file that was put on something else meanwhile does not
lie on it any more; one that cannot be read is taken for what it was.

Rule 1: asking changes nothing, opens files only for reading, and waits for the repository only when the one thing that
        is known of an image is that a snapshot had it.
Rule 2: what cannot be seen counts as there. A person who knows better says so (`BASE_IMAGE`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vmferry import limits
from vmferry.core.saving import SaveFact
from vmferry.errors import PlanRefused, RepositoryError, UsageError

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")

BASE_IMAGE: Final = "base-image"
"""What `--accept` takes."""
_HEADER: Final = struct.Struct(">4sIQI")
"""A qcow2 image begins with it: magic, version, where the name of the image under it is, and its length."""
_MAGIC: Final = b"QFI\xfb"
_NAME_BYTES_MAX: Final = 1023
"""QEMU's own limit."""


@dataclass(frozen=True, slots=True)
class Known:
    """Something that lies on an image, as far as somebody wrote that down."""

    base: str
    path: str
    """The file; empty: only a snapshot has the image."""
    why: str
    """What it is, behind its name: 'in which web1 went on when it was saved as nightly'."""
    vm: str = ""
    """The VM that goes on in it; empty: not known."""
    snapshot: str = ""
    """The id of the snapshot that has the image, whatever becomes of the file."""
    name: str = ""
    """That snapshot's name."""


async def require_none(agent: Agent, vm: str, paths: Sequence[str], accept: Iterable[str], *, way_out: str) -> None:
    """Raises PlanRefused if something is known to lie on one of the images that the VM would write to, UsageError for a
    word that is none. `way_out`: what is done with the file in which the guest went on; `{}` is that file."""
    unknown = set(accept) - {BASE_IMAGE}
    if unknown:
        raise UsageError(f"--accept {unknown.pop()} is not known; there is {BASE_IMAGE}")
    if not paths or BASE_IMAGE in accept:
        return
    known = [*_of_saves(agent), *_of_restores(agent)]
    try:
        async with asyncio.timeout(limits.IMAGES_BESIDE_S):
            found = await asyncio.to_thread(look, paths, known)
    except TimeoutError as error:  # of storage that hangs; the thread ends with that
        raise PlanRefused(
            f"what lies on the disks of {vm} could not be seen within {limits.IMAGES_BESIDE_S:g} s: "
            "the storage of one of them, or of an image that was on one once, does not answer",
            side="client",
            retry="yes",
            hint=f"--accept {BASE_IMAGE} starts it without a look",
        ) from error
    silent = ""
    if any(not each.path for each in found):
        found, silent = await _without_forgotten(agent, found)
    if not found:
        return
    first = found[0].base
    listed = "; ".join(_words(each) for each in found if each.base == first)
    goes_on = await asyncio.to_thread(tops, found, known, vm=vm)
    hint = way_out.format(" or ".join(f'"{path}"' for path in goes_on)) if goes_on else "give it an image on top of it"
    raise PlanRefused(
        f"{vm} would write to {first}, and that would damage what lies on it: {listed}{silent}",
        side="client",
        retry="after-fix",
        hint=f"{hint}; --accept {BASE_IMAGE} writes to {first} all the same",
    )


def _words(each: Known) -> str:
    if not each.path:
        return f"the snapshot {each.name}"
    return f"{each.path}, {each.why}"


def _of_saves(agent: Agent) -> Iterator[Known]:
    at_work = (job.wire() for job in agent.saves.at_work() if SaveFact.DISKS in job.facts)
    for wire in itertools.chain(agent.saves.results.values(), at_work):
        yield from of_save(wire)


def of_save(wire: dict[str, Any]) -> Iterator[Known]:
    """What a save, as it is told, put on which image. Pure."""
    vm, name = str(wire.get("vm")), str(wire.get("name"))
    # An earlier agent's has the new files only beside the disks of its snapshot.
    old = {str(disk.get("path")): disk.get("overlay") for disk in wire.get("disks") or ()}
    for base, path in (wire.get("goes_on_in") or old).items():
        if path:
            yield Known(base, str(path), f"in which {vm} went on when it was saved as {name}", vm,
                        str(wire.get("snapshot") or ""), name)  # fmt: skip


def _of_restores(agent: Agent) -> Iterator[Known]:
    for disk in agent.restores.disks.known():
        if disk.is_copy:
            yield Known(disk.path, "", "", disk.vm, disk.snapshot, disk.name)
            continue
        yield Known(disk.backing, disk.path, f"to which {disk.vm} writes since it was restored from {disk.name}")


async def _without_forgotten(agent: Agent, found: list[Known]) -> tuple[list[Known], str]:
    """Without snapshots that are not there any more; and why nobody can say that, if nobody can."""
    try:
        there = await agent.snapshot_store.with_repository(lambda repository: frozenset(repository.snapshot_ids()))
    except RepositoryError as error:
        return found, f" (whether it is still there is not known: {error.message})"
    return [each for each in found if each.path or each.snapshot in there], ""


# --- what is seen in files, in a thread -------------------------------------------------------------------------


def look(paths: Sequence[str], known: Sequence[Known]) -> list[Known]:
    """What lies on these images now. Each file once; one that a person knows by what was written down comes first."""
    found = []
    for path in paths:
        seen: set[str] = set()
        for each in [*(k for k in known if _is_same(k.base, path)), *beside(path)]:
            if each.path in seen:
                continue
            if _lies_on(each.path, path):
                found.append(Known(path, each.path, each.why, each.vm, each.snapshot, each.name))
                seen.add(each.path)
            elif each.snapshot:
                found.append(Known(path, "", each.why, each.vm, each.snapshot, each.name))
    return found


def tops(found: Sequence[Known], known: Sequence[Known], *, vm: str) -> list[str]:
    """Where that which lies on an image goes on now: the files on which nothing lies. Those of this VM, if there are
    some; else all."""
    own = [each for each in found if each.path and each.vm == vm]
    reached: dict[str, None] = {}
    for each in own or [each for each in found if each.path]:
        path, passed = each.path, {each.path}
        while True:
            above = [e.path for e in look([path], known) if e.path and e.path not in passed and (not own or e.vm == vm)]
            if not above:
                break
            path = max(above, key=_mtime_ns)
            passed.add(path)
        reached[path] = None
    return list(reached)


def _mtime_ns(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime_ns
    return 0


def _is_same(path: str, other: str) -> bool:
    return path == other or os.path.realpath(path) == os.path.realpath(other)


def beside(path: str) -> Iterator[Known]:
    """Files in the folder of an image that say that they lie on it. Only regular files are opened; a device's folder
    has no images."""
    real = os.path.realpath(path)
    try:
        if not stat.S_ISREG(os.stat(real).st_mode):
            return
        with os.scandir(os.path.dirname(real)) as entries:
            for number, entry in enumerate(entries):
                if number >= limits.IMAGES_BESIDE_MAX:
                    log.warning("image=%s result=not every file beside it was looked at", path)
                    return
                if entry.is_file(follow_symlinks=False) and entry.path != real and _says_so(entry.path, real):
                    yield Known(path, entry.path, "whose header names it")
    except OSError as error:
        log.info("image=%s result=what is beside it cannot be seen: %s", path, error)


def _says_so(path: str, base: str) -> bool:
    with contextlib.suppress(OSError):
        under = backing_of(path)
        return bool(under) and _is_same(under, base)
    return False


def _lies_on(path: str, base: str) -> bool:
    """Whether it does, or may."""
    try:
        under = backing_of(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return bool(under) and _is_same(under, base)


def backing_of(path: str) -> str:
    """The image under a qcow2 image, '' for one that has none or is no qcow2 image. Raises OSError."""
    # A pipe that got the name meanwhile must hold nobody up.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as image:
        head = image.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return ""
        magic, _, offset, length = _HEADER.unpack(head)
        if magic != _MAGIC or not offset or not 0 < length <= _NAME_BYTES_MAX or offset >= 1 << 40:
            return ""
        name = os.pread(descriptor, length, offset).decode("utf-8", "surrogateescape")
    return os.path.join(os.path.dirname(os.path.realpath(path)), _file_of(name)) if name else ""


def _file_of(name: str) -> str:
    """The file in QEMU's name of an image, which may be written as JSON, or with the protocol."""
    if not name.startswith("json:"):
        return name.removeprefix("file:")
    try:
        found = json.loads(name.removeprefix("json:"))
    except ValueError:
        return name
    while isinstance(found, dict):
        found = found.get("filename") or found.get("file.filename") or found.get("file")
    return found if isinstance(found, str) else name
