"""One save: the guest's QEMU sends its state to this agent, which keeps it, and the guest goes on.

Theory of operation
-------------------
The way there is a straight line (`_save`); whatever ends it, the way back is a table (`core.saving.ROWS`, walked by
`give_back`). The order, and what an agent that dies leaves:

    1. the job is journalled, with whether the guest runs   nothing was done; the job ends as failed
    2. QEMU's options, journalled before they are changed   they are put back
    3. `migrate` to a socket of ours; pages go into packs   QEMU loses its connection and stays with its guest; packs
                                                            that nobody needs are left, for `prune`
    4. only for writable disks, or for a person's leave:    the guest stands until the next agent cancels the
       QEMU's pause before the switchover, disks            migration; disks: see `save_disks`, `save_mirrors`
    5. the last pages, set aside in a file, and the device  QEMU goes back by itself; once it has completed, the guest
       state; QEMU has completed                            stands until the next agent says `cont`
    6. `cont`                                               the guest runs; what was saved is lost with the agent
    7. packs, index, manifest: the commit                   the snapshot is there
    8. the end is journalled                                the next agent finds the snapshot by the job's id

With `pause` step 7 comes before step 6: the guest stands from step 2 on until its snapshot is there. A background save
has no steps 4 to 6: QEMU lets its guest go on by itself after some milliseconds.

Rule 1: the guest is nowhere else and never was, so it may always go on here, and always does: no error of the
        repository, of the endpoint or of this agent leaves it stopped.
Rule 2: nothing of the snapshot is there before the commit; a save that failed or was cancelled leaves only what
        `prune` takes away.
Rule 3: blocking work (the endpoint's end, the store) is done in threads; only this task acts on the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.agent import job_events, save_back, save_mirrors, save_report, save_ways
from vmferry.agent.images import Identity
from vmferry.agent.own_threads import in_own_thread
from vmferry.agent.save_back import CONT_S, RETRY_FIRST_S, RETRY_LAST_S
from vmferry.agent.save_options import SaveOptions
from vmferry.agent.save_report import Counted
from vmferry.agent.vms import KeptVm
from vmferry.agent.wants import SaveWanted
from vmferry.core.job import SAVE, JobStatus, path
from vmferry.core.saving import (
    Did,
    Guest,
    SaveFact,
    SaveLog,
    Word,
    awaits_leave,
    did,
    guest_of,
    halt_of,
    halted,
    may_cancel,
    may_name_copies,
    ran_at_instant,
    save_job,
    word_of,
)
from vmferry.errors import (
    CancelRefused,
    GuestHeld,
    MigrationCancelled,
    MigrationFailed,
    QemuError,
    Unfit,
    VmferryError,
)
from vmferry.jobs.journal import Entry
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpCommandError

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.snapshot_sink import SnapshotSink
    from vmferry.engine.incoming import Incoming
    from vmferry.store.manifest import Head
    from vmferry.store.repository import Repository, SnapshotInfo

log = logging.getLogger("vmferry.agent")

FD_NAME = "vmferry-save"
POLL_S = 0.2
"""QEMU is asked for its numbers at least this often; its events wake earlier."""
CLOSING_S = 3.0


@dataclass(eq=False)
class SaveJob:
    """A save at work. Made when it is journalled, or from the journal (`was_restored`: then it only goes back)."""

    agent: Agent
    wanted: SaveWanted
    kept: KeptVm
    options_before: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Identity] = field(default_factory=dict)
    """Files that the job made."""
    was_restored: bool = False
    hands_off: str = ""
    """Why nothing of the VM may be touched any more; empty: it may."""

    def __post_init__(self) -> None:
        self.facts = SaveLog()
        self.revision = 0
        self.counted = Counted(guest_bytes=self.kept.definition.memory_bytes)
        self.error: VmferryError | None = None
        self.head: Head | None = None
        self.snapshot = ""
        self.disks: list[Any] = []
        self.notes: list[str] = []
        self.ended = asyncio.Event()
        self.started_s = self.agent.clock.wall_s()
        self.ended_s: float | None = None
        self.is_committing = False
        self._wake = asyncio.Event()
        self.heard = asyncio.Event()
        self._is_back = False
        self._has_written_halt = False
        self._sink: SnapshotSink | None = None
        self._incoming: Incoming | None = None
        self._cleaning: asyncio.Future[None] | None = None
        self.copying = save_mirrors.Copying()
        self.sizes: dict[str, int] = {}
        """What the guest sees of its disks, by their new files."""
        self.disks_settled = not self.was_restored
        """Whether it is known, and durable, which files the guest's disks are now, and none is copied any more."""
        self._options = SaveOptions(self.wanted, self.options_before)
        self._hands = save_ways.hands_of(self.wanted)

    # --- what others see ----------------------------------------------------------------------------------

    @property
    def job(self) -> str:
        """The job's id."""
        return self.wanted.job

    @property
    def way(self) -> str:
        """`precopy` or `background` once that is decided, '' before."""
        return self._options.way

    @property
    def vm(self) -> str:
        """The VM's name."""
        return self.wanted.vm

    @property
    def is_over(self) -> bool:
        """Whether its end is known; `ended` is set a moment later, when that is durable."""
        return SaveFact.CLEANUP in self.facts

    @property
    def state(self) -> JobStatus:
        """The job's state."""
        return save_job(self.facts)

    def note(self, fact: SaveFact, *, text: str = "", by: str = "") -> None:
        """Records a fact (once) and tells it, with each state that it led the job through."""
        before, was = self.facts, self.state
        self.facts = before.with_fact(fact, text=text, at_s=self.agent.clock.wall_s(), by=by)
        if self.facts is before:
            return
        self.revision += 1
        log.info("job=%s vm=%s save fact=%s by=%s text=%r", self.job, self.vm, fact, by, text)
        failed = self.error is not None or SaveFact.CANCEL in self.facts
        job_events.tell_fact(
            self.agent, SAVE.name, {"fact": fact.value, "round": 0, "text": text, "by": by},
            job=self.job, vm=self.vm, revision=self.revision, states=path(was, self.state, failed=failed),
        )  # fmt: skip
        self._wake.set()

    def want_cancel(self) -> bool:
        """Whether a cancel would change something: the guest goes on, and nothing is kept. Raises CancelRefused when it
        is late."""
        if SaveFact.CANCEL in self.facts:
            return False
        late = may_cancel(self.facts, is_committing=self.is_committing, stands=self.wanted.pause)
        if late is not None:
            raise CancelRefused(f"the save of {self.vm} cannot be cancelled any more: {late}", hint="")
        return not self.is_over

    def finalize(self) -> None:
        """A person's leave to take the guest's last state."""
        self.note(SaveFact.FINALIZE, by="person")

    def wire(self) -> dict[str, Any]:
        """Everything about it, as plain values."""
        return save_report.wire(self)

    # --- the course ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """To the end, whatever happens. Only the agent's own end stops it in between."""
        machine = self.kept.machine
        self.note(SaveFact.WANTED, by="person" if not self.was_restored else "journal")
        if machine is not None:
            machine.listeners.add(self._hear)
        try:
            if self.was_restored:
                self.note(SaveFact.RESTARTED, by="journal")
                self.error = MigrationFailed(
                    f"the agent restarted while {self.vm} was being saved", guest="unharmed", retry="yes"
                )
            else:
                await self._whole_way()
            await self.give_back()
            await self._hands.settle(self)
            await self._clean_up()
            if SaveFact.KEPT not in self.facts and (self.was_restored or may_name_copies(self.facts)):
                await self._look_for_it()
            await save_ways.take_away(self)
        except asyncio.CancelledError:  # the agent ends: a moment for the guest, if it stands
            with contextlib.suppress(VmferryError, TimeoutError):
                async with asyncio.timeout(CLOSING_S):
                    await self.give_back()
            raise
        finally:
            self._begin_clean_up()
            if machine is not None:
                machine.listeners.discard(self._hear)
        await self._end()

    async def _whole_way(self) -> None:
        """From the options to the commit. Errors are recorded, defects too; the guest may stand afterwards."""
        from vmferry.agent.snapshot_sink import SnapshotSink

        try:
            repository = await self.agent.snapshot_store.run(self.agent.snapshot_store.open_repository)
            folder = None if self.wanted.pause else self.agent.config.state_dir / "spill"
            sink = self._sink = SnapshotSink(repository, vm=self.vm, spill_folder=folder)
            await self._save(sink)
            if not self.wanted.pause:
                await self.give_back()
            await self._keep(sink)
        except Exception as error:  # noqa: BLE001 - whatever it is, the guest is given back and the job has an end
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Records what went wrong: the first error, but for one that says that the guest stands."""
        if isinstance(error, OSError):
            error = QemuError(f"{self.vm}: {error}", cause=error)
        if not isinstance(error, VmferryError):
            log.error("job=%s vm=%s save result=defect", self.job, self.vm, exc_info=error)
            error = VmferryError(f"a defect of vmferry ended the save: {error!r}", retry="no", cause=error)
        log.warning("job=%s vm=%s save result=%s", self.job, self.vm, error)
        if self.error is None or isinstance(error, GuestHeld):
            self.error = error
        if SaveFact.CANCEL not in self.facts:
            self.note(SaveFact.ERROR, text=str(error))

    def _begin_clean_up(self) -> None:
        """The endpoint ends, and the repository gets back what it was asked to hold: in a thread that nobody waits for
        longer than a little, because both may hang as long as the store does."""
        incoming, sink = self._incoming, self._sink
        if self._cleaning is not None or sink is None:
            return

        def work() -> None:
            if incoming is not None:
                incoming.stop()
            sink.abort()

        self._cleaning = in_own_thread(f"save-clean-{self.vm}", work)

    async def _clean_up(self) -> None:
        """After the guest has been given back."""
        self._begin_clean_up()
        if self._cleaning is None:
            return
        try:
            async with asyncio.timeout(limits.SAVE_CLEAN_UP_S):
                await asyncio.shield(self._cleaning)
        except Exception as error:  # noqa: BLE001 - a lock that stays gets stale by itself
            log.warning("job=%s vm=%s save effect=clean-up result=%r", self.job, self.vm, error)

    async def _save(self, sink: SnapshotSink) -> None:
        """Until the state is whole and QEMU has completed. Raises what went wrong; the guest may stand then."""
        machine = self.kept.require_machine()
        self._check_cancel()
        await self._options.apply(machine, self._remember_options)
        self.note(SaveFact.CONFIGURED, text=self.way)
        await self._hands.make(self)
        if self.wanted.pause:
            await self._stop("asked for")
        incoming, ours, theirs = self._endpoint(sink)
        self._incoming = incoming
        with theirs:
            await machine.execute("getfd", {"fdname": FD_NAME}, fds=(theirs.fileno(),))
        incoming.take(ours)
        self._check_cancel()
        await self._about_to(Did.SEND)
        await self._migrate()
        self.note(SaveFact.STARTED)
        await self._follow(incoming)
        await self._until_whole(incoming)

    def _endpoint(self, sink: SnapshotSink) -> tuple[Incoming, socket.socket, socket.socket]:
        from vmferry.engine.incoming import Incoming

        loop = asyncio.get_running_loop()
        incoming = Incoming(sink.image, name=f"save-{self.vm}")

        def wake(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._wake.set)

        incoming.ledger.listen(wake)
        ours, theirs = socket.socketpair()
        return incoming, ours, theirs

    async def _follow(self, incoming: Incoming) -> None:
        """Until QEMU has completed. Raises MigrationFailed, MigrationCancelled."""
        machine = self.kept.require_machine()
        while True:
            self.look_anew()
            info = await machine.migration()
            self.counted.count(info)
            match word_of(info.get("status")):
                case Word.DONE:
                    return
                case Word.IDLE | Word.ENDING:
                    raise self._failure(info, incoming)
                case Word.WAITS:
                    await self._at_the_switchover()
                case Word.GOING:
                    await self._hands.watch(self)
                    await self._look_at_the_guest()
                    if self.counted.passes > limits.SAVE_PASSES_MAX and self.way == "precopy":
                        await self._stop(f"it writes faster than it is saved, after {self.counted.passes} passes")
            await self.pause(POLL_S)

    async def _at_the_switchover(self) -> None:
        """The guest stands and its disks are quiet: leave, new images, and on."""
        machine = self.kept.require_machine()
        if not self.wanted.auto_finalize:
            self.note(SaveFact.HOLD)
        self.note(SaveFact.STANDS, by="QEMU")
        until_s = self.agent.clock.now_s() + limits.SAVE_HOLD_S
        while awaits_leave(self.facts):
            self.look_anew()
            await self._hands.watch(self)
            if self.agent.clock.now_s() >= until_s:
                raise MigrationFailed(f"nobody gave leave within {limits.SAVE_HOLD_S:g} s; {self.vm} goes on")
            await self.pause(POLL_S)
        if self.wanted.keeps_disks and SaveFact.DISKS not in self.facts and SaveFact.COPIED not in self.facts:
            await self._hands.switch(self)
        with contextlib.suppress(QmpCommandError):  # it went on by itself, or is over: the next look says which
            await machine.execute("migrate-continue", {"state": "pre-switchover"})

    async def _until_whole(self, incoming: Incoming) -> None:
        """QEMU has sent everything; until all of it is here. Raises what the endpoint met."""
        from vmferry.engine.frozen import run_state_of

        until_s = self.agent.clock.now_s() + limits.SAVE_WHOLE_S
        while not incoming.is_over:
            self._wake.clear()
            if incoming.is_over:
                break
            if self.agent.clock.now_s() >= until_s:
                raise MigrationFailed(f"the state of {self.vm} is not whole {limits.SAVE_WHOLE_S:g} s after its end")
            await self.pause(POLL_S)
        if not incoming.image.is_device_state_whole or incoming.error is not None:
            raise incoming.error or MigrationFailed(f"the state of {self.vm} did not come whole")
        self.note(SaveFact.WHOLE, by="endpoint")
        self.note(SaveFact.INSTANT, text=run_state_of((*incoming.image.early, *incoming.image.devices)), by="endpoint")

    def _failure(self, info: dict[str, Any], incoming: Incoming) -> VmferryError:
        """What made QEMU give up: what this side met first, else QEMU's own words."""
        if incoming.error is not None and not isinstance(incoming.error, MigrationFailed):
            return incoming.error
        text = info.get("error-desc") or incoming.error or "QEMU gave no reason"
        return MigrationFailed(f"{self.vm} was not saved: {text}", side="source")

    async def _keep(self, sink: SnapshotSink) -> None:
        """The commit. Raises RepositoryError: there is no snapshot then, unless its manifest's put may have been done:
        then nobody knows."""
        self._check_cancel()
        if self._incoming is not None:  # the writer has one user at a time
            outcome = await in_own_thread(f"save-end-{self.vm}", self._incoming.stop)
            if outcome.threads_left:
                raise MigrationFailed(f"the endpoint of the save does not end: {', '.join(outcome.threads_left)}")
        self.disks = await save_ways.describe(self)  # nobody writes to them any more
        if self.wanted.copies:
            await self.agent.journal.append(Entry.SAVE_ACTS, self.job, {"commits": True})
            self.note(SaveFact.COMMITS)
        self._check_cancel()
        self.is_committing = True
        work = functools.partial(sink.commit, self.wanted.name, self._words(), self.disks)
        functools.update_wrapper(work, sink.commit)
        if self.wanted.pause:  # it waits for nobody else's work
            commit = in_own_thread(f"save-commit-{self.vm}", work)
        else:
            commit = asyncio.ensure_future(self.agent.snapshot_store.run(work))
        try:
            self.head = await self._answer(commit)
        except Exception as error:
            if sink.may_be_there:
                self.note(SaveFact.UNKNOWN, text=f"the commit may have been carried out: {error}")
            raise
        self.snapshot = sink.snapshot
        if sink.base_damage:
            self.notes.append(
                f"not all of {self.vm}'s snapshot before could be read ({sink.base_damage}); pages that are in both "
                "are stored once: 'vmferry verify' tells whether this one lacks any"
            )
        self.note(SaveFact.KEPT, text=self.snapshot, by="repository")

    async def _answer(self, commit: asyncio.Future[Head]) -> Head:
        """The commit's. Raises MigrationCancelled when a person does not want a guest that stands to wait for it."""
        commit.add_done_callback(lambda _: self._wake.set())
        try:
            while not commit.done():
                self._wake.clear()
                if SaveFact.CANCEL in self.facts:
                    self.note(SaveFact.UNKNOWN, text="the commit is not waited for any more")
                    raise MigrationCancelled(f"the commit of {self.vm} was not waited for")
                if not commit.done():
                    await self._wake.wait()
        finally:
            if not commit.done():
                commit.cancel()
        return commit.result()

    async def _look_for_it(self) -> None:
        """The agent that had begun it may have died after the commit: then the snapshot is there, and it is told so."""
        try:
            async with asyncio.timeout(limits.SAVE_LOOK_S):
                store = self.agent.snapshot_store
                found = await in_own_thread(f"save-look-{self.vm}", lambda: self._find(store.open_repository()))
        except Exception as error:  # noqa: BLE001 - nobody can say now; 'vmferry snapshots' will
            log.warning("job=%s vm=%s save effect=look-for-snapshot result=%s", self.job, self.vm, error)
            if did(self.facts) is Did.SEND and (self.was_restored or SaveFact.UNKNOWN in self.facts):
                self.note(SaveFact.UNKNOWN, text=str(error))
            return
        if found is not None:
            self.head, self.snapshot = found.head, found.snapshot
            if not isinstance(self.error, GuestHeld):
                self.error = None
            if self.was_restored:
                self.notes.append("the agent restarted on the way; times are not known")
            self.note(SaveFact.KEPT, text=found.snapshot, by="repository")
        elif not self.was_restored and SaveFact.UNKNOWN not in self.facts:
            self.note(SaveFact.ABSENT, by="repository")

    def _find(self, repository: Repository) -> SnapshotInfo | None:
        return next(
            (each for each in repository.snapshots() if each.head and each.head.metadata.get("job") == self.job), None
        )

    def _words(self) -> Any:
        from vmferry.engine.frozen import SnapshotWords

        return SnapshotWords(
            vm=self.vm,
            host=self.agent.config.name,
            job=self.job,
            machine=self.kept.definition.machine,
            qemu_version="" if self.kept.machine is None else self.kept.machine.version_text,
            was_running=ran_at_instant(self.facts, before=self.wanted.running_before),
            way="background" if self.way == "background" else "precopy",
            definition=self.wanted.definition,
        )

    # --- the guest ----------------------------------------------------------------------------------------

    async def _stop(self, why: str) -> None:
        """`stop`, of a guest that runs."""
        if SaveFact.STOPPED in self.facts:
            return
        machine = self.kept.require_machine()
        if SaveFact.ACTS not in self.facts:
            await self._about_to(Did.STOP)
        self.note(SaveFact.STOPPED, text=why)
        if guest_of(await machine.run_state()) is Guest.RUNS:
            await machine.execute("stop", deadline_s=CONT_S)

    async def _about_to(self, what: Did) -> None:
        """Durable before QEMU is told anything that has to be undone: without it the next agent only ends the job."""
        await self.agent.journal.append(Entry.SAVE_ACTS, self.job, {"did": what.value})

    async def _look_at_the_guest(self) -> None:
        """Whether something else has stopped it: an internal error of QEMU has no event that says so."""
        state = await self.kept.require_machine().run_state()
        if guest_of(state) is Guest.OTHER:
            self.note(SaveFact.HALTED, text=state, by="QEMU")
        await self._write_halt()

    async def _write_halt(self) -> None:
        """Without this entry (a full disk) the next agent starts the guest, should this one die before the end."""
        if self._has_written_halt or not halted(self.facts):
            return
        try:
            await self.agent.journal.append(Entry.SAVE_ACTS, self.job, {"halted": halted(self.facts)})
            self._has_written_halt = True
        except Unfit as error:
            log.warning("job=%s vm=%s save effect=keep-halt result=%s", self.job, self.vm, error)

    async def _migrate(self) -> None:
        """QEMU begins to send. Raises QmpCommandError: it did not begin, and if it sends, then for somebody else."""
        self.note(SaveFact.ACTS)
        try:
            await self.kept.require_machine().execute("migrate", {"uri": f"fd:{FD_NAME}"})
        except QmpCommandError:
            self.note(SaveFact.REFUSED, by="QEMU")
            with contextlib.suppress(VmferryError):
                await self._about_to(did(self.facts))
            raise

    async def give_back(self) -> None:
        """The guest is its own again when this returns, and QEMU's options are what they were; or the error says that
        it stands and why."""
        if not self._is_back:
            await self._write_halt()
            trouble, row = await save_back.walk(self)
            self._is_back = True
            save_back.tell(self, row, trouble)
            if self.is_ours():
                await self._options.put_back(self.kept.machine, FD_NAME)

    def is_ours(self) -> bool:
        """Whether the VM is what the save began with, and nobody else has it in hand."""
        attempt = self.agent.attempts.get(self.vm)
        return (
            not self.hands_off
            and self.agent.vms.get(self.vm) is self.kept
            and self.kept.generation == self.wanted.generation
            and (attempt is None or attempt.ended.is_set())
        )

    # --- the end ------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        if SaveFact.KEPT not in self.facts and SaveFact.CANCEL in self.facts and not isinstance(self.error, GuestHeld):
            self.error = MigrationCancelled(f"the save of {self.vm} was cancelled; the guest goes on")
        self.ended_s = self.agent.clock.wall_s()
        self.note(SaveFact.CLEANUP)
        wire = self.wire()
        await self._durably(Entry.ENDED, self.job, wire)
        self.agent.saves.is_over(self, wire)
        self.ended.set()

    # --- helpers ------------------------------------------------------------------------------------------

    def _check_cancel(self) -> None:
        if SaveFact.CANCEL in self.facts:
            raise MigrationCancelled(f"the save of {self.vm} was cancelled; the guest goes on")

    async def _durably(self, kind: Entry, subject: str, body: dict[str, Any]) -> None:
        """Tries until it is written: the VM is not free before, or the next agent would walk this save back."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                await self.agent.journal.append(kind, subject, body)
            except VmferryError as error:
                log.error("job=%s vm=%s save effect=%s result=%s", self.job, self.vm, kind.value, error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_LAST_S)
            else:
                return

    async def _remember_options(self, values: dict[str, Any]) -> None:
        """Durable before QEMU has others: whoever ends this save puts them back."""
        await self.agent.journal.append(Entry.OPTIONS_BEFORE, self.job, values)

    def look_anew(self) -> None:
        """From here on whatever happens ends the next `pause`. Raises MigrationCancelled."""
        self._wake.clear()
        self._check_cancel()

    async def pause(self, seconds: float) -> None:
        """So long, or until something happened."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _hear(self, event: Event) -> None:
        """An event of the guest's QEMU."""
        at_s = self.agent.clock.wall_s() if event.timestamp_us is None else event.timestamp_us / 1e6
        if event.name == "STOP":
            self.counted.stop_s = self.counted.stop_s or at_s
            if self._sink is not None and self.way == "precopy":
                self._sink.spill()
        elif event.name == "RESUME":
            self.counted.resume_s = at_s
        halt = halt_of(event.name, event.data)
        if halt:
            self.note(SaveFact.HALTED, text=halt, by="QEMU")
        self.heard.set()
        self._wake.set()
