"""What hardware a running QEMU shows its guest, so that two sides can be compared before a migration.

Rule 1: only what a guest can see, or what the migration stream names, is compared; host paths are not.
Rule 2: a difference is a sentence with the device in it, because a person must act on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# The commands whose answers `view` takes, by name; every QEMU from 6 on has them.
COMMANDS: tuple[str, ...] = (
    "query-pci",
    "query-hotpluggable-cpus",
    "query-memory-devices",
    "query-memory-size-summary",
)


@dataclasses.dataclass(frozen=True, slots=True)
class HardwareView:
    """Names of things -> what they are, as plain text, sorted; equal on both sides means the same guest."""

    parts: tuple[tuple[str, str], ...]


def view(answers: Mapping[str, Any]) -> HardwareView:
    """The answers of `COMMANDS` (command -> its return value) -> the view. Missing answers are left out."""
    parts: dict[str, str] = {}
    for bus in answers.get("query-pci") or ():
        for device in bus["devices"]:
            _pci(device, parts)
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


def _pci(device: Mapping[str, Any], parts: dict[str, str]) -> None:
    """One PCI function and what is behind it. Addresses that firmware assigns at run time are left out."""
    place = f"{device['bus']}:{device['slot']:02x}.{device['function']}"
    identity = device["id"]
    words = [
        f"{identity['vendor']:04x}:{identity['device']:04x}",
        f"class {device['class_info']['class']:04x}",
    ]
    if "subsystem" in identity:
        words.append(f"subsystem {identity.get('subsystem-vendor', 0):04x}:{identity['subsystem']:04x}")
    words.append(f"id {device['qdev_id'] or 'none'}")
    words += [
        f"bar{bar['bar']} {bar['type']} {bar['size']}" for bar in device.get("regions", ()) if bar["size"]
    ]
    bridge = device.get("pci_bridge")
    if bridge is None:
        parts[f"PCI device {place}"] = " ".join(words)
        return
    # A bridge's bus number is set by firmware, so what is behind it is named by the bridge's place.
    parts[f"PCI bridge {place}"] = " ".join(words)
    for child in bridge.get("devices", ()):
        _pci({**child, "bus": f"{place}/"}, parts)
