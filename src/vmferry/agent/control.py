"""Commands of people and scripts: the control socket's QMP commands.

Each command is an async function of the agent and its arguments; `COMMANDS` is the table. A command about a VM
that lives on another known host is passed on to that host's agent (`_where`), so every command works from any
host.

Rule 1: an argument that is unknown, missing or of the wrong type is refused by name, before anything is done.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from vmferry import limits
from vmferry.agent import (
    blockers,
    inspection,
    job_commands,
    job_ids,
    rescue_commands,
    restored_disks,
    restores,
    saves,
    snapshot_commands,
    vm_commands,
)
from vmferry.agent.events import EVENTS
from vmferry.agent.job_book import JobInfo
from vmferry.agent.plan_disks import choices, origin
from vmferry.agent.schema import Schema
from vmferry.agent.source import SourceAttempt
from vmferry.agent.wants import Wanted
from vmferry.core import disks as disk_rules
from vmferry.core import policy as policies
from vmferry.core.blockers import Operation
from vmferry.core.options import Mode, find_option, policy_objection
from vmferry.core.policy import FailurePolicy
from vmferry.errors import Busy, UnknownJob, UnknownVm, UsageError, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.qmp.server import CommandNotFound

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")

Body = Callable[["Agent", Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoArguments:
    """A command without arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmArgument:
    """A command about one VM."""

    vm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateArguments:
    """`vm-migrate` and `vm-plan`."""

    vm: str
    destination: str
    job: str = ""
    """Minted by the client, so that asking twice is asking once; made here if empty."""
    mode: str = "auto"
    settings: list[str] = field(default_factory=list)
    """'NAME=VALUE' of the option table."""
    config: dict[str, Any] = field(default_factory=dict)
    """The same options by QEMU's names and with QEMU's own types, whole: what is not named has vmferry's default."""
    multifd: int = 0
    clear_text: bool = False
    postcopy_after_passes: int | None = None
    postcopy_after_ms: int | None = None
    postcopy_by_hand: bool = False
    """A postcopy begins only when `vm-start-postcopy` asks for it."""
    accept: list[str] = field(default_factory=list)
    """Codes of blockers that the person takes upon themselves."""
    disks: str | None = None
    """'copy': every disk that is local goes with the guest."""
    verify_disks: bool = False
    disk: list[str] = field(default_factory=list)
    """'ID=copy' or 'ID=shared' for one disk."""
    only_changes: bool = False
    """The guest goes back to where it came from with its disks: with what changed since, or not at all."""
    keep_images_ms: int | None = None
    """How long the images that the guest leaves behind are kept while it runs there; null: nothing takes them away."""
    policy: dict[str, str] = field(default_factory=dict)
    """What to do in trouble, by the names of `core.policy`."""
    auto_finalize: bool = True
    """False: the switchover waits, the guest paused, until `job-finalize`; for a minute, then the guest goes back."""
    auto_dismiss: bool = True
    """False: the job stays in `query-jobs` with its result until `job-dismiss`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetArguments:
    """`vm-set`."""

    vm: str
    settings: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListArguments:
    """`vm-list`."""

    local: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobArguments:
    """`job-status`: by VM or by job."""

    vm: str = ""
    job: str = ""


async def migrate(agent: Agent, arguments: MigrateArguments) -> dict[str, Any]:
    """Wants a migration. Returns the job at once; events tell how it goes."""
    job = job_ids.wanted(arguments.job)
    existing = agent.attempts.get(arguments.vm)
    if existing is not None and existing.job == job:
        return existing.brief()
    if _is_over_here(agent, arguments):
        return agent.results[job]
    job_ids.require_new(agent, job)
    with agent.claims.hold(arguments.vm, "sent somewhere"), agent.claims.hold(f"job {job}", "begun"):
        wanted = await wanted_from(agent, arguments, job)
        kept = agent.vms[arguments.vm]
        await agent.journal.append(Entry.WANTED, job, msgspec.to_builtins(wanted))
        attempt = SourceAttempt(agent, wanted, kept)
        agent.run_attempt(attempt)
    return attempt.brief()


async def wanted_from(agent: Agent, arguments: MigrateArguments, job: str, *, is_plan: bool = False) -> Wanted:
    """Checks what can be checked here and now. Raises Busy, UsageError …; nothing was done."""
    kept = agent.vms[arguments.vm]
    machine = kept.require_machine()
    # A plan lists what people hold with all other objections.
    agent.blockers.require_free(arguments.vm, Operation.MIGRATE, people=not is_plan)
    if arguments.destination != agent.config.name and arguments.destination not in agent.config.peers:
        agent.peers.link(arguments.destination)  # raises, naming the known hosts
    if arguments.mode not in ("auto", *Mode):
        raise UsageError(f"mode {arguments.mode!r} is not possible; allowed: auto, {', '.join(Mode)}")
    agent.jobs.make_room(auto_dismiss=arguments.auto_dismiss)
    options = _options(arguments)
    _check_postcopy(arguments)
    disks = disk_rules.parse(arguments.disks, arguments.disk)
    disk_rules.choose(choices(kept.definition), disks)
    policy = FailurePolicy().changed(job_commands.policy_changes(arguments.policy))
    if arguments.keep_images_ms is not None and arguments.keep_images_ms < 0:
        raise UsageError(f"images cannot be kept for {arguments.keep_images_ms} ms")
    postcopy = {
        "after_passes": arguments.postcopy_after_passes,
        "after_ms": arguments.postcopy_after_ms,
        "by_hand": 1 if arguments.postcopy_by_hand else None,
    }
    return Wanted(
        job=job,
        vm=arguments.vm,
        destination=arguments.destination,
        generation=kept.generation + 1,
        mode=arguments.mode,
        options=options,
        multifd_channels=arguments.multifd,
        clear_text=arguments.clear_text or agent.config.clear_text,
        postcopy={k: v for k, v in postcopy.items() if v is not None},
        accept=tuple(arguments.accept),
        policy=policy,
        disks=disks,
        verify_disks=arguments.verify_disks,
        only_changes=arguments.only_changes,
        keep_images_s=None if arguments.keep_images_ms is None else arguments.keep_images_ms / 1000,
        auto_finalize=arguments.auto_finalize,
        auto_dismiss=arguments.auto_dismiss,
        wanted_s=agent.clock.wall_s(),
        running_before=await machine.run_state() == "running",
    )


def _options(arguments: MigrateArguments) -> dict[str, Any]:
    """What the person chose, whole. Raises UsageError for what can never be set, or may not be."""
    policies_among = [text for text in arguments.settings if text.partition("=")[0] in policies.NAMES]
    if policies_among:
        raise UsageError(f"{policies_among[0]} is a policy and no option of QEMU; it is given as one")
    options, _ = job_commands.split_settings(arguments.settings, arguments.config)
    for name, value in options.items():
        objection = policy_objection(find_option(name), value)
        if objection is not None:
            raise UsageError(f"{name}: {objection}")
    return options


def _check_postcopy(arguments: MigrateArguments) -> None:
    """Raises UsageError for a start of postcopy that cannot be meant."""
    wishes = {"passes": arguments.postcopy_after_passes, "ms": arguments.postcopy_after_ms}
    given = {unit: value for unit, value in wishes.items() if value is not None}
    for unit, value in given.items():
        if value < 0:
            raise UsageError(f"postcopy after {value} {unit} is not possible; 0 means at once")
    if given and arguments.mode == Mode.PRECOPY:
        raise UsageError(
            "a precopy never switches to postcopy, so it cannot be said when",
            hint="say --mode postcopy, or leave out --postcopy-after and --postcopy-after-passes",
        )


async def plan(agent: Agent, arguments: MigrateArguments) -> dict[str, Any]:
    """Asks both hosts whether and how the guest could go; changes nothing."""
    wanted = await wanted_from(agent, arguments, "plan", is_plan=True)
    found = await agent.planner.plan(wanted, agent.vms[arguments.vm], running_job=False)
    return found.wire(arguments.vm, agent.config.name, arguments.destination)


async def cancel(agent: Agent, arguments: VmArgument) -> dict[str, Any]:
    """`job-cancel` by the VM's name. Raises CancelRefused with the reason after the grant; a second cancel, and one
    after the end, change nothing."""
    attempt = agent.attempts.get(arguments.vm)
    if attempt is None:
        raise UsageError(f"{arguments.vm} has no migration to cancel")
    await job_commands.cancel(agent, attempt)
    return attempt.brief()


async def change(agent: Agent, arguments: SetArguments) -> dict[str, Any]:
    """`job-change` by the VM's name."""
    agent.blockers.require(arguments.vm, Operation.SET)
    attempt = agent.attempts.get(arguments.vm)
    return {"set": await job_commands.change(attempt, arguments.settings, {}, vm=arguments.vm)}


