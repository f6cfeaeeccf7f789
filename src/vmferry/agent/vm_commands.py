"""Commands about VMs that are not migrations: run, adopt, list, status, stop, doctor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmferry import __version__
from vmferry.agent import disk_bases
from vmferry.agent.claims import HINT
from vmferry.agent.directories import remove_directory
from vmferry.agent.machine import Machine
from vmferry.agent.peers import PROTOCOL
from vmferry.agent.vms import DiskRef, KeptVm, VmDefinition, adopted_to_wire
from vmferry.core.blockers import Operation
from vmferry.errors import Busy, QemuError, SpecError, UsageError, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.qmp.errors import QmpCommandError
from vmferry.vm import adopt as vm_adopt
from vmferry.vm import argv as vm_argv
from vmferry.vm import probe, probe_host, probe_qemu
from vmferry.vm import spec as vm_spec
from vmferry.vm.runtime import RuntimePaths

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")

RUN_WAY_OUT = 'to go on from where it was, write path = {} and format = "qcow2" for that disk into the spec'
ADOPT_WAY_OUT = "end that QEMU before it writes more, and start the guest on {}"
LIST_S = 3.0
STOP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunArguments:
    """`vm-run`: the path of a spec on this host."""

    path: str
    accept: list[str] = field(default_factory=list)
    """'base-image': it may write to an image on which others lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptArguments:
    """`vm-adopt`: the QMP socket of a QEMU on this host that somebody else started."""

    vm: str
    qmp: str
    shared: bool = True
    """Whether its disks are on storage that every host sees under the same paths."""
    accept: list[str] = field(default_factory=list)
    """'base-image': it writes to an image on which others lie, and that is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopArguments:
    """`vm-stop`: asks the guest to power down, or ends its QEMU at once."""

    vm: str
    force: bool = False
    remove_disks: bool = False
    """The disks that its restore made go with it; those that somebody else needs stay, and are told."""


async def free_name(agent: Agent, name: str) -> None:
    """Raises Busy unless nobody has or awaits a VM of this name. Whoever asks holds the name's claim."""
    current = agent.attempts.get(name)
    if current is not None and not current.ended.is_set():
        raise Busy(f"{name} has a migration to {current.wanted.destination} that is not settled", side="client")
    if agent.restores.active(name) is not None:
        raise Busy(f"{name} is being restored on {agent.config.name}", side="client", hint=HINT)
    kept = agent.vms.get(name)
    if kept is not None and (kept.machine is None or kept.machine.is_gone):
        await forget(agent, kept)  # it powered off or died; its name is free again
    place = agent.place_of(name)
    if name in agent.vms or (place is not None and not place.ended.is_set()):
        raise _taken(agent.config.name, name)
    for host, answer in await _elsewhere(agent, name):
        if answer.get("has") or answer.get("awaits"):
            raise _taken(host, name)
        if answer.get("doing"):
            raise Busy(f"on {host}, {name} is being {answer['doing']} at this very moment", side="client", hint=HINT)


def _taken(host: str, name: str) -> Busy:
    hint = f"take another name; 'vmferry status {name}' shows who has this one"
    return Busy(f"{host} has a VM named {name} already", side="client", retry="after-fix", hint=hint)


async def run_vm(agent: Agent, arguments: RunArguments) -> dict[str, Any]:
    """Starts a VM from a spec. Raises SpecError (malformed, or QEMU refuses it), Busy, PlanRefused (others lie on an
    image that it would write to); nothing is left then."""
    spec = vm_spec.load(arguments.path)
    with agent.claims.hold(spec.name, "started"):
        kept = agent.vms.get(spec.name)
        if kept is None or kept.machine is None or kept.machine.is_gone:  # else its name is taken, and that is said
            paths = [disk.path for disk in spec.disk if not disk.is_readonly]
            await disk_bases.require_none(agent, spec.name, paths, arguments.accept, way_out=RUN_WAY_OUT)
        await _run(agent, spec)
    return await vm_status(agent, spec.name)


