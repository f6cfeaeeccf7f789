"""The VM that comes out of a snapshot: its definition under its name, disks of its own, and whom it would clash with.

Theory of operation
-------------------
A snapshot's guest has an identity: addresses of its cards, a UUID, disks, and what its definition names on the host.
Restored beside the guest that it was taken from, or many times over, all copies have the same one, since a guest reads
it at boot. What vmferry owns is made anew for each: the name, directories, sockets, and for each disk that the guest
may change an overlay on the stored image, so that the stored one stays as it is for the next restore.

The rest is compared with every VM that this agent or another one keeps:

    named and allowed    the UUID; the address of a card that nobody else's network sees (`user`, `none`)
    refused              the address of a card on a bridge or a tap; a tap, socket, port or file that is named in both

`accept` takes a clash of addresses upon oneself; what only one process can have stays refused.

Stored images must be what they were. A file's size and time say so. A device says only how large it is: whether
somebody has written to it since is a person's to know (`accept` again).

Rule 1: nothing is changed or made here; all of it is known before anything is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vmferry.agent import image_chain
from vmferry.agent.vms import DiskRef, VmDefinition
from vmferry.core.preflight import QEMU_OVERHEAD_BYTES
from vmferry.errors import PlanRefused, SpecError
from vmferry.limits import RESTORE_OTHER_MEMORY_BYTES_MAX
from vmferry.units import format_size
from vmferry.vm import spec as vm_spec

if TYPE_CHECKING:
    from vmferry.engine.frozen import FrozenDisk, FrozenImage
    from vmferry.store.manifest import Block
    from vmferry.vm.probe_qemu import QemuFacts

SAME_ADDRESS: Final = "same-address"
UNCHECKED_DISK: Final = "unchecked-disk"
ACCEPTED: Final = (SAME_ADDRESS, UNCHECKED_DISK)
"""What `--accept` takes."""
_MAC: Final = re.compile(r"\bmac(?:addr)?\"?\s*[=:]\s*\"?([0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5})\b")
"""`mac=`, `macaddr=`, and as JSON has it."""
_EXCLUSIVE: Final = re.compile(
    r"\b(?:path|filename|file|mem-path|ifname|hostfwd|port|localaddr|listen|guestfwd)=([^,\"\s]+)"
)
_KEEPS_WRITES: Final = ("external-snapshot", "mirror")
"""Ways in which a disk that the guest writes to is kept."""
_STORED: Final = ("read-only", *_KEEPS_WRITES)
"""Ways of a disk whose image is the snapshot's."""
_SINCE: Final = "since the snapshot was made"
_ON_A_NETWORK: Final = frozenset({"tap"})


@dataclass(frozen=True, slots=True)
class GuestIdentity:
    """What of a VM must not be there twice, or should be known to be."""

    vm: str
    host: str
    uuid: str = ""
    quiet_macs: tuple[str, ...] = ()
    """Addresses that no other machine sees."""
    loud_macs: tuple[str, ...] = ()
    """Addresses on a network."""
    writable: tuple[str, ...] = ()
    """Images that it may change."""
    exclusive: tuple[str, ...] = ()
    """What it names on its host and only one process can have."""
    bases: tuple[str, ...] = ()
    """Images under disks that restores made for it."""

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> GuestIdentity:
        """What `to_wire` gave, from an agent that may know more."""
        known = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in wire.items()}
        return cls(**{key: value for key, value in values.items() if key in known})


@dataclass(frozen=True, slots=True)
class Overlay:
    """An image that takes what the guest writes; `backing` is the stored one."""

    path: str
    backing: str
    backing_format: str


@dataclass(frozen=True, slots=True)
class Renewed:
    """The VM that will be."""

    definition: VmDefinition
    overlays: tuple[Overlay, ...] = ()


def identity_of(definition: VmDefinition, *, host: str) -> GuestIdentity:
    """What of this VM could clash."""
    writable = definition.writable_paths()
    if definition.spec is not None:
        spec = vm_spec.from_wire(definition.spec)
        quiet: list[str] = []
        loud: list[str] = []
        taps: list[str] = []
        for index, card in enumerate(spec.network):
            (loud if card.type in _ON_A_NETWORK else quiet).append(spec.mac_of(index).lower())
            taps += [card.ifname] if card.ifname else []
        more = " ".join(spec.extra_args)
        loud += _macs(more)  # whatever network such a card is on: it may be one that others are on
        named = [*taps, *_EXCLUSIVE.findall(more)]
        return GuestIdentity(
            definition.name, host, spec.uuid or "", tuple(quiet), tuple(loud), writable, tuple(sorted(set(named)))
        )
    assert definition.adopted is not None, "a definition has a spec or a command line"
    args = [str(arg) for arg in definition.adopted["args"]]
    uuid = next((after for arg, after in itertools.pairwise(args) if arg in ("-uuid", "--uuid")), "")
    macs = tuple(_macs(" ".join(args)))
    # Sockets of an adopted VM are put elsewhere when its command line is rewritten (`vm.rewrite`).
    return GuestIdentity(definition.name, host, uuid, (), macs, writable)


