"""What a stream holds, for people: counts, blocks, devices and their fields; and what differs between two.

Rule 1: a summary grows with the number of devices and blocks, not with the memory of the guest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from vmferry.wire import description
from vmferry.wire.events import Command as _Command
from vmferry.wire.events import (
    CompressedPage,
    Configuration,
    Description,
    DeviceSection,
    Discard,
    Event,
    MappedData,
    OpaqueDevices,
    PackageEnd,
    PageRun,
    PostcopyAdvise,
    RamBlock,
    SectionFooter,
    SectionPart,
    SectionStart,
    XbzrlePage,
    ZeroRun,
)

COMMANDS_KEPT_MAX = 1000
# Fields longer than this are shown by their beginning.
SHOWN_BYTES_MAX = 32


class Summary:
    """Collects the events of one main channel."""

    def __init__(self) -> None:
        self.configuration: Configuration | None = None
        self.commands: list[str] = []
        self.blocks: dict[str, RamBlock] = {}
        self.pages: dict[str, Counter[str]] = {}
        self.iterable: list[str] = []
        self.devices: dict[tuple[str, int], DeviceSection] = {}
        self.described: description.Described | None = None
        self.description_bytes: int | None = None
        self.opaque_bytes = 0
        self.records: Counter[str] = Counter()

    def add(self, event: Event) -> None:
        """One event, in the order of the stream."""
        match event:
            case PageRun(block, offsets, _, _):
                self._count(block, "page", len(offsets))
            case ZeroRun(block, offsets, _):
                self._count(block, "zero", len(offsets))
            case XbzrlePage(block):
                self._count(block, "xbzrle", 1)
            case CompressedPage(block):
                self._count(block, "compressed", 1)
            case DeviceSection():
                self.devices[event.idstr, event.instance] = event
            case RamBlock():
                self.blocks[event.name] = event
            case SectionStart():
                self.iterable.append(event.idstr)
            case Configuration():
                self.configuration = event
            case Description(text):
                self.described = description.parse(text)
                self.description_bytes = len(text)
            case OpaqueDevices(data):
                self.opaque_bytes = len(data)
            case MappedData() | SectionFooter() | SectionPart() | PackageEnd():
                self.records[type(event).__name__] += 1
            case _ if isinstance(event, _Command):
                if len(self.commands) < COMMANDS_KEPT_MAX:
                    self.commands.append(_command(event))
            case _:
                self.records[type(event).__name__] += 1

    def _count(self, block: RamBlock, kind: str, pages: int) -> None:
        self.pages.setdefault(block.name, Counter())[kind] += pages

    def fields(self, key: tuple[str, int]) -> tuple[description.Field, ...] | None:
        """The fields of a device, or None if nothing describes them."""
        if self.described is None:
            return None
        body = self.devices[key].body
        for device in self.described.devices:
            if (device.name, device.instance) == key and device.size == len(body):
                return description.fields(device, body)
        return None

    def to_wire(self) -> dict[str, Any]:
        """Plain values."""
        configuration = self.configuration
        return {
            "machine": None if configuration is None else configuration.machine,
            "capabilities": [] if configuration is None else list(configuration.capabilities or ()),
            "uuid": configuration.uuid.hex() if configuration is not None and configuration.uuid else None,
            "commands": self.commands,
            "blocks": [
                {"name": each.name, "bytes": each.used_length, "records": dict(self.pages.get(each.name, {}))}
                for each in self.blocks.values()
            ],
            "iterable_sections": self.iterable,
            "devices": [self._device(key) for key in self.devices],
            "undelimited_device_bytes": self.opaque_bytes,
            "vmdescription_bytes": self.description_bytes,
            "records": dict(self.records),
        }

    def _device(self, key: tuple[str, int]) -> dict[str, Any]:
        section = self.devices[key]
        fields = self.fields(key)
        return {
            "name": section.idstr,
            "instance": section.instance,
            "version": section.version,
            "section_id": section.section_id,
            "early": section.early,
            "bytes": len(section.body),
            "fields": None if fields is None else [
                {"path": each.path, "type": each.type, "bytes": len(each.data), "hex": shown(each.data)}
                for each in fields
            ],
        }  # fmt: skip


def _command(event: _Command) -> str:
    name = type(event).__name__
    match event:
        case Discard(block, ranges):
            return f"{name} {block}: {len(ranges)} ranges, {sum(length for _, length in ranges)} bytes"
        case PostcopyAdvise(None, _):
            return f"{name} for dirty bitmaps"
        case _:
            values = [getattr(event, each) for each in event.__slots__]
            return " ".join([name, *(hex(each) if isinstance(each, int) else str(each) for each in values)])


def shown(data: bytes) -> str:
    """Some bytes in hex."""
    return data[:SHOWN_BYTES_MAX].hex() + ("..." if len(data) > SHOWN_BYTES_MAX else "")


def compare(first: Summary, second: Summary) -> Iterator[dict[str, Any]]:
    """Everything that differs but memory's contents: `what`, `first`, `second`."""
    one, two = first.to_wire(), second.to_wire()
    for name in ("machine", "capabilities", "uuid", "iterable_sections"):
        yield from _difference(name, one[name], two[name])
    for block in {**first.blocks, **second.blocks}:
        lengths = [each.blocks[block].used_length if block in each.blocks else None for each in (first, second)]
        yield from _difference(f"block {block}, bytes", *lengths)
    for key in {**first.devices, **second.devices}:
        name = f"device {key[0]}/{key[1]}"
        if key not in first.devices or key not in second.devices:
            yield from _difference(name, *("there" if key in each.devices else None for each in (first, second)))
            continue
        a, b = first.devices[key], second.devices[key]
        yield from _difference(f"{name}, version", a.version, b.version)
        if a.body != b.body:
            yield from _compare_fields(name, first, second, key)


def _compare_fields(name: str, first: Summary, second: Summary, key: tuple[str, int]) -> Iterator[dict[str, Any]]:
    found = [each.fields(key) for each in (first, second)]
    if found[0] is None or found[1] is None:
        bodies = [each.devices[key].body for each in (first, second)]
        yield {"what": f"{name}, state", "first": shown(bodies[0]), "second": shown(bodies[1])}
        return
    one, two = ({field.path: field.data for field in fields} for fields in (found[0], found[1]))
    for path in {**one, **two}:
        values = [shown(each[path]) if path in each else None for each in (one, two)]
        if one.get(path) != two.get(path):
            yield {"what": f"{name}, {path}", "first": values[0], "second": values[1]}


def _difference(what: str, first: Any, second: Any) -> Iterator[dict[str, Any]]:
    if first != second:
        yield {"what": what, "first": first, "second": second}