async def _run(agent: Agent, spec: vm_spec.VmSpec) -> None:
    await free_name(agent, spec.name)
    facts = await agent.planner.qemu_facts()
    machine_type = facts.concrete_machine(spec.machine)
    if machine_type is None:
        raise SpecError(f"{spec.name}: this host's QEMU has no machine type {spec.machine}")
    accel = await accel_for(agent, spec.accel, facts)
    pinned = vm_spec.pin(spec, machine=machine_type, accel=accel)
    runtime = RuntimePaths(str(agent.vm_directory / f"{spec.name}-{uuid.uuid4().hex[:8]}"))
    argv = vm_argv.build_argv(
        pinned, qemu=agent.config.qemu, machine=machine_type, accel=accel, runtime=runtime, incoming=False
    )
    machine = await agent.launch(spec.name, argv, runtime)
    kept = KeptVm(
        definition=definition_of(pinned),
        generation=1,
        identity=machine.identity,
        qmp_path=machine.qmp_path,
        directory=runtime.directory,
        machine=machine,
    )
    try:
        await agent.journal.append(Entry.KEPT, spec.name, kept.to_journal())
        await machine.execute("cont", deadline_s=STOP_S)
    except BaseException as error:
        # It never ran an instruction: nothing is lost with it.
        await machine.kill()
        await agent.journal.append(Entry.FORGOTTEN, spec.name)
        await machine.close()
        remove_directory(Path(runtime.directory), keep_logs=False)
        if isinstance(error, QmpCommandError):
            raise SpecError(f"{spec.name}: QEMU cannot start it: {error.desc}", cause=error) from error
        raise
    agent.vms[spec.name] = kept
    agent.hold(kept)
    await agent.monitors.settle()


async def accel_for(
    agent: Agent, wished: Literal["auto", "tcg", "kvm"], facts: probe_qemu.QemuFacts
) -> Literal["tcg", "kvm"]:
    """What a spec's accelerator is on this host. Raises SpecError for one that its QEMU does not offer."""
    if wished == "tcg":
        return "tcg"
    if wished == "kvm":
        if "kvm" not in facts.accelerators():
            raise SpecError("the spec wants KVM, and this host's QEMU does not offer it")
        return "kvm"
    return "kvm" if await agent.planner.best_accel() == "kvm" else "tcg"


def definition_of(spec: vm_spec.VmSpec) -> VmDefinition:
    """A pinned spec as a definition."""
    assert spec.accel != "auto", "a definition is pinned"
    files = [spec.kernel.image, spec.kernel.initrd] if spec.kernel else []
    disks = [DiskRef(d.path, d.is_readonly, d.shared, d.format) for d in spec.disk]
    disks += [DiskRef(path, True, True, "file") for path in (*files, spec.firmware) if path]
    return VmDefinition(
        name=spec.name,
        machine=spec.machine,
        accel=spec.accel,
        cpu=spec.cpu,
        memory_bytes=vm_argv.ram_bytes(spec, spec.accel),
        disks=tuple(disks),
        spec=vm_spec.to_wire(spec),
    )


async def adopt_vm(agent: Agent, arguments: AdoptArguments) -> dict[str, Any]:
    """Takes a running QEMU over. Raises UsageError, QemuError, SpecError, or PlanRefused for a guest that writes to an
    image on which others lie; the guest is untouched in every case."""
    if not vm_spec.is_name(arguments.vm):
        raise UsageError(f"{arguments.vm!r} is no name: 1 to 64 letters, digits, dots, dashes or underscores")
    with agent.claims.hold(arguments.vm, "taken over"):
        await free_name(agent, arguments.vm)
        found = await asyncio.to_thread(vm_adopt.adopt, arguments.qmp)
        # A QEMU may have two monitors, and two people two names for it.
        with agent.claims.hold(f"process {found.identity.pid}", "taken over"):
            await _adopt(agent, arguments, found)
    return await vm_status(agent, arguments.vm)


