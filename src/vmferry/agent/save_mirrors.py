"""Disks of a guest that is saved, copied while it runs: one mirror each in its own QEMU, to a file of this host.

Theory of operation
-------------------
The guest stays on its own disks: its definition, its command line and its chains of images are what they were.

    1. new empty images are made and journalled: nobody else's, and no link is followed (`images`)
    2. QEMU copies each disk to its image and follows what the guest writes, until all copies are ready
    3. the memory goes; in QEMU's pause before the switchover, when the guest stands and its writes are flushed, each
       mirror is asked for its end, writes what is left (`pending`), and only when all have is the first let go
    4. the images are closed: they are what the disks were at that instant, and a snapshot names them

A death of the agent leaves mirrors at work, and nothing that the guest notices. Their names follow from the job's id,
so the next agent finds what of them is still there, ends exactly those, and takes away the images, unless a snapshot
may name them (`core.saving.may_name_copies`).

A file system that its copies share with the guest's own images is never filled by them: an image that cannot grow
would stop the guest. Copies are given up before that.

A guest's write never waits for its copy (`copy-mode` background), and no trouble of a copy is reported to the guest.
What that costs: a guest that writes faster than its copy grows may never be equal to it. So a copy that has sent
several times what its disk has is given up, and so is a rest that takes longer than a guest may stand.

Rule 1: all copies end at the same pause, or none of them is kept.
Rule 2: only what has a name of this job's is ended or closed in QEMU, and only in the process that the save began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from vmferry import limits
from vmferry.agent import images
from vmferry.agent.machine import Machine
from vmferry.agent.plan_disks import inserted_by_path
from vmferry.agent.save_back import RETRY_FIRST_S, RETRY_LAST_S
from vmferry.agent.wants import StoredCopy
from vmferry.core.saving import SaveFact
from vmferry.errors import MigrationFailed, QemuError
from vmferry.jobs.journal import Entry
from vmferry.pki.job_credentials import tag
from vmferry.qmp.errors import QmpCommandError
from vmferry.units import format_size

if TYPE_CHECKING:
    from vmferry.agent.save import SaveJob

log = logging.getLogger("vmferry.agent")

POLL_S: Final = 0.5
"""How often QEMU is asked how far the copies are; what changes their status it tells by itself."""
OPEN_S: Final = 10.0
DRAIN_POLL_S: Final = 0.002
"""While the guest stands for it; QEMU tells of each change, and an event may be lost."""
KNOWS_ZERO_SINCE: Final = (10, 1)
"""QEMU's target-is-zero: a fresh image is not filled with zeroes first."""
OVER: Final = ("concluded", "null")
GOES_ON: Final = ("ready", "standby")
"""A mirror that has everything; `standby` while QEMU holds it still for a moment."""


@dataclass(slots=True)
class Copying:
    """What was last seen of a save's copies. Nothing of it is needed by an agent that begins anew."""

    sizes: dict[str, int] = field(default_factory=dict)
    """What the guest sees of each disk, by the path of its copy."""
    first_bytes: dict[str, int] = field(default_factory=dict)
    """What each mirror had to send as QEMU spoke of it first, by its job."""
    shared: tuple[str, ...] = ()
    """Folders of copies on whose file system the guest's images or the agent's state are."""


def copies_of(job: str, disks: Sequence[tuple[str, str, str]]) -> tuple[StoredCopy, ...]:
    """The copies of disks (QEMU's node, path, new file), with the names that they have in QEMU. Pure."""
    word = tag(job)
    return tuple(
        StoredCopy(
            node=node,
            path=path,
            stored=stored,
            job=f"vmferry-{word}-s{number}",
            target=f"vmferry-{word[:10]}-st{number}",
            filter=f"vmferry-{word[:10]}-sf{number}",
        )
        for number, (node, path, stored) in enumerate(disks)
    )


# --- copying --------------------------------------------------------------------------------------------------


