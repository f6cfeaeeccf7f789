"""Local disks that go with a guest: which are copied, what speaks against it. Pure.

Theory of operation
-------------------
A person says which disks go (`choose`); the source's QEMU says what they are (`LocalDisk`), the destination's agent
where it would put them and whether there is room (`RoomReport`); `objections` compares the three. A mirror copies
what the guest sees of an image, and nothing else of it: internal snapshots stay behind, so an image that has any is
refused, and so is everything that `qemu-img create` with a size would not give back.

Rule 1: a file that exists on the destination is never written to: it is an objection. But for one that the guest left
        there when it went with its disks, and that nobody has touched since (`is_left`): what changed is sent then.
Rule 2: a read-only disk or a CD-ROM is not copied: it has to be there, as ever (`core.preflight`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from vmferry.core.disk_reports import LocalDisk, RoomReport, Since
from vmferry.core.preflight import Objection, Weight
from vmferry.errors import Side, UsageError
from vmferry.units import format_size

ALL = "*"
"""In place of an id: every local disk that the guest can write to."""
WAYS = ("copy", "shared")
FORMATS = ("raw", "qcow2")
SINCE, TRIED = "vmferry-since", "vmferry-tried"
METADATA_SHARE = 64
"""An image's own tables take less than one part in so many of what it holds."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One disk of the guest as its definition has it."""

    id: str
    path: str
    readonly: bool
    shared: bool


