"""A guest at rest: what an image knows beside its pages as bytes, and what a snapshot's owner says of it. Pure.

Theory of operation
-------------------
A manifest of a repository has `device_state`, which are bytes, and `metadata` and `disks`, which are plain values; it
knows nothing of QEMU. This module is where both sides agree on what stands in them:

    device_state   MAGIC, version (u32, big endian), then msgpack of `_State`: the configuration section, the device
                   sections in the order of the stream with name, instance and version, the vmdescription
    metadata       `SnapshotWords`
    disks          `FrozenDisk`, one per disk of the guest

Pages are not here, nor are the lengths of RAM blocks: those are the manifest's own.

Rule 1: what cannot be kept is refused when it is frozen, in words, while the guest still has it.
Rule 2: what is thawed was checked: its encoding onto the wire cannot fail. What does not fit is a RepositoryError, also
        a version that this program does not know; nothing was made of it then.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, TypeVar

import msgspec

from vmferry.engine.image import Image
from vmferry.errors import PlanRefused, RepositoryError
from vmferry.wire import limits as wire_limits
from vmferry.wire.configuration import CAPABILITIES, PAGE_BITS, UUID
from vmferry.wire.events import Configuration, DeviceSection, to_raw, to_text

MAGIC: Final = b"vmferry device state\n"
STATE_VERSION: Final = 1
WORDS_VERSION: Final = 1
_VERSION = struct.Struct(">I")
_U32_MAX: Final = (1 << 32) - 1
_NAME_BYTES_MAX: Final = 255

# --- device state ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FrozenState:
    """What an image knows beside its pages. Sections in the order of the stream, the early ones first."""

    configuration: Configuration | None
    devices: tuple[DeviceSection, ...]
    description: bytes | None
    has_footers: bool = True
    ram_section_id: int = 1

    @property
    def machine(self) -> str:
        """The machine type, '' if the stream had no configuration section."""
        return "" if self.configuration is None else self.configuration.machine

    def fill(self, image: Image) -> None:
        """Gives all of it to an image that has no device state. A guest can be started from it as soon as it has its
        blocks; their pages may come later."""
        assert not image.devices
        assert not image.early
        image.configuration = self.configuration
        image.has_footers = self.has_footers
        image.ram_section_id = self.ram_section_id
        image.early = [each for each in self.devices if each.early]
        image.devices = [each for each in self.devices if not each.early]
        image.description = self.description
        image.is_device_state_whole = True


class _Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    machine: bytes
    order: list[str]
    page_bits: int | None = None
    capabilities: list[bytes] | None = None
    uuid: bytes | None = None


class _Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    section_id: int
    idstr: bytes
    instance: int
    version: int
    early: bool
    body: bytes


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    configuration: _Configuration | None
    has_footers: bool
    ram_section_id: int
    devices: list[_Device]
    description: bytes | None


def state_of(image: Image) -> FrozenState:
    """What this image knows beside its pages. Raises PlanRefused for what no snapshot keeps; nothing was changed."""
    assert image.is_device_state_whole, "a stream that has come whole"
    if image.bitmaps is not None:
        raise PlanRefused(
            "a snapshot does not keep dirty bitmaps: they belong to images that go on changing",
            side="source",
            hint="switch the capability dirty-bitmaps off",
        )
    return FrozenState(
        image.configuration,
        (*image.early, *image.devices),
        image.description,
        image.has_footers,
        image.ram_section_id,
    )


_GLOBAL_STATE: Final = "globalstate"
_RUN_STATE_AT: Final = 4


def run_state_of(devices: Iterable[DeviceSection]) -> str:
    """QEMU's run state when the stream was written, which it keeps in a section of its own; '' if it did not."""
    for device in devices:
        if device.idstr == _GLOBAL_STATE:
            return to_text(device.body[_RUN_STATE_AT:].split(b"\0", 1)[0])
    return ""


def freeze(state: FrozenState) -> bytes:
    """The state as bytes: the same state gives the same bytes."""
    configuration = None if state.configuration is None else _frozen(state.configuration)
    devices = [
        _Device(each.section_id, to_raw(each.idstr), each.instance, each.version, each.early, each.body)
        for each in state.devices
    ]
    body = _State(configuration, state.has_footers, state.ram_section_id, devices, state.description)
    return MAGIC + _VERSION.pack(STATE_VERSION) + msgspec.msgpack.encode(body)


def _frozen(found: Configuration) -> _Configuration:
    capabilities = None if found.capabilities is None else [to_raw(each) for each in found.capabilities]
    return _Configuration(to_raw(found.machine), list(found.order), found.page_bits, capabilities, found.uuid)


def thaw(data: bytes) -> FrozenState:
    """What `freeze` was given. Raises RepositoryError, also for a version that this program does not know."""
    head = len(MAGIC) + _VERSION.size
    if len(data) < head or not data.startswith(MAGIC):
        raise _unreadable("these bytes are no device state")
    (version,) = _VERSION.unpack_from(data, len(MAGIC))
    if version != STATE_VERSION:
        raise _unreadable(f"it has version {version}, and this vmferry reads version {STATE_VERSION}")
    try:
        body = msgspec.msgpack.decode(memoryview(data)[head:], type=_State)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(str(error)) from None
    _check(body)
    devices = tuple(
        DeviceSection(each.section_id, to_text(each.idstr), each.instance, each.version, each.body, each.early)
        for each in body.devices
    )
    configuration = None if body.configuration is None else _configuration(body.configuration)
    return FrozenState(configuration, devices, body.description, body.has_footers, body.ram_section_id)


