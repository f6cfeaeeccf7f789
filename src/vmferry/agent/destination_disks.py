"""The destination's side of disks that go with the guest: images of this job's own, served to the source's QEMU.

Theory of operation
-------------------
The images are made before the QEMU that opens them (`images` says how a crash leaves each). While it waits for the
guest, that QEMU itself takes what the source's QEMU writes: an NBD server with one writable export per disk, under the
same credentials as the memory. An export makes its image active, which an incoming guest's images otherwise are only
later; the guest's device does not touch it before the guest runs.

An image that the guest left here when it went is no other one: it is filled with what changed since (`left_images`).

From before the guest runs its QEMU counts what is written to each disk (`since_name`): so it can go back with no more.

Rule 1: `close_exports` comes after the load and before `cont`: from then on the images are the guest's alone.
Rule 2: images are taken away only in RENOUNCE, after their QEMU is gone, and only the job's own: never one that the
        guest left here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from vmferry import limits
from vmferry.agent.destination import DestinationAttempt
from vmferry.agent.machine import Machine
from vmferry.agent.plan_disks import inserted_by_path
from vmferry.core.disks import since_name
from vmferry.core.facts import Fact
from vmferry.errors import QemuError, Unfit
from vmferry.jobs.journal import Entry
from vmferry.pki.job_credentials import tag
from vmferry.qmp.errors import QmpCommandError

log = logging.getLogger("vmferry.agent")

CLOSE_S = 10.0
"""The server waits for what it has taken to be written."""


def export_name(job: str, disk: str) -> str:
    """What the source asks the NBD server for."""
    return f"vmferry-{tag(job)[:12]}-{disk}"


async def make_images(attempt: DestinationAttempt) -> None:
    """Every image of the place, empty, but for those that the guest left here. Raises Unfit; what was made until then
    is RENOUNCE's to take away."""
    host, journal, job = attempt.context.host, attempt.context.journal, attempt.job
    for disk in attempt.place.disks:
        if disk.left_by:
            if not attempt.context.is_left_image(disk.path, disk.left_by):
                raise Unfit(f"{disk.path} was changed since the guest left it here", side="destination")
            continue
        try:
            await attempt.context.make_room_for_image(disk.path, attempt.vm)
        except OSError as error:
            raise Unfit(f"{disk.path} cannot be made anew: {error}", side="destination", cause=error) from error
        identity = await host.make_image(disk, job, attempt.context.config.qemu)
        await journal.append(Entry.IMAGE_MADE, job, {disk.path: list(identity)})
        attempt.images[disk.path] = identity
        host.publish_image(disk.path, job)


def remove_images(attempt: DestinationAttempt, *, but: Collection[str] = ()) -> None:
    """What this job made, and nothing else. Trouble is a line in the log: the guest is not concerned."""
    for disk in attempt.place.disks:
        if disk.left_by or disk.path in but:
            continue
        try:
            is_ours = attempt.context.host.remove_image(disk.path, attempt.images.get(disk.path), attempt.job)
        except OSError as error:
            log.warning("job=%s vm=%s image=%s result=%s", attempt.job, attempt.vm, disk.path, error)
            continue
        if not is_ours:
            log.info("job=%s vm=%s image=%s result=kept: another file", attempt.job, attempt.vm, disk.path)


async def keep_for_next_try(attempt: DestinationAttempt) -> set[str]:
    """The place's QEMU is gone. What the guest left here may have got newer, and is still of use; an image that had all
    of a disk once is kept for a while. The paths of those that are not to be taken away."""
    context, kept = attempt.context, set[str]()
    for disk in attempt.place.disks:
        stamp = attempt.image_stamps.get(disk.path)
        if disk.left_by:
            await context.renew_left_image(disk.path, stamp)
        elif (
            stamp is not None
            and disk.format == "raw"
            and attempt.has_whole_copies
            and stamp[:2] == attempt.images.get(disk.path)
            and await context.keep_tried_image(attempt, disk, stamp)
        ):
            kept.add(disk.path)
    return kept


