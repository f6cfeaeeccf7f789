"""Disks of a guest that is saved as external snapshots: their images stay as they are, and it goes on in new ones.

Theory of operation
-------------------
In QEMU's pause before
the switchover, when the guest stands and its writes are flushed, all of its writable disks are given new files in one
transaction. The old image files are what the disks were at that instant, and nobody writes to them any more; the guest
goes on in the new ones, which have the old ones underneath.

    1. the new files are made, while the guest runs, and journalled: nobody else's, and no link is followed (`overlays`)
    2. the transaction        3. the definition in the journal
A death between 2 and 3 leaves a guest that has disks that its definition does not know: the next agent asks QEMU which
files it has open, and mends that (`mend`). Files in which no guest goes on are taken away again.

Rule 1: a save that fails after the transaction leaves the guest in its new files: nothing is lost, and the chain is one
        file longer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from vmferry.agent import overlays
from vmferry.agent.machine import Machine
from vmferry.agent.save_back import RETRY_FIRST_S, RETRY_LAST_S
from vmferry.agent.vms import KeptVm, VmDefinition
from vmferry.agent.wants import Overlay
from vmferry.core.saving import SaveFact
from vmferry.errors import QemuError, Unfit
from vmferry.jobs.journal import Entry
from vmferry.qmp.errors import QmpCommandError

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.save import SaveJob

log = logging.getLogger("vmferry.agent")

TRANSACTION_S: Final = 30.0
"""Flushes and makes a qcow2 file per disk."""


class Open(NamedTuple):
    """An image that QEMU has open at the top of a disk."""

    node: str
    size_bytes: int
    """What the guest sees."""
    is_writable: bool
    format: str
    is_encrypted: bool


async def open_images(machine: Machine) -> dict[str, Open]:
    """What QEMU has at the top of each disk, by path. Raises QemuError."""
    found = {}
    for device in await machine.execute("query-block"):
        inserted = device.get("inserted")
        if inserted and inserted.get("node-name"):
            image = inserted.get("image", {})
            path = str(image.get("filename", inserted.get("file", "")))
            is_writable = not inserted.get("ro", False)
            is_encrypted = bool(image.get("encrypted"))
            found[path] = Open(
                str(inserted["node-name"]), int(image.get("virtual-size", 0)), is_writable,
                str(image.get("format", "")), is_encrypted,
            )  # fmt: skip
    return found


async def make(job: SaveJob) -> None:
    """The new files, empty. The guest is as it was, and runs. Raises Unfit, QemuError."""
    if not job.wanted.overlays:
        return
    job.sizes = await _sizes(job)
    layers = [
        overlays.Layer(each.overlay, each.path, each.format, job.sizes[each.overlay]) for each in job.wanted.overlays
    ]
    agent = job.agent
    await overlays.make_all(layers, job=job.job, qemu=agent.config.qemu, journal=agent.journal, made=job.images)


async def _sizes(job: SaveJob) -> dict[str, int]:
    """What each new file has to be like; the image under it is open at the top of its disk. Raises QemuError."""
    opened = await open_images(job.kept.require_machine())
    found = {}
    for each in job.wanted.overlays:
        image = opened.get(each.path)
        if image is None or image.node != each.node:
            raise QemuError(f"{job.vm} has not {each.path} on its disk any more", retry="yes")
        found[each.overlay] = image.size_bytes
    return found


async def _check(job: SaveJob) -> None:
    """The last look before the transaction; QEMU takes the files as they are. Raises QemuError."""
    for path, size in (await _sizes(job)).items():
        if size != job.sizes[path]:
            raise QemuError(f"a disk of {job.vm} got another size while it was saved", retry="yes")
        found = await asyncio.to_thread(os.lstat, path)
        # A link may have got the number of the file that it replaced; nobody else can make a file of this user's.
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not is_ours or (found.st_dev, found.st_ino) != job.images.get(path):
            raise QemuError(f"{path}, where {job.vm} would go on, is not the file that was made for it", retry="yes")


async def watch(job: SaveJob) -> None:
    """The new files wait for the pause; nothing of them is at work."""


async def switch(job: SaveJob) -> None:
    """All writable disks go on in new files, in one transaction.

    Raises QmpCommandError: then none does. After another error nobody knows; the save asks before it ends."""
    machine = job.kept.require_machine()
    await _check(job)
    actions = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {
                "node-name": each.node,
                "snapshot-file": each.overlay,
                "snapshot-node-name": each.overlay_node,
                "format": "qcow2",
                "mode": "existing",
            },
        }
        for each in job.wanted.overlays
    ]
    job.disks_settled = False
    try:
        await machine.execute("transaction", {"actions": actions}, deadline_s=TRANSACTION_S)
    except QmpCommandError:  # all of it or nothing
        job.disks_settled = True
        raise
    job.note(SaveFact.DISKS, text=", ".join(each.overlay for each in job.wanted.overlays))
    try:
        await _redefine(job.agent, job.kept, job.wanted.overlays)
        job.disks_settled = True
    except Unfit as error:  # written again before the save ends
        log.warning("job=%s vm=%s effect=keep-definition result=%s", job.job, job.vm, error)


async def _redefine(agent: Agent, kept: KeptVm, overlays: tuple[Overlay, ...]) -> None:
    """The guest's definition has its new files, durably."""
    kept.definition = with_overlays(kept.definition, overlays)
    await agent.journal.append(Entry.KEPT, kept.name, kept.to_journal())


def with_overlays(definition: VmDefinition, overlays: tuple[Overlay, ...]) -> VmDefinition:
    """The same guest with these files on top of its images. Pure."""
    new = {each.path: each.overlay for each in overlays}
    assert definition.spec is not None, "such a VM is refused"
    spec = {
        **definition.spec,
        "disk": [
            {**disk, "path": new[disk["path"]], "format": "qcow2"} if disk["path"] in new else disk
            for disk in definition.spec["disk"]
        ],
    }
    disks = tuple(
        dataclasses.replace(disk, path=new[disk.path], format="qcow2") if disk.path in new else disk
        for disk in definition.disks
    )
    return dataclasses.replace(definition, spec=spec, disks=disks)


async def settle(job: SaveJob) -> None:
    """No end before it is known, and durable, which files the guest goes on in: a definition that names others lets the
    next migration run its memory on a wrong disk."""
    pause_s = RETRY_FIRST_S
    while job.wanted.overlays and not job.disks_settled and job.is_ours():
        if job.kept.machine is None or job.kept.machine.is_gone:
            return
        try:
            if await mend(job.agent, job.kept, job.wanted.overlays):
                listed = ", ".join(each.overlay for each in job.wanted.overlays)
                job.note(SaveFact.DISKS, text=listed)
                job.notes.append(f"{job.vm} goes on in {listed}")
            job.disks_settled = True
        except Exception as error:  # noqa: BLE001 - whatever it is, it is asked again
            log.warning("job=%s vm=%s save effect=settle-disks result=%r", job.job, job.vm, error)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_LAST_S)


async def mend(agent: Agent, kept: KeptVm, overlays: tuple[Overlay, ...]) -> bool:
    """After a restart, or an answer that was lost: if the guest goes on in the new files, its definition says so,
    durably. Whether it does.

    Raises QemuError while QEMU does not answer, Unfit when that cannot be written down: again."""
    machine = kept.machine
    if not overlays or machine is None or machine.is_gone:
        return False
    top = await open_images(machine)
    done = tuple(each for each in overlays if each.overlay in top)
    left = tuple(each for each in done if each.path in kept.definition.writable_paths())
    if done:  # also if only the journal does not know
        await _redefine(agent, kept, left)
    return bool(done)
