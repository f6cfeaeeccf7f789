"""Commands about jobs: `query-jobs` and the verbs. `vm-cancel`, `vm-set`, `vm-start-postcopy` are words for the same.

Theory of operation
-------------------
A verb is first looked up in the table of its kind (`core.job.answer`), which refuses it with a reason, or says that
nothing is left to do. What it does is to write a want into the journal and to record it as a fact; the decision tables
do the rest.

Rule 1: a want is durable before it is recorded, and what a person was told holds after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmferry.agent import mirror_jobs, source_disks, source_options
from vmferry.agent.job_book import JobInfo, mirror_info
from vmferry.agent.mirror_jobs import MirrorJob
from vmferry.agent.source import SourceAttempt
from vmferry.core import policy as policies
from vmferry.core.blockers import Operation
from vmferry.core.facts import Fact
from vmferry.core.job import ELSEWHERE, KINDS, Answer, JobStatus, Verb, answer, pause_refusal
from vmferry.core.option_table import Policy, Role
from vmferry.core.options import Mode, check_value, find_option, parse_setting, policy_objection, refusal
from vmferry.core.policy import parse_policy
from vmferry.core.status import is_over, source_status
from vmferry.errors import CancelRefused, JobRefused, OptionLocked, UsageError
from vmferry.jobs.journal import Entry

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent


@dataclass(frozen=True, slots=True, kw_only=True)
class JobId:
    """A verb without further arguments."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeArguments:
    """`job-change`. What is left out stays as it is."""

    id: str
    type: str = "migrate"
    mode: str = ""
    """'postcopy': switch to it now."""
    downtime_limit: int | None = None
    """Milliseconds."""
    max_bandwidth: int | None = None
    """Bytes per second."""
    max_postcopy_bandwidth: int | None = None
    settings: list[str] = field(default_factory=list)
    """'NAME=VALUE' of the option table, or of the policies for trouble."""
    config: dict[str, Any] = field(default_factory=dict)
    """The same options with QEMU's own types."""


async def query_jobs(agent: Agent, arguments: Any) -> list[dict[str, Any]]:
    """Every job of this agent that is not dismissed."""
    return [info.to_wire() for info in agent.jobs.infos()]


def _asked(agent: Agent, job: str, verb: Verb) -> tuple[JobInfo, SourceAttempt | None]:
    """The job, and its attempt if the verb is to be carried out by one. Raises UnknownJob, JobRefused."""
    info, does = _answered(agent, job, verb)
    return info, agent.jobs.attempt(job) if does else None


def _answered(agent: Agent, job: str, verb: Verb) -> tuple[JobInfo, bool]:
    """The job, and whether something is to be done. Raises UnknownJob, JobRefused."""
    info = agent.jobs.info(job)
    cell = answer(KINDS[info.type], verb, info.status)
    if cell.answer is Answer.REFUSED:
        where = f" ({info.peer})" if cell is ELSEWHERE else ""
        of = f" of {info.vm}" if info.vm else ""
        raise JobRefused(f"job {job}{of} is {info.status.value}: {cell.why}{where}")
    return info, cell.answer is Answer.DOES


def _brief(agent: Agent, job: str) -> dict[str, Any]:
    return agent.jobs.info(job).to_wire()


async def job_cancel(agent: Agent, arguments: JobId) -> dict[str, Any]:
    """The guest stays. Raises CancelRefused after the grant, or the commit of a save; JobRefused for a job that is its
    source's, and for a restore whose guest may have run."""
    if (mirror := agent.jobs.mirror(arguments.id)) is not None:
        return await _of_mirror(agent, mirror, Verb.CANCEL)
    _, attempt = _asked(agent, arguments.id, Verb.CANCEL)
    chore = agent.chores.by_id(arguments.id)
    if attempt is not None:
        await cancel(agent, attempt)
    elif agent.restores.by_id(arguments.id) is not None:
        await agent.restores.cancel(arguments.id)
    elif chore is not None:
        chore.cancel()
    else:
        await agent.saves.cancel(arguments.id)
    return _brief(agent, arguments.id)


async def cancel(agent: Agent, attempt: SourceAttempt) -> None:
    """Cancels a migration. Raises CancelRefused with the reason after the grant; a second cancel, and one after the
    end, change nothing.

    A want is durable before anything follows from it, and the grant may go out while the disk is written:

    1. a cancel is asked for, and nothing speaks against it  2. CANCEL_WANTED is being written  3. the grant is sent
    4. it is too late: CANCEL_REFUSED is written  5. the person hears that  6. the agent restarts

    An agent that dies before 4 has told nobody anything and reads a cancel, which after 3 only asks the destination
    whether it ran the guest. After 4 it reads none: what a person was told holds."""
    if attempt.ended.is_set() or not attempt.want_cancel():
        return
    await agent.journal.append(Entry.CANCEL_WANTED, attempt.job)
    try:
        is_new = attempt.want_cancel()
    except CancelRefused:
        if Fact.CANCEL not in attempt.facts:  # what was accepted is not taken back by another one's refusal
            await agent.journal.append(Entry.CANCEL_REFUSED, attempt.job)
        raise
    if is_new:
        attempt.note(Fact.CANCEL, by="person")


