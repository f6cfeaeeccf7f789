"""The definition that a snapshot brings along: read as what a stranger may have written.

Theory of operation
-------------------
Without a key nothing in a repository proves who wrote it, and a definition becomes the command line of a QEMU that runs
with this agent's rights. So of a definition is taken only what a spec can say, and everything of it from one list: the
disks that QEMU opens are the disks that are checked, put under overlays, and compared with other VMs.

What a spec cannot bound (`powers`: extra arguments, the command line of a QEMU that somebody else started) may run any
program. It is restored only where somebody vouched for it: this host's journal has it of a VM that it kept, or the
repository is sealed with a key, or a person says so by name, having been shown it.

Rule 1: whatever is wrong with a definition is an error of ours, never a KeyError.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry.agent.vm_commands import definition_of
from vmferry.agent.vms import VmDefinition, adopted_from_wire
from vmferry.errors import PlanRefused, RepositoryError, VmferryError
from vmferry.jobs.journal import Entry, Written
from vmferry.vm import spec as vm_spec

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.engine.frozen import FrozenDisk


def read_definition(wire: Any, disks: Sequence[FrozenDisk]) -> VmDefinition:
    """The definition of a manifest, whose disks are the spec's and those that the snapshot describes.

    Raises RepositoryError: it is malformed, or contradicts itself."""
    try:
        found = _converted(wire)
    except (VmferryError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise RepositoryError(f"the snapshot's definition cannot be read: {error}", retry="no", cause=error) from error
    described = {disk.path for disk in disks}
    lacking = sorted(disk.path for disk in found.disks if disk.readonly and disk.path not in described)
    if lacking:
        raise _contradiction(f"nothing is known of {', '.join(lacking)}, which QEMU would read")
    return found


def _converted(wire: Any) -> VmDefinition:
    VmDefinition.from_wire(wire)  # names of fields, in words
    found = msgspec.convert(wire, VmDefinition)  # and types
    if (found.spec is None) == (found.adopted is None):
        raise _contradiction("it has to have a spec or a command line, and not both")
    if found.adopted is not None:
        kinds = found.adopted.get("kinds")
        vm = adopted_from_wire(found.adopted)
        words = (vm.qemu_binary, vm.cwd, *vm.launcher, *vm.args)
        if not isinstance(kinds, dict) or not all(isinstance(word, str) for word in words):
            raise _contradiction("its command line is none")
        return found
    assert found.spec is not None
    spec = vm_spec.from_wire(found.spec, source="the snapshot's definition")
    derived = definition_of(spec)
    if _paths(derived) != _paths(found):
        raise _contradiction("the disks that QEMU would open are not those that it lists")
    named = (found.name, found.machine, found.accel, found.cpu, found.memory_bytes)
    if named != (derived.name, derived.machine, derived.accel, derived.cpu, derived.memory_bytes):
        raise _contradiction("its machine is not that of its spec")
    return dataclasses.replace(found, disks=derived.disks)


def _paths(definition: VmDefinition) -> list[tuple[str, bool, str]]:
    return sorted((disk.path, disk.readonly, disk.format) for disk in definition.disks)


def _contradiction(what: str) -> RepositoryError:
    return RepositoryError(f"the snapshot's definition contradicts itself: {what}", retry="no")


def powers(definition: VmDefinition) -> tuple[str, ...]:
    """The arguments of QEMU in it that could run anything; empty: a spec bounds all of it."""
    if definition.adopted is not None:
        vm = adopted_from_wire(definition.adopted)
        return (vm.qemu_binary, *vm.launcher, *vm.args)
    return tuple(str(arg) for arg in (definition.spec or {}).get("extra_args", ()))


async def require_trust(agent: Agent, definition: VmDefinition, *, is_said: bool) -> None:
    """Raises PlanRefused, showing what would be run, unless somebody vouched for it."""
    asked = powers(definition)
    if not asked or is_said or agent.config.repository_key is not None:
        return
    written = await asyncio.to_thread(agent.journal.read)
    if asked in known_powers(written) or any(asked == powers(kept.definition) for kept in agent.vms.values()):
        return
    raise PlanRefused(
        f"the snapshot's definition of {definition.name} has arguments of QEMU that {agent.config.name} does not know: "
        f"{shlex.join(asked)}",
        hint="whoever can write to the repository can write them; if they are yours say --trust-definition",
        side="client",
    )


def known_powers(written: Iterable[Written]) -> set[tuple[str, ...]]:
    """Of the VMs that this host keeps or kept, and of what a person restored here."""
    found = set()
    for entry in written:
        if entry.kind in (Entry.KEPT, Entry.RESTORE_WANTED) and isinstance(entry.body.get("definition"), dict):
            found.add(powers(VmDefinition.from_wire(entry.body["definition"])))
    return found