def _configuration(found: _Configuration) -> Configuration:
    values = {PAGE_BITS: found.page_bits, CAPABILITIES: found.capabilities, UUID: found.uuid}
    present = [name for name, value in values.items() if value is not None]
    capabilities = found.capabilities or ()
    is_sound = (
        sorted(found.order) == sorted(present)
        and 0 < len(found.machine) <= wire_limits.MACHINE_NAME_BYTES_MAX
        and (found.uuid is None or len(found.uuid) == 16)
        and (
            found.page_bits is None
            or wire_limits.TARGET_PAGE_BITS_MIN <= found.page_bits <= wire_limits.TARGET_PAGE_BITS_MAX
        )
        and len(capabilities) <= wire_limits.CAPABILITIES_MAX
        and all(len(each) <= _NAME_BYTES_MAX for each in capabilities)
    )
    if not is_sound:
        raise _unreadable("its configuration section is none that a QEMU writes")
    return Configuration(
        to_text(found.machine),
        found.page_bits,
        None if found.capabilities is None else tuple(to_text(each) for each in found.capabilities),
        found.uuid,
        tuple(found.order),
    )


def _check(body: _State) -> None:
    if len(body.devices) > wire_limits.SECTIONS_MAX:
        raise _unreadable(f"it has {len(body.devices)} device sections")
    numbers = [body.ram_section_id]
    for each in body.devices:
        numbers += [each.section_id, each.instance, each.version]
        if len(each.idstr) > _NAME_BYTES_MAX:
            raise _unreadable("a device's name is too long")
    if any(not 0 <= number <= _U32_MAX for number in numbers):
        raise _unreadable("a section's number is out of bounds")
    if len(body.description or b"") > wire_limits.DESCRIPTION_BYTES_MAX:
        raise _unreadable("its vmdescription is too long")
    is_late = False
    for each in body.devices:
        if each.early and is_late:
            raise _unreadable("its sections are not in the order of a stream")
        is_late = is_late or not each.early


def _unreadable(what: str) -> RepositoryError:
    return RepositoryError(f"the snapshot's device state cannot be read: {what}", retry="no")


# --- what the owner says of a snapshot ------------------------------------------------------------------------

DiskWay = Literal["read-only", "external-snapshot", "mirror", "none"]
"""`read-only`: nobody changes it. `external-snapshot`: the file is what the disk was at that instant, and the guest
went on in an overlay. `mirror`: the file is a copy of that instant, and the guest stayed on its own disk.
`none`: the snapshot was imported, and nobody knows of its disks."""


_OF_COPIES = ("disk", "virtual_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenImage:
    """A file under a disk's own: it must stay untouched as well."""

    path: str
    format: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenDisk:
    """One disk of the guest as it was at the instant of the snapshot.

    `path` is the file that holds it and must stay untouched: `size_bytes` and `mtime_ns` tell whether it did. So must
    all that it lies on (`chain`).
    """

    path: str
    format: str
    way: DiskWay
    size_bytes: int
    mtime_ns: int
    overlay: str = ""
    """Where the saved guest went on: its own, and no part of the snapshot."""
    disk: str = ""
    """The guest's own file, no part of the snapshot either, where `path` is a copy of it."""
    virtual_bytes: int | None = None
    """What the guest sees of a copy."""
    node: str = ""
    """QEMU's node of the disk."""
    chain: tuple[FrozenImage, ...] | None = None
    """What it lies on, the nearest first; None: nobody knows."""

    @property
    def guest_path(self) -> str:
        """What the guest's definition calls it."""
        return self.disk or self.path

    def to_wire(self) -> dict[str, Any]:
        """Plain values, for the manifest. Of disks that are not copies an earlier agent reads them, too."""
        wire = asdict(self)
        return wire if self.way == "mirror" else {key: wire[key] for key in wire if key not in _OF_COPIES}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> FrozenDisk:
        """What `to_wire` gave. Raises RepositoryError."""
        return _convert(wire, cls, "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotWords:
    """What a snapshot's owner says of it: the manifest's `metadata`."""

    vm: str
    """The name that the guest had."""
    host: str
    """The agent that saved it."""
    job: str
    machine: str
    """The versioned machine type."""
    qemu_version: str = ""
    """Of the QEMU that the state comes from, '7.2.22'; '' if nobody knows (an imported file)."""
    was_running: bool
    """Whether the guest ran at that instant. One that was paused is restored paused."""
    way: Literal["precopy", "background", "import"]
    definition: dict[str, Any] | None = None
    """The VM's definition as the agent keeps it (`agent.vms.VmDefinition`); None for an imported file."""
    version: int = WORDS_VERSION

    def to_wire(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> SnapshotWords:
        """What `to_wire` gave. Raises RepositoryError, also for a version that this program does not know."""
        version = wire.get("version")
        if version != WORDS_VERSION:
            raise RepositoryError(
                f"the snapshot's description has version {version!r}, and this vmferry reads version {WORDS_VERSION}",
                retry="no",
                hint="it was saved by another version of vmferry, or not by vmferry",
            )
        return _convert(wire, cls, "description")


_T = TypeVar("_T", FrozenDisk, SnapshotWords)


def _convert(wire: Mapping[str, Any], kind: type[_T], what: str) -> _T:
    strange = set(wire) - {each.name for each in fields(kind)}
    if strange:
        raise RepositoryError(f"the snapshot's {what} cannot be read: {', '.join(sorted(strange))}: what is that?")
    try:
        return msgspec.convert(dict(wire), kind)
    except (msgspec.ValidationError, TypeError) as error:
        raise RepositoryError(f"the snapshot's {what} cannot be read: {error}", retry="no") from None