async def job_pause(agent: Agent, arguments: JobId) -> dict[str, Any]:
    """No page of a postcopy moves until it is resumed, no more of a disk is copied. Raises JobRefused for a precopy:
    QEMU has no pause for it."""
    if (mirror := agent.jobs.mirror(arguments.id)) is not None:
        return await _of_mirror(agent, mirror, Verb.PAUSE)
    info, attempt = _asked(agent, arguments.id, Verb.PAUSE)
    if attempt is not None:
        reason = pause_refusal(source_status(attempt.facts))
        if reason is not None:
            raise JobRefused(f"job {info.id} of {info.vm} is {info.detail}: {reason}")
        await attempt.pause_pages()
    return _brief(agent, arguments.id)


async def job_resume(agent: Agent, arguments: JobId) -> dict[str, Any]:
    """A paused postcopy is joined again, a paused disk copied on. Raises JobRefused for a job that is not paused."""
    if (mirror := agent.jobs.mirror(arguments.id)) is not None:
        return await _of_mirror(agent, mirror, Verb.RESUME)
    _, attempt = _asked(agent, arguments.id, Verb.RESUME)
    if attempt is not None:
        await attempt.try_again()
    elif agent.restores.by_id(arguments.id) is not None:
        agent.restores.resume(arguments.id)
    return _brief(agent, arguments.id)


async def job_complete(agent: Agent, arguments: JobId) -> dict[str, Any]:
    """For kinds that wait to be completed; a migration does it by itself, and refuses with JobRefused."""
    _asked(agent, arguments.id, Verb.COMPLETE)
    return _brief(agent, arguments.id)


async def job_finalize(agent: Agent, arguments: JobId) -> dict[str, Any]:
    """Gives the leave to hand the guest over. Raises JobRefused for a job that does not wait for it."""
    _, attempt = _asked(agent, arguments.id, Verb.FINALIZE)
    save, chore = agent.saves.by_id(arguments.id), agent.chores.by_id(arguments.id)
    if attempt is not None:
        await attempt.finalize()
    elif save is not None:
        save.finalize()
    elif chore is not None:
        chore.finalize()
    return _brief(agent, arguments.id)


async def job_dismiss(agent: Agent, arguments: JobId) -> dict[str, Any]:
    """The result of a concluded job is not shown any more. Raises JobRefused for one that is not over."""
    if (mirror := agent.jobs.mirror(arguments.id)) is not None:
        return await _of_mirror(agent, mirror, Verb.DISMISS)
    info, _ = _asked(agent, arguments.id, Verb.DISMISS)
    await agent.jobs.dismiss(info)
    return {"id": info.id, "type": info.type, "status": JobStatus.NULL.value}


async def job_change(agent: Agent, arguments: ChangeArguments) -> dict[str, Any]:
    """Changes what of a job may change now. Raises OptionLocked naming the window, JobRefused, UsageError."""
    if (mirror := agent.jobs.mirror(arguments.id)) is not None:
        return await _change_mirror(agent, mirror, arguments)
    info, attempt = _asked(agent, arguments.id, Verb.CHANGE)
    config = _config_of(arguments, info)
    assert attempt is not None, "only a source's job takes changes, and one that is at work has an attempt"
    if arguments.mode not in ("", Mode.POSTCOPY):
        raise UsageError(f"a job that runs may change its mode to {Mode.POSTCOPY} only, not to {arguments.mode!r}")
    agent.blockers.require(info.vm, Operation.SET)
    if arguments.settings or config:
        await change(attempt, arguments.settings, config)
    if arguments.mode:
        await start_postcopy(agent, attempt)
    return _brief(agent, arguments.id)


async def _of_mirror(agent: Agent, mirror: MirrorJob, verb: Verb) -> dict[str, Any]:
    """A verb for the job of a disk. Raises JobRefused, QemuError; CancelRefused of its migration."""
    _, does = _answered(agent, mirror.id, verb)
    if does:
        match verb:
            case Verb.CANCEL:
                await cancel(agent, mirror.attempt)
            case Verb.PAUSE:
                await mirror_jobs.pause(mirror)
            case Verb.RESUME:
                await mirror_jobs.resume(mirror)
            case Verb.DISMISS:
                mirror_jobs.dismiss(mirror)
    return mirror_info(mirror).to_wire()


