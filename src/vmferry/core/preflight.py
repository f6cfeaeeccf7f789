"""Can this guest go there? Every reason against it, before anything is touched.

Theory of operation
-------------------
Both agents and the guest's QEMU report plain values; `check` walks one table of rules over them and returns
every objection, worst first. A rule is a code, a weight, a side, a function that finds cases, and the two
sentences for a person: what is wrong and how to mend it. Nothing here asks anybody anything.

Rule 1: None in a report means "not known". `_UNKNOWN` turns each into an objection; no rule guesses.
Rule 2: a rule finds cases and never words; the sentences stand in the table.
Rule 3: a blocker is never hidden by another one: all rules run each time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from vmferry.core import hazards
from vmferry.core.disk_reports import DiskReport, DiskUse, RoomReport
from vmferry.core.options import Mode, Refused, TlsChoice, Value, build
from vmferry.errors import Side, UsageError
from vmferry.units import GIB, MIB, format_size

QEMU_OVERHEAD_BYTES: Final = 128 * MIB  # one QEMU beside the guest's memory: 60 to 100 MiB measured, rounded up
CLOCK_SKEW_NOTED_MS: Final = 1000
MULTIFD_POSTCOPY_SINCE: Final = (10, 1)
"""The first QEMU that switches from multifd to postcopy in one migration."""


class Weight(StrEnum):
    """How much an objection weighs. Only blockers stop a migration."""

    BLOCKER = "blocker"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Objection:
    """One thing that speaks against the migration."""

    code: str
    side: Side
    message: str
    fix: str
    weight: Weight = Weight.BLOCKER


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What an agent says about its host and the QEMU to be used there. None = it could not find out."""

    name: str
    host_id: str | None = None
    agent_version: str | None = None
    qemu_binary: str = "qemu-system-x86_64"
    qemu_found: bool | None = None
    qemu_version: tuple[int, int, int] | None = None
    machines: Mapping[str, str] | None = None  # every name and alias -> concrete name
    cpu_models: Mapping[str, tuple[str, ...] | None] | None = None  # model -> features that it lacks here
    host_cpu: str | None = None
    devices: frozenset[str] | None = None  # None also means: compared with the started QEMU, not before
    accelerators: frozenset[str] | None = None
    capabilities: frozenset[str] | None = None
    parameters: frozenset[str] | None = None
    memory_available_bytes: int | None = None
    userfaultfd: bool | None = None
    ports_free: Mapping[int, bool] = field(default_factory=lambda: MappingProxyType({}))
    disks: Mapping[str, DiskReport] = field(default_factory=lambda: MappingProxyType({}))
    rooms: Mapping[str, RoomReport] = field(default_factory=lambda: MappingProxyType({}))  # for disks to be copied
    vms: frozenset[str] | None = None
    clock_offset_ms: float | None = None
    tls_only: bool = False  # its agent was told to have no part in a stream in clear text

    def option_names(self) -> frozenset[str] | None:
        """Capabilities and parameters of this QEMU together; None if either is not known."""
        if self.capabilities is None or self.parameters is None:
            return None
        return self.capabilities | self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestReport:
    """The running guest, as its QEMU on the source tells it."""

    name: str
    machine: str | None = None
    cpu_model: str | None = None
    accelerator: str | None = None
    memory_bytes: int | None = None
    page_bytes: int | None = None  # of the memory backend: 4096, or the huge page size
    disks: tuple[DiskUse, ...] = ()
    devices: frozenset[str] = frozenset()
    has_vfio: bool | None = None
    blocked_reasons: tuple[str, ...] | None = None
    run_state: str | None = None
    job: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How the person wants it done. `ports`: those that the destination would listen on."""

    mode: Mode = Mode.PRECOPY
    multifd_channels: int = 0
    tls: TlsChoice | None = None
    settings: Mapping[str, Value] = field(default_factory=lambda: MappingProxyType({}))
    ports: tuple[int, ...] = ()
    rdma: bool = False
    rdma_configured: bool = False


@dataclass(frozen=True, slots=True)
class _Case:
    source: HostReport
    destination: HostReport
    guest: GuestReport
    wish: Wish


_Found = Iterable[Mapping[str, Any]]
_HIT: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: `find` yields the values for one objection each; the sentences are format strings."""

    code: str
    weight: Weight
    side: Side
    find: Callable[[_Case], _Found]
    message: str
    fix: str