async def _adopt(agent: Agent, arguments: AdoptArguments, found: vm_adopt.AdoptedVm) -> None:
    for kept in agent.vms.values():
        if kept.identity == found.identity:
            hint = f"nothing is left to do: 'vmferry status {kept.name}' shows it"
            raise Busy(f"that QEMU is kept already, as {kept.name}", side="client", retry="no", hint=hint)
    kinds = await asyncio.to_thread(vm_adopt.host_kinds, found)
    machine = agent.host.attach(arguments.vm, found.identity, arguments.qmp, clock=agent.clock)
    if machine is None:
        raise QemuError(f"the process behind {arguments.qmp} has just ended")
    try:
        definition = await _definition_of_adopted(arguments, machine, found, dict(kinds))
        await disk_bases.require_none(
            agent, arguments.vm, definition.writable_paths(), arguments.accept, way_out=ADOPT_WAY_OUT
        )
        # Refuses now, in words, what no destination could take.
        definition.incoming_argv(RuntimePaths(str(agent.vm_directory / "trial")), agent.config.qemu)
        kept = KeptVm(
            definition=definition,
            generation=1,
            identity=found.identity,
            qmp_path=arguments.qmp,
            directory="",
            machine=machine,
        )
        await agent.journal.append(Entry.KEPT, arguments.vm, kept.to_journal())
    except BaseException:
        await machine.close()
        raise
    agent.vms[arguments.vm] = kept
    agent.hold(kept)
    await agent.monitors.settle()


async def _definition_of_adopted(
    arguments: AdoptArguments, machine: Machine, found: vm_adopt.AdoptedVm, kinds: dict[str, Any]
) -> VmDefinition:
    known = await machine.execute("query-machines")
    aliases = {m["alias"]: m["name"] for m in known if "alias" in m}
    default = next((m["name"] for m in known if m.get("is-default")), "pc")
    memory = await machine.execute("query-memory-size-summary")
    kvm = await machine.execute("query-kvm")
    devices = await machine.execute("query-block")
    disks: list[DiskRef] = []
    for device in devices:
        inserted = device.get("inserted")
        if inserted and "/" in str(inserted.get("image", {}).get("filename", "")):
            disks.append(
                DiskRef(
                    str(inserted["image"]["filename"]),
                    bool(inserted.get("ro")),
                    arguments.shared,
                    str(inserted["image"].get("format", "raw")),
                )
            )
    pci = str(await machine.execute("query-pci"))
    cpu = next((found.args[i + 1] for i, a in enumerate(found.args[:-1]) if a in ("-cpu", "--cpu")), "qemu64")
    return VmDefinition(
        name=arguments.vm,
        machine=vm_adopt.pinned_machine(found.machine_option, aliases, default=default),
        accel="kvm" if kvm.get("enabled") else "tcg",
        cpu=cpu.partition(",")[0],
        memory_bytes=int(memory["base-memory"]),
        disks=tuple(disks),
        adopted=adopted_to_wire(found, kinds),
        has_vfio="vfio" in pci,
    )


async def _elsewhere(agent: Agent, name: str) -> list[tuple[str, dict[str, Any]]]:
    """What other hosts say to `peer-has`, by host; silent hosts are passed over."""
    answers = await asyncio.gather(
        *(link.call("peer-has", {"vm": name}, deadline_s=1.0) for link in agent.peers.links.values()),
        return_exceptions=True,
    )
    both = zip(agent.peers.links, answers, strict=True)
    return [(host, answer) for host, answer in both if isinstance(answer, dict)]


async def vm_status(agent: Agent, name: str) -> dict[str, Any]:
    """One VM of this host: where, what it is doing, its migration if it has one, its blockers. Of one that is only
    awaited here: what this side knows."""
    kept = agent.vms.get(name)
    if kept is None:
        return _awaited(agent, name)
    attempt = agent.attempts.get(name)
    state, blocked = await _state(kept)
    return {
        "vm": name,
        "host": agent.config.name,
        "run_state": state,
        "generation": kept.generation,
        "machine": kept.definition.machine,
        "accel": kept.definition.accel,
        "memory_bytes": kept.definition.memory_bytes,
        "origin": "spec" if kept.definition.spec is not None else "adopted",
        "pid": kept.identity.pid,
        "qmp": kept.qmp_path,
        "monitor": str(agent.monitors.path_of(name)),
        "directory": kept.directory,
        "serial": f"{kept.directory}/serial.log" if kept.directory else None,
        "qemu": kept.machine.version_text if kept.machine else "unknown",
        "blocked": blocked,
        "blockers": [blocker.to_wire() for blocker in agent.blockers.all_of(name, blocked)],
        "migration": attempt.wire() if attempt is not None else await arrival(agent, name),
    }


