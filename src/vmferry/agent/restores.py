"""The restores of one agent: those at work, those that are over, snapshots that are open, and the command.

Theory of operation
-------------------
`restore` reads the snapshot's description, and asks everything that can be asked before anything is made: is the name
free, are the stored disks what they were, does this host have the machine, whom would the guest clash with. Then the
order is journalled, and a `RestoreAttempt` does the rest.

Rule 1: what can be refused is refused by the command, in words, before anything is journalled or made.
Rule 2: a guest that lacks pages is not moved and not saved (`blockers`): its QEMU could do neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry import limits
from vmferry.agent import job_ids, restore_spec, restore_trust, restored_disks, vm_commands
from vmferry.agent.job_book import JobInfo
from vmferry.agent.open_snapshots import OpenSnapshots
from vmferry.agent.restore_definition import (
    ACCEPTED,
    GuestIdentity,
    Renewed,
    clashes,
    disk_doubts,
    disk_objections,
    host_objections,
    identity_of,
    memory_objection,
    renew,
    unless_accepted,
)
from vmferry.agent.restored_disks import RestoredDisks
from vmferry.agent.restoring import RestoreAttempt, RestoreWanted
from vmferry.agent.touch_orders import TouchOrders
from vmferry.agent.vms import VmDefinition
from vmferry.core import restore as core
from vmferry.core.job import KINDS, RESTORE, Answer, JobStatus, Verb, answer
from vmferry.core.restore import RestoreFact as F
from vmferry.errors import Busy, JobRefused, PlanRefused, QemuError, RepositoryError, UsageError, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.vm import spec as vm_spec

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.restore_spec import Given
    from vmferry.engine.frozen import FrozenDisk, SnapshotWords
    from vmferry.engine.lazy import Touches
    from vmferry.store.manifest import Head
    from vmferry.store.repository import Repository

log = logging.getLogger("vmferry.agent")

ASK_S = 2.0
FORWARD_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreArguments:
    """`vm-restore`."""

    name: str
    """The snapshot's name, its id, or the beginning of its id."""
    rename: str = ""
    """The name that the guest gets; '': the one that it had."""
    host: str = ""
    """The agent that restores it; '': the one that is asked."""
    repository: str = ""
    """The id of the repository that is meant; '': the agent's own, whichever it is."""
    lazy: bool = False
    """The guest runs at once, and its memory comes as it needs it."""
    paused: bool = False
    """The guest is not started."""
    accept: list[str] = field(default_factory=list)
    trust_definition: bool = False
    """Arguments of QEMU in the snapshot's definition that this host does not know are a person's own."""
    spec_path: str = ""
    """For a snapshot that was imported: the path of a spec, on the host whose agent is asked first."""
    spec: dict[str, Any] | None = None
    """The same in wire form, as it goes on to another host."""
    job: str = ""
    """Minted by the client, so that asking twice is asking once; made here if empty."""
    auto_dismiss: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreStatusArguments:
    """`restore-status`: a restore by its id, on this host or another one."""

    job: str
    host: str = ""