# --- what the rules look for: each yields the values of its sentence, and skips what is not known -------


def _when(happens: bool) -> _Found:
    return (_HIT,) if happens else ()


def _same_host(case: _Case) -> _Found:
    source, destination = case.source, case.destination
    same_id = source.host_id is not None and source.host_id == destination.host_id
    return _when(source.name == destination.name or same_id)


def _machine_version(machine: str) -> tuple[int, int] | None:
    found = re.search(r"-(\d+)\.(\d+)$", machine)
    return (int(found[1]), int(found[2])) if found else None


def _concrete_machine(case: _Case) -> str | None:
    machine = case.guest.machine
    return None if machine is None else (case.source.machines or {}).get(machine, machine)


def _newest_common(case: _Case, machine: str) -> str:
    family = machine.rsplit("-", 1)[0] + "-"
    here, there = set((case.source.machines or {}).values()), set((case.destination.machines or {}).values())
    common = {m: _machine_version(m) for m in here & there if m.startswith(family)}
    known = [(version, m) for m, version in common.items() if version is not None]
    return max(known)[1] if known else "one that both know"


def _machine_missing(case: _Case, *, newer: bool) -> _Found:
    machine, there, version = (
        _concrete_machine(case),
        case.destination.machines,
        case.destination.qemu_version,
    )
    if machine is None or there is None or machine in there:
        return
    wanted = _machine_version(machine)
    if newer == (wanted is not None and version is not None and wanted > version[:2]):
        needs = ".".join(map(str, wanted)) if wanted else "?"
        yield {"machine": machine, "needs": needs, "common": _newest_common(case, machine)}


def _older_qemu(case: _Case) -> _Found:
    here, there = case.source.qemu_version, case.destination.qemu_version
    return _when(here is not None and there is not None and there[:2] < here[:2])


def _copies_host_cpu(case: _Case) -> bool:
    model, accel = case.guest.cpu_model, case.guest.accelerator
    return model == "host" or (model == "max" and accel != "tcg")


def _cpu_max_emulated(case: _Case) -> _Found:
    versions = {case.source.qemu_version, case.destination.qemu_version}
    emulated = case.guest.cpu_model == "max" and case.guest.accelerator == "tcg"
    return _when(emulated and None not in versions and len(versions) == 2)


def _cpu_unknown(case: _Case) -> _Found:
    model, there = case.guest.cpu_model, case.destination.cpu_models
    return _when(model not in {None, "host", "max"} and there is not None and model not in there)


def _cpu_features(case: _Case) -> _Found:
    missing = (case.destination.cpu_models or {}).get(case.guest.cpu_model or "", ())
    if missing:
        yield {"features": ", ".join(missing), "model": case.guest.cpu_model}


def _cpu_features_unknown(case: _Case) -> _Found:
    there = case.destination.cpu_models or {}
    return _when(not _copies_host_cpu(case) and there.get(case.guest.cpu_model or "", ()) is None)


def _cpu_host(case: _Case, *, unknown: bool) -> _Found:
    cpus = {case.source.host_cpu, case.destination.host_cpu}
    bad = None in cpus if unknown else None not in cpus and len(cpus) == 2
    return _when(_copies_host_cpu(case) and bad)


def _devices_unknown(case: _Case) -> _Found:
    there = case.destination.devices
    return ({"device": d} for d in sorted(case.guest.devices - there)) if there is not None else ()


def _accel_missing(case: _Case) -> _Found:
    accel, there = case.guest.accelerator, case.destination.accelerators
    return _when(accel is not None and there is not None and accel not in there)