async def start_postcopy(agent: Agent, arguments: VmArgument) -> dict[str, Any]:
    """`job-change` of the mode by the VM's name. Raises OptionLocked for a precopy, UsageError without a migration."""
    attempt = agent.attempts.get(arguments.vm)
    if attempt is None or attempt.ended.is_set():
        raise UsageError(f"{arguments.vm} has no migration on its way")
    agent.blockers.require(arguments.vm, Operation.SET)
    await job_commands.start_postcopy(agent, attempt)
    return attempt.brief()


async def job_status(agent: Agent, arguments: JobArguments) -> dict[str, Any]:
    """The newest migration of a VM, or one by its id: as it stands, or as it ended."""
    if arguments.job in agent.jobs.dismissed:
        raise UnknownJob(f"the job {arguments.job} was dismissed")
    restored = agent.restores.status(job=arguments.job) if arguments.job else None
    if restored is not None:
        return restored
    saved = agent.saves.status(job=arguments.job) if arguments.job else None
    if saved is not None:
        return saved
    chore = agent.chores.status(job=arguments.job) if arguments.job else None
    if chore is not None:
        return chore
    for attempt in agent.attempts.values():
        if attempt.job in agent.jobs.dismissed:
            continue
        if arguments.job == attempt.job or (arguments.vm and arguments.vm == attempt.vm):
            return attempt.wire()
    if arguments.job in agent.results:
        return agent.results[arguments.job]
    for wire in reversed(list(agent.results.values())):
        if arguments.vm and wire["vm"] == arguments.vm and wire["job"] not in agent.jobs.dismissed:
            return dict(wire)
    if arguments.vm in agent.vms:
        arrived = await vm_commands.arrival(agent, arguments.vm)
        if arrived is not None:
            return arrived
        return {"vm": arguments.vm, "job": None, "status": "none", "outcome": None, "sentence": "no migration"}
    raise UnknownVm(f"no migration of {arguments.vm or arguments.job} is known here")


