"""What hosts and QEMUs say about disks: values that reports are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskReport:
    """One image as one host sees it. `identity`: equal on two hosts if and only if it is the same image."""

    exists: bool
    writable: bool | None = None
    size_bytes: int | None = None
    format: str | None = None
    identity: str | None = None
    write_locked: bool | None = None  # seen there while the guest runs here: the hosts see each other's locks


@dataclass(frozen=True, slots=True)
class DiskUse:
    """One image of the guest."""

    path: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Since:
    """From here on a guest's QEMU has counted what is written to a disk, and the other host's image has all else."""

    name: str
    """QEMU's bitmap."""
    job: str
    """With which the guest came, or a copy of the disk was tried."""
    host: str
    """Where it came from, or where the copy is."""
    is_origin: bool
    """The guest came from there with it."""
    changed_bytes: int = 0
    """Until now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDisk:
    """One disk that is to be copied, as the QEMU that has it tells it."""

    id: str
    """`disk0` and so on, in the order of the guest's definition."""
    path: str
    node: str
    """QEMU's name of the block node that the guest's device uses."""
    format: str
    virtual_bytes: int
    allocated_bytes: int
    cluster_bytes: int | None = None
    """qcow2: the size of its clusters."""
    compat: str = ""
    """qcow2: its version ('0.10' or '1.1')."""
    extended_l2: bool = False
    backing: str = ""
    extras: tuple[str, ...] = ()
    """In words: what it has that a copy of its content would not have."""
    is_device: bool = False
    since: Since | None = None
    """None: nobody knows what was written to it since when."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomReport:
    """Where a host would put the copy of a disk, and what is there now."""

    path: str
    folder: str
    exists: bool
    folder_writable: bool
    free_bytes: int | None = None
    filesystem: str = ""
    """Equal for places that share their free bytes."""
    has_tool: bool = True
    """There is a qemu-img for images that are more than their bytes."""
    left_bytes: int | None = None
    """The file is what the disk was at the moment that was asked about, and nobody has touched it; what the guest saw
    of it then, in bytes. None: it is not."""