def _memory_short(case: _Case) -> _Found:
    needed, there = case.guest.memory_bytes, case.destination.memory_available_bytes
    if needed is not None and there is not None and there < needed + QEMU_OVERHEAD_BYTES:
        yield {"needed": format_size(needed + QEMU_OVERHEAD_BYTES), "there": format_size(there)}


def _tcg_loses_writes(case: _Case) -> _Found:
    guest = case.guest
    return _when(hazards.precopy_loses_writes(guest.accelerator, case.source.qemu_version, guest.memory_bytes))


def _tcg_throttle(case: _Case) -> _Found:
    throttles = case.wish.settings.get("auto-converge") is True
    return _when(throttles and hazards.standby_loses_writes(case.guest.accelerator, case.source.qemu_version))


def _disks(case: _Case) -> Iterator[tuple[DiskUse, DiskReport | None, DiskReport | None]]:
    for disk in case.guest.disks:
        yield disk, case.source.disks.get(disk.path), case.destination.disks.get(disk.path)


def _disk_unreported(case: _Case) -> _Found:
    return ({"path": disk.path} for disk, _, there in _disks(case) if there is None)


def _disk_missing(case: _Case) -> _Found:
    return ({"path": disk.path} for disk, _, there in _disks(case) if there is not None and not there.exists)


def _present(case: _Case) -> Iterator[tuple[DiskUse, DiskReport | None, DiskReport]]:
    for disk, here, there in _disks(case):
        if there is not None and there.exists:
            yield disk, here, there


def _disk_writable(case: _Case, answer: bool | None) -> _Found:
    return ({"path": d.path} for d, _, there in _present(case) if there.writable is answer and not d.read_only)


def _disk_differs(case: _Case, what: str) -> _Found:
    for disk, here, there in _present(case):
        values = {getattr(here, what, None), getattr(there, what)}
        if None not in values and len(values) == 2:
            yield {"path": disk.path, "here": getattr(here, what), "there": getattr(there, what)}


def _disk_identity(case: _Case, *, unknown: bool) -> _Found:
    for disk, here, there in _present(case):
        mine = here.identity if here is not None else None
        is_unknown = mine is None or there.identity is None
        if not disk.read_only and unknown == is_unknown and (unknown or mine != there.identity):
            yield {"path": disk.path}


def _ports(case: _Case, answer: bool | None) -> _Found:
    return ({"port": p} for p in case.wish.ports if case.destination.ports_free.get(p) is answer)


def _clear_text_forbidden(case: _Case) -> _Found:
    return ({"host": h.name} for h in (case.source, case.destination) if case.wish.tls is None and h.tls_only)


def _multifd_postcopy(case: _Case) -> _Found:
    wants = case.wish.mode is Mode.POSTCOPY and case.wish.multifd_channels > 0
    versions = (case.source.qemu_version, case.destination.qemu_version)
    return _when(wants and any(v is not None and v[:2] < MULTIFD_POSTCOPY_SINCE for v in versions))


def _options(case: _Case) -> _Found:
    here, there = case.source.option_names(), case.destination.option_names()
    if here is None or there is None:
        return
    wish = case.wish
    result = build(
        wish.mode, wish.settings, source_known=here, destination_known=there, tls=wish.tls,
        multifd_channels=wish.multifd_channels,
    )  # fmt: skip
    if isinstance(result, Refused):
        yield from ({"reason": reason} for reason in result.objections)


def _run_state(case: _Case, weight: Weight) -> _Found:
    state = case.guest.run_state
    if state is not None:
        found, why = RUN_STATES.get(state, (Weight.BLOCKER, "vmferry does not know this state"))
        if found is weight:
            yield {"state": state, "why": why}


def _clock(case: _Case) -> _Found:
    here, there = case.source.clock_offset_ms, case.destination.clock_offset_ms
    if here is not None and there is not None and abs(here - there) > CLOCK_SKEW_NOTED_MS:
        yield {"skew": f"{abs(here - there) / 1000:.1f} s"}


def _agent_versions(case: _Case) -> _Found:
    here, there = case.source.agent_version, case.destination.agent_version
    if here is not None and there is not None and here != there:
        yield {"here": here, "there": there}