FORWARD_S = 30.0


@dataclass(frozen=True, slots=True)
class CommandRow:
    """One command: its argument type, its body, and whether it belongs to the host that keeps the VM."""

    arguments: type
    body: Body
    at_vm: bool = False
    of_job: bool = False
    """About the VM's migration: that is conducted by its source, also while the guest runs elsewhere already."""
    returns: object = Any
    """The type of the answer, for the schema."""
    of_place: bool = False
    """Can be said of a VM that is only awaited here, too."""
    forward_s: float = FORWARD_S
    """How long the other host may take with it."""


async def _list(agent: Agent, arguments: ListArguments) -> dict[str, Any]:
    return await vm_commands.list_vms(agent, local=arguments.local)


async def _doctor(agent: Agent, arguments: NoArguments) -> dict[str, Any]:
    return await vm_commands.doctor(agent)


async def _agent_status(agent: Agent, arguments: NoArguments) -> dict[str, Any]:
    return vm_commands.agent_status(agent)


async def _vm_status(agent: Agent, arguments: VmArgument) -> dict[str, Any]:
    return await vm_commands.vm_status(agent, arguments.vm)


async def _inspect(agent: Agent, arguments: VmArgument) -> dict[str, Any]:
    return await inspection.inspect(agent, arguments.vm)


async def _origin(agent: Agent, arguments: VmArgument) -> dict[str, Any]:
    return await origin(agent.vms[arguments.vm])


async def _stop(agent: Agent, arguments: vm_commands.StopArguments) -> dict[str, Any]:
    return await vm_commands.stop_vm(agent, arguments)


