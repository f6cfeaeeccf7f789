"""In which ways the writable disks of a guest can be saved: what is refused, and whose hands do it.

    external-snapshot    the images stay as they are, and the guest goes on in new files (`save_disks`)
    mirror               the images are copied while it runs, and the guest stays on its own (`save_mirrors`)

Rule 1: what no way keeps is refused before anything happens, in words: disks that nobody said how to keep, or that only
        QEMU knows of, files that exist, a VM whose command line is not ours (no restore could give it other disks).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

from vmferry import limits
from vmferry.agent import image_chain, images, save_disks, save_mirrors
from vmferry.agent.machine import Machine
from vmferry.agent.vms import KeptVm
from vmferry.agent.wants import Overlay, SaveWanted, StoredCopy
from vmferry.core.disk_reports import RoomReport
from vmferry.core.saving import SaveFact, may_name_copies
from vmferry.errors import PlanRefused, UsageError
from vmferry.units import format_size
from vmferry.vm.image_locks import WriteLock

if TYPE_CHECKING:
    from vmferry.agent.save import SaveJob
    from vmferry.engine.frozen import FrozenDisk

log = logging.getLogger("vmferry.agent")

EXTERNAL_SNAPSHOT: Final = "external-snapshot"
MIRROR: Final = "mirror"
REFUSE: Final = "refuse"
DISKS: Final = (REFUSE, EXTERNAL_SNAPSHOT, MIRROR)
FORMATS: Final = ("raw", "qcow2")
_BLOCK_JOBS: Final = frozenset({"mirror", "backup", "commit", "stream"})
HOW: Final = (
    f"say --disks {MIRROR}: they are copied while it runs, and it stays on them; or --disks {EXTERNAL_SNAPSHOT}: these "
    "files are left as they are at that instant, and the guest goes on in new ones on top of them"
)


class Hands(Protocol):
    """What a way does, in the order of a save. Each is given the whole save, and raises what went wrong."""

    async def make(self, job: SaveJob) -> None:
        """What can be done while the guest runs."""

    async def watch(self, job: SaveJob) -> None:
        """Whether that is still right, while the memory goes."""

    async def switch(self, job: SaveJob) -> None:
        """In the pause before the switchover: the disks of that instant are there when it returns."""

    async def settle(self, job: SaveJob) -> None:
        """After the guest has been given back: no end before it is known how its disks stand."""


_HANDS: Final[Mapping[str, Hands]] = MappingProxyType({EXTERNAL_SNAPSHOT: save_disks, MIRROR: save_mirrors})


def hands_of(wanted: SaveWanted) -> Hands:
    """Those of a save; where nothing is to be kept they do nothing."""
    return _HANDS[MIRROR if wanted.copies else EXTERNAL_SNAPSHOT]


# --- what is refused ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a person said of the disks."""

    job: str
    name: str
    """The snapshot's."""
    disks: str
    folder: str = ""
    """Where copies go; empty: beside their disks."""


@dataclass(frozen=True, slots=True)
class _Disk:
    """A disk that the guest writes to."""

    number: int
    path: str
    format: str
    opened: save_disks.Open


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be made; one of both is empty."""

    overlays: tuple[Overlay, ...] = ()
    copies: tuple[StoredCopy, ...] = ()


async def plan(kept: KeptVm, wish: Wish, *, qemu: str, state_dir: Path) -> Planned:
    """What happens to the guest's writable disks. Raises PlanRefused, in words, for what no way keeps; UsageError.
    `state_dir`: the agent's, which copies must not fill."""
    if wish.folder and wish.disks != MIRROR:
        raise UsageError(f"--disks-dir is where --disks {MIRROR} puts its copies, and nothing else does that")
    definition, writable = kept.definition, kept.definition.writable_paths()
    opened = await save_disks.open_images(kept.require_machine())
    unnamed = sorted(path for path, image in opened.items() if image.is_writable and path not in writable)
    if unnamed:
        raise PlanRefused(
            f"{kept.name} writes to {', '.join(unnamed)}, which its definition does not name: no way keeps what its "
            "QEMU was given later, or by other means",
            side="source",
            hint="take that disk out of the guest first (device_del on its monitor)",
        )
    if not writable:
        return Planned()
    listed = ", ".join(writable)
    if wish.disks == REFUSE:
        raise PlanRefused(
            f"{kept.name} writes to {listed}, and a snapshot of its memory alone would not fit to them later",
            side="source",
            hint=HOW,
        )
    if definition.spec is None:
        raise PlanRefused(
            f"{kept.name} was not started from a spec: with other disks than on its command line ({listed}) it could "
            "neither be moved nor restored",
            side="source",
            hint="save it without writable disks, or start it from a spec",
        )
    if images.tool_of(qemu) is None:
        raise PlanRefused(
            f"there is no qemu-img to make the files that a save of {kept.name} needs", side="source",
            hint="install qemu-utils",
        )  # fmt: skip
    for path in writable:
        if path not in opened:
            raise PlanRefused(f"{kept.name}: its QEMU has no disk {path} open", side="source", retry="no")
    disks = [
        _Disk(number, disk["path"], str(disk.get("format", "raw")), opened[disk["path"]])
        for number, disk in enumerate(definition.spec["disk"])
        if disk["path"] in writable
    ]
    if wish.disks == MIRROR:
        return Planned(copies=await _plan_copies(kept, wish, disks, qemu=qemu, state_dir=state_dir))
    return Planned(overlays=await _plan_overlays(kept, wish, disks))