def _is_postcopy(case: _Case) -> bool:
    return case.wish.mode is Mode.POSTCOPY


def _huge_pages(case: _Case, *, giant: bool) -> _Found:
    size = case.guest.page_bytes
    if _is_postcopy(case) and size is not None and size > 64 * 1024 and giant == (size >= GIB):
        yield {"size": format_size(size)}


_B, _W, _N = Weight.BLOCKER, Weight.WARNING, Weight.NOTE
_MID_MIGRATION: Final = (_B, "a migration is in the middle of its hand-over, or left it so")
RUN_STATES: Final[Mapping[str, tuple[Weight | None, str]]] = MappingProxyType(
    {
        "running": (None, ""),
        "paused": (_N, "it arrives paused"),
        "suspended": (_N, "it arrives suspended"),
        "prelaunch": (_N, "it was never started and arrives so"),
        "debug": (_N, "it is held by a debugger and arrives paused"),
        "io-error": (_W, "it stopped because of a disk error, which may hit the destination too"),
        "watchdog": (_W, "its watchdog stopped it"),
        "guest-panicked": (_W, "its kernel has crashed, and the crash is all that would move"),
        "internal-error": (_B, "QEMU cannot run it any further"),
        "shutdown": (_B, "it has shut down, so there is nothing to move"),
        "inmigrate": (_B, "it is still arriving here"),
        "finish-migrate": _MID_MIGRATION,
        "postmigrate": _MID_MIGRATION,
        "save-vm": (_B, "a snapshot is being saved"),
        "restore-vm": (_B, "a snapshot is being loaded"),
        "colo": (_B, "it is replicated all the time (COLO), which vmferry does not support"),
    }
)
"""QEMU's run states: what each means for a migration; None = nothing speaks against it."""

