"""What a plan needs to know of local disks: which there are, and what the guest's own QEMU says of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vmferry.agent.machine import Machine
from vmferry.agent.vms import KeptVm, VmDefinition
from vmferry.core.disk_reports import LocalDisk, Since
from vmferry.core.disks import Choice, ids, parse_since, since_for
from vmferry.errors import PlanRefused, QemuError

FILES = ("kernel", "initrd", "firmware")


def choices(definition: VmDefinition) -> tuple[Choice, ...]:
    """The guest's disks with their ids. A kernel or a firmware is a file of the guest, and no disk."""
    disks = [disk for disk in definition.disks if disk.format != "file"]
    named = ids(disk.path for disk in disks)
    return tuple(Choice(name, d.path, d.readonly, d.shared) for (name, _), d in zip(named, disks, strict=True))


async def inserted_by_path(machine: Machine) -> dict[str, dict[str, Any]]:
    """Each image file that a device of the guest has, and what query-block says of it there. Raises QemuError."""
    found: dict[str, dict[str, Any]] = {}
    for device in await machine.execute("query-block"):
        inserted = device.get("inserted") or {}
        filename = str((inserted.get("image") or {}).get("filename", ""))
        if filename and inserted.get("node-name"):
            found.setdefault(filename, inserted)
    return found


async def media(machine: Machine) -> dict[str, str]:
    """What each device of the guest has for its disk: the block node and the file. Raises QemuError."""
    found: dict[str, str] = {}
    for device in await machine.execute("query-block"):
        inserted = device.get("inserted")
        name = str(device.get("qdev") or device.get("device") or "")
        if inserted and name:
            filename = (inserted.get("image") or {}).get("filename") or inserted.get("file", "")
            found[name] = f"{filename} (node {inserted.get('node-name', 'without a name')})"
    return found


def exchanged(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Devices whose medium is another one than it was, in words: the destination has opened what was there before."""
    return tuple(
        f"{name} had {before.get(name, 'nothing')} when the migration was planned, and has {now.get(name, 'nothing')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


async def other_disks(kept: KeptVm) -> tuple[str, ...]:
    """Disks and media that the definition names and the guest's QEMU does not have, or the other way round, with what
    to do: the destination opens those of the definition, and the guest's memory would run on wrong ones there. Only of
    a VM that was started from a spec: its paths are those that QEMU was given."""
    definition = kept.definition
    if definition.spec is None:
        return ()
    wanted, named = choices(definition), {disk.path for disk in definition.disks}
    found = await inserted_by_path(kept.require_machine())
    missing = (
        f"its QEMU does not {'have' if choice.readonly else 'write to'} {choice.path}, which its definition names: "
        + (
            "insert it again (blockdev-change-medium), or start the guest from a spec without it"
            if choice.readonly
            else "have it write there again (block-commit), or start the guest from a spec that names its disks"
        )
        for choice in wanted
        if choice.path not in found
    )
    strange = (
        f"its QEMU has {path}, which its definition does not name: take it out (eject, device_del)"
        for path, inserted in found.items()
        if path not in named and inserted.get("ro")
    )
    return (*missing, *strange)


async def local_disks(kept: KeptVm, chosen: Collection[Choice], destination: str) -> tuple[LocalDisk, ...]:
    """What the guest's QEMU says of these, for a move to that host. Raises QemuError when it has not one of them."""
    found = await inserted_by_path(kept.require_machine())
    disks: list[LocalDisk] = []
    for choice in chosen:
        inserted = found.get(choice.path)
        if inserted is None:
            raise QemuError(f"the QEMU of {kept.name} does not have {choice.id} ({choice.path}) as a disk any more")
        disks.append(_disk(choice, inserted, destination))
    return tuple(disks)


def _disk(choice: Choice, inserted: dict[str, Any], destination: str) -> LocalDisk:
    image = inserted["image"]
    data = (image.get("format-specific") or {}).get("data") or {}
    return LocalDisk(
        id=choice.id,
        path=choice.path,
        node=str(inserted["node-name"]),
        format=str(image.get("format", "")),
        virtual_bytes=int(image["virtual-size"]),
        allocated_bytes=int(image.get("actual-size", 0)),
        cluster_bytes=image.get("cluster-size"),
        compat=str(data.get("compat", "")),
        extended_l2=bool(data.get("extended-l2")),
        backing=str(image.get("full-backing-filename") or image.get("backing-filename") or ""),
        extras=tuple(_extras(image, data)),
        since=since_for(counted(inserted), destination),
        is_device=choice.path.startswith("/dev/") and not choice.path.startswith("/dev/shm/"),
    )


async def origin(kept: KeptVm) -> dict[str, Any]:
    """Where the guest came from with its disks, and how much of each has changed since. Raises PlanRefused when nobody
    counts that, QemuError."""
    found = await inserted_by_path(kept.require_machine())
    disks = [
        {"id": choice.id, "path": choice.path, "host": each.host, "job": each.job, "changed_bytes": each.changed_bytes}
        for choice in choices(kept.definition)
        for each in counted(found.get(choice.path, {}))
        if each.is_origin
    ]
    if not disks:
        raise PlanRefused(
            f"{kept.name} did not come here with its disks, or its QEMU was started anew since",
            side="source",
            hint=f"vmferry migrate {kept.name} HOST --disks copy",
        )
    return {"vm": kept.name, "host": disks[0]["host"], "job": disks[0]["job"], "disks": disks}


def counted(inserted: dict[str, Any]) -> list[Since]:
    """What QEMU counts for vmferry on this disk, each from a moment on."""
    found = []
    for bitmap in inserted.get("dirty-bitmaps") or ():
        since = parse_since(str(bitmap.get("name", "")), int(bitmap.get("count", 0)))
        if since is not None and bitmap.get("recording") and not bitmap.get("inconsistent"):
            found.append(since)
    return found


def _extras(image: dict[str, Any], data: dict[str, Any]) -> list[str]:
    extras = ["snapshots inside"] if image.get("snapshots") else []
    extras += ["encryption"] if image.get("encrypted") or data.get("encrypt") else []
    extras += ["its data in another file"] if data.get("data-file") else []
    return extras


def image_options(disk: LocalDisk) -> tuple[str, ...]:
    """What `qemu-img create -o` needs for an image that is built as this one is."""
    if disk.format != "qcow2":
        return ()
    options = [f"compat={disk.compat}"] if disk.compat else []
    options += [f"cluster_size={disk.cluster_bytes}"] if disk.cluster_bytes else []
    options += ["extended_l2=on"] if disk.extended_l2 else []
    return tuple(options)