class Restores:
    """Owned by the agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._jobs: dict[str, RestoreAttempt] = {}
        """Those at work, by VM."""
        self.results: dict[str, dict[str, Any]] = {}
        """The newest ended restores, by job, and those that wait to be dismissed."""
        self.orders = TouchOrders(agent.config.state_dir / "first-touches")
        self.snapshots = OpenSnapshots(agent, self.orders, on_new=self._retry)
        self.disks = RestoredDisks(agent, ask=identities)
        self._promised: dict[str, GuestIdentity] = {}
        """Of restores whose orders are being written, by job."""

    def warm_up(self) -> None:
        """An agent that has a repository loads what a restore needs, so that the first one does not wait for it: 0.3 s.
        One that has none stays without numpy."""
        config = self._agent.config
        if config.repository or config.repository_folder.is_dir():
            self._agent.keep_task(
                asyncio.create_task(self._agent.snapshot_store.run(_load_rooms), name="warm-up-restores")
            )

    # --- which there are ------------------------------------------------------------------------------------

    def active(self, vm: str) -> RestoreAttempt | None:
        """The restore that brings this VM, if it is not over."""
        found = self._jobs.get(vm)
        return None if found is None or found.ended.is_set() else found

    def by_id(self, job: str) -> RestoreAttempt | None:
        """The restore with this id that is at work, or None."""
        return next((each for each in self.at_work() if each.job == job), None)

    def at_work(self) -> Iterator[RestoreAttempt]:
        """Every restore that is not over."""
        return (each for each in self._jobs.values() if not each.ended.is_set())

    def status(self, *, job: str) -> dict[str, Any] | None:
        """A restore by its id, as it stands or as it ended."""
        found = self.by_id(job)
        return self.results.get(job) if found is None else found.wire()

    def has(self, job: str) -> bool:
        """Whether a restore has this id, or had it."""
        return job in self.results or self.by_id(job) is not None

    def infos(self) -> list[JobInfo]:
        """The restores at work, as jobs."""
        return [_info(each) for each in self.at_work()]

    def require_room(self) -> None:
        """Raises Busy."""
        at_work = sum(1 for _ in self.at_work()) + len(self._promised)
        if at_work >= limits.RESTORES_MAX:
            raise Busy(f"{at_work} restores are on their way on {self._agent.config.name} already", side="client")

    @contextlib.contextmanager
    def promised(self, job: str, mine: GuestIdentity) -> Iterator[None]:
        """While the order is being checked and written, everybody who asks sees its guest. Raises Busy.

        1. two restores, here or on two hosts, ask whom they would clash with, and neither sees the other  2. both are
        written: two guests have one address. So each says first what it is about to be, and asks then: of two at least
        one sees the other."""
        self.require_room()
        self._promised[job] = mine
        try:
            yield
        finally:
            del self._promised[job]

    def promises(self, *, but: str = "") -> list[GuestIdentity]:
        """What restores are about to be, one job's left out."""
        return [each for job, each in self._promised.items() if job != but]

    # --- their life -----------------------------------------------------------------------------------------

    def begin(self, attempt: RestoreAttempt) -> None:
        """Registers it and runs it."""
        self._jobs[attempt.vm] = attempt
        attempt.note(F.WANTED)
        self._agent.keep_task(asyncio.create_task(attempt.run(), name=f"restore-{attempt.job}"))

    def adopt(self, attempt: RestoreAttempt) -> None:
        """The guest is one of this host's from now on."""
        kept, vms = attempt.kept, self._agent.vms
        assert kept is not None
        if attempt.was_adopted:
            return  # it is, or somebody has stopped it since
        attempt.was_adopted = True
        other = vms.get(attempt.vm)
        if other is not None and other is not kept:
            # Names are claimed and asked for before; should that fail, the VM that is known stays so.
            log.error("job=%s vm=%s result=its name is another VM's: its QEMU is process %d", attempt.job, attempt.vm,
                      kept.identity.pid)  # fmt: skip
            return
        vms[attempt.vm] = kept
        self._agent.monitors.changed()

    def disown(self, attempt: RestoreAttempt) -> None:
        """The guest, which never ran, is none of this host's any more."""
        if self._agent.vms.get(attempt.vm) is attempt.kept:
            self._agent.vms.pop(attempt.vm, None)
            self._agent.monitors.changed()

    async def over(self, attempt: RestoreAttempt, result: dict[str, Any]) -> None:
        """It has ended, and its end is in the journal."""
        if self._jobs.get(attempt.vm) is attempt:
            del self._jobs[attempt.vm]  # with the tables of its snapshot
        self.results[attempt.job] = result
        self.disks.remember(restored_disks.of_job(attempt.wanted, attempt.images))
        kept = attempt.kept
        if kept is not None and self._agent.vms.get(attempt.vm) is kept:
            self._agent.hold(kept)
        if attempt.has_opened:
            self.snapshots.release(attempt.wanted.snapshot)
        if attempt.wanted.lazy:
            self._agent.keep_task(asyncio.create_task(self.unpin(attempt), name=f"unpin-{attempt.job}"))
        self._agent.publish("RESTORE", attempt.brief())
        self._agent.jobs.ended(
            RESTORE.name, attempt.job, result, auto_dismiss=attempt.wanted.auto_dismiss,
            auto_finalize=attempt.wanted.auto_finalize,
        )  # fmt: skip
        self._agent.jobs.forget_old(self.results)

    async def cancel(self, job: str) -> None:
        """The restore is given up. Raises JobRefused once its guest may have run, also if that came to be while the
        want was being written: then CANCEL_REFUSED takes it back, so that the next agent keeps to what was said."""
        attempt = self.by_id(job)
        if attempt is None:
            return
        refusal = core.cancel_refusal(attempt.log)
        if refusal is not None:
            raise JobRefused(f"restore {job} of {attempt.vm}: {refusal}")
        await self._agent.journal.append(Entry.CANCEL_WANTED, job)
        refusal = core.cancel_refusal(attempt.log)
        if refusal is not None and F.CANCEL not in attempt.log:
            await self._agent.journal.append(Entry.CANCEL_REFUSED, job)
            raise JobRefused(f"restore {job} of {attempt.vm}: {refusal}")
        attempt.note(F.CANCEL)

    def resume(self, job: str) -> None:
        """What failed is tried again at once."""
        attempt = self.by_id(job)
        if attempt is None:
            return
        if attempt.log.stands:
            attempt.note(F.AGAIN, round_no=attempt.log.rounds(F.STANDS), text="as a person wished")
        if attempt.feed is not None:
            attempt.feed.source.retry()

    def _retry(self, snapshot: str) -> None:
        """What could not be read of this snapshot is tried again."""
        for attempt in self.at_work():
            if attempt.wanted.snapshot == snapshot and attempt.feed is not None:
                attempt.feed.source.retry()

    async def close(self) -> None:
        """The agent ends: threads end, QEMUs wait for the next agent."""
        for attempt in list(self.at_work()):
            if attempt.feed is not None:
                await attempt.feed.stop()
            if attempt.machine is not None:
                await attempt.machine.close()
        await self.snapshots.close()

    async def remember_touches(self, wanted: RestoreWanted, touches: Touches) -> None:
        """What the guest of a lazy restore asked for, in its order, from the first page on."""
        if wanted.lazy and len(touches):
            await self._agent.snapshot_store.run(self.orders.put, wanted.snapshot, touches)

    # --- pins -----------------------------------------------------------------------------------------------

    async def pin(self, wanted: RestoreWanted) -> None:
        """Nobody takes the snapshot away before this guest is whole, whatever becomes of its agent. The snapshot is
        open. Raises RepositoryError."""
        from vmferry.store import pins

        pin = pins.Pin(wanted.job, wanted.snapshot, self._agent.config.name, wanted.vm)
        await self._agent.snapshot_store.with_repository(lambda repository: pins.put(repository, pin))

    async def unpin(self, attempt: RestoreAttempt) -> None:
        """It is whole or ended. Tried until the repository takes it, or the agent ends: then the next one does it. A
        pin that is on its way is waited for: what is not there yet cannot be taken away."""
        from vmferry.store import pins

        if attempt.pinning is not None:
            await asyncio.gather(attempt.pinning, return_exceptions=True)
        job = attempt.job
        pause_s = limits.RESTORE_RETRY_MIN_S
        while True:
            try:
                await self._agent.snapshot_store.with_repository(lambda repository: pins.remove(repository, job))
            except RepositoryError as error:
                log.warning("job=%s effect=unpin result=%s", job, error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, limits.RESTORE_UNPIN_MAX_S)
            else:
                return