RULES: Final[tuple[Rule, ...]] = (
    Rule("same-host", _B, "both", _same_host, "{destination} is the host that {vm} runs on",
         "name another host"),
    Rule("qemu-missing", _B, "destination", lambda c: _when(c.destination.qemu_found is False),
         "{destination} has no {binary}", "install QEMU there, or name its path in the agent's settings"),
    Rule("vm-there", _B, "destination", lambda c: _when(c.guest.name in (c.destination.vms or ())),
         "{destination} already has a VM named {vm}", "remove or rename that VM"),
    Rule("job-exists", _B, "source", lambda c: _when(c.guest.job is not None),
         "{vm} already has the job {job}", "wait for it or cancel it"),
    Rule("run-state", _B, "source", lambda c: _run_state(c, _B), "{vm} is in state {state}: {why}",
         "bring the VM into a normal state first"),
    Rule("not-migratable", _B, "source", lambda c: ({"reason": r} for r in c.guest.blocked_reasons or ()),
         "QEMU refuses to migrate {vm}: {reason}", "unplug the device or undo what the reason names"),
    Rule("machine-newer", _B, "destination", lambda c: _machine_missing(c, newer=True),
         "{vm} has machine type {machine}, which is newer than {destination}'s QEMU {there_version}",
         "install QEMU {needs} or newer on {destination}; or restart the VM with machine type {common}"),
    Rule("machine-unknown", _B, "destination", lambda c: _machine_missing(c, newer=False),
         "{destination}'s QEMU {there_version} does not know {vm}'s machine type {machine}",
         "use a QEMU there that knows it; or restart the VM with machine type {common}"),
    Rule("cpu-unknown", _B, "destination", _cpu_unknown,
         "{destination}'s QEMU does not know the CPU model {cpu}",
         "restart the VM with a model that both know"),
    Rule("cpu-features", _B, "destination", _cpu_features,
         "{destination}'s CPU lacks what the model {model} promises: {features}",
         "choose another host, or restart the VM with an older CPU model"),
    Rule("cpu-host-differs", _B, "both", lambda c: _cpu_host(c, unknown=False),
         "{vm} has the CPU model {cpu}, which copies the host's CPU, and the hosts' CPUs differ",
         "restart the VM with a named CPU model that both hosts can offer"),
    Rule("device-unknown", _B, "destination", _devices_unknown,
         "{destination}'s QEMU does not have the device {device}",
         "unplug the device, or use another QEMU there"),
    Rule("accelerator-missing", _B, "destination", _accel_missing,
         "{vm} runs under {accel}, which {destination} does not offer",
         "enable {accel} there or choose another host"),
    Rule("memory-short", _B, "destination", _memory_short,
         "{vm} needs {needed} and {destination} has {there} left",
         "free memory there or choose another host"),
    Rule("tcg-loses-writes", _B, "source", _tcg_loses_writes,
         "{source}'s QEMU {here_version} loses writes of a TCG guest with this size of memory while it migrates",
         "restart {vm} with 8 KiB more memory, or under KVM, or on QEMU 9.0 or newer"),
    Rule("tcg-auto-converge", _W, "source", _tcg_throttle,
         "under TCG, {source}'s QEMU {here_version} may lose writes of {vm} while auto-converge slows it",
         "leave auto-converge out, or run {vm} under KVM"),
    Rule("disk-unreported", _B, "destination", _disk_unreported,
         "{destination} did not say whether it has the image {path}", "check its agent's log and ask again"),
    Rule("disk-missing", _B, "destination", _disk_missing, "{destination} does not have the image {path}",
         "make the image reachable there under the same path"),
    Rule("disk-read-only", _B, "destination", lambda c: _disk_writable(c, False),
         "{destination} cannot write the image {path}", "mend its permissions or its mount there"),
    Rule("disk-size", _B, "both", lambda c: _disk_differs(c, "size_bytes"),
         "the image {path} has {here} bytes on {source} and {there} on {destination}, so it is not the same",
         "make both hosts see one image"),
    Rule("disk-format", _B, "both", lambda c: _disk_differs(c, "format"),
         "the image {path} is {here} on {source} and {there} on {destination}",
         "make both hosts see one image"),
    Rule("disk-not-shared", _B, "both", lambda c: _disk_identity(c, unknown=False),
         "{path} is one image on {source} and another on {destination}: the VM would lose its writes",
         "copy it with the guest (--disks copy), or put it on storage that both hosts share"),
    Rule("port-taken", _B, "destination", lambda c: _ports(c, False),
         "port {port} on {destination} is in use", "free it or give the agent another range"),
    Rule("port-unknown", _B, "destination", lambda c: _ports(c, None),
         "{destination} did not say whether port {port} is free", "check its agent's log and ask again"),
    Rule("userfaultfd-missing", _B, "destination",
         lambda c: _when(_is_postcopy(c) and c.destination.userfaultfd is False),
         "postcopy needs userfaultfd, which {destination} does not allow",
         "set vm.unprivileged_userfaultfd=1 there, let the agent run as root, or use --mode precopy"),
    Rule("postcopy-vfio", _B, "both", lambda c: _when(_is_postcopy(c) and c.guest.has_vfio is True),
         "{vm} has a passed-through device (VFIO), whose memory cannot follow later",
         "use --mode precopy or unplug the device"),
    Rule("postcopy-giant-pages", _B, "both", lambda c: _huge_pages(c, giant=True),
         "{vm} has pages of {size}: in postcopy each miss would stop it for the time to send a whole one",
         "use --mode precopy"),
    Rule("multifd-postcopy", _B, "both", _multifd_postcopy,
         "multifd together with postcopy needs QEMU 10.1 on both hosts",
         "leave out --multifd or use --mode precopy"),
    Rule("clear-text-forbidden", _B, "both", _clear_text_forbidden,
         "the agent of {host} takes no part in a migration in clear text (tls_only)",
         "leave out --clear-text, or take tls_only out of that agent's settings"),
    Rule("rdma", _B, "both", lambda c: _when(c.wish.rdma and not c.wish.rdma_configured),
         "RDMA is refused: vmferry could not cut such a channel",
         "use TCP, or allow RDMA in both agents' settings and accept that"),
    Rule("option", _B, "both", _options, "{reason}", "change or leave out that option"),
    Rule("older-qemu", _W, "destination", _older_qemu,
         "{destination}'s QEMU {there_version} is older than {source}'s {here_version}",
         "nothing if the VM's devices were there already in {there_version}; else upgrade {destination}"),
    Rule("cpu-features-unknown", _W, "destination", _cpu_features_unknown,
         "{destination} did not tell whether its CPU has all features of the model {cpu}",
         "check its agent's log on that host and ask again"),
    Rule("cpu-max-emulated", _W, "both", _cpu_max_emulated,
         "{vm} has the CPU model max, which differs between QEMU {here_version} and {there_version}",
         "restart the VM with a named CPU model"),
    Rule("cpu-host-unknown", _W, "both", lambda c: _cpu_host(c, unknown=True),
         "{vm} has the CPU model {cpu}, and whether the hosts' CPUs are equal is not known",
         "make sure that they are equal, or use a named CPU model"),
    Rule("disk-writable-unknown", _W, "destination", lambda c: _disk_writable(c, None),
         "whether {destination} may write the image {path} is not known", "check its permissions there"),
    Rule("disk-identity-unknown", _W, "both", lambda c: _disk_identity(c, unknown=True),
         "whether {path} is the same image on both hosts is not known",
         "make sure that the storage is shared"),
    Rule("run-state-odd", _W, "source", lambda c: _run_state(c, _W), "{vm} is in state {state}: {why}",
         "look after the guest first, or go on"),
    Rule("agent-versions", _W, "both", _agent_versions,
         "the agents differ in version: {here} on {source}, {there} on {destination}",
         "upgrade the older one"),
    Rule("postcopy-huge-pages", _W, "both", lambda c: _huge_pages(c, giant=False),
         "{vm} has pages of {size}, so each miss in postcopy waits for a whole one", "expect short stalls"),
    Rule("run-state-kept", _N, "source", lambda c: _run_state(c, _N), "{vm} is in state {state}: {why}",
         "nothing to do"),
    Rule("clear-text", _N, "both", lambda c: _when(c.wish.tls is None),
         "{vm}'s memory goes over the network in clear text, as it was asked for by name",
         "leave out --clear-text; agents that speak in clear text themselves need certificates first"),
    Rule("clock-skew", _N, "both", _clock, "the clocks of {source} and {destination} are {skew} apart",
         "synchronise them, so that times in reports can be compared"),
)  # fmt: skip

