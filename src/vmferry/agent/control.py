"""Commands of people and scripts: the control socket's QMP commands.

Each command is an async function of the agent and its arguments; `COMMANDS` is the table. A command about a VM
that lives on another known host is passed on to that host's agent (`_where`), so every command works from any
host.

Rule 1: an argument that is unknown, missing or of the wrong type is refused by name, before anything is done.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry import limits
from vmferry.agent import inspection, rescue_commands, source_disks, vm_commands
from vmferry.agent.plan_disks import choices
from vmferry.agent.source import SourceAttempt
from vmferry.agent.wants import Wanted
from vmferry.core import disks as disk_rules
from vmferry.core import policy as policies
from vmferry.core.facts import Fact
from vmferry.core.option_table import Role
from vmferry.core.options import Mode, parse_setting, policy_objection, refusal
from vmferry.core.policy import FailurePolicy, parse_policy
from vmferry.core.status import is_over, source_status
from vmferry.errors import Busy, CancelRefused, OptionLocked, UnknownVm, UsageError, VmferryError
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
    multifd: int = 0
    clear_text: bool = False
    postcopy_after_passes: int | None = None
    postcopy_after_ms: int | None = None
    accept: list[str] = field(default_factory=list)
    """Codes of blockers that the person takes upon themselves."""
    disks: str | None = None
    """'copy': every disk that is local goes with the guest."""
    verify_disks: bool = False
    disk: list[str] = field(default_factory=list)
    """'ID=copy' or 'ID=shared' for one disk."""
    policy: dict[str, str] = field(default_factory=dict)
    """What to do in trouble, by the names of `core.policy`."""


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
    job = arguments.job or uuid.uuid4().hex
    existing = agent.attempts.get(arguments.vm)
    if existing is not None and existing.job == job:
        return existing.brief()
    if job in agent.results:
        return agent.results[job]
    with agent.claims.hold(arguments.vm, "sent somewhere"):
        wanted = await wanted_from(agent, arguments, job)
        kept = agent.vms[arguments.vm]
        await agent.journal.append(Entry.WANTED, job, msgspec.to_builtins(wanted))
        attempt = SourceAttempt(agent, wanted, kept)
        agent.run_attempt(attempt)
    return attempt.brief()


async def wanted_from(agent: Agent, arguments: MigrateArguments, job: str) -> Wanted:
    """Checks what can be checked here and now. Raises Busy, UsageError …; nothing was done."""
    kept = agent.vms[arguments.vm]
    machine = kept.require_machine()
    current = agent.attempts.get(arguments.vm)
    if current is not None and not current.ended.is_set():
        raise Busy(f"{arguments.vm} is on its way to {current.wanted.destination} already (job {current.job})")
    place = agent.place_of(arguments.vm)
    if place is not None and not place.ended.is_set():
        raise Busy(f"{arguments.vm} is still arriving from {place.place.source} (job {place.job})")
    if arguments.destination != agent.config.name and arguments.destination not in agent.config.peers:
        agent.peers.link(arguments.destination)  # raises, naming the known hosts
    if arguments.mode not in ("auto", *Mode):
        raise UsageError(f"mode {arguments.mode!r} is not possible; allowed: auto, {', '.join(Mode)}")
    options: dict[str, Any] = {}
    for text in arguments.settings:
        option, value = parse_setting(text)
        objection = policy_objection(option, value)
        if objection is not None:
            raise UsageError(f"{text}: {objection}")
        options[option.name] = value
    _check_postcopy(arguments)
    disks = disk_rules.parse(arguments.disks, arguments.disk)
    disk_rules.choose(choices(kept.definition), disks)
    policy = FailurePolicy().changed(_policy_changes(arguments.policy))
    postcopy = {
        "after_passes": arguments.postcopy_after_passes,
        "after_ms": arguments.postcopy_after_ms,
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
        wanted_s=agent.clock.wall_s(),
        running_before=await machine.run_state() == "running",
    )


def _policy_changes(policies: Mapping[str, str]) -> dict[str, Any]:
    """Fields of `FailurePolicy` in their plain form. Raises UsageError naming what is possible."""
    changes: dict[str, Any] = {}
    for name, text in policies.items():
        try:
            changes |= parse_policy(name, text)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error
    return changes


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
    wanted = await wanted_from(agent, arguments, "plan")
    found = await agent.planner.plan(wanted, agent.vms[arguments.vm], running_job=False)
    return found.wire(arguments.vm, agent.config.name, arguments.destination)


async def cancel(agent: Agent, arguments: VmArgument) -> dict[str, Any]:
    """Cancels the VM's migration. Raises CancelRefused with the reason after the grant; a second cancel, and
    one after the end, change nothing.

    A want is durable before anything follows from it, and the grant may go out while the disk is written:

    1. a cancel is asked for, and nothing speaks against it  2. CANCEL_WANTED is being written  3. the grant is sent
    4. it is too late: CANCEL_REFUSED is written  5. the person hears that  6. the agent restarts

    An agent that dies before 4 has told nobody anything and reads a cancel, which after 3 only asks the destination
    whether it ran the guest. After 4 it reads none: what a person was told holds."""
    attempt = agent.attempts.get(arguments.vm)
    if attempt is None:
        raise UsageError(f"{arguments.vm} has no migration to cancel")
    if not attempt.ended.is_set() and attempt.want_cancel():
        await agent.journal.append(Entry.CANCEL_WANTED, attempt.job)
        try:
            is_new = attempt.want_cancel()
        except CancelRefused:
            if Fact.CANCEL not in attempt.facts:  # what was accepted is not taken back by another one's refusal
                await agent.journal.append(Entry.CANCEL_REFUSED, attempt.job)
            raise
        if is_new:
            attempt.note(Fact.CANCEL, by="person")
    return attempt.brief()


async def change(agent: Agent, arguments: SetArguments) -> dict[str, Any]:
    """Changes options and policies of the running migration, options where their windows allow it. Raises
    OptionLocked, and HostUnreachable when the destination did not hear of a policy: this side has it then."""
    pairs = [text.partition("=") for text in arguments.settings]
    changes = _policy_changes({name: value for name, _, value in pairs if name in policies.NAMES})
    settings = [text for text in arguments.settings if text.partition("=")[0] not in policies.NAMES]
    for text in settings:
        parse_setting(text)  # a value that can never be set is said to be so, whatever is going on
    attempt = agent.attempts.get(arguments.vm)
    if attempt is None or attempt.ended.is_set():
        raise OptionLocked(
            f"{arguments.vm} has no migration whose options could change",
            hint="give options when it starts: vmferry migrate NAME HOST --set NAME=VALUE",
        )
    values: dict[str, Any] = {}
    for text in settings:
        option, value = parse_setting(text)
        reason = policy_objection(option, value) or refusal(
            option,
            source_status(attempt.facts),
            role=Role.SOURCE,
            cleanup_done=is_over(attempt.facts),
            attempt=attempt.wanted.generation,
            has_attempt=True,
        )
        if reason is not None and not (option.name == "max-bandwidth" and source_disks.are_copied(attempt)):
            raise OptionLocked(f"{option.name} cannot change now: {reason}")
        values[option.name] = value
    if values:
        await attempt.machine.execute("migrate-set-parameters", values)
        if "max-bandwidth" in values:
            await source_disks.change_speed(attempt, int(values["max-bandwidth"]))
    if changes:
        await attempt.change_policy(changes)
    round_no = attempt.facts.last_round(Fact.SET_OPTION) + 1
    attempt.note(Fact.SET_OPTION, round_no=round_no, text=", ".join(arguments.settings), by="person")
    return {"set": {**values, **changes}}


async def start_postcopy(agent: Agent, arguments: VmArgument) -> dict[str, Any]:
    """Asks for the switch to postcopy now. Raises OptionLocked for a precopy, and UsageError without a migration."""
    attempt = agent.attempts.get(arguments.vm)
    if attempt is None or attempt.ended.is_set():
        raise UsageError(f"{arguments.vm} has no migration on its way")
    mode = attempt.wanted.mode if attempt.plan is None else attempt.plan.mode
    if mode == Mode.PRECOPY:
        raise OptionLocked(f"{arguments.vm}: this migration was started as {mode}")
    if Fact.START_POSTCOPY not in attempt.facts:
        await agent.journal.append(Entry.POSTCOPY_WANTED, attempt.job)
        attempt.note(Fact.START_POSTCOPY, text="by hand", by="person")
    return attempt.brief()


async def job_status(agent: Agent, arguments: JobArguments) -> dict[str, Any]:
    """The newest migration of a VM, or one by its id: as it stands, or as it ended."""
    for attempt in agent.attempts.values():
        if arguments.job == attempt.job or (arguments.vm and arguments.vm == attempt.vm):
            return attempt.wire()
    if arguments.job in agent.results:
        return agent.results[arguments.job]
    for wire in reversed(list(agent.results.values())):
        if arguments.vm and wire["vm"] == arguments.vm:
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


async def _stop(agent: Agent, arguments: vm_commands.StopArguments) -> dict[str, Any]:
    return await vm_commands.stop_vm(agent, arguments)


async def _commands(agent: Agent, arguments: NoArguments) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted(COMMANDS)]


COMMANDS: dict[str, CommandRow] = {
    "vm-run": CommandRow(vm_commands.RunArguments, vm_commands.run_vm),
    "vm-adopt": CommandRow(vm_commands.AdoptArguments, vm_commands.adopt_vm),
    "vm-list": CommandRow(ListArguments, _list),
    "vm-status": CommandRow(VmArgument, _vm_status, at_vm=True, of_place=True),
    "vm-stop": CommandRow(vm_commands.StopArguments, _stop, at_vm=True),
    "vm-migrate": CommandRow(MigrateArguments, migrate, at_vm=True),
    "vm-plan": CommandRow(MigrateArguments, plan, at_vm=True),
    "vm-cancel": CommandRow(VmArgument, cancel, at_vm=True, of_job=True),
    "vm-set": CommandRow(SetArguments, change, at_vm=True, of_job=True),
    "vm-start-postcopy": CommandRow(VmArgument, start_postcopy, at_vm=True, of_job=True),
    "job-status": CommandRow(JobArguments, job_status, at_vm=True, of_job=True),
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
    "query-commands": CommandRow(NoArguments, _commands),
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