def _awaited(agent: Agent, name: str) -> dict[str, Any]:
    """The same of a VM for which this host has a place that is not settled. Its QEMU is not asked: it may load."""
    place = agent.place_of(name)
    assert place is not None, "whoever asks has looked"
    definition = VmDefinition.from_wire(place.place.definition)
    machine = place.machine
    return {
        "vm": name,
        "host": agent.config.name,
        "run_state": "incoming",
        "generation": place.place.generation,
        "machine": definition.machine,
        "accel": definition.accel,
        "memory_bytes": definition.memory_bytes,
        "origin": "spec" if definition.spec is not None else "adopted",
        "pid": None if machine is None or machine.is_gone else machine.pid,
        "qmp": place.runtime.qmp_path,
        "directory": place.place.directory,
        "serial": f"{place.place.directory}/serial.log",
        "qemu": machine.version_text if machine else "unknown",
        "blocked": [],
        "blockers": [blocker.to_wire() for blocker in agent.blockers.all_of(name)],
        "migration": place.wire(),
    }


async def arrival(agent: Agent, vm: str) -> dict[str, Any] | None:
    """The migration with which the VM came here, as its source tells it, or as this side knows it while the source's
    agent does not answer and it is not settled; else None."""
    place = agent.place_of(vm)
    if place is None:
        return None
    question = {"command": "job-status", "arguments": {"job": place.job}}
    try:
        return dict(await agent.peers.link(place.place.source).call("peer-forward", question, deadline_s=LIST_S))
    except VmferryError as error:
        log.info("job=%s vm=%s command=job-status result=%s", place.job, vm, error)
        return None if place.ended.is_set() else place.wire()


async def _state(kept: KeptVm) -> tuple[str, list[str]]:
    """(run state or 'gone' or 'silent', QEMU's reasons against a migration)."""
    if kept.machine is None or kept.machine.is_gone:
        return "gone", []
    try:
        state = await kept.machine.run_state(deadline_s=1.0)
        info = await kept.machine.migration(deadline_s=1.0)
    except QemuError as error:
        log.info("vm=%s command=query-status result=%s", kept.name, error)
        return "silent", []
    return state, [str(reason) for reason in info.get("blocked-reasons", [])]


async def list_vms(agent: Agent, *, local: bool) -> dict[str, Any]:
    """Every VM here, and (unless `local`) on every known host; a host that does not answer is listed so."""
    rows = []
    for name, kept in agent.vms.items():
        state, _ = await _state(kept)
        attempt = agent.attempts.get(name)
        busy = attempt is not None and not attempt.ended.is_set()
        rows.append(
            {
                "vm": name,
                "host": agent.config.name,
                "run_state": state,
                "doing": attempt.brief() if attempt is not None and busy else None,
                "generation": kept.generation,
                "memory_bytes": kept.definition.memory_bytes,
            }
        )
    for place in agent.places.values():
        if not place.ended.is_set() and place.vm not in agent.vms:
            rows.append(
                {
                    "vm": place.vm,
                    "host": agent.config.name,
                    "run_state": "incoming",
                    "doing": place.brief(),
                    "generation": place.place.generation,
                    "memory_bytes": place.place.definition.get("memory_bytes", 0),
                }
            )
    hosts: list[dict[str, Any]] = [{"host": agent.config.name, "answers": True, "error": None}]
    if not local:
        answers = await asyncio.gather(
            *(link.call("peer-list", {}, deadline_s=LIST_S) for link in agent.peers.links.values()),
            return_exceptions=True,
        )
        for host, answer in zip(agent.peers.links, answers, strict=True):
            if isinstance(answer, VmferryError):
                hosts.append({"host": host, "answers": False, "error": answer.to_wire()})
            elif isinstance(answer, BaseException):
                raise answer
            else:
                hosts.append({"host": host, "answers": True, "error": None})
                rows += answer["vms"]
    rows.sort(key=lambda row: (row["vm"], row["host"]))
    return {"vms": rows, "hosts": hosts}