async def _commands(agent: Agent, arguments: NoArguments) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted((*COMMANDS, "qmp_capabilities"))]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandName:
    """One line of `query-commands`."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilitiesArguments:
    """`qmp_capabilities`, which the session itself answers."""

    enable: list[Literal["oob"]] = field(default_factory=list)


async def _schema(agent: Agent, arguments: NoArguments) -> list[dict[str, Any]]:
    return schema_wire()


@functools.cache
def schema_wire() -> list[dict[str, Any]]:
    """The answer to `query-qmp-schema`."""
    schema = Schema()
    schema.command("qmp_capabilities", CapabilitiesArguments, NoArguments)
    for name, row in COMMANDS.items():
        schema.command(name, row.arguments, row.returns)
    for name, data in EVENTS.items():
        schema.event(name, data)
    return schema.wire()


COMMANDS: dict[str, CommandRow] = {
    "vm-run": CommandRow(vm_commands.RunArguments, vm_commands.run_vm),
    "vm-adopt": CommandRow(vm_commands.AdoptArguments, vm_commands.adopt_vm),
    "vm-list": CommandRow(ListArguments, _list),
    "vm-status": CommandRow(VmArgument, _vm_status, at_vm=True, of_place=True),
    "vm-stop": CommandRow(vm_commands.StopArguments, _stop, at_vm=True),
    "vm-migrate": CommandRow(MigrateArguments, migrate, at_vm=True),
    "vm-plan": CommandRow(MigrateArguments, plan, at_vm=True),
    "vm-origin": CommandRow(VmArgument, _origin, at_vm=True),
    "vm-restore": CommandRow(restores.RestoreArguments, restores.restore),
    "restore-status": CommandRow(restores.RestoreStatusArguments, restores.restore_status),
    "restored-disks": CommandRow(NoArguments, restored_disks.listed),
    "restored-disk-remove": CommandRow(restored_disks.RemoveArguments, restored_disks.remove),
    "vm-save": CommandRow(saves.SaveArguments, saves.save, at_vm=True),
    "snapshots": CommandRow(NoArguments, snapshot_commands.snapshots),
    "repository-init": CommandRow(NoArguments, snapshot_commands.init),
    "snapshot-verify": CommandRow(snapshot_commands.VerifyArguments, snapshot_commands.verify),
    "snapshot-forget": CommandRow(snapshot_commands.SnapshotName, snapshot_commands.forget),
    "snapshot-prune": CommandRow(snapshot_commands.PruneArguments, snapshot_commands.prune),
    "snapshot-export": CommandRow(snapshot_commands.FileArguments, snapshot_commands.export),
    "snapshot-import": CommandRow(snapshot_commands.FileArguments, snapshot_commands.load),
    "vm-cancel": CommandRow(VmArgument, cancel, at_vm=True, of_job=True),
    "vm-set": CommandRow(SetArguments, change, at_vm=True, of_job=True),
    "vm-start-postcopy": CommandRow(VmArgument, start_postcopy, at_vm=True, of_job=True),
    "job-status": CommandRow(JobArguments, job_status, at_vm=True, of_job=True),
    "blocker-add": CommandRow(blockers.AddArguments, blockers.add, at_vm=True),
    "blocker-remove": CommandRow(blockers.RemoveArguments, blockers.remove, at_vm=True),
    "query-jobs": CommandRow(NoArguments, job_commands.query_jobs, returns=list[JobInfo]),
    "job-cancel": CommandRow(job_commands.JobId, job_commands.job_cancel, returns=JobInfo),
    "job-pause": CommandRow(job_commands.JobId, job_commands.job_pause, returns=JobInfo),
    "job-resume": CommandRow(job_commands.JobId, job_commands.job_resume, returns=JobInfo),
    "job-complete": CommandRow(job_commands.JobId, job_commands.job_complete, returns=JobInfo),
    "job-finalize": CommandRow(job_commands.JobId, job_commands.job_finalize, returns=JobInfo),
    "job-dismiss": CommandRow(job_commands.JobId, job_commands.job_dismiss),
    "job-change": CommandRow(job_commands.ChangeArguments, job_commands.job_change, returns=JobInfo),
    "rescue-bring-back": CommandRow(
        rescue_commands.RescueArguments, rescue_commands.bring_back, at_vm=True, of_job=True, forward_s=limits.RESCUE_S
    ),
    "rescue-throw-away": CommandRow(
        rescue_commands.RescueArguments, rescue_commands.throw_away, at_vm=True, of_job=True, forward_s=limits.RESCUE_S
    ),
    "rescue-feed": CommandRow(
        rescue_commands.FeedArguments, rescue_commands.feed, at_vm=True, of_job=True, forward_s=limits.RESCUE_S
    ),
    "vm-inspect": CommandRow(VmArgument, _inspect, at_vm=True, of_job=True, of_place=True),
    "vm-recover": CommandRow(
        rescue_commands.FeedArguments, rescue_commands.recover, at_vm=True, of_job=True, forward_s=limits.RESCUE_S
    ),
    "vm-resolve": CommandRow(rescue_commands.ResolveArguments, rescue_commands.resolve, at_vm=True, of_job=True),
    "doctor": CommandRow(NoArguments, _doctor),
    "agent-status": CommandRow(NoArguments, _agent_status),
    "query-commands": CommandRow(NoArguments, _commands, returns=list[CommandName]),
    "query-qmp-schema": CommandRow(NoArguments, _schema),
}


async def handle(agent: Agent, name: str, arguments: dict[str, Any], *, forward: bool = True) -> Any:
    """One command. Raises CommandNotFound or the command's own error."""
    row = COMMANDS.get(name)
    if row is None:
        raise CommandNotFound(name)
    decoded = decode(name, row.arguments, arguments)
    vm = getattr(decoded, "vm", "")
    if row.at_vm and not vm and not getattr(decoded, "job", ""):
        raise UsageError(f"{name} needs the name of a VM", hint="'vmferry ls' shows every VM on every known host")
    if isinstance(decoded, MigrateArguments) and row.body is migrate and _is_over_here(agent, decoded):
        return agent.results[decoded.job]  # the guest may be elsewhere by now, and the answer is here
    if row.at_vm and vm and forward:
        host = await _where(agent, vm, of_job=row.of_job)
        if host is not None:
            link = agent.peers.link(host)
            return await link.call("peer-forward", {"command": name, "arguments": arguments}, deadline_s=row.forward_s)
    if row.at_vm and vm and not row.of_job and vm not in agent.vms:
        place = agent.place_of(vm)
        if place is None or place.ended.is_set():
            raise UnknownVm(f"no known host has a VM named {vm}")
        if not row.of_place:
            raise Busy(
                f"{vm} is awaited here from {place.place.source}, which keeps it until it has arrived",
                hint=f"'vmferry status {vm}' shows how it stands; what is to be done to it needs the agent of "
                f"{place.place.source}",
            )
    return await row.body(agent, decoded)


