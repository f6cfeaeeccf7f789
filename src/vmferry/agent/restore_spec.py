"""A snapshot that was imported, restored with a spec: what of its guest a person has to say.

Theory of operation
-------------------
A stream file has a guest's memory, the state of its devices, and the name of its machine type; not what the machine is
made of, nor which disks it had. A person says that with a spec, as for `run`. What the stream says itself counts: the
machine type. What QEMU compares itself (memory blocks, devices) is left to it and to the restore, which starts nothing
on a guest that does not fit.

Of the spec's disks nobody knows whether they are what they were when the guest was saved: memory on another disk
damages what is on it, so a person has to take that upon themselves (`--accept`). Nothing is written to them in any
case: the guest gets overlays, as in every restore. A kernel, an initrd and a firmware are no such disks: a guest that
runs has read them.

Rule 1: nothing is made here, and nothing is changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmferry.agent import image_chain, vm_commands
from vmferry.agent.vms import VmDefinition
from vmferry.errors import PlanRefused, SpecError, UsageError
from vmferry.vm import spec as vm_spec

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.restore_definition import GuestIdentity
    from vmferry.engine.frozen import FrozenDisk, SnapshotWords

_ALIASES = ("q35", "pc")


@dataclass(frozen=True, slots=True)
class Given:
    """What a spec says of an imported guest."""

    definition: VmDefinition
    disks: tuple[FrozenDisk, ...] = ()
    """All that its QEMU would open, as it is now."""
    doubts: tuple[str, ...] = ()
    """A sentence for each disk of which nobody knows whether it is what it was."""


def wish_of(path: str, wire: dict[str, Any] | None) -> dict[str, Any] | None:
    """The spec that is meant, in wire form: from a file of this host, or as another agent sent it; None: there is none.
    Reads the file. Raises SpecError, UsageError."""
    if path and wire is not None:
        raise UsageError("a spec is given as a file or as a table, and not as both")
    return vm_spec.to_wire(vm_spec.load(path)) if path else wire


def require_fit(name: str, words: SnapshotWords, wire: dict[str, Any] | None) -> None:
    """Raises PlanRefused unless exactly one of both says what the guest is made of: the snapshot or the spec. Pure."""
    if words.definition is None and wire is None:
        raise PlanRefused(
            f"the snapshot {name} was imported, and nobody knows what its machine is made of",
            side="client",
            hint="say it with --spec FILE: a spec as 'vmferry run' takes it",
        )
    if words.definition is not None and wire is not None:
        raise PlanRefused(
            f"the snapshot {name} says itself what its guest is made of, and takes no spec",
            side="client",
            hint="leave out --spec; the guest's new name is said with --as",
        )


async def given(agent: Agent, wire: dict[str, Any], words: SnapshotWords) -> Given:
    """The definition that a spec and the stream make together. Raises SpecError, PlanRefused, QemuError."""
    spec = _with_machine(vm_spec.from_wire(wire, source="the spec"), words.machine)
    accel = await vm_commands.accel_for(agent, spec.accel, await agent.planner.qemu_facts())
    definition = vm_commands.definition_of(vm_spec.pin(spec, machine=spec.machine, accel=accel))
    disks = await asyncio.to_thread(_as_they_are, definition)
    doubts = (
        f"{disk.path} is the spec's, and as the snapshot was imported nobody can say whether it was written to since "
        "the guest was saved"
        for disk in spec.disk
    )
    return Given(definition, disks, tuple(dict.fromkeys(doubts)))


def _with_machine(spec: vm_spec.VmSpec, machine: str) -> vm_spec.VmSpec:
    """The spec with the machine type of the stream. Raises PlanRefused if it names another one. Pure."""
    try:
        found = vm_spec.from_wire({**vm_spec.to_wire(spec), "machine": machine}, source="the stream's machine type")
    except SpecError as error:
        raise PlanRefused(
            f"no spec can describe a guest of the machine type {machine}: {error}", side="client"
        ) from error
    named = found.machine_family if spec.machine in _ALIASES else machine
    if spec.machine != named:
        raise PlanRefused(
            f"the spec's machine type is {spec.machine}, and the snapshot is of a guest of {machine}",
            side="client",
            hint=f'write machine = "{machine}" into the spec, if the rest of it is that guest\'s',
        )
    return found


def _as_they_are(definition: VmDefinition) -> tuple[FrozenDisk, ...]:
    """Each image, as a snapshot would describe it that was made now. One that is missing is told as such later."""
    from vmferry.engine.frozen import FrozenDisk

    found = []
    for disk in definition.disks:
        try:
            seen = image_chain.look(disk.path)
        except OSError:
            seen = image_chain.Look(0, 0, is_file=True)
        found.append(
            FrozenDisk(
                path=disk.path,
                format=disk.format,
                way="read-only" if disk.readonly else "external-snapshot",
                size_bytes=seen.size_bytes,
                mtime_ns=seen.mtime_ns,
            )
        )
    return tuple(found)


def written_by(disks: Sequence[FrozenDisk], others: Iterable[GuestIdentity]) -> tuple[str, ...]:
    """Which VMs may write to a disk while the restored guest reads it, a sentence each. Pure."""
    return tuple(
        f"{other.vm} on {other.host} may write to {disk.path}, which the restored guest would read"
        for other in others
        for disk in disks
        if disk.path in other.writable
    )