async def make(job: SaveJob) -> None:
    """The copies have all that their disks have when this returns; the guest runs. Raises Unfit, QemuError,
    MigrationFailed, MigrationCancelled; what was begun until then is `settle`'s to end."""
    machine, copies = job.kept.require_machine(), job.wanted.copies
    job.copying.sizes = await _sizes(job)
    folders = {os.path.dirname(each.stored) for each in copies}
    others = [*(each.path for each in copies), str(job.agent.config.state_dir)]
    job.copying.shared = tuple(await asyncio.to_thread(lambda: sorted(f for f in folders if is_shared(f, others))))
    await _make_images(job)
    for each in copies:
        await _require_ours(job, each.stored)
    job.disks_settled = False  # from here on something may be there
    job.note(SaveFact.COPYING, text=", ".join(f"{each.path} to {each.stored}" for each in copies))
    for each in copies:
        await machine.execute("blockdev-add", _target(each), deadline_s=OPEN_S)
    for each in copies:
        await machine.execute("blockdev-mirror", _mirror(each, machine))
    while True:
        job.look_anew()
        found = await _look(job)
        for name, state in found.items():
            if state["total-progress"]:
                job.copying.first_bytes.setdefault(name, int(state["total-progress"]))
        late = [each for each in copies if not is_near(found[each.job], job.copying.first_bytes.get(each.job, 0))]
        if not late:
            break
        for each in late:
            _require_end_in_sight(job, each, found[each.job])
        await job.pause(POLL_S)
    job.note(SaveFact.COPIES_READY, text=format_size(job.counted.disks_done_bytes), by="QEMU")


async def _sizes(job: SaveJob) -> dict[str, int]:
    """Raises QemuError when QEMU has another image on a disk than the plan has seen."""
    found, inserted = {}, await inserted_by_path(job.kept.require_machine())
    for each in job.wanted.copies:
        if inserted.get(each.path, {}).get("node-name") != each.node:
            raise QemuError(f"{job.vm} has not {each.path} on its disk any more", retry="yes")
        found[each.stored] = int(inserted[each.path]["image"]["virtual-size"])
    return found


async def _make_images(job: SaveJob) -> None:
    """Raises Unfit: some may be there then, and `job.images` has those that the journal has."""
    copies, qemu = job.wanted.copies, job.agent.config.qemu
    making = (
        images.make(
            each.stored, job=job.job, size_bytes=job.copying.sizes[each.stored], format="qcow2", options=(), qemu=qemu,
            side="source",
        )
        for each in copies
    )  # fmt: skip
    # All of them have come to an end before one's failure is told: no file appears after that.
    found = await asyncio.gather(*making, return_exceptions=True)
    job.images |= {each.stored: one for each, one in zip(copies, found, strict=True) if isinstance(one, tuple)}
    for one in found:
        if isinstance(one, BaseException):
            raise one
    body = {path: list(identity) for path, identity in job.images.items()}
    await job.agent.journal.append(Entry.IMAGE_MADE, job.job, body)
    for each in copies:
        images.publish(each.stored, job=job.job, side="source")


async def _require_ours(job: SaveJob, path: str) -> os.stat_result:
    """QEMU takes the file of this name, and the snapshot will. Raises QemuError if it is not the one that was made."""
    try:
        found = await asyncio.to_thread(os.lstat, path)
    except OSError as error:
        raise QemuError(
            f"{path}, the copy of a disk of {job.vm}, is not there: {error.strerror}", cause=error
        ) from error
    is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    if not is_ours or (found.st_dev, found.st_ino) != job.images.get(path):
        raise QemuError(f"{path}, the copy of a disk of {job.vm}, is not the file that was made for it", retry="yes")
    return found


def _target(copy: StoredCopy) -> dict[str, Any]:
    # Holes stay holes: a copy of a disk that is mostly empty takes no room for that.
    return {
        "driver": "qcow2",
        "node-name": copy.target,
        "file": {"driver": "file", "filename": copy.stored},
        "discard": "unmap",
        "detect-zeroes": "unmap",
    }


def _mirror(copy: StoredCopy, machine: Machine) -> dict[str, Any]:
    wanted = {
        "job-id": copy.job,
        "device": copy.node,
        "target": copy.target,
        "sync": "full",
        "filter-node-name": copy.filter,
        "copy-mode": "background",
        "on-source-error": "report",
        "on-target-error": "report",
        "auto-finalize": False,
        "auto-dismiss": False,
    }
    return wanted | ({"target-is-zero": True} if machine.version >= KNOWS_ZERO_SINCE else {})