def _is_over_here(agent: Agent, wish: MigrateArguments) -> bool:
    """Whether this repeats what ended here: the client did not hear of it."""
    return bool(wish.job) and agent.results.get(wish.job, {}).get("vm") == wish.vm


def decode(command: str, kind: type, arguments: dict[str, Any]) -> Any:
    """QMP arguments -> the command's dataclass. Raises UsageError naming what is wrong."""
    known = {f.name.replace("_", "-"): f.name for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in arguments.items():
        if key.replace("_", "-") not in known:
            raise UsageError(f"{command} has no argument {key!r} (it has: {', '.join(known) or 'none'})")
        values[known[key.replace("_", "-")]] = value
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{command}: {error}") from error


async def _where(agent: Agent, vm: str, *, of_job: bool) -> str | None:
    """The other host that the command belongs to, or None if it is this one. Raises UnknownVm.

    A VM that is on its way is where its migration is conducted: at the source, until that has ended. Only while
    nobody is heard who has it, it is where it is awaited."""
    current, place = agent.attempts.get(vm), agent.place_of(vm)
    if current is not None and not current.ended.is_set():
        return None
    if of_job and place is not None and not place.ended.is_set():
        return place.place.source
    if vm in agent.vms:
        return None
    answers = await asyncio.gather(
        *(link.call("peer-has", {"vm": vm}, deadline_s=3.0) for link in agent.peers.links.values()),
        return_exceptions=True,
    )
    found: list[tuple[int, str, bool]] = []
    silent: list[str] = []
    awaiting = []
    for host, answer in zip(agent.peers.links, answers, strict=True):
        if isinstance(answer, VmferryError):
            silent.append(f"{host} ({answer})")
        elif isinstance(answer, BaseException):
            raise answer
        elif answer.get("has"):
            found.append((int(answer["generation"]), host, bool(answer.get("sends"))))
        elif answer.get("awaits"):
            awaiting.append(host)
    if found:
        generation, host, sends = max(found)
        # What brought it there was conducted here, and nothing has moved it since, nor is about to.
        was_ours = current is not None and current.wanted.generation == generation and not sends
        return None if of_job and was_ours else host
    if current is not None or any(wire["vm"] == vm for wire in agent.results.values()):
        return None
    if place is not None and not place.ended.is_set():
        return None
    if awaiting and not of_job:
        return awaiting[0]
    hint = f"these hosts did not answer: {'; '.join(silent)}" if silent else None
    raise UnknownVm(f"no known host has a VM named {vm}", hint=hint)
