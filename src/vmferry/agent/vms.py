"""The VMs that this host keeps: what each is made of, where its QEMU is, which generation it holds.

`VmDefinition` is what another host needs to build the same guest; it travels as plain JSON values and stands in
the journal's KEPT entry. `KeptVm` adds what belongs to this host alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vmferry.agent.machine import Machine
from vmferry.errors import QemuError, SpecError
from vmferry.vm import adopt as vm_adopt
from vmferry.vm import argv as vm_argv
from vmferry.vm import spec as vm_spec
from vmferry.vm.adopt import AdoptedVm
from vmferry.vm.runtime import RuntimePaths
from vmferry.vm.spawn import ProcessIdentity


@dataclass(frozen=True, slots=True)
class DiskRef:
    """One disk as a plan looks at it."""

    path: str
    readonly: bool = False
    shared: bool = True
    format: str = "raw"


@dataclass(frozen=True, slots=True)
class VmDefinition:
    """What the guest is made of, the same on every host."""

    name: str
    machine: str
    """The versioned machine type."""
    accel: Literal["tcg", "kvm"]
    cpu: str
    memory_bytes: int
    disks: tuple[DiskRef, ...] = ()
    spec: dict[str, Any] | None = None
    """The pinned spec in wire form, for a VM that vmferry started."""
    adopted: dict[str, Any] | None = None
    """For a VM that somebody else started: its command line as /proc shows it, and what its paths are."""
    has_vfio: bool = False

    def writable_paths(self) -> tuple[str, ...]:
        """The images that the guest may change."""
        return tuple(disk.path for disk in self.disks if not disk.readonly)

    def moved(self, paths: Mapping[str, str]) -> VmDefinition:
        """The same with images under other paths: what they are there. Raises SpecError for a VM that somebody else
        started, whose command line is taken as it is."""
        if all(path == there for path, there in paths.items()):
            return self
        if self.spec is None:
            raise SpecError(f"{self.name} was not started from a spec: its disks keep their paths")
        spec = {**self.spec, "disk": [{**d, "path": paths.get(d["path"], d["path"])} for d in self.spec["disk"]]}
        disks = tuple(dataclasses.replace(d, path=paths.get(d.path, d.path)) for d in self.disks)
        return dataclasses.replace(self, spec=spec, disks=disks)

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> VmDefinition:
        """What `to_wire` gave. Raises SpecError if a field is missing or unknown."""
        try:
            disks = tuple(DiskRef(**disk) for disk in wire.get("disks", ()))
            return cls(**{**wire, "disks": disks})
        except TypeError as error:
            raise SpecError(f"a VM definition from another host cannot be read: {error}") from error

    def incoming_argv(self, runtime: RuntimePaths, qemu: str) -> list[str]:
        """The command line of a QEMU that waits, paused, for this guest. Raises SpecError."""
        if self.spec is not None:
            return vm_argv.build_argv(
                vm_spec.from_wire(self.spec),
                qemu=qemu,
                machine=self.machine,
                accel=self.accel,
                runtime=runtime,
                incoming=True,
            )
        assert self.adopted is not None, "a definition has a spec or a command line"
        rewritten = vm_adopt.destination_argv(
            adopted_from_wire(self.adopted),
            qemu=qemu,
            machine=self.machine,
            runtime=runtime,
            kinds=self.adopted["kinds"],
        )
        return list(rewritten.argv)


def adopted_to_wire(vm: AdoptedVm, kinds: dict[str, Any]) -> dict[str, Any]:
    """The command line of an adopted QEMU as plain values."""
    return {
        "identity": dataclasses.asdict(vm.identity),
        "qemu_binary": vm.qemu_binary,
        "launcher": list(vm.launcher),
        "args": list(vm.args),
        "cwd": vm.cwd,
        "machine_option": vm.machine_option,
        "kinds": kinds,
    }


def adopted_from_wire(wire: dict[str, Any]) -> AdoptedVm:
    """What `adopted_to_wire` gave."""
    return AdoptedVm(
        ProcessIdentity(**wire["identity"]),
        wire["qemu_binary"],
        tuple(wire["launcher"]),
        tuple(wire["args"]),
        wire["cwd"],
        wire["machine_option"],
    )


@dataclass(slots=True)
class KeptVm:
    """A VM that this host keeps. Owned by the agent; lives on its loop."""

    definition: VmDefinition
    generation: int
    identity: ProcessIdentity
    qmp_path: str
    directory: str
    """The runtime directory of its QEMU; for an adopted VM the directory of its QMP socket is not ours, so
    this one is empty until it moves."""
    machine: Machine | None = None
    is_leaving: bool = False
    """Its QEMU is being retired because the guest runs elsewhere."""
    run_state: str = "unknown"
    blockers: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.definition.name

    def require_machine(self) -> Machine:
        """The machine. Raises QemuError when the QEMU is gone."""
        if self.machine is None or self.machine.is_gone:
            raise QemuError(f"the QEMU of {self.name} is gone", guest="lost", retry="no")
        return self.machine

    def to_journal(self) -> dict[str, Any]:
        """The body of the KEPT entry."""
        return {
            "definition": self.definition.to_wire(),
            "generation": self.generation,
            "identity": dataclasses.asdict(self.identity),
            "qmp_path": self.qmp_path,
            "directory": self.directory,
        }

    @classmethod
    def from_journal(cls, body: dict[str, Any]) -> KeptVm:
        """What `to_journal` gave; without a machine until the agent attaches."""
        return cls(
            definition=VmDefinition.from_wire(body["definition"]),
            generation=int(body["generation"]),
            identity=ProcessIdentity(**body["identity"]),
            qmp_path=str(body["qmp_path"]),
            directory=str(body["directory"]),
        )