def _macs(arguments: str) -> list[str]:
    return [mac.lower() for mac in _MAC.findall(arguments)]


def clashes(
    mine: GuestIdentity, others: Iterable[GuestIdentity], *, accept: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what forbids it, what should be known), a sentence each. `mine.host` is where it would be."""
    refused: list[str] = []
    notes: list[str] = []
    for other in others:
        where = f"{other.vm} on {other.host}"
        if mine.uuid and mine.uuid == other.uuid:
            notes.append(f"{where} has the same UUID: it is the same guest, or another restore of it")
        common = sorted({*mine.loud_macs} & {*other.loud_macs, *other.quiet_macs})
        if common and SAME_ADDRESS not in accept:
            refused.append(
                f"{where} has a card with the same address on a network ({', '.join(common)}); "
                f"say --accept {SAME_ADDRESS} if they never meet"
            )
        elif common:
            notes.append(f"{where} has a card with the same address ({', '.join(common)}), as was accepted")
        quiet = sorted({*mine.quiet_macs} & {*other.loud_macs, *other.quiet_macs})
        if quiet:
            notes.append(f"{where} has a card with the same address ({', '.join(quiet)}), on another network")
        disks = sorted({*mine.writable} & {*other.writable})
        if disks:
            refused.append(f"{where} may write to the same disk ({', '.join(disks)})")
        things = sorted({*mine.exclusive} & {*other.exclusive}) if mine.host == other.host else []
        if things:
            refused.append(f"{where} uses the same {', '.join(things)}, which its definition names")
    return tuple(refused), tuple(notes)


def renew(definition: VmDefinition, disks: Sequence[FrozenDisk], *, name: str, folder: str, tag: str) -> Renewed:
    """The definition under a name, with an overlay in `folder` for each disk that it may change.

    Raises PlanRefused for what a snapshot of this kind cannot be restored with, SpecError for a malformed one.
    """
    frozen = {disk.guest_path: disk for disk in disks}
    overlays: list[Overlay] = []
    moved: dict[str, DiskRef] = {}
    for number, disk in enumerate(definition.disks):
        if disk.readonly:
            continue
        stored = frozen.get(disk.path)
        if stored is None or stored.way not in _KEEPS_WRITES:
            raise PlanRefused(
                f"the snapshot does not keep what {definition.name} had on {disk.path}",
                side="client",
                hint="its memory without its disk would damage the disk",
            )
        path = os.path.join(folder, f"{name}-{tag}-{number}.qcow2")
        overlays.append(Overlay(path, stored.path, stored.format))
        moved[disk.path] = DiskRef(path, False, False, "qcow2")
    return Renewed(_named(definition, name, moved), tuple(overlays))


def _named(definition: VmDefinition, name: str, moved: dict[str, DiskRef]) -> VmDefinition:
    disks = tuple(moved.get(disk.path, disk) for disk in definition.disks)
    if definition.spec is None:
        if moved:
            raise SpecError(
                f"{definition.name} was not started from a spec: its command line is taken as it is, and its disks "
                "cannot be put under others",
                hint="only its memory with disks that it cannot change could be restored",
            )
        return dataclasses.replace(definition, name=name, disks=disks)
    spec = vm_spec.from_wire(definition.spec)
    wire = dict(definition.spec)
    wire["name"] = name
    if spec.network:
        # An address that the spec leaves open follows from the name, and the guest has the old one.
        cards = [dict(card) for card in wire["network"]]
        wire["network"] = [{**card, "mac": spec.mac_of(index)} for index, card in enumerate(cards)]
    if spec.disk:
        changed = [dict(disk) for disk in wire["disk"]]
        for disk in changed:
            there = moved.get(disk["path"])
            if there is not None:
                disk.update(path=there.path, format=there.format, shared=False)
        wire["disk"] = changed
    vm_spec.from_wire(wire, source=f"the definition of {definition.name}")
    return dataclasses.replace(definition, name=name, disks=disks, spec=wire)


def disk_objections(disks: Sequence[FrozenDisk]) -> tuple[str, ...]:
    """What is wrong with the stored images and with what they lie on, a sentence each: missing, or not what they were.
    Reads the file system."""
    found = []
    for image, under in _stored(disks):
        name = f"the disk image {image.path}{under}"
        try:
            seen = image_chain.look(image.path)
        except OSError as error:
            found.append(f"{name} of the snapshot is not there: {error.strerror}")
            continue
        if seen.is_file and (seen.size_bytes, seen.mtime_ns) != (image.size_bytes, image.mtime_ns):
            found.append(f"{name} was changed since the snapshot was made")
        elif not seen.is_file and 0 not in (seen.size_bytes, image.size_bytes) and seen.size_bytes != image.size_bytes:
            found.append(f"{name} has {seen.size_bytes} bytes, and had {image.size_bytes} when the snapshot was made")
    return tuple(found)


def disk_doubts(disks: Sequence[FrozenDisk]) -> tuple[str, ...]:
    """Of which stored images nobody can say whether they are what they were, a sentence each. Reads the file system."""
    found = []
    for image, under in _stored(disks):
        with contextlib.suppress(OSError):  # `disk_objections` tells
            if not image_chain.look(image.path).is_file:
                found.append(f"{image.path}{under} is a device, and nobody can say whether it was written to {_SINCE}")
    for disk in disks:
        # There was no qemu-img, or an early vmferry that did not ask.
        if disk.way in _STORED and disk.chain is None and disk.format not in image_chain.FLAT:
            found.append(f"what {disk.path} lies on was not known, so nor is whether that was written to {_SINCE}")
    return tuple(found)


def unless_accepted(doubts: Sequence[str], accept: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what forbids a restore, what should be known), as `clashes`. Pure."""
    if UNCHECKED_DISK in accept:
        return (), tuple(f"{doubt}; that was accepted" for doubt in doubts)
    return tuple(f"{doubt}; say --accept {UNCHECKED_DISK} if it was not" for doubt in doubts), ()