def _config_of(arguments: ChangeArguments, info: JobInfo) -> dict[str, Any]:
    """The options that are given by QEMU's names. Raises UsageError for a job of another type."""
    if arguments.type != info.type:
        raise UsageError(f"job {info.id} is a {info.type} and no {arguments.type}")
    members = ("downtime_limit", "max_bandwidth", "max_postcopy_bandwidth")
    named = {name.replace("_", "-"): getattr(arguments, name) for name in members}
    return {**arguments.config, **{name: value for name, value in named.items() if value is not None}}


async def _change_mirror(agent: Agent, mirror: MirrorJob, arguments: ChangeArguments) -> dict[str, Any]:
    """Raises UsageError for anything but how fast it may be; JobRefused, QemuError."""
    info, _ = _answered(agent, mirror.id, Verb.CHANGE)
    values, changes = split_settings(arguments.settings, _config_of(arguments, info))
    if set(values) != {"max-bandwidth"} or changes or arguments.mode:
        raise UsageError(f"of job {mirror.id} only max-bandwidth can change", hint="all else is its migration's")
    agent.blockers.require(mirror.attempt.vm, Operation.SET)
    await mirror_jobs.change_speed(mirror, int(values["max-bandwidth"]))
    return mirror_info(mirror).to_wire()


def policy_changes(given: Mapping[str, str]) -> dict[str, Any]:
    """Fields of `FailurePolicy` in their plain form. Raises UsageError naming what is possible."""
    changes: dict[str, Any] = {}
    for name, text in given.items():
        try:
            changes |= parse_policy(name, text)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error
    return changes


def split_settings(texts: list[str], config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options, policies) of what a person wrote and of typed values. Raises UsageError for what can never be set, and
    for an option that is given twice with different values."""
    pairs = [text.partition("=") for text in texts]
    changes = policy_changes({name: value for name, _, value in pairs if name in policies.NAMES})
    values: dict[str, Any] = {}
    for text in texts:
        if text.partition("=")[0] not in policies.NAMES:
            option, value = parse_setting(text)
            values[option.name] = value
    for name, given in config.items():
        option = find_option(name)
        value = check_value(option, given)
        if values.get(option.name, value) != value:
            raise UsageError(f"{option.name} is given twice, as {values[option.name]!r} and as {value!r}")
        values[option.name] = value
    return values, changes


async def change(
    attempt: SourceAttempt | None, texts: list[str], config: Mapping[str, Any], *, vm: str = ""
) -> dict[str, Any]:
    """Changes options of a running migration where their windows allow it, and policies. Raises OptionLocked, and
    HostUnreachable when the destination did not hear of a policy: this side has it then."""
    values, changes = split_settings(texts, config)
    if attempt is None or attempt.ended.is_set():
        raise OptionLocked(
            f"{attempt.vm if attempt is not None else vm} has no migration whose options could change",
            hint="give options when it starts: vmferry migrate NAME HOST --set NAME=VALUE",
        )
    for name, value in values.items():
        option = find_option(name)
        objection = policy_objection(option, value)
        window = refusal(
            option,
            source_status(attempt.facts),
            role=Role.SOURCE,
            cleanup_done=is_over(attempt.facts),
            attempt=attempt.wanted.generation,
            has_attempt=True,
            waits_for_disks=source_disks.are_copied(attempt),
        )
        reason = objection or window
        if option.policy is Policy.MANAGED:  # the other choice, which it follows from, may be another one later
            reason = "; ".join(each for each in (window, objection) if each) or None
        if reason is not None:
            raise OptionLocked(f"{name} cannot change now: {reason}")
    if values:
        await source_options.change(attempt, values)
        attempt.tracking.changed_by_hand()
    if changes:
        await attempt.change_policy(changes)
    told = [*texts, *(f"{name}={value}" for name, value in config.items())]
    round_no = attempt.facts.last_round(Fact.SET_OPTION) + 1
    attempt.note(Fact.SET_OPTION, round_no=round_no, text=", ".join(told), by="person")
    return {**values, **changes}


async def start_postcopy(agent: Agent, attempt: SourceAttempt) -> None:
    """Asks for the switch to postcopy now. Raises OptionLocked for a precopy."""
    mode = attempt.wanted.mode if attempt.plan is None else attempt.plan.mode
    if mode == Mode.PRECOPY:
        raise OptionLocked(f"{attempt.vm}: this migration was started as {mode}")
    if Fact.START_POSTCOPY not in attempt.facts:
        await agent.journal.append(Entry.POSTCOPY_WANTED, attempt.job)
        attempt.note(Fact.START_POSTCOPY, text="by hand", by="person")
