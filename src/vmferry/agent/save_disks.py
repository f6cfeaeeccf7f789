"""The disks of a guest that is saved: what of them belongs to the instant of its memory.

Theory of operation
-------------------
A read-only disk is the same at every instant. A writable one is kept as an *external snapshot*: in QEMU's pause before
the switchover, when the guest stands and its writes are flushed, all of its writable disks are given new files in one
transaction. The old image files are what the disks were at that instant, and nobody writes to them any more; the guest
goes on in the new ones, which have the old ones underneath.

    1. the new files are in the journal, with the save        2. the transaction        3. the definition in the journal
A death between 2 and 3 leaves a guest that has disks that its definition does not know: the next agent asks QEMU which
files it has open, and mends that (`mend`).

Rule 1: what cannot be kept is refused before anything happens: disks that nobody said how to keep, files that exist, a
        VM whose command line is not ours (it could not be started anywhere else with other disks).
Rule 2: a save that fails after the transaction leaves the guest in its new files: nothing is lost, and the chain is one
        file longer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import uuid
from typing import TYPE_CHECKING, Any, Final

from vmferry.agent.machine import Machine
from vmferry.agent.vms import KeptVm, VmDefinition
from vmferry.agent.wants import Overlay
from vmferry.core.saving import SaveFact
from vmferry.errors import PlanRefused, Unfit
from vmferry.jobs.journal import Entry
from vmferry.qmp.errors import QmpCommandError

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.save import SaveJob
    from vmferry.engine.frozen import FrozenDisk

log = logging.getLogger("vmferry.agent")

EXTERNAL_SNAPSHOT: Final = "external-snapshot"
TRANSACTION_S: Final = 30.0
"""Flushes and makes a qcow2 file per disk."""


async def plan(kept: KeptVm, name: str, disks: str) -> tuple[Overlay, ...]:
    """What happens to the guest's writable disks. Raises PlanRefused, in words, for what no way keeps."""
    definition = kept.definition
    writable = definition.writable_paths()
    if not writable:
        return ()
    listed = ", ".join(writable)
    if disks != EXTERNAL_SNAPSHOT:
        raise PlanRefused(
            f"{kept.name} writes to {listed}, and a snapshot of its memory alone would not fit to them later",
            side="source",
            hint="say --disks external-snapshot: these files are left as they are at that instant, and the guest goes "
            "on in new ones on top of them",
        )
    if definition.spec is None:
        raise PlanRefused(
            f"{kept.name} was not started from a spec: with other disks than on its command line ({listed}) it could "
            "not be moved any more",
            side="source",
            hint="save it without writable disks, or start it from a spec",
        )
    formats = {disk["path"]: disk.get("format", "raw") for disk in definition.spec["disk"]}
    numbers = {disk["path"]: number for number, disk in enumerate(definition.spec["disk"])}
    nodes = await _open_images(kept.require_machine())
    found = []
    for path in writable:
        if path.startswith("/dev/"):
            raise PlanRefused(f"{path} is a device, and no new file can be put on top of it here", side="source")
        if path not in nodes:
            raise PlanRefused(f"{kept.name}: its QEMU has no disk {path} open", side="source", retry="no")
        # Not after the image's own name: that would grow with each snapshot.
        overlay = os.path.join(os.path.dirname(path), f"{kept.name}-disk{numbers[path]}.{name}.qcow2")
        if await asyncio.to_thread(os.path.lexists, overlay):
            raise PlanRefused(f"{overlay}, where the guest would go on, exists already", side="source")
        node = f"disk{numbers[path]}-{uuid.uuid4().hex[:12]}"  # QEMU takes 31 characters, and each name once
        found.append(Overlay(nodes[path], path, str(formats[path]), overlay, node))
    return tuple(found)


async def _open_images(machine: Machine) -> dict[str, str]:
    """The images at the top of the guest's disks: path to QEMU's node."""
    found = {}
    for device in await machine.execute("query-block"):
        inserted = device.get("inserted")
        if inserted and inserted.get("node-name"):
            found[str(inserted.get("image", {}).get("filename", inserted.get("file", "")))] = str(inserted["node-name"])
    return found


async def switch(job: SaveJob) -> None:
    """All writable disks go on in new files, in one transaction.

    Raises QmpCommandError: then none does. After another QemuError nobody knows; the save asks before it ends."""
    machine = job.kept.require_machine()
    actions = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {
                "node-name": each.node,
                "snapshot-file": each.overlay,
                "snapshot-node-name": each.overlay_node,
                "format": "qcow2",
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


async def mend(agent: Agent, kept: KeptVm, overlays: tuple[Overlay, ...]) -> bool:
    """After a restart, or an answer that was lost: if the guest goes on in the new files, its definition says so,
    durably. Whether it does.

    Raises QemuError while QEMU does not answer, Unfit when that cannot be written down: again."""
    machine = kept.machine
    if not overlays or machine is None or machine.is_gone:
        return False
    top = await _open_images(machine)
    done = tuple(each for each in overlays if each.overlay in top)
    left = tuple(each for each in done if each.path in kept.definition.writable_paths())
    if done:  # also if only the journal does not know
        await _redefine(agent, kept, left)
    return bool(done)


async def describe(definition: dict[str, Any], overlays: tuple[Overlay, ...]) -> list[FrozenDisk]:
    """The guest's disks of that instant, for the manifest. Raises OSError when a file is gone."""
    return await asyncio.to_thread(_describe, definition, {each.path: each for each in overlays})


def _describe(definition: dict[str, Any], overlays: dict[str, Overlay]) -> list[FrozenDisk]:
    from vmferry.engine.frozen import FrozenDisk

    found = []
    for disk in definition["disks"]:
        path = str(disk["path"])
        stat = os.stat(path)
        over = overlays.get(path)
        found.append(
            FrozenDisk(
                path=path,
                format=str(disk["format"]),
                way="read-only" if over is None else "external-snapshot",
                size_bytes=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
                overlay="" if over is None else over.overlay,
                node="" if over is None else over.node,
            )
        )
    return found