async def _states(job: SaveJob) -> dict[str, dict[str, Any]]:
    """What QEMU says of each mirror, by its job. Raises MigrationFailed with QEMU's reason when one of them failed."""
    ours = {each.job: each for each in job.wanted.copies}
    jobs = await job.kept.require_machine().execute("query-jobs")
    found = {str(each["id"]): each for each in jobs if each["id"] in ours}
    job.counted.count_disks(found.values())
    for name, copy in ours.items():
        trouble = "QEMU does not know of it any more" if name not in found else str(found[name].get("error", ""))
        if trouble:
            raise MigrationFailed(
                f"{copy.path} could not be copied to {copy.stored}: {trouble}",
                side="source",
                hint="look at the disk on which the copies are made; --disks-dir puts them elsewhere",
            )
    return found


def is_shared(folder: str, others: Iterable[str]) -> bool:
    """Whether one of the others is on the folder's file system. Asks the file system; what is not there is on none."""
    found = set()
    for path in others:
        with contextlib.suppress(OSError):
            found.add(os.stat(path).st_dev)
    try:
        return os.stat(folder).st_dev in found
    except OSError:
        return False


def _free_bytes(folder: str) -> int:
    seen = os.statvfs(folder)
    return seen.f_bavail * seen.f_frsize


async def _require_room(job: SaveJob) -> None:
    """Raises MigrationFailed while there is still room for what the guest itself writes; OSError."""
    for folder in job.copying.shared:
        free = await asyncio.to_thread(_free_bytes, folder)
        if free < limits.SAVE_COPY_LEAVES_BYTES:
            raise MigrationFailed(
                f"{format_size(free)} are left in {folder}, where {job.vm} or its agent has to write, too: its disks "
                "are not copied any further",
                side="source",
                hint="make room there, or put the copies on another file system with --disks-dir",
            )


async def _look(job: SaveJob) -> dict[str, dict[str, Any]]:
    """The same of mirrors that nobody has asked to end; also raises what `_require_room` does."""
    await _require_room(job)
    found = await _states(job)
    for copy in job.wanted.copies:
        if found[copy.job]["status"] in OVER:
            raise MigrationFailed(
                f"the copy of {copy.path} ended before the instant of {job.vm} was there", side="source"
            )
    return found


def is_near(state: dict[str, Any], first_bytes: int) -> bool:
    """Whether a copy has all that its disk has but for what the guest is just writing. QEMU calls it ready when for a
    moment nothing at all is left; with a guest that never stops writing that moment may come only in the pause.
    `first_bytes`: what it had to send as it began; 0: QEMU did not say so yet. Pure."""
    done, whole = int(state["current-progress"]), int(state["total-progress"])
    return state["status"] in GOES_ON or (0 < first_bytes <= done and whole - done <= limits.SAVE_COPY_REST_BYTES)


def _require_end_in_sight(job: SaveJob, copy: StoredCopy, state: dict[str, Any]) -> None:
    """Raises MigrationFailed for a copy that runs after its disk."""
    done, whole = int(state["current-progress"]), int(state["total-progress"])
    size = job.copying.first_bytes.get(copy.job, 0)
    if done > limits.SAVE_COPY_TIMES * size + limits.SAVE_COPY_MORE_BYTES:
        raise MigrationFailed(
            f"{job.vm} writes to {copy.path} faster than it is copied: {format_size(done)} were copied of "
            f"{format_size(size)} that it had, and {format_size(whole - done)} are left",
            side="source",
            hint="save it when it writes less, put the copies on a faster disk (--disks-dir), or say --disks "
            "external-snapshot, which copies nothing",
        )


async def watch(job: SaveJob) -> None:
    """While the memory goes, or a person's leave is awaited. Raises MigrationFailed for a copy that failed."""
    if SaveFact.COPIED not in job.facts:
        await _look(job)


# --- the instant ----------------------------------------------------------------------------------------------


