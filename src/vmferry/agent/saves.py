"""The saves of one agent: those at work, those that are over, and the command that begins one.

Rule 1: one save or migration of a VM at a time: each is a blocker of the other (`blockers`).
Rule 2: what can be refused is refused by the command, before anything is journalled or changed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry.agent import job_ids, save_ways
from vmferry.agent.job_book import JobInfo
from vmferry.agent.restored_disks import copies_of_save
from vmferry.agent.save import SaveJob
from vmferry.agent.vms import KeptVm, VmDefinition
from vmferry.agent.wants import SaveWanted
from vmferry.core import hazards
from vmferry.core.blockers import Operation
from vmferry.core.job import KINDS, SAVE, Answer, Verb, answer
from vmferry.core.saving import Did, SaveFact, Word, awaits_leave, save_status, word_of
from vmferry.errors import CancelRefused, PlanRefused, UsageError
from vmferry.jobs.journal import Entry, JobState
from vmferry.vm.spawn import ProcessIdentity

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")

WAYS = ("auto", "precopy", "background")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveArguments:
    """`vm-save`."""

    vm: str
    name: str
    """The snapshot's; no other one of the repository may have it."""
    job: str = ""
    """Minted by the client, so that asking twice is asking once; made here if empty."""
    way: str = "auto"
    """'precopy', 'background', or 'auto': in the background where QEMU and the host can."""
    pause: bool = False
    """The guest stands until its snapshot is committed."""
    disks: str = "refuse"
    """What happens to writable disks: 'refuse', 'external-snapshot', or 'mirror'."""
    disks_dir: str = ""
    """Where the copies of a 'mirror' go, an absolute path on the VM's host; empty: beside their disks."""
    auto_finalize: bool = True
    """False: the guest's last stop waits, the guest paused, until `job-finalize`; for a minute, then it goes on."""
    auto_dismiss: bool = True
    """False: the job stays in `query-jobs` with its result until `job-dismiss`."""


class Saves:
    """Owned by the agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._jobs: dict[str, SaveJob] = {}
        """Those at work, by VM."""
        self.results: dict[str, dict[str, Any]] = {}
        """The newest ended saves, by job, and those that wait to be dismissed."""

    def active(self, vm: str) -> SaveJob | None:
        """The VM's save that is at work, or None."""
        job = self._jobs.get(vm)
        return None if job is None or job.ended.is_set() else job

    def by_id(self, job: str) -> SaveJob | None:
        """The save with this id that is at work, or None."""
        return next((each for each in self.at_work() if each.job == job), None)

    def at_work(self) -> Iterator[SaveJob]:
        """Every save that is not over."""
        return (job for job in self._jobs.values() if not job.ended.is_set())

    def status(self, *, job: str) -> dict[str, Any] | None:
        """A save by its id, as it stands or as it ended."""
        found = self.by_id(job)
        # Not over before that is durable: whoever hears so may save again.
        return self.results.get(job) if found is None else {**found.wire(), "over": False}

    def has(self, job: str) -> bool:
        """Whether a save has this id, or had it."""
        return job in self.results or self.by_id(job) is not None

    async def cancel(self, job: str) -> None:
        """The guest goes on and nothing is kept. A second cancel changes nothing.

        Raises CancelRefused once the snapshot is being committed, also if that came to be while the want was being
        written: then CANCEL_REFUSED takes it back, so that the next agent keeps to what was said."""
        save = self.by_id(job)
        if save is None or not save.want_cancel():
            return
        await self._agent.journal.append(Entry.CANCEL_WANTED, job)
        try:
            is_new = save.want_cancel()
        except CancelRefused:
            await self._agent.journal.append(Entry.CANCEL_REFUSED, job)
            raise
        if is_new:
            save.note(SaveFact.CANCEL, by="person")

    def begin(self, save: SaveJob) -> None:
        """Registers it and runs it."""
        self._jobs[save.vm] = save
        task = asyncio.create_task(save.run(), name=f"save-{save.job}")
        task.add_done_callback(_shout)
        self._agent.keep_task(task)

    def is_over(self, save: SaveJob, wire: dict[str, Any]) -> None:
        """It has ended, and its end is in the journal."""
        if self._jobs.get(save.vm) is save:
            del self._jobs[save.vm]  # with the maps of all the guest's pages
        self.results[save.job] = wire
        self._agent.restores.disks.remember(copies_of_save(save.wanted, save.images, snapshot=wire["snapshot"]))
        self._agent.jobs.ended(
            SAVE.name, save.job, wire, auto_dismiss=save.wanted.auto_dismiss, auto_finalize=save.wanted.auto_finalize
        )
        self._agent.jobs.forget_old(self.results)

    async def restore(self, state: JobState, jobs: Iterable[JobState]) -> None:
        """What the journal says of one, among all jobs in their order. A save that was at work is walked back: what had
        come is lost with the agent that had it, and the guest goes on. One whose guest is not its own to touch any more
        only concludes."""
        if state.ended is not None:
            self.results[state.job] = state.ended
            self._agent.jobs.remember(SAVE.name, state)
            await self._agent.restores.disks.take_up(state)
            return
        wanted = msgspec.convert(state.body, SaveWanted)
        kept = self._agent.vms.get(wanted.vm)
        hands_off = why_not_ours(wanted, kept, state.job, jobs)
        if hands_off or kept is None:
            log.warning("job=%s vm=%s save effect=none because=%s", state.job, wanted.vm, hands_off)
            kept = _as_it_was(wanted)
        save = SaveJob(
            self._agent, wanted, kept, options_before=state.options_before, was_restored=True, hands_off=hands_off,
            images=msgspec.convert(state.images, dict[str, tuple[int, int]]),
        )  # fmt: skip
        if state.did == Did.SEND.value:
            save.note(SaveFact.ACTS, by="journal")
        elif state.did == Did.STOP.value:
            save.note(SaveFact.STOPPED, text="it may have been", by="journal")
        if state.commits:
            save.note(SaveFact.COMMITS, by="journal")
        if state.halted:
            save.note(SaveFact.HALTED, text=state.halted, by="journal")
        if state.cancel_wanted:
            save.note(SaveFact.CANCEL, by="journal")
        self.begin(save)

    def infos(self) -> list[JobInfo]:
        """The saves at work, as jobs."""
        return [_info(save) for save in self.at_work()]