def _load_rooms() -> None:
    """In a thread."""
    for room in ("engine.frozen", "engine.lazy", "engine.outgoing", "store.reader", "store.local"):
        importlib.import_module(f"vmferry.{room}")


def _info(attempt: RestoreAttempt) -> JobInfo:
    state, moved = core.restore_state(attempt.log), attempt.progress()
    return JobInfo(
        id=attempt.job,
        type=RESTORE.name,
        status=state,
        current_progress=moved.pages * 4096,
        total_progress=moved.pages_whole * 4096,
        error=None if attempt.error is None else attempt.error.message,
        vm=attempt.vm,
        detail=core.detail(attempt.log),
        reason=core.reason(attempt.log) if state is JobStatus.PAUSED else "",
        auto_finalize=attempt.wanted.auto_finalize,
        auto_dismiss=attempt.wanted.auto_dismiss,
        percent=moved.pages * 100 // moved.pages_whole if moved.pages_whole else None,
        percent_error=0,
        verbs=_verbs(attempt, state),
        revision=attempt.revision,
    )


def _verbs(attempt: RestoreAttempt, state: JobStatus) -> list[str]:
    """What it takes: by the table, and without a cancel that would be refused since the guest may have run."""
    found = [verb for verb in Verb if answer(KINDS[RESTORE.name], verb, state).answer is Answer.DOES]
    refusal = core.cancel_refusal(attempt.log)
    return [verb.value for verb in found if verb is not Verb.CANCEL or refusal is None]