async def switch(job: SaveJob) -> None:
    """The guest stands: every mirror writes what is left and ends, and its image is closed. Raises MigrationFailed,
    MigrationCancelled, QemuError: then no copy is of use.

    1. all are asked to end and come to `pending`, in which nothing is left to write  2. one fails instead: the others
    still wait, and are given up with it  3. all are there: they are let go, which cannot fail any more."""
    machine, clock, copies = job.kept.require_machine(), job.agent.clock, job.wanted.copies
    end_s, asked = clock.now_s() + limits.SAVE_DRAIN_S, set[str]()
    while True:
        job.look_anew()
        words = {name: str(state["status"]) for name, state in (await _states(job)).items()}
        if all(word in ("pending", *OVER) for word in words.values()):
            break
        if clock.now_s() >= end_s:
            left = format_size(job.counted.disks_whole_bytes - job.counted.disks_done_bytes)
            raise MigrationFailed(
                f"the copies of the disks of {job.vm} still lacked {left} after it had stood for "
                f"{limits.SAVE_DRAIN_S:g} s; it goes on",
                side="source",
                hint="save it when it writes less, or put the copies on a faster disk (--disks-dir)",
            )
        for each in copies:
            if words[each.job] in GOES_ON and each.job not in asked:
                asked.add(each.job)
                await machine.execute("block-job-cancel", {"device": each.job})  # of a mirror that is ready: its end
        await job.pause(DRAIN_POLL_S)
    for each in copies:
        await machine.execute("job-finalize", {"id": each.job})
    while any(state["status"] not in OVER for state in (await _states(job)).values()):
        job.look_anew()
        if clock.now_s() >= end_s + limits.SAVE_OBEY_S:
            raise MigrationFailed(f"the copies of the disks of {job.vm} do not end", side="source")
        await job.pause(DRAIN_POLL_S)
    await _forget(machine, copies)
    job.disks_settled = True
    job.note(SaveFact.COPIED, text=", ".join(each.stored for each in copies), by="QEMU")


async def keep(job: SaveJob) -> dict[str, os.stat_result]:
    """The copies as they are, durably, by their paths. Raises MigrationFailed if they are not of the instant, QemuError
    if one is not what was made, OSError."""
    if SaveFact.COPIED not in job.facts:
        raise MigrationFailed(f"QEMU sent the last of {job.vm} before its disks were copied", side="source")
    found = {}
    for each in job.wanted.copies:
        await asyncio.to_thread(_sync, each.stored)
        found[each.stored] = await _require_ours(job, each.stored)
    return found


def _sync(path: str) -> None:
    images.sync(path)
    images.sync(os.path.dirname(path))


# --- giving up ------------------------------------------------------------------------------------------------


async def settle(job: SaveJob) -> None:
    """Nothing of the copies is at work in QEMU when this returns, as far as the save may touch it."""
    pause_s = RETRY_FIRST_S
    while not job.disks_settled and job.is_ours():
        machine = job.kept.machine
        if machine is None or machine.is_gone:
            break
        try:
            await _drop(job, machine)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is asked again
            log.warning("job=%s vm=%s save effect=drop-copies result=%r", job.job, job.vm, error)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_LAST_S)
        else:
            break
    job.disks_settled = True  # what a process still has open is not taken away: `save_ways.take_away`


async def _drop(job: SaveJob, machine: Machine) -> None:
    """Raises QemuError when QEMU does not answer, or a mirror does not end: a read of the guest's own image may hang in
    its storage."""
    clock, ours = job.agent.clock, {each.job for each in job.wanted.copies}
    end_s = clock.now_s() + limits.SAVE_OBEY_S
    while left := [
        str(each["id"])
        for each in await machine.execute("query-jobs")
        if each["id"] in ours and each["status"] not in OVER
    ]:
        if clock.now_s() >= end_s:
            raise QemuError(f"the copies {', '.join(left)} do not end", side="source")
        for name in left:
            with contextlib.suppress(QmpCommandError):  # it has just ended
                await machine.execute("job-cancel", {"id": name})
        await asyncio.sleep(DRAIN_POLL_S)
    await _forget(machine, job.wanted.copies)


async def _forget(machine: Machine, copies: Sequence[StoredCopy]) -> None:
    """Results are dismissed, images closed. Raises QemuError when one is still there."""
    for each in copies:
        for command, wish in (("job-dismiss", {"id": each.job}), ("blockdev-del", {"node-name": each.target})):
            try:
                await machine.execute(command, wish)
            except QmpCommandError as error:
                log.info("vm=%s command=%s result=%s", machine.vm, command, error)
    nodes = {str(node["node-name"]) for node in await machine.execute("query-named-block-nodes", {"flat": True})}
    left = sorted(nodes & {each.target for each in copies})
    if left:
        raise QemuError(f"QEMU does not close {', '.join(left)}", side="source")