async def _plan_overlays(kept: KeptVm, wish: Wish, disks: Sequence[_Disk]) -> tuple[Overlay, ...]:
    found = []
    for disk in disks:
        if disk.path.startswith("/dev/"):
            raise PlanRefused(
                f"{disk.path} is a device, and no new file can be put on top of it here",
                side="source",
                hint=f"say --disks {MIRROR} --disks-dir DIR: it is copied into a file there",
            )
        # Not after the image's own name: that would grow with each snapshot.
        overlay = os.path.join(os.path.dirname(disk.path), f"{kept.name}-disk{disk.number}.{wish.name}.qcow2")
        if await asyncio.to_thread(os.path.lexists, overlay):
            raise PlanRefused(f"{overlay}, where the guest would go on, exists already", side="source")
        node = f"disk{disk.number}-{uuid.uuid4().hex[:12]}"  # QEMU takes 31 characters, and each name once
        found.append(Overlay(disk.opened.node, disk.path, disk.format, overlay, node))
    return tuple(found)


async def _plan_copies(
    kept: KeptVm, wish: Wish, disks: Sequence[_Disk], *, qemu: str, state_dir: Path
) -> tuple[StoredCopy, ...]:
    if wish.folder and not os.path.isabs(wish.folder):
        raise UsageError(f"--disks-dir {wish.folder!r} is no absolute path, and the agent has its own current folder")
    await _require_no_other_job(kept.name, kept.require_machine())
    found: list[tuple[str, str, str]] = []
    rooms: dict[str, RoomReport] = {}
    for disk in disks:
        if disk.opened.format not in FORMATS or disk.opened.is_encrypted:
            what = "encrypted" if disk.opened.is_encrypted else disk.opened.format or "of a format without a name"
            raise PlanRefused(
                f"{disk.path} is {what}: only images that are {' or '.join(FORMATS)} and not encrypted are copied",
                side="source",
            )
        if disk.path.startswith("/dev/") and not disk.path.startswith("/dev/shm/") and not wish.folder:
            raise PlanRefused(
                f"{disk.path} is a device, and its copy is a file, which cannot be put beside it",
                side="source",
                hint="say --disks-dir DIR: a folder of this host with room for all of the disk",
            )
        stored = os.path.join(
            wish.folder or os.path.dirname(disk.path), f"{kept.name}-disk{disk.number}.{wish.name}.stored.qcow2"
        )
        room = await asyncio.to_thread(images.room, stored, qemu=qemu)
        if room.exists:
            raise PlanRefused(
                f"{stored}, where {disk.path} would be copied to, exists already",
                side="source",
                hint="take another name for the snapshot; 'vmferry disks' tells whether a snapshot needs that file",
            )
        if not room.folder_writable:
            raise PlanRefused(
                f"no file can be made in {room.folder}, where the copy of {disk.path} would be",
                side="source",
                hint="make that folder, or say --disks-dir with another one",
            )
        rooms[disk.path] = room
        found.append((disk.opened.node, disk.path, stored))
    await _require_room(kept.name, disks, rooms, qemu=qemu, state_dir=state_dir)
    return save_mirrors.copies_of(wish.job, found)


async def _require_room(
    vm: str, disks: Sequence[_Disk], rooms: Mapping[str, RoomReport], *, qemu: str, state_dir: Path
) -> None:
    """By file system, since several copies may go to one."""
    needed: dict[str, int] = {}
    leaves: dict[str, int] = {}
    others = [*(disk.path for disk in disks), str(state_dir)]
    for disk in disks:
        room = rooms[disk.path]
        if room.filesystem not in leaves:
            is_shared = await asyncio.to_thread(save_mirrors.is_shared, room.folder, others)
            leaves[room.filesystem] = limits.SAVE_COPY_LEAVES_BYTES if is_shared else 0
        stays = leaves[room.filesystem]
        needed[room.filesystem] = total = needed.get(room.filesystem, 0) + await _needed_bytes(disk, qemu=qemu)
        if room.free_bytes is not None and total + stays > room.free_bytes:
            more = f", of which {format_size(stays)} have to stay free for {vm} itself" if stays else ""
            raise PlanRefused(
                f"the copies of the disks of {vm} need {total} bytes ({format_size(total)}) in {room.folder}, and "
                f"{room.free_bytes} ({format_size(room.free_bytes)}) are free there{more}",
                side="source",
                retry="after-fix",
                hint="make room, or say --disks-dir with another folder",
            )