# --- the command ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """A snapshot by its name."""

    repository: str
    """The repository's id."""
    snapshot: str
    head: Head
    words: SnapshotWords
    disks: tuple[FrozenDisk, ...]


async def restore(agent: Agent, arguments: RestoreArguments) -> dict[str, Any]:
    """Wants a guest back. Returns the job at once; events and `restore-status` tell how it goes.

    Raises UsageError, PlanRefused, Busy, RepositoryError …; nothing was done then."""
    if arguments.host and arguments.host != agent.config.name:
        link = agent.peers.link(arguments.host)
        # A name means another guest in another repository: what is meant is settled where the person is.
        meant = await agent.snapshot_store.with_repository(lambda repository: find(repository, arguments.name))
        wish = {**msgspec.to_builtins(arguments), "host": "", "name": meant.snapshot, "repository": meant.repository}
        # An earlier agent knows of no spec, and needs not, as long as there is none.
        wish = {key: value for key, value in wish.items() if key not in ("spec_path", "spec")}
        spec = await asyncio.to_thread(restore_spec.wish_of, arguments.spec_path, arguments.spec)
        if spec is not None:
            restore_spec.require_fit(arguments.name, meant.words, spec)
            wish["spec"] = spec
        answered = await link.call("peer-forward", {"command": "vm-restore", "arguments": wish}, deadline_s=FORWARD_S)
        return dict(answered)
    job = job_ids.wanted(arguments.job)
    known = agent.restores.status(job=job)
    if known is not None:
        return known
    job_ids.require_new(agent, job)
    _check(agent, arguments)
    found = await agent.snapshot_store.with_repository(
        lambda repository: find(repository, arguments.name, meant=arguments.repository)
    )
    spec = await asyncio.to_thread(restore_spec.wish_of, arguments.spec_path, arguments.spec)
    restore_spec.require_fit(arguments.name, found.words, spec)
    given = None if spec is None else await restore_spec.given(agent, spec, found.words)
    vm = arguments.rename or (found.words.vm if given is None else given.definition.name)
    if not vm_spec.is_name(vm):
        raise UsageError(f"{vm!r} is no name of a VM", hint="say --as NAME")
    with agent.claims.hold(vm, "restored"):
        renewed = await _renewed(agent, arguments, found, given, vm=vm, job=job)
        mine = identity_of(renewed.definition, host=agent.config.name)
        with agent.restores.promised(job, mine):
            wanted = await _wanted(agent, arguments, found, renewed, given, mine=mine, job=job)
            await agent.journal.append(Entry.RESTORE_WANTED, job, msgspec.to_builtins(wanted))
            attempt = RestoreAttempt(agent, wanted)
            agent.restores.begin(attempt)
    return attempt.wire()