async def serve(attempt: DestinationAttempt) -> dict[str, Any]:
    """Starts the NBD server: where it is, and each disk's export. Raises QemuError."""
    machine = attempt.machine
    assert machine is not None
    attempt.note(Fact.DISKS_SERVED)
    nodes = await nodes_by_path(machine)
    host, port = await _listen(attempt, machine)
    exports: dict[str, str] = {}
    for disk in attempt.place.disks:
        node = nodes.get(disk.path)
        if node is None:
            raise QemuError(f"{attempt.vm}: the destination's QEMU has no disk {disk.path}", side="destination")
        name = export_name(attempt.job, disk.id)
        wanted = {"type": "nbd", "id": name, "name": name, "node-name": node, "writable": True}
        await machine.execute("block-export-add", wanted)
        # From here on it is locked. 1. it was looked at  2. somebody else writes to it  3. this QEMU opens it
        if disk.left_by and disk.format == "raw" and not attempt.context.is_left_image(disk.path, disk.left_by):
            raise Unfit(f"{disk.path} was changed since the guest left it here", side="destination")
        exports[disk.id] = name
    return {"host": host, "port": port, "exports": exports}


async def _listen(attempt: DestinationAttempt, machine: Machine) -> tuple[str, int]:
    """The first port that is free. Raises QmpCommandError when none is."""
    config = attempt.context.config
    first, last = config.migration_ports
    failure: QmpCommandError | None = None
    while (port := attempt.context.host.free_port(first, last, config.data_address)) is not None:
        address = {"type": "inet", "data": {"host": config.data_address, "port": str(port)}}
        connections = len(attempt.place.disks)  # the source has one for each
        arguments: dict[str, Any] = {"addr": address, "max-connections": connections}
        if not attempt.place.clear_text:
            # Who has no certificate gets nothing written, and shall not keep the source out by being there first.
            arguments["max-connections"] = connections + limits.NBD_STRANGERS
            arguments["tls-creds"] = f"vmferry-tls-{tag(attempt.job)}"
        try:
            await machine.execute("nbd-server-start", arguments)
        except QmpCommandError as error:
            if failure is not None and first:
                raise
            failure, first = error, port + 1 if first else 0  # somebody was faster
            continue
        return config.data_address, port
    raise failure or QemuError(
        f"no port from {first} to {last} is free on {config.name} for the disks",
        side="destination",
        hint="give that agent a wider range (migration_ports)",
    )


async def nodes_by_path(machine: Machine) -> dict[str, str]:
    """Each disk's image file -> the block node that the guest's device uses. Raises QemuError."""
    return {path: str(inserted["node-name"]) for path, inserted in (await inserted_by_path(machine)).items()}


async def close_exports(attempt: DestinationAttempt) -> None:
    """Ends the server with everything that it has taken written. Raises QemuError; it is tried again then.

    The source's mirrors had ended before the state that is loaded here was sent, so nobody is cut off."""
    machine = attempt.machine
    assert machine is not None
    try:
        await machine.execute("nbd-server-stop", deadline_s=CLOSE_S)
    except QmpCommandError as error:
        # It was stopped before, by an agent that died before it had written so.
        log.info("job=%s vm=%s command=nbd-server-stop result=%s", attempt.job, attempt.vm, error)
        if await machine.execute("query-block-exports"):
            raise
    await _count_changes(attempt, machine)
    attempt.note(Fact.DISKS_CLOSED, by="agent")


async def _count_changes(attempt: DestinationAttempt, machine: Machine) -> None:
    """Both sides' disks are equal, and the guest does not run yet. Raises QmpDisconnected and QmpTimeout. A bitmap that
    cannot be had is a line in the log: the guest would have to go back with all of its disks, no more."""
    name = since_name(attempt.job, attempt.place.source)
    nodes = await nodes_by_path(machine)
    for disk in attempt.place.disks:
        wanted = {"node": nodes[disk.path], "name": name, "granularity": limits.DISK_BITMAP_BYTES}
        try:
            await machine.execute("block-dirty-bitmap-add", wanted)
        except QmpCommandError as error:  # there already, by an agent that died before it had written so, say
            log.info("job=%s vm=%s command=block-dirty-bitmap-add result=%s", attempt.job, attempt.vm, error)


async def digests(attempt: DestinationAttempt) -> dict[str, str]:
    """Each disk's checksum. The mirrors have ended, and flushed. Raises Unfit."""
    try:
        return {disk.id: await attempt.context.host.image_digest(disk.path) for disk in attempt.place.disks}
    except OSError as error:
        raise Unfit(f"a copy cannot be read: {error}", side="destination", cause=error) from error
