"""What was asked for and agreed: the bodies of the journal's WANTED, PLACE_WANTED and RECOVERY_WAY. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vmferry.core.policy import FailurePolicy


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for: the body of the journal's WANTED entry."""

    job: str
    vm: str
    destination: str
    generation: int
    """The destination's generation: one more than the guest has now."""
    mode: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    multifd_channels: int = 0
    clear_text: bool = False
    postcopy: dict[str, Any] = field(default_factory=dict)
    wanted_s: float = 0.0
    running_before: bool = True
    accept: tuple[str, ...] = ()
    """Codes of blockers that the person takes upon themselves."""
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    disks: dict[str, str] = field(default_factory=dict)
    """What goes how: a disk's id, or '*' for all that are local, to 'copy' or 'shared'."""
    verify_disks: bool = False
    """Both sides' disks are read and compared while the guest is paused for the switchover."""
    only_changes: bool = False
    """A disk of which more than what changed would have to go keeps the guest here."""
    keep_images_s: float | None = None
    """How long the images that the guest leaves here are kept while it runs there; None: nothing takes them away."""
    auto_finalize: bool = True
    """False: the switchover waits until a person gives leave."""
    auto_dismiss: bool = True
    """False: the ended job is listed, with its result, until somebody dismisses it."""


@dataclass(frozen=True, slots=True)
class PlacedDisk:
    """A disk that is copied to the place: an image to be made there, and filled over the network."""

    id: str
    path: str
    format: str
    size_bytes: int
    options: tuple[str, ...] = ()
    """For qemu-img create: 'cluster_size=65536' and so on."""
    left_by: str = ""
    """The job with which the guest went and left this image here: what changed since is written into it. Empty: an
    image is made."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """One disk's mirror, as the source's agent asked its QEMU for it: the journal's MIRRORS entry."""

    id: str
    """The disk's id."""
    path: str
    node: str
    """What is copied."""
    job: str
    """QEMU's job."""
    target: str
    """QEMU's node for the destination's export."""
    number: int
    """1 for the first disk: its round in the fact log."""
    size_bytes: int = 0
    """What the guest sees of it."""
    since: str = ""
    """QEMU's bitmap that has whatever differs from the image there; empty: all of the disk is copied."""
    format: str = ""


@dataclass(frozen=True, slots=True)
class RecoveryWay:
    """How the source's agent reaches a place without the agents' link: the body of the journal's RECOVERY_WAY entry.
    See `knock`."""

    token: str = field(repr=False)
    """Hexadecimal."""
    hosts: tuple[str, ...]
    """The destination's addresses for guests' memory, best first."""
    ports: tuple[int, ...]
    """In the order in which both sides try them."""


@dataclass(frozen=True, slots=True)
class Place:
    """What was asked for: the body of the journal's PLACE_WANTED entry."""

    job: str
    vm: str
    source: str
    generation: int
    definition: dict[str, Any]
    run_after: bool = True
    commands: tuple[tuple[str, dict[str, Any]], ...] = ()
    """The QMP commands that set every option, in order."""
    expected: dict[str, Any] = field(default_factory=dict)
    """What must be read back after them."""
    multifd: bool = False
    clear_text: bool = False
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    auto_dismiss: bool = True
    blockers: tuple[dict[str, Any], ...] = ()
    """What people hold on the VM: it goes along."""
    recovery_token: str = field(default="", repr=False)
    """Hexadecimal; who shows it may connect the two QEMUs again without the agents' link. Empty: nobody may."""
    disks: tuple[PlacedDisk, ...] = ()
    directory: str = ""
    """The QEMU's runtime directory on this host."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """A writable disk of a guest that is saved: its image stays as it is, and the guest goes on in a new file."""

    node: str
    """QEMU's node of the image."""
    path: str
    format: str
    overlay: str
    """The new file, a qcow2 image on top of the other one."""
    overlay_node: str


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """A writable disk of a guest that is saved: QEMU copies it into a new file, and the guest stays where it is."""

    node: str
    """QEMU's node of the disk."""
    path: str
    stored: str
    """The new file, a qcow2 image with nothing under it."""
    job: str
    """QEMU's job, and below its node of the new file, and the one that it puts above the disk meanwhile."""
    target: str
    filter: str


@dataclass(frozen=True, slots=True)
class SaveWanted:
    """What was asked for: the body of the journal's SAVE_WANTED entry."""

    job: str
    vm: str
    name: str
    """The snapshot's."""
    way: str = "auto"
    """'precopy', 'background', or 'auto'."""
    pause: bool = False
    """The guest stands until its snapshot is committed."""
    running_before: bool = True
    overlays: tuple[Overlay, ...] = ()
    copies: tuple[StoredCopy, ...] = ()
    repository: str = ""
    """Where the snapshot is to be."""
    definition: dict[str, Any] = field(default_factory=dict)
    """What the guest is made of at that instant: before it goes on in new files."""
    generation: int = 0
    """The guest's, on this host."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Its QEMU's process (`ProcessIdentity`): no other one is acted on for this save."""
    auto_finalize: bool = True
    auto_dismiss: bool = True

    @property
    def keeps_disks(self) -> bool:
        """Whether disks have to be kept in the pause before the switchover."""
        return bool(self.overlays or self.copies)


@dataclass(frozen=True, slots=True)
class ChoreWanted:
    """A job about the repository that was asked for: the body of the journal's CHORE_WANTED entry."""

    job: str
    kind: str
    """`core.job.CHORES`, by name."""
    name: str = ""
    """The snapshot's, as a person said it; '': all, or none in particular."""
    file: str = ""
    """The stream file of an export or import."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of a prune, or a verify."""
    auto_finalize: bool = True
    """False: a plan is shown, and waits for leave."""
    auto_dismiss: bool = True