def _check(agent: Agent, arguments: RestoreArguments) -> None:
    """Raises UsageError, Busy."""
    unknown = set(arguments.accept) - {*ACCEPTED}
    if unknown:
        raise UsageError(f"--accept {unknown.pop()} is not known; there are {' and '.join(ACCEPTED)}")
    agent.jobs.make_room(auto_dismiss=arguments.auto_dismiss)
    agent.restores.require_room()


def find(repository: Repository, name: str, *, meant: str = "") -> _Found:
    """A snapshot by whatever names it, described. In a thread of the store. Raises RepositoryError, also when this is
    not the repository that is `meant`, by its id."""
    from vmferry.agent import snapshot_sink
    from vmferry.engine.frozen import FrozenDisk, SnapshotWords
    from vmferry.store.errors import Damaged

    own = repository.config.repository
    if meant not in ("", own):
        raise RepositoryError(
            f"this host's repository ({own[:12]}) is not the one that has the snapshot ({meant[:12]})",
            retry="after-fix",
            hint="give both agents the same --repository, or export the snapshot, import it there, and "
            "restore that with --spec FILE",
        )
    info = snapshot_sink.find(repository, name)
    if info.head is None:
        raise Damaged(f"snapshots/{info.snapshot}", info.damage)
    words = SnapshotWords.from_wire(info.head.metadata)
    return _Found(own, info.snapshot, info.head, words, tuple(FrozenDisk.from_wire(each) for each in info.head.disks))


async def _renewed(
    agent: Agent, arguments: RestoreArguments, found: _Found, given: Given | None, *, vm: str, job: str
) -> Renewed:
    """The VM that it would be. Raises PlanRefused, RepositoryError."""
    if given is None:
        definition, disks = restore_trust.read_definition(found.words.definition, found.disks), found.disks
        await restore_trust.require_trust(agent, definition, is_said=arguments.trust_definition)
    else:  # a person's own, as one that is run
        definition, disks = given.definition, given.disks
    objection = "" if restore_trust.powers(definition) else memory_objection(definition, found.head.blocks)
    if objection:  # arguments that somebody vouched for may give a guest any memory
        raise PlanRefused(f"{arguments.name} cannot be restored: {objection}", side="client")
    folder = agent.config.disk_dir or agent.config.state_dir / "disks"
    return renew(definition, disks, name=vm, folder=str(folder), tag=job[:8])


async def _wanted(
    agent: Agent,
    arguments: RestoreArguments,
    found: _Found,
    renewed: Renewed,
    given: Given | None,
    *,
    mine: GuestIdentity,
    job: str,
) -> RestoreWanted:
    """Asks everything that can be asked before something is made. Raises PlanRefused with every reason."""
    vm = mine.vm
    _, (others, unasked), reasons, doubts = await asyncio.gather(
        vm_commands.free_name(agent, vm),
        identities(agent, but=job),
        asyncio.to_thread(disk_objections, found.disks if given is None else given.disks),
        asyncio.to_thread(disk_doubts, found.disks),
    )
    refused, notes = clashes(mine, others, accept=arguments.accept)
    if given is not None:
        doubts, reasons = given.doubts, (*reasons, *restore_spec.written_by(given.disks, others))
    lacks, known = await _host_objections(agent, renewed, lazy=arguments.lazy, saved_by=found.words.qemu_version)
    doubtful, accepted = unless_accepted(doubts, arguments.accept)
    refused = (*reasons, *doubtful, *refused, *lacks)
    if refused:
        raise PlanRefused(f"{arguments.name} cannot be restored as {vm}: {'; '.join(refused)}", side="client")
    return RestoreWanted(
        job=job,
        vm=vm,
        snapshot=found.snapshot,
        name=found.head.name,
        lazy=arguments.lazy,
        runs=found.words.was_running and not arguments.paused,
        definition=renewed.definition.to_wire(),
        directory=str(agent.vm_directory / f"{vm}-{job[:8]}"),
        overlays=renewed.overlays,
        notes=(*notes, *accepted, *unasked, *known),
        auto_dismiss=arguments.auto_dismiss,
        wanted_s=agent.clock.wall_s(),
    )


