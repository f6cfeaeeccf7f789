"""The agent's side of planning: collects what both hosts and the guest say, and asks the core.

Theory of operation
-------------------
A plan needs three reports: of this host, of the destination (one `peer-report` call), and of the guest. The
core's rules (`core.preflight`) give every objection at once, `core.converge.pick_mode` the mode and why,
`core.options.build` the complete options of both QEMUs. Facts about QEMU binaries are probed once at start and
kept; a plan of a running guest costs a handful of QMP commands and one call.

Rule 1: planning changes nothing, here or there.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from vmferry import __version__
from vmferry.agent.plan_disks import choices, image_options, local_disks, other_disks
from vmferry.agent.vms import DiskRef, KeptVm
from vmferry.agent.wants import PlacedDisk, Wanted
from vmferry.core import converge as core_converge
from vmferry.core import disks as disk_rules
from vmferry.core import hazards, preflight
from vmferry.core.blockers import Operation
from vmferry.core.converge import ConvergePolicy, GiveUp, ModeInputs, PostcopyStart, Sample, StartPostcopy
from vmferry.core.disk_reports import DiskReport, DiskUse, LocalDisk, RoomReport
from vmferry.core.facts import Fact
from vmferry.core.options import AttemptOptions, Mode, Refused, TlsChoice, build, with_switchover_ack
from vmferry.core.preflight import GuestReport, HostReport, Objection, Weight, Wish
from vmferry.errors import HostUnreachable, MigrationFailed, QemuError
from vmferry.pki import job_credentials
from vmferry.vm import image_locks, probe, probe_qemu

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.source import SourceAttempt

REPORT_S = 5.0
GIVE_UP_S = 2.0
"""Within REPORT_S, as is the question before it."""
GUEST_QUESTIONS: Final = (
    ("query-status", None),
    ("query-migrate", None),
    ("query-migrate-capabilities", None),
    ("query-migrate-parameters", None),
    *(("qom-list", {"path": folder}) for folder in ("/machine/peripheral", "/machine/peripheral-anon")),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one attempt shall go, or why it cannot."""

    mode: Mode
    why: str
    policy: ConvergePolicy
    options: AttemptOptions
    objections: tuple[Objection, ...]
    """Blockers only; the rest is in `remarks`."""
    remarks: tuple[Objection, ...]
    multifd: bool
    """Several connections, which `fd:` does not carry: the QEMUs connect by themselves and yank is the cut."""

    stops_first: bool = False
    """The guest is stopped before its memory moves, and switched over at once (`core.hazards`)."""
    copies: tuple[LocalDisk, ...] = ()
    """Local disks that go with the guest."""
    image_paths: Mapping[str, str] = field(default_factory=dict)
    """Where their copies are: path here -> path there."""
    left_there: frozenset[str] = frozenset()
    """Those (path here) that the guest left there when it came from there: what changed since goes back, no more."""
    fence_paths: tuple[str, ...] = ()
    """The guest's writable images, if both hosts see each other's locks on all of them."""

    def placed_disks(self) -> tuple[PlacedDisk, ...]:
        """The images that the destination is to make."""
        return tuple(
            PlacedDisk(
                disk.id, self.image_paths[disk.path], disk.format, disk.virtual_bytes, image_options(disk),
                left_by=disk.since.job if disk.since is not None and disk.path in self.left_there else "",
            )
            for disk in self.copies
        )  # fmt: skip

    def bitmap(self, disk: LocalDisk) -> str:
        """QEMU's bitmap that has what is to go back; empty: the disk goes as a whole."""
        return "" if disk.since is None or disk.path not in self.left_there else disk.since.name

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know although nothing blocks."""
        return tuple(f"{remark.weight}: {remark.message}" for remark in self.remarks)

    def wire(self, vm: str, source: str, destination: str) -> dict[str, Any]:
        """Plain JSON values."""
        verdict = f"can move from {source} to {destination}" if not self.objections else "cannot move there"
        found = [
            {"code": o.code, "weight": o.weight.value, "side": o.side, "message": o.message, "fix": o.fix}
            for o in (*self.objections, *self.remarks)
        ]
        return {
            "vm": vm,
            "source": source,
            "destination": destination,
            "possible": not self.objections,
            "mode": self.mode.value,
            "why": self.why,
            "objections": found,
            "disks": [
                {
                    "id": disk.id,
                    "path": disk.path,
                    "there": self.image_paths.get(disk.path),
                    "format": disk.format,
                    "virtual_bytes": disk.virtual_bytes,
                    "allocated_bytes": disk.allocated_bytes,
                    "changed_bytes": disk.since.changed_bytes if disk.since and self.bitmap(disk) else None,
                }
                for disk in self.copies
            ],
            "sentence": f"{vm} {verdict}: {self.mode.value}, because {self.why}"
            if not self.objections
            else f"{vm} cannot move from {source} to {destination}; nothing was changed.",
        }


class Planner:
    """Owned by the agent; keeps the facts about its QEMU."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._facts: asyncio.Task[probe_qemu.QemuFacts] | None = None
        self._userfaultfd: bool | None = None
        self._samples: dict[str, list[Sample]] = {}

    # --- facts about this host ---

    def warm_up(self) -> None:
        """Begins the probe of this host's QEMU, so that the first plan need not wait for it."""
        if self._facts is None or (self._facts.done() and self._facts.exception() is not None):
            config = self.agent.config
            self._facts = asyncio.create_task(
                self.agent.host.qemu_facts(config.qemu, config.state_dir), name="probe-qemu"
            )
            self.agent.keep_task(self._facts)

    async def qemu_facts(self) -> probe_qemu.QemuFacts:
        """What this host's QEMU is and can do. Raises QemuError when there is none."""
        self.warm_up()
        assert self._facts is not None
        return await asyncio.shield(self._facts)

    async def best_accel(self) -> str:
        """'kvm' where a guest really boots under it (tried once per boot of the host), else 'tcg'."""
        accel, _ = await probe.best_accel(self.agent.config.qemu, state_directory=self.agent.config.state_dir)
        return accel

    async def report_wire(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The answer to another agent's `peer-report`."""
        disks = [DiskRef(**disk) for disk in arguments.get("disks", ())]
        accel, vm = str(arguments["accel"]), str(arguments["vm"])
        place = self.agent.place_of(vm)
        if place is not None:  # of an earlier attempt: what nobody wants any more hinders nothing
            await place.is_given_up(deadline_s=GIVE_UP_S)
        report = await self.host_report(disks, accel=accel, vm=vm)
        wanted = [str(path) for path in arguments.get("copies", ())]
        since = {str(path): (str(at["job"]), str(at["id"])) for path, at in arguments.get("since", {}).items()}
        keeps_paths = bool(arguments.get("keeps_paths"))
        rooms = {p: self._room(p, vm=vm, keeps_paths=keeps_paths, since=since.get(p)) for p in wanted}
        report = replace(report, rooms=rooms)
        return dict(msgspec.to_builtins(report, str_keys=True))

    def _room(self, path: str, *, vm: str, keeps_paths: bool, since: tuple[str, str] | None) -> RoomReport:
        """Where the copy of this disk would be here: in what the guest left when it went (`since`: with which job,
        which disk), if that is there."""
        config = self.agent.config
        left = None if since is None else self.agent.left_images.find(*since)
        if left is not None:
            room = self.agent.host.image_room(left.path, config.qemu)
            return replace(room, left_bytes=left.size_bytes)
        folder = None if keeps_paths else config.disk_dir
        there = path if folder is None else str(folder / os.path.basename(path))
        room = self.agent.host.image_room(there, config.qemu)
        return replace(room, exists=room.exists and not self.agent.left_images.is_spent(there, vm))

    async def host_report(self, disks: list[DiskRef], *, accel: str, vm: str) -> HostReport:
        """This host as a place for that guest."""
        agent, config = self.agent, self.agent.config
        report = HostReport(
            name=config.name,
            agent_version=__version__,
            qemu_binary=config.qemu,
            memory_available_bytes=agent.host.memory_available_bytes(),
            host_cpu=agent.host.cpu(),
            userfaultfd=self.userfaultfd(),
            disks={disk.path: _disk_report(disk, config.name) for disk in disks},
            vms=frozenset(agent.vms) | frozenset(p.vm for p in agent.places.values() if not p.ended.is_set()),
            clock_offset_ms=0.0,
            tls_only=config.tls_only,
            ports_free={},  # the default is a read-only view, which does not go on the wire
            rooms={},
        )
        first, last = config.migration_ports
        if first and config.listen is not None:
            free = agent.host.free_port(first, last, config.data_address)
            report = replace(report, ports_free={first if free is None else free: free is not None})
        try:
            facts = await self.qemu_facts()
        except QemuError:
            return replace(report, qemu_found=False)
        models = {model.name: model.unavailable for model in facts.cpus.get(accel, ())}
        return replace(
            report,
            qemu_found=True,
            qemu_version=facts.version,
            machines={**{m: m for m in facts.machines}, **facts.aliases},
            cpu_models=models,
            accelerators=frozenset(facts.accelerators()),
            capabilities=frozenset(facts.capabilities),
            parameters=frozenset(facts.parameters),
        )

    def userfaultfd(self) -> bool | None:
        """Whether the kernel lets a guest run before its memory is here; None: not known."""
        if self._userfaultfd is None:
            self._userfaultfd = self.agent.host.has_userfaultfd()
        return self._userfaultfd

    # --- one plan ---

    async def plan(self, wanted: Wanted, kept: KeptVm, *, running_job: bool) -> Plan:
        """Raises UnknownHost, HostUnreachable, NotTrusted, QemuError; nothing was changed."""
        definition, name = kept.definition, self.agent.config.name
        chosen = disk_rules.choose(choices(definition), wanted.disks)
        copied = {disk.path for disk in chosen}
        local = await local_disks(kept, chosen, wanted.destination) if chosen else ()
        disks = [disk for disk in definition.disks if disk.path not in copied]
        here_task = asyncio.create_task(
            self.host_report(disks, accel=definition.accel, vm=wanted.vm), name="report-here"
        )
        guest_task = asyncio.create_task(self._guest(wanted, kept), name="report-guest")
        try:
            if wanted.destination == name:
                there = replace(await here_task, vms=frozenset())
            else:
                there = await self._there(wanted, kept, disks, local)
            here, (guest, source_names) = await here_task, await guest_task
        finally:
            await asyncio.gather(here_task, guest_task, return_exceptions=True)
        plan = _decide(
            wanted, here, there, replace(guest, disks=tuple(d for d in guest.disks if d.path not in copied)),
            source_names, running_job=running_job,
        )  # fmt: skip
        if chosen:
            from_spec = definition.spec is not None
            plan = _with_disks(plan, here, there, local, from_spec=from_spec, wanted=wanted)
        held = [one for one in self.agent.blockers.held(wanted.vm) if one.operation is Operation.MIGRATE]
        more = (
            Objection(
                code="blocked", side="source", message=f"it is blocked by {one.name}: {one.reason}",
                fix=f"vmferry unblock {wanted.vm} {one.name}",
            )
            for one in held
        )  # fmt: skip
        return replace(plan, objections=(*plan.objections, *more))

    async def _there(
        self, wanted: Wanted, kept: KeptVm, disks: list[DiskRef], copies: tuple[LocalDisk, ...]
    ) -> HostReport:
        link = self.agent.peers.link(wanted.destination)
        arguments = {
            "vm": wanted.vm,
            "accel": kept.definition.accel,
            "disks": [msgspec.to_builtins(disk) for disk in disks],
            "copies": [disk.path for disk in copies],
            "since": {disk.path: {"job": disk.since.job, "id": disk.id} for disk in copies if disk.since is not None},
            "keeps_paths": kept.definition.spec is None,
        }
        wire = await link.call("peer-report", arguments, deadline_s=REPORT_S)
        try:
            report = msgspec.convert(wire, HostReport, strict=False)
        except msgspec.ValidationError as error:
            raise HostUnreachable(
                f"the report of {wanted.destination} cannot be read: {error}", side="destination"
            ) from error
        offset_s = link.clock_offset_s
        return replace(report, clock_offset_ms=None if offset_s is None else offset_s * 1000)

    async def _guest(self, wanted: Wanted, kept: KeptVm) -> tuple[GuestReport, tuple[frozenset[str], ...]]:
        """The guest, and the capabilities and parameters that its very QEMU knows."""
        machine, definition = kept.require_machine(), kept.definition
        # One after another without a wait between them: each answer takes QEMU a fraction of a millisecond.
        status, info, capabilities, parameters, *listed = await machine.execute_all(GUEST_QUESTIONS)
        devices = _device_types(listed)
        spec = definition.spec or {}
        huge = bool((spec.get("memory_backend") or {}).get("hugepages"))
        guest = GuestReport(
            name=wanted.vm,
            machine=definition.machine,
            cpu_model=definition.cpu,
            accelerator=definition.accel,
            memory_bytes=definition.memory_bytes,
            page_bytes=2 << 20 if huge else 4096,
            disks=tuple(DiskUse(disk.path, disk.readonly) for disk in definition.disks),
            devices=devices,
            has_vfio=definition.has_vfio or any(name.startswith("vfio-") for name in devices),
            blocked_reasons=(
                *(str(reason) for reason in info.get("blocked-reasons", ())),
                *await other_disks(kept),
            ),
            run_state=str(status["status"]),
        )
        names = (frozenset(c["capability"] for c in capabilities), frozenset(parameters))
        return guest, names

    # --- while it runs ---

    def converge(self, attempt: SourceAttempt, info: dict[str, Any]) -> None:
        """New counters: progress for people, and the policy that may ask for postcopy or give up."""
        sample = _sample(attempt, info)
        samples = self._samples.setdefault(attempt.job, [])
        samples.append(sample)
        attempt.tracking.advance(samples)
        if Fact.START_POSTCOPY in attempt.facts or Fact.SWITCHOVER in attempt.facts:
            return
        mode, policy = _policy(attempt)
        after_passes = attempt.wanted.postcopy.get("after_passes")
        if after_passes is not None and mode is Mode.POSTCOPY and sample.passes > after_passes:
            attempt.note(Fact.START_POSTCOPY, text=f"{after_passes} passes are over", by="policy")
            return
        match core_converge.decide(samples, policy):
            case StartPostcopy(why):
                attempt.note(Fact.START_POSTCOPY, text=why, by="policy")
            case GiveUp(why):
                attempt.fail(MigrationFailed(f"given up: {why}", side="source"))
            case _:
                pass

    def forget(self, job: str) -> None:
        """The job is over: its samples are of no use any more."""
        self._samples.pop(job, None)


def _device_types(found: list[list[dict[str, Any]]]) -> frozenset[str]:
    """The types of the devices that were added to the board, as QEMU's object tree has them."""
    types = [str(entry["type"]) for entries in found for entry in entries]
    return frozenset(t.removeprefix("child<").removesuffix(">") for t in types if t.startswith("child<"))


def _disk_report(disk: DiskRef, host: str) -> DiskReport:
    """What this host sees under the path. Same image or not cannot be seen from one side: who defined the VM
    said whether its storage is shared."""
    try:
        status = os.stat(disk.path)
    except OSError:
        return DiskReport(exists=False)
    size = status.st_size if status.st_size else None
    return DiskReport(
        exists=True,
        writable=os.access(disk.path, os.W_OK),
        size_bytes=size if disk.format == "raw" else None,
        format=disk.format,
        identity="shared, as the VM's definition says" if disk.shared else f"{host}:{disk.path}",
        write_locked=_is_write_locked(disk.path),
    )


def _is_write_locked(path: str) -> bool | None:
    try:
        found = image_locks.in_use(path)
    except OSError:
        return None
    return None if found is None else "write" in found


def _fence_paths(guest: GuestReport, there: HostReport) -> tuple[str, ...]:
    """The images by whose locks this host can tell whether a QEMU over there runs the guest, or () if it cannot."""
    writable = [disk.path for disk in guest.disks if not disk.read_only]
    seen = [there.disks[path] for path in writable if path in there.disks]
    is_proved = len(seen) == len(writable) and all(disk.write_locked is True for disk in seen)
    return tuple(writable) if is_proved else ()


def _sample(attempt: SourceAttempt, info: dict[str, Any]) -> Sample:
    ram, disk = info.get("ram") or {}, info.get("disk") or {}
    page_bytes = int(ram.get("page-size", 4096))
    return Sample(
        elapsed_ms=float(info.get("total-time", 0)),
        sent_bytes=int(ram.get("transferred", 0)),
        # "remaining" beside the parts (QEMU 11 in postcopy) is the whole of the VM, device state included.
        remaining_bytes=max(
            int(ram.get("remaining", 0)) + int(disk.get("remaining", 0)), int(info.get("remaining", 0))
        ),
        throughput_bytes_per_s=float(ram.get("mbps", 0.0)) * 1e6 / 8,
        dirty_rate_bytes_per_s=float(ram.get("dirty-pages-rate", 0)) * page_bytes,
        passes=_passes(ram, page_bytes),
        throttle_percent=int(info.get("cpu-throttle-percentage", 0)),
        in_postcopy=Fact.PACKAGE_SENT in attempt.facts,
    )


def _passes(ram: dict[str, Any], page_bytes: int) -> int:
    """QEMU's pass, but 1 until every page was sent once: QEMU 11 counts three in the first tenth of a second,
    with nearly all memory still to go."""
    sent_pages = int(ram.get("normal", 0)) + int(ram.get("duplicate", 0))
    if sent_pages * page_bytes < int(ram.get("total", 0)):
        return 1
    return max(2, int(ram.get("dirty-sync-count", 2)))


def _decide(
    wanted: Wanted,
    here: HostReport,
    there: HostReport,
    guest: GuestReport,
    source_names: tuple[frozenset[str], ...],
    *,
    running_job: bool,
) -> Plan:
    """Pure: reports and the want -> the plan."""
    here = replace(here, capabilities=source_names[0], parameters=source_names[1])
    there = replace(there, cpu_models=_beyond(here, there))
    mode, start, why = _mode(wanted, here, there, guest)
    creds = f"vmferry-tls-{job_credentials.tag(wanted.job)}"
    tls = None if wanted.clear_text else TlsChoice(creds, creds, job_credentials.tls_hostname(wanted.job))
    names = [report.option_names() or frozenset() for report in (here, there)]
    settings = with_switchover_ack(wanted.options, has_vfio=guest.has_vfio, known=names)
    wish = Wish(
        mode=mode,
        multifd_channels=wanted.multifd_channels,
        tls=tls,
        settings=settings,
        ports=tuple(there.ports_free),
    )
    found = preflight.accept(preflight.check(here, there, guest, wish), frozenset(wanted.accept))
    blocking = preflight.blockers(found)
    options = build(
        mode,
        settings,
        source_known=names[0],
        destination_known=names[1],
        tls=tls,
        multifd_channels=wanted.multifd_channels,
    )
    if isinstance(options, Refused):
        assert blocking, "preflight lists what options.build refuses"
        options = _NO_OPTIONS
    policy = ConvergePolicy(start=start, postcopy_after_ms=wanted.postcopy.get("after_ms"))
    return Plan(
        mode=mode,
        why=why,
        policy=policy,
        options=options,
        objections=blocking,
        remarks=tuple(o for o in found if o.weight is not Weight.BLOCKER),
        stops_first=_stops_first(wanted, here, guest),
        fence_paths=_fence_paths(guest, there),
        multifd=wanted.multifd_channels > 0 or wanted.options.get("postcopy-preempt") is True,
    )


def _with_disks(
    plan: Plan, here: HostReport, there: HostReport, copies: tuple[LocalDisk, ...], *, from_spec: bool, wanted: Wanted
) -> Plan:
    """The plan with these disks copied, and what speaks against that."""
    paths = {disk.path: there.rooms[disk.path].path for disk in copies if disk.path in there.rooms}
    left = frozenset(disk.path for disk in copies if disk_rules.is_left(disk, there.rooms.get(disk.path)))
    against = disk_rules.objections(here.name, there.name, copies, there.rooms, from_spec=from_spec,
        verify=wanted.verify_disks, only_changes=wanted.only_changes,
        takes_bitmaps=wanted.options.get("dirty-bitmaps") is True,
    )  # fmt: skip
    return replace(
        plan,
        copies=copies,
        image_paths=paths,
        left_there=left,
        objections=(*plan.objections, *against),
        remarks=(*plan.remarks, *disk_rules.remarks(copies, there.rooms, clear_text=wanted.clear_text)),
        fence_paths=(),  # each host has images of its own: a lock on one says nothing of the other
    )


_NO_OPTIONS = AttemptOptions({}, {}, {}, {}, {}, ())


def taken_over(journalled: Mapping[str, Any]) -> Plan:
    """What of a plan is still to be carried out by an agent that was started since its disks began to be copied: the
    options are set, and the images are there."""
    return Plan(
        mode=Mode(journalled["mode"]),
        why=str(journalled["why"]),
        policy=ConvergePolicy(start=PostcopyStart.NEVER),
        options=_NO_OPTIONS,
        objections=(),
        remarks=(),
        multifd=bool(journalled["multifd"]),
        stops_first=bool(journalled["stops_first"]),
    )


def _beyond(here: HostReport, there: HostReport) -> dict[str, tuple[str, ...] | None] | None:
    """What each CPU model lacks there and not here: what both lack the guest never had."""
    if there.cpu_models is None:
        return None
    mine = here.cpu_models or {}
    return {
        model: lacking and tuple(feature for feature in lacking if feature not in (mine.get(model) or ()))
        for model, lacking in there.cpu_models.items()
    }


def _policy(attempt: SourceAttempt) -> tuple[Mode, ConvergePolicy]:
    """The plan's, or after a restart of the agent, which forgets the plan, what was asked for by name."""
    if attempt.plan is not None and not attempt.was_restored:
        return attempt.plan.mode, attempt.plan.policy
    wanted = attempt.wanted
    if wanted.mode != Mode.POSTCOPY:
        return Mode.PRECOPY, ConvergePolicy(start=PostcopyStart.NEVER)
    return Mode.POSTCOPY, ConvergePolicy(start=_asked_start(wanted), postcopy_after_ms=wanted.postcopy.get("after_ms"))


def _asked_start(wanted: Wanted) -> PostcopyStart:
    if wanted.postcopy.get("by_hand"):
        return PostcopyStart.HAND
    if wanted.postcopy.get("after_ms") is not None:
        return PostcopyStart.TIME
    if wanted.postcopy.get("after_passes") is not None:
        return PostcopyStart.HAND
    return PostcopyStart.FIRST_PASS


def _stops_first(wanted: Wanted, here: HostReport, guest: GuestReport) -> bool:
    """Only a postcopy that was asked for gets so far with such a guest: `auto` takes precopy for it."""
    if "tcg-loses-writes" in wanted.accept or wanted.mode != Mode.POSTCOPY:
        return False
    return hazards.stops_first(Mode.POSTCOPY, guest.accelerator, here.qemu_version)


def _mode(wanted: Wanted, here: HostReport, there: HostReport, guest: GuestReport) -> tuple[Mode, PostcopyStart, str]:
    start = _asked_start(wanted)
    if wanted.mode == Mode.POSTCOPY:
        stopped = _stops_first(wanted, here, guest)
        return Mode.POSTCOPY, start, f"it was asked for; {hazards.WHY_STOPPED}" if stopped else "it was asked for"
    if wanted.mode == Mode.PRECOPY:
        return Mode.PRECOPY, PostcopyStart.NEVER, "it was asked for"
    if hazards.standby_loses_writes(guest.accelerator, here.qemu_version):
        return Mode.PRECOPY, PostcopyStart.NEVER, hazards.WHY_PRECOPY
    choice = core_converge.pick_mode(
        ModeInputs(
            memory_bytes=guest.memory_bytes or 0,
            source_version=here.qemu_version or (0, 0),
            destination_version=there.qemu_version or (0, 0),
            userfaultfd_source=here.userfaultfd,
            userfaultfd_destination=there.userfaultfd,
            has_vfio=guest.has_vfio,
            multifd_channels=wanted.multifd_channels,
        )
    )
    return choice.mode, choice.start, choice.why