async def _require_no_other_job(vm: str, machine: Machine) -> None:
    """QEMU does not say which disks a job has its hands on, so any is one too many."""
    for job in await machine.execute("query-jobs"):
        if job["type"] in _BLOCK_JOBS and job["status"] not in save_mirrors.OVER:
            raise PlanRefused(
                f"the QEMU of {vm} has the job {job['id']} ({job['type']}) on a disk, and a disk has one job at a time",
                side="source",
                retry="yes",
                hint="let it end, or cancel it on the VM's monitor",
            )


async def _needed_bytes(disk: _Disk, *, qemu: str) -> int:
    """What a copy takes at most as long as the guest does not write where it has not written yet. Raises Unfit."""
    program = images.tool_of(qemu)
    assert program is not None, "refused before"
    words = ("measure", "-U", "--output=json", "-O", "qcow2", "-f", disk.opened.format, "--", disk.path)
    said = await images.run_tool(program, *words, what=f"say how much room a copy of {disk.path} takes", side="source")
    return int(json.loads(said)["required"])


# --- afterwards -----------------------------------------------------------------------------------------------


async def describe(job: SaveJob) -> list[FrozenDisk]:
    """The guest's disks of that instant, for the manifest. Raises OSError when a file is gone, Unfit when nobody can
    say what one lies on, and what `save_mirrors.keep` does."""
    from vmferry.engine.frozen import FrozenDisk, FrozenImage

    wanted, found = job.wanted, []
    overlays = {each.path: each for each in wanted.overlays}
    copies = {each.path: each for each in wanted.copies}
    stored = await save_mirrors.keep(job) if copies else {}
    for disk in wanted.definition["disks"]:
        path, over, copy = str(disk["path"]), overlays.get(disk["path"]), copies.get(disk["path"])
        if copy is not None:
            seen = stored[copy.stored]
            found.append(
                FrozenDisk(
                    path=copy.stored, format="qcow2", way="mirror", size_bytes=seen.st_size, mtime_ns=seen.st_mtime_ns,
                    node=copy.node, disk=path, virtual_bytes=job.copying.sizes[copy.stored], chain=(),
                )
            )  # fmt: skip
            continue
        looked = await asyncio.to_thread(image_chain.look, path)
        under = await image_chain.under(path, str(disk["format"]), qemu=job.agent.config.qemu)
        found.append(
            FrozenDisk(
                path=path,
                format=str(disk["format"]),
                way="read-only" if over is None else "external-snapshot",
                size_bytes=looked.size_bytes,
                mtime_ns=looked.mtime_ns,
                overlay="" if over is None else over.overlay,
                node="" if over is None else over.node,
                chain=None if under is None else tuple(FrozenImage(**dataclasses.asdict(each)) for each in under),
            )
        )
    return found


async def take_away(job: SaveJob) -> None:
    """The new files, where it is known that no guest goes on in them and no snapshot has them. Trouble is a line in the
    log."""
    if not job.disks_settled:
        return
    if may_name_copies(job.facts) if job.wanted.copies else SaveFact.DISKS in job.facts:
        if job.wanted.copies and SaveFact.KEPT not in job.facts:
            listed = ", ".join(each.stored for each in job.wanted.copies)
            job.notes.append(f"{listed}: kept, since a snapshot may have it; 'vmferry disks' tells who needs it")
        return
    for path in (*(each.overlay for each in job.wanted.overlays), *(each.stored for each in job.wanted.copies)):
        try:
            if not await asyncio.to_thread(_remove, path, job):
                log.warning("job=%s vm=%s image=%s effect=remove result=not ours, or in use", job.job, job.vm, path)
        except OSError as error:
            log.warning("job=%s vm=%s image=%s effect=remove result=%s", job.job, job.vm, path, error)


def _remove(path: str, job: SaveJob) -> bool:
    """In a thread. False: it stays. Raises OSError."""
    identity = job.images.get(path)
    if identity is None or not os.path.exists(path):  # at most a file under its first name is there
        return images.remove(path, identity, job=job.job)
    lock = WriteLock.take(path)
    if lock is None:
        return False
    try:
        return images.remove(path, identity, job=job.job)
    finally:
        lock.release()


def wire(job: SaveJob) -> dict[str, Any]:
    """What became of the disks, as plain values."""
    wanted, facts = job.wanted, job.facts
    are_there = SaveFact.COPIED in facts and (not job.is_over or may_name_copies(facts))
    return {
        "goes_on_in": {each.path: each.overlay for each in wanted.overlays if SaveFact.DISKS in facts},
        "copies": {each.path: each.stored for each in wanted.copies if are_there},
    }