_NeededWhen = Callable[[_Case], bool]
_ALWAYS: Final[_NeededWhen] = lambda _: True  # noqa: E731 - a table entry, never called by name elsewhere
_UNKNOWN: Final[tuple[tuple[str, str, Weight, _NeededWhen, str], ...]] = (
    ("destination", "qemu_found", _B, _ALWAYS, "whether it has a QEMU"),
    ("destination", "qemu_version", _B, _ALWAYS, "which version its QEMU has"),
    ("source", "qemu_version", _B, _ALWAYS, "which version its QEMU has"),
    ("destination", "machines", _B, _ALWAYS, "which machine types its QEMU knows"),
    ("source", "machines", _N, _ALWAYS, "which machine types its QEMU knows"),
    ("destination", "cpu_models", _W, _ALWAYS, "which CPU models it offers"),
    ("destination", "accelerators", _B, _ALWAYS, "which accelerators it offers"),
    ("destination", "memory_available_bytes", _B, _ALWAYS, "how much memory it has left"),
    ("destination", "vms", _B, _ALWAYS, "which VMs it has"),
    ("destination", "userfaultfd", _B, _is_postcopy, "whether it allows userfaultfd, which postcopy needs"),
    ("source", "capabilities", _B, _ALWAYS, "which migration capabilities its QEMU has"),
    ("source", "parameters", _B, _ALWAYS, "which migration parameters its QEMU has"),
    ("destination", "capabilities", _B, _ALWAYS, "which migration capabilities its QEMU has"),
    ("destination", "parameters", _B, _ALWAYS, "which migration parameters its QEMU has"),
    ("source", "clock_offset_ms", _N, _ALWAYS, "how its clock stands"),
    ("destination", "clock_offset_ms", _N, _ALWAYS, "how its clock stands"),
    ("source", "agent_version", _N, _ALWAYS, "which version its agent has"),
    ("destination", "agent_version", _N, _ALWAYS, "which version its agent has"),
    ("guest", "machine", _B, _ALWAYS, "its machine type"),
    ("guest", "cpu_model", _W, _ALWAYS, "its CPU model"),
    ("guest", "accelerator", _B, _ALWAYS, "its accelerator"),
    ("guest", "memory_bytes", _B, _ALWAYS, "how much memory it has"),
    ("guest", "page_bytes", _N, _is_postcopy, "the size of its memory pages"),
    ("guest", "has_vfio", _B, _is_postcopy, "whether it has a passed-through device"),
    ("guest", "blocked_reasons", _W, _ALWAYS, "whether it can be migrated at all"),
    ("guest", "run_state", _B, _ALWAYS, "its run state"),
)
"""(who, field, weight when it is None, when it matters, the missing answer in words)."""