async def stop_vm(agent: Agent, arguments: StopArguments) -> dict[str, Any]:
    """Ends a VM: by its own power button, or at once. Raises Busy while it is on its way somewhere."""
    kept = agent.vms[arguments.vm]
    agent.blockers.require_free(arguments.vm, Operation.STOP)
    if kept.machine is not None and not kept.machine.is_gone:
        if arguments.force:
            await kept.machine.quit()
        else:
            await kept.machine.execute("system_powerdown")
            if not await kept.machine.wait_gone(deadline_s=STOP_S):
                raise QemuError(
                    f"{arguments.vm} did not power down within {STOP_S:g} s", hint="say --force to end it at once"
                )
    await forget(agent, kept)
    wire: dict[str, Any] = {"vm": arguments.vm, "stopped": True}
    if arguments.remove_disks:
        restore = agent.restores.active(arguments.vm)
        if restore is not None:  # it ends with its guest, and has written that down
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await restore.ended.wait()
        paths = kept.definition.writable_paths()
        wire["disks"] = await agent.restores.disks.remove_all(arguments.vm, paths)
    return wire


async def forget(agent: Agent, kept: KeptVm) -> None:
    """This host does not keep the VM any more; its QEMU is gone."""
    await agent.journal.append(Entry.FORGOTTEN, kept.name)
    agent.vms.pop(kept.name, None)
    await agent.monitors.settle()
    agent.blockers.forget(kept.name)
    if kept.machine is not None:
        await kept.machine.close()
    if kept.directory:
        remove_directory(Path(kept.directory), keep_logs=False)


async def doctor(agent: Agent) -> dict[str, Any]:
    """Whether this host is fit, point by point, and how its peers answer."""
    config = agent.config
    checks = list(
        await probe.doctor(
            qemu=config.qemu,
            clock=agent.clock,
            state_directory=config.state_dir,
            certificates=config.pki_dir,
            ports=config.migration_ports if config.migration_ports != (0, 0) else None,
        )
    )
    for name, link in agent.peers.links.items():
        try:
            await link.call("peer-hello", {"time": agent.clock.wall_s(), "protocol": PROTOCOL}, deadline_s=LIST_S)
        except VmferryError as error:
            checks.append(probe.Check(f"agent of {name}", False, error.message, error.hint))
            continue
        trip_ms = (link.round_trip_s or 0.0) * 1000
        checks.append(probe.Check(f"agent of {name}", True, f"answers in {trip_ms:.1f} ms"))
        offset = probe_host.ClockOffset(name, (link.clock_offset_s or 0.0) * 1000, trip_ms / 2)
        checks.append(probe.offset_check(offset))
    for left in (each for each in agent.left_images.wire() if each["waits"]):
        fix = f"delete it when nobody wants {left['vm']} to come back into it"
        checks.append(probe.Check(f"left image {left['path']}", None, f"its time is over; {left['waits']}", fix))
    return {
        "host": config.name,
        # Without KVM guests run under TCG: slow, and still fit to be moved.
        "fit": all(check.ok is not False for check in checks if check.name != "kvm"),
        "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail, "fix": c.fix} for c in checks],
    }


def agent_status(agent: Agent) -> dict[str, Any]:
    """The agent itself."""
    return {
        "name": agent.config.name,
        "version": __version__,
        "vms": len(agent.vms),
        "peers": {name: link.is_up for name, link in agent.peers.links.items()},
        "running_jobs": [a.job for a in agent.attempts.values() if not a.ended.is_set()],
        "clear_text": agent.config.clear_text,
        "left_images": agent.left_images.wire(),
    }