def _shout(task: asyncio.Task[None]) -> None:
    """A save's task never ends with an error; if it does, somebody must hear of it."""
    if not task.cancelled() and task.exception() is not None:
        log.critical("task=%s result=defect: its job has no end", task.get_name(), exc_info=task.exception())


def why_not_ours(wanted: SaveWanted, kept: KeptVm | None, job: str, jobs: Iterable[JobState]) -> str:
    """Why the guest of a save that the journal has is not its own to touch any more; '' if it is. Pure.

    1. a save's end is not written down  2. its VM is moved, or ends and its name is given to another one
    3. the next agent reads both jobs: the later one proves that the save was over
    """
    if kept is None:
        return "its VM is not kept here any more"
    if dataclasses.asdict(kept.identity) != wanted.identity:
        return "its VM has another QEMU now"
    if kept.generation != wanted.generation:
        return "its VM has been elsewhere meanwhile"
    is_later = False
    for other in jobs:
        if other.job == job:
            is_later = True
        elif other.body.get("vm") == wanted.vm and (is_later or other.ended is None):
            return f"its VM has the job {other.job} since"
    return ""


def _as_it_was(wanted: SaveWanted) -> KeptVm:
    """The VM of a save that touches none any more."""
    identity = ProcessIdentity(**wanted.identity) if wanted.identity else ProcessIdentity(0, 0, "")
    return KeptVm(VmDefinition.from_wire(wanted.definition), wanted.generation, identity, qmp_path="", directory="")


def _reason(save: SaveJob, *, waits: bool) -> str:
    if SaveFact.HELD in save.facts and save.error is not None:
        return f"{save.error.message}; {save.error.hint}"
    return "the guest stands and waits for leave to be saved" if waits else ""


def _info(save: SaveJob) -> JobInfo:
    progress, state, waits = save.counted.progress(), save.state, awaits_leave(save.facts)
    stood_s = save.counted.stop_s
    return JobInfo(
        id=save.job,
        type=SAVE.name,
        status=state,
        current_progress=progress["current_bytes"],
        total_progress=progress["whole_bytes"],
        error=None if save.error is None else save.error.message,
        vm=save.vm,
        detail=save_status(save.facts),
        reason=_reason(save, waits=waits),
        auto_finalize=save.wanted.auto_finalize,
        auto_dismiss=save.wanted.auto_dismiss,
        percent=progress["percent"],
        percent_error=0,
        guest_paused_ms=(save.agent.clock.wall_s() - stood_s) * 1000 if waits and stood_s is not None else None,
        verbs=[verb.value for verb in Verb if answer(KINDS[SAVE.name], verb, state).answer is Answer.DOES],
        revision=save.revision,
    )


