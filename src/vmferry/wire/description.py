"""The vmdescription: what QEMU tells in JSON about the device state before it, names, versions and sizes.

Rule 1: `parse` gives None for anything that is not such a document; it never raises and never guesses.
Rule 2: sizes come from a peer; they are only ever compared with bytes that are there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vmferry.wire import limits


@dataclass(frozen=True, slots=True)
class Device:
    """One device: how many bytes its body has, and the JSON that says so."""

    name: str
    instance: int
    version: int | None
    size: int
    raw: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Described:
    """A whole vmdescription."""

    page_size: int | None
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a device's state; `path` is its name with those around it."""

    path: str
    type: str
    data: bytes


def parse(text: bytes) -> Described | None:
    """The document, or None if it is not one."""
    try:
        document = json.loads(text)
        devices = tuple(_device(each) for each in document["devices"])
        page_size = document.get("page_size")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return Described(page_size if isinstance(page_size, int) else None, devices)


def fields(device: Device, body: bytes) -> tuple[Field, ...]:
    """The fields of a body, in order; structures are opened. The description must fit (`Device.size`)."""
    assert len(body) == device.size
    if "fields" not in device.raw:
        return (Field("data", "buffer", body),)
    return tuple(_fields(device.raw, body, 0, ""))


def _device(raw: dict[str, Any]) -> Device:
    name, instance = raw["name"], raw["instance_id"]
    if not isinstance(name, str) or not isinstance(instance, int):
        raise TypeError("a device without a name or instance")
    size = _state_size(raw) if "fields" in raw else _number(raw["size"])
    version = raw.get("version")
    return Device(name, instance, version if isinstance(version, int) else None, size, raw)


def _state_size(raw: dict[str, Any]) -> int:
    size = sum(_number(each["size"]) * _number(each.get("array_len", 1)) for each in raw["fields"])
    for subsection in raw.get("subsections", ()):
        size += _subsection_head(subsection) + _state_size(subsection)
    return size


def _subsection_head(subsection: dict[str, Any]) -> int:
    return 6 + len(subsection["vmsd_name"].encode())


def _number(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= limits.DEVICES_BYTES_MAX:
        raise TypeError("no size")
    return value


def _fields(raw: dict[str, Any], body: bytes, at: int, path: str) -> Iterator[Field]:
    repeated = Counter(str(field.get("name")) for field in raw["fields"])
    seen: Counter[str] = Counter()
    for field in raw["fields"]:
        if field["size"] == 0:
            continue  # however many there are of them
        plain = str(field.get("name"))
        for _ in range(field.get("array_len", 1)):
            name = path + plain
            if "array_len" in field or repeated[plain] > 1:
                name += f"[{field.get('index', seen[plain])}]"
            seen[plain] += 1
            data = body[at : at + field["size"]]
            at += len(data)
            inner = field.get("struct")
            if isinstance(inner, dict) and "fields" in inner and _fits(inner, len(data)):
                yield from _fields(inner, data, 0, name + ".")
            else:
                yield Field(name, str(field.get("type", "?")), data)
    for subsection in raw.get("subsections", ()):
        at += _subsection_head(subsection)
        size = _state_size(subsection)
        name = subsection["vmsd_name"]
        yield from _fields(subsection, body[at : at + size], 0, f"{path}<{name}>.")
        at += size


def _fits(inner: dict[str, Any], size: int) -> bool:
    try:
        return _state_size(inner) == size
    except (TypeError, KeyError, AttributeError):
        return False