_WEIGHTS: Final = tuple(Weight)


def check(source: HostReport, destination: HostReport, guest: GuestReport, wish: Wish) -> tuple[Objection, ...]:
    """Everything that speaks against this migration, blockers first; `blockers` of it decides.

    A pure function of the reports: equal reports give equal objections in equal order. Raises nothing.
    """
    case = _Case(source, destination, guest, wish)
    found = [*_from_rules(case), *_from_unknown(case)]
    return tuple(sorted(found, key=lambda objection: _WEIGHTS.index(objection.weight)))


ACCEPTABLE: Final = frozenset({"tcg-loses-writes"})
"""Blockers that a person may take upon themselves by name: the guest may be damaged, and nobody else is."""


def accept(objections: Iterable[Objection], codes: frozenset[str]) -> tuple[Objection, ...]:
    """The objections with every blocker in `codes` turned into a warning. Raises UsageError for a code that
    nobody can accept."""
    refused = sorted(codes - ACCEPTABLE)
    if refused:
        raise UsageError(f"{refused[0]} cannot be accepted; what can: {', '.join(sorted(ACCEPTABLE))}")
    return tuple(replace(o, weight=Weight.WARNING) if o.code in codes else o for o in objections)


def blockers(objections: Iterable[Objection]) -> tuple[Objection, ...]:
    """Those that stop the migration."""
    return tuple(objection for objection in objections if objection.weight is Weight.BLOCKER)


def _version(version: tuple[int, int, int] | None) -> str:
    return "of unknown version" if version is None else ".".join(map(str, version))


def _from_rules(case: _Case) -> Iterator[Objection]:
    common = {
        "source": case.source.name,
        "destination": case.destination.name,
        "vm": case.guest.name,
        "job": case.guest.job,
        "cpu": case.guest.cpu_model,
        "accel": case.guest.accelerator,
        "binary": case.destination.qemu_binary,
        "here_version": _version(case.source.qemu_version),
        "there_version": _version(case.destination.qemu_version),
    }
    for rule in RULES:
        for values in rule.find(case):
            words = {**common, **values}
            message, fix = rule.message.format_map(words), rule.fix.format_map(words)
            yield Objection(rule.code, rule.side, message, fix, rule.weight)


def _from_unknown(case: _Case) -> Iterator[Objection]:
    who: dict[str, tuple[Side, str, object]] = {
        "source": ("source", case.source.name, case.source),
        "destination": ("destination", case.destination.name, case.destination),
        "guest": ("source", case.guest.name, case.guest),
    }
    for part, name, weight, matters, words in _UNKNOWN:
        side, subject, report = who[part]
        if getattr(report, name) is None and matters(case):
            fix = "check the agent's log on that host and ask again"
            code = f"unknown-{part}-{name.replace('_', '-')}"
            yield Objection(code, side, f"{subject} did not tell {words}", fix, weight)