def ids(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(id, path) in the order of the guest's definition: `disk0` is the first."""
    return ((f"disk{n}", path) for n, path in enumerate(paths))


def parse(disks: str | None, each: Iterable[str]) -> dict[str, str]:
    """`--disks` and every `--disk ID=WAY` -> what is wanted by id. Raises UsageError."""
    wanted: dict[str, str] = {} if disks is None else {ALL: disks}
    for text in each:
        name, _, way = text.partition("=")
        wanted[name] = way
    for name, way in wanted.items():
        if way not in WAYS:
            said = f"{name}={way}" if name != ALL else way
            raise UsageError(f"{said!r} says nothing about a disk; say {' or '.join(WAYS)}")
    return wanted


def choose(disks: Collection[Choice], wanted: Mapping[str, str]) -> tuple[Choice, ...]:
    """The disks that are to be copied. Raises UsageError for an id that the guest does not have, and for a disk that
    cannot be copied."""
    known = {disk.id: disk for disk in disks}
    strange = sorted(set(wanted) - set(known) - {ALL})
    if strange:
        raise UsageError(f"the guest has no disk {strange[0]}; it has {', '.join(known) or 'none'}")
    chosen: list[Choice] = []
    for disk in disks:
        way = wanted.get(disk.id)
        if way == "copy" and disk.readonly:
            raise UsageError(
                f"{disk.id} ({disk.path}) is read-only, and such a disk is not copied",
                hint="put it under the same path on the destination",
            )
        is_local = wanted.get(ALL) == "copy" and not disk.readonly and not disk.shared
        if way == "copy" or (way is None and is_local):
            chosen.append(disk)
    return tuple(chosen)


def since_name(job: str, host: str) -> str:
    """QEMU's name for the dirty bitmap that counts what is written from then on. It says itself what it means: the
    QEMU has it as long as it counts, and nothing else has to be remembered."""
    return f"{SINCE}:{job}:{host}"


def tried_name(job: str, host: str) -> str:
    """The same for a disk that is about to be copied to that host: should that fail once the copy is whole, the next
    try sends what was written from here on."""
    return f"{TRIED}:{job}:{host}"


def parse_since(name: str, changed_bytes: int) -> Since | None:
    """What such a name says; None for another bitmap."""
    word, _, rest = name.partition(":")
    job, _, host = rest.partition(":")
    if word not in (SINCE, TRIED) or not (job and host):
        return None
    return Since(name, job, host, word == SINCE, changed_bytes)


def since_for(found: Iterable[Since], host: str) -> Since | None:
    """What counts for a move to that host: a try is newer than the guest's arrival from there."""
    return min((each for each in found if each.host == host), key=lambda each: each.is_origin, default=None)


def is_left(disk: LocalDisk, room: RoomReport | None) -> bool:
    """The host has what the disk was when the guest came from there: what changed since has to go back, no more."""
    return disk.since is not None and room is not None and room.left_bytes == disk.virtual_bytes


def room_bytes(disk: LocalDisk) -> int:
    """What the copy may take on the destination's disk at first: what is allocated, and its tables. Bytes."""
    return disk.allocated_bytes + disk.virtual_bytes // (METADATA_SHARE * 1024) + (1 << 20)


def objections(
    source: str,
    destination: str,
    disks: Collection[LocalDisk],
    rooms: Mapping[str, RoomReport],
    *,
    from_spec: bool,
    verify: bool = False,
    only_changes: bool = False,
    takes_bitmaps: bool = False,
) -> tuple[Objection, ...]:
    """Everything that speaks against copying these disks. `from_spec`: vmferry started the guest from a spec.
    `only_changes`: a disk of which all would have to go is not wanted there. `takes_bitmaps`: QEMU's capability
    dirty-bitmaps is asked for: it has every bitmap busy while memory moves, so that no round could begin."""
    found: list[Objection] = []
    if takes_bitmaps:
        found.append(
            _objection(
                "disk-copy-bitmaps",
                "client",
                "disks that are copied go by their dirty bitmaps, which the option dirty-bitmaps keeps busy",
                "leave out dirty-bitmaps, or put the disks on storage that both hosts share",
            )
        )
    if not from_spec:
        found.append(
            _objection(
                "disk-copy-adopted",
                "source",
                "the guest was started by somebody else, and only disks of guests from a vmferry spec are copied",
                "put its disks on storage that both hosts share",
            )
        )
    for disk in disks:
        if verify and disk.format != "raw":
            message = f"{disk.id} ({disk.path}) is {disk.format}, and only raw images can be verified"
            found.append(_objection("disk-verify-format", "client", message, "leave out --verify-disks"))
        found += (_objection(*words) for words in _at_source(source, disk))
        room = rooms.get(disk.path)
        if only_changes and room is not None and not is_left(disk, room):
            found.append(
                _objection(
                    "disk-not-left",
                    "destination",
                    f"{destination} does not have {disk.id} ({disk.path}) as the guest left it there, or it was "
                    "touched since: all of it would have to go",
                    f"vmferry migrate NAME {destination} --disks copy",
                )
            )
            continue
        found += (_objection(*words) for words in _at_destination(destination, disk, room))
    found += (_objection(*words) for words in _together(destination, disks, rooms))
    return tuple(found)


_Words = tuple[str, Side, str, str]


def _objection(code: str, side: Side, message: str, fix: str) -> Objection:
    return Objection(code, side, message, fix, Weight.BLOCKER)


def _at_source(host: str, disk: LocalDisk) -> Iterator[_Words]:
    name = f"{disk.id} ({disk.path})"
    if disk.backing:
        yield (
            "disk-copy-backing", "source",
            f"{name} stands on another image ({disk.backing}), and only whole images are copied",
            "make one of both: block-stream in the running QEMU, or qemu-img rebase -b ''",
        )  # fmt: skip
    if disk.format not in FORMATS:
        yield (
            "disk-copy-format", "source",
            f"{name} has the format {disk.format}; {' and '.join(FORMATS)} can be copied",
            "convert it, or put it on storage that both hosts share",
        )  # fmt: skip
    for what in disk.extras:
        yield (
            "disk-copy-extra", "source", f"{name} has {what}, which a copy would not have",
            "take it away, or put the disk on storage that both hosts share",
        )  # fmt: skip
    if disk.is_device:
        yield (
            "disk-copy-device", "source",
            f"{name} is a device of {host}; only images in files are copied",
            "put the disk on storage that both hosts share",
        )  # fmt: skip


def _at_destination(host: str, disk: LocalDisk, room: RoomReport | None) -> Iterator[_Words]:
    name = f"{disk.id} ({disk.path})"
    if room is None:
        yield (
            "disk-copy-unreported", "destination", f"{host} did not say whether it has room for {name}",
            "upgrade its agent, or check its log and ask again",
        )  # fmt: skip
        return
    if room.exists and not is_left(disk, room):
        yield (
            "disk-copy-exists", "destination",
            f"{host} has a file {room.path} already, which vmferry did not make for this and does not overwrite",
            "move it out of the way there, or give that agent another disk_dir",
        )  # fmt: skip
    if not room.folder_writable:
        yield (
            "disk-copy-folder", "destination", f"{host} cannot make files in {room.folder} for the copy of {name}",
            "make that folder there, or give that agent a disk_dir",
        )  # fmt: skip
    if disk.format != "raw" and not room.has_tool and not is_left(disk, room):
        yield (
            "disk-copy-tool", "destination", f"{host} has no qemu-img to make {disk.format} images with",
            "install it there (the package is called qemu-utils)",
        )  # fmt: skip


def _together(host: str, disks: Collection[LocalDisk], rooms: Mapping[str, RoomReport]) -> Iterator[_Words]:
    """Disks that would stand in each other's way, and what they need on each file system."""
    needed: dict[str, int] = {}
    free: dict[str, int] = {}
    places: dict[str, str] = {}
    for disk in disks:
        room = rooms.get(disk.path)
        if room is None:
            continue
        if room.path in places:
            yield (
                "disk-copy-name", "destination", f"{places[room.path]} and {disk.id} would both be {room.path}",
                "give that agent no disk_dir, or rename one of the images",
            )  # fmt: skip
        places[room.path] = disk.id
        if room.free_bytes is not None:
            size = disk.since.changed_bytes if disk.since is not None and is_left(disk, room) else room_bytes(disk)
            needed[room.filesystem] = needed.get(room.filesystem, 0) + size
            free[room.filesystem] = room.free_bytes
    for filesystem, size in needed.items():
        if size > free[filesystem]:
            yield (
                "disk-copy-room", "destination",
                f"the disks need {format_size(size)} on {host} and {format_size(free[filesystem])} are free there",
                "make room there, or give that agent another disk_dir",
            )  # fmt: skip


def remarks(
    disks: Collection[LocalDisk], rooms: Mapping[str, RoomReport], *, clear_text: bool = False
) -> tuple[Objection, ...]:
    """What is copied, how large, and where to: for the person who asks for the plan."""
    copied = tuple(
        Objection(
            "disk-copy",
            "both",
            f"{disk.id} ({disk.path}, {disk.format}, {format_size(disk.virtual_bytes)}, of which "
            f"{_sent(disk, rooms[disk.path])} to {rooms[disk.path].path}",
            "nothing to do",
            Weight.NOTE,
        )
        for disk in disks
        if disk.path in rooms
    )
    if not (clear_text and copied):
        return copied
    message = (
        "the disks go over the network in clear text, as it was asked for by name: who reads there has them, and who "
        "reaches the destination's port before the source does may write to the copies"
    )
    fix = "leave out --clear-text; agents that speak in clear text themselves need certificates first"
    return (*copied, Objection("disk-copy-clear-text", "both", message, fix, Weight.WARNING))


def _sent(disk: LocalDisk, room: RoomReport) -> str:
    if disk.since is not None and is_left(disk, room):
        return f"{format_size(disk.since.changed_bytes)} changed since both sides were equal) is sent"
    return f"{format_size(disk.allocated_bytes)} are in use) is copied"