async def _host_objections(
    agent: Agent, renewed: Renewed, *, lazy: bool, saved_by: str
) -> tuple[Sequence[str], Sequence[str]]:
    """(what this host lacks, what should be known), a sentence each."""
    try:
        facts = await agent.planner.qemu_facts()
    except QemuError as error:
        return [error.message], []
    available = agent.host.memory_available_bytes()
    found, notes = host_objections(renewed.definition, facts, available_bytes=available, saved_by=saved_by)
    if lazy and agent.planner.userfaultfd() is False:
        found.append("this host's kernel lets no guest run before its memory is here (userfaultfd); leave out --lazy")
    return found, notes


async def identities(agent: Agent, *, but: str = "") -> tuple[list[GuestIdentity], tuple[str, ...]]:
    """(what every VM of this host and of those that answer could clash with, a note for each host that did not)."""
    found = local_identities(agent, but=but)
    notes = []
    answers = await asyncio.gather(
        *(link.call("peer-identities", {}, deadline_s=ASK_S) for link in agent.peers.links.values()),
        return_exceptions=True,
    )
    for host, answered in zip(agent.peers.links, answers, strict=True):
        if isinstance(answered, BaseException) and not isinstance(answered, VmferryError):
            raise answered
        try:
            if isinstance(answered, VmferryError):
                raise answered
            found += msgspec.convert(_known_members(answered), list[GuestIdentity])
        except (VmferryError, msgspec.ValidationError) as error:
            log.info("host=%s command=peer-identities result=%s", host, error)
            notes.append(f"{host} was not asked whether a VM of it has the same name, address or disk: {error}")
    return found, tuple(notes)


def _known_members(answered: Any) -> list[Any]:
    """Another agent may know more of a VM than this one does; what it says is checked by whoever converts it."""
    known = {each.name for each in dataclasses.fields(GuestIdentity)}
    found = answered.get("identities") if isinstance(answered, dict) else None
    if not isinstance(found, list):
        raise VmferryError("it did not say which VMs it has")
    return [{k: v for k, v in each.items() if k in known} if isinstance(each, dict) else each for each in found]


def local_identities(agent: Agent, *, but: str = "") -> list[GuestIdentity]:
    """Those of the VMs that run here, or are about to, but for that of one job."""
    definitions = {
        kept.name: kept.definition for kept in agent.vms.values() if kept.machine and not kept.machine.is_gone
    }
    for attempt in agent.restores.at_work():
        definitions[attempt.vm] = VmDefinition.from_wire(attempt.wanted.definition)
    found = [identity_of(each, host=agent.config.name) for each in definitions.values()]
    return [*found, *agent.restores.promises(but=but)]


async def restore_status(agent: Agent, arguments: RestoreStatusArguments) -> dict[str, Any]:
    """A restore as it stands, or as it ended. Raises UnknownJob."""
    if arguments.host and arguments.host != agent.config.name:
        link = agent.peers.link(arguments.host)
        wish = {"job": arguments.job}
        answered = await link.call("peer-forward", {"command": "restore-status", "arguments": wish}, deadline_s=ASK_S)
        return dict(answered)
    found = agent.restores.status(job=arguments.job)
    if found is None:
        agent.jobs.info(arguments.job)  # raises UnknownJob
        raise UsageError(f"job {arguments.job} is no restore")
    return found