async def save(agent: Agent, arguments: SaveArguments) -> dict[str, Any]:
    """Wants a snapshot of a running VM. Returns the job at once; events and `job-status` tell how it goes.

    Raises UsageError, PlanRefused, Busy, Blocked, RepositoryError …; nothing was done then."""
    from vmferry.agent.snapshot_sink import check_name, require_free

    job = job_ids.wanted(arguments.job)
    known = agent.saves.status(job=job)
    if known is not None:
        return known
    job_ids.require_new(agent, job)
    check_name(arguments.name)
    for what, value, allowed in (("way", arguments.way, WAYS), ("disks", arguments.disks, save_ways.DISKS)):
        if value not in allowed:
            raise UsageError(f"{what} {value!r} is not possible; allowed: {', '.join(allowed)}")
    with agent.claims.hold(arguments.vm, "saved"), agent.snapshot_names.hold(arguments.name, job):
        agent.blockers.require_free(arguments.vm, Operation.SNAPSHOT)
        agent.jobs.make_room(auto_dismiss=arguments.auto_dismiss)
        wanted = await _checked(agent, arguments, job)
        await agent.snapshot_store.with_repository(lambda repository: require_free(repository, arguments.name))
        await agent.journal.append(Entry.SAVE_WANTED, job, msgspec.to_builtins(wanted))
        found = SaveJob(agent, wanted, agent.vms[arguments.vm])
        agent.saves.begin(found)
    return found.wire()


async def _checked(agent: Agent, arguments: SaveArguments, job: str) -> SaveWanted:
    """Looks at the guest. Raises PlanRefused for one that cannot be saved, with every reason."""
    kept = agent.vms[arguments.vm]
    machine = kept.require_machine()
    state = await machine.run_state()
    if state not in ("running", "paused"):
        raise PlanRefused(f"{arguments.vm} is {state}: only a guest that runs or is paused can be saved", side="source")
    info = await machine.migration()
    if word_of(info.get("status")) not in (Word.IDLE, Word.DONE):
        raise PlanRefused(
            f"the QEMU of {arguments.vm} is sending or taking a guest already (it says {info['status']}), and vmferry "
            "did not ask for that",
            side="source",
            hint="let that end first",
        )
    reasons = [str(reason) for reason in info.get("blocked-reasons", [])]
    if kept.definition.has_vfio:
        reasons.append("a device of the host is passed through to it, and its state cannot be told apart")
    if reasons:
        raise PlanRefused(f"{arguments.vm} cannot be saved: {'; '.join(reasons)}", side="source")
    definition = kept.definition
    loses = hazards.precopy_loses_writes(definition.accel, machine.version, definition.memory_bytes)
    if loses and state == "running" and not arguments.pause:
        raise PlanRefused(
            f"under TCG QEMU {machine.version_text} loses writes of {arguments.vm} while its memory is read, so what "
            "would be kept is not what it was",
            side="source",
            hint="say --pause: a guest that stands writes nothing",
        )
    wish = save_ways.Wish(job=job, name=arguments.name, disks=arguments.disks, folder=arguments.disks_dir)
    planned = await save_ways.plan(kept, wish, qemu=agent.config.qemu, state_dir=agent.config.state_dir)
    if arguments.way == "background":
        for is_so, why in (
            (arguments.pause, "with pause the guest stands anyway"),
            (not arguments.auto_finalize, "it cannot wait for leave"),
            (planned != save_ways.Planned(), "nobody can say at which instant its disks would have to be kept"),
            (state != "running", "it is paused, and QEMU before 8.0 would start it"),
        ):
            if is_so:
                raise PlanRefused(f"{arguments.vm} cannot be saved in the background: {why}", side="source")
    return SaveWanted(
        job=job,
        vm=arguments.vm,
        name=arguments.name,
        way=arguments.way,
        pause=arguments.pause,
        running_before=state == "running",
        overlays=planned.overlays,
        copies=planned.copies,
        repository=agent.snapshot_store.place,
        definition=kept.definition.to_wire(),
        generation=kept.generation,
        identity=dataclasses.asdict(kept.identity),
        auto_finalize=arguments.auto_finalize,
        auto_dismiss=arguments.auto_dismiss,
    )