def _stored(disks: Sequence[FrozenDisk]) -> Iterator[tuple[FrozenDisk | FrozenImage, str]]:
    """Each image that must be what it was, and under which it lies, in words."""
    for disk in disks:
        if disk.way in _STORED:
            yield disk, ""
            for image in disk.chain or ():
                yield image, f" under {disk.path}"


def memory_objection(definition: VmDefinition, blocks: Sequence[Block]) -> str:
    """Why the memory of a snapshot cannot be this guest's; '' if it can. Asked before a table of pages is read: a
    forged one has some MB for a TiB of zeros."""
    has = sum(block.size_bytes for block in blocks)
    may_have = definition.memory_bytes + RESTORE_OTHER_MEMORY_BYTES_MAX
    if has <= may_have:
        return ""
    return f"it has {format_size(has)} of memory, and its definition says {format_size(definition.memory_bytes)}"


def host_objections(
    definition: VmDefinition, facts: QemuFacts, *, available_bytes: int | None, saved_by: str = ""
) -> tuple[list[str], list[str]]:
    """(what a host lacks for this guest, what should be known), a sentence each: as a migration's plan looks at it.

    Args:
        available_bytes: memory that the host has left; None: not known.
        saved_by: the version of the QEMU that the guest comes from, as the snapshot has it; '': not known.
    """
    found: list[str] = []
    notes: list[str] = []
    if definition.machine not in facts.machines:
        found.append(f"this host's QEMU {'.'.join(map(str, facts.version))} has no machine type {definition.machine}")
    if definition.accel not in facts.accelerators():
        found.append(f"the guest ran under {definition.accel}, which this host's QEMU does not offer")
    model = definition.cpu.partition(",")[0]
    models = {each.name: each.unavailable for each in facts.cpus.get(definition.accel, ())}
    if model == "host" or (model == "max" and definition.accel != "tcg"):
        notes.append(f"it has the CPU model {model}, and nobody knows whether this host's CPU is as the one it ran on")
    elif model != "max" and models and model not in models:
        found.append(f"this host's QEMU does not know the CPU model {model}")
    elif models.get(model):
        found.append(f"this host's CPU lacks what the model {model} promises: {', '.join(models[model] or ())}")
    elif models and model != "max" and models.get(model) is None:
        notes.append(f"this host's QEMU does not say whether its CPU has all features of the model {model}")
    here = ".".join(map(str, facts.version))
    if model == "max" and definition.accel == "tcg" and saved_by not in ("", here):
        notes.append(f"it has the CPU model max, which differs between QEMU {saved_by} and {here}")
    needed = definition.memory_bytes + QEMU_OVERHEAD_BYTES
    if available_bytes is not None and available_bytes < needed:
        found.append(f"it needs {format_size(needed)} of memory and this host has {format_size(available_bytes)} left")
    return found, notes
