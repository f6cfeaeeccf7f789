"""What hardware a running QEMU shows its guest, so that two sides can be compared before a migration.

Rule 1: only what a guest can see, or what the migration stream names, is compared; host paths are not.
Rule 2: a difference is a sentence with the device in it, because a person must act on it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

# Commands without arguments whose answers `view` takes; every QEMU from 6 on has them.
COMMANDS: tuple[str, ...] = (
    "query-pci",
    "query-hotpluggable-cpus",
    "query-memory-devices",
    "query-memory-size-summary",
)
# Where QEMU keeps the devices of its command line and of device_add, with and without an id.
FOLDERS: tuple[str, ...] = ("/machine/peripheral", "/machine/peripheral-anon")
DEVICES = "devices"


class Execute(Protocol):
    """Run a QMP command, as the QMP client's `execute` does."""

    async def __call__(self, name: str, arguments: Mapping[str, Any] | None = None, /) -> Any: ...


@dataclasses.dataclass(frozen=True, slots=True)
class HardwareView:
    """Names of things -> what they are, as plain text, sorted; equal on both sides means the same guest."""

    parts: tuple[tuple[str, str], ...]


async def look(execute: Execute) -> HardwareView:
    """Ask a QEMU, running or incoming: some ten commands and three for each device, several under way at a time.

    Raises what `execute` raises; the guest is unharmed.
    """
    said = await asyncio.gather(*(execute(command) for command in COMMANDS))
    listed = await asyncio.gather(*(execute("qom-list", {"path": folder}) for folder in FOLDERS))
    kinds = {
        f"{folder}/{entry['name']}": str(entry["type"])[len("child<") : -1]
        for folder, entries in zip(FOLDERS, listed, strict=True)
        for entry in entries
        if entry["type"].startswith("child<")
    }
    words = await asyncio.gather(*(_describe(execute, path, kind) for path, kind in kinds.items()))
    answers: dict[str, Any] = dict(zip(COMMANDS, said, strict=True))
    return view({**answers, DEVICES: dict(zip(kinds, words, strict=True))})


async def _describe(execute: Execute, path: str, kind: str) -> str:
    """A device's type, the bus it sits on and its place there."""
    known = {entry["name"] for entry in await execute("qom-list", {"path": path})}
    words = [kind]
    for name in ("parent_bus", "addr"):
        if name in known:
            value = str(await execute("qom-get", {"path": path, "property": name}))
            # The way to a built-in bus differs between QEMU versions; the bus's own name does not.
            words.append(f"{name} {value.rpartition('/')[2]}")
    return " ".join(words)


def view(answers: Mapping[str, Any]) -> HardwareView:
    """Answers -> the view: of each of `COMMANDS`, and under `DEVICES` path -> description. Pure.

    Of query-pci only the root buses count: what is behind a bridge is listed there only after the guest's
    firmware has numbered the buses, which an incoming QEMU's has not. `DEVICES` has those.
    """
    parts: dict[str, str] = {}
    for bus in answers.get("query-pci") or ():
        for device in bus["devices"]:
            parts[f"PCI device {device['bus']}:{device['slot']:02x}.{device['function']}"] = _pci(device)
    for path, description in dict(answers.get(DEVICES) or {}).items():
        parts[f"device {path.removeprefix('/machine/')}"] = description
    for cpu in answers.get("query-hotpluggable-cpus") or ():
        place = ",".join(f"{key}={value}" for key, value in sorted(cpu["props"].items()))
        parts[f"cpu {place}"] = f"{cpu['type']} {'present' if 'qom-path' in cpu else 'absent'}"
    for device in answers.get("query-memory-devices") or ():
        data = device["data"]
        parts[f"memory device {data.get('id')}"] = f"{device['type']} size {data.get('size')}"
    summary = answers.get("query-memory-size-summary")
    if summary is not None:
        parts["memory"] = " ".join(f"{key} {value}" for key, value in sorted(summary.items()))
    return HardwareView(tuple(sorted(parts.items())))


def differences(source: HardwareView, destination: HardwareView) -> tuple[str, ...]:
    """One sentence for each part that is not the same; empty when a migration can work."""
    left, right = dict(source.parts), dict(destination.parts)
    result: list[str] = []
    for name in sorted({*left, *right}):
        if name not in right:
            result.append(f"{name} ({left[name]}) is missing on the destination")
        elif name not in left:
            result.append(f"{name} ({right[name]}) is only on the destination")
        elif left[name] != right[name]:
            result.append(f"{name} is {left[name]} on the source and {right[name]} on the destination")
    return tuple(result)


def _pci(device: Mapping[str, Any]) -> str:
    """One PCI function. Addresses that firmware assigns at run time are left out."""
    identity = device["id"]
    words = [
        f"{identity['vendor']:04x}:{identity['device']:04x}",
        f"class {device['class_info']['class']:04x}",
    ]
    if "subsystem" in identity:
        words.append(f"subsystem {identity.get('subsystem-vendor', 0):04x}:{identity['subsystem']:04x}")
    words.append(f"id {device['qdev_id'] or 'none'}")
    words += [f"bar{bar['bar']} {bar['type']} {bar['size']}" for bar in device.get("regions", ()) if bar["size"]]
    return " ".join(words)
