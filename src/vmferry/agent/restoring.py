"""One restore at work: its facts, its loop, and the hands for each step of `core.restore`.

Theory of operation
-------------------
The loop asks the table what is next and does it; what happens elsewhere (threads of the feed, the QEMU's end, a
person's cancel) becomes facts and wakes the loop. A restarted agent makes the same object with the facts that the
journal and QEMU prove (`restore_commands.take_up`), and the same loop goes on.

    1. the order is in the journal (RESTORE_WANTED)      a death here: nothing was made, or it is found and taken away
    2. overlays, a QEMU with -S, the snapshot read       as 1: the journal names directory and overlays
    3. the guest is sent                                 as 1: the journal has no STARTING, so it never ran
    4. KEPT                                              the next agent goes on with 5, or obeys a cancel
    5. STARTING, `cont` (`restore_start`)                the guest may run; pages that it lacks are sent on by the next
                                                         agent, which joins the postcopy again

Rule 1: a step that fails while the guest has not run ends the restore, and nothing of it is left; one that fails later
        is tried again. That holds for every exception: one that is no error of ours is a defect, and is told as one.
Rule 2: QEMU gets no connection before everything that could be checked without reading pages was checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.agent import guest_memory, job_events, overlays, rescue, restore_start, touch_orders
from vmferry.agent.machine import Machine
from vmferry.agent.open_snapshots import Opened
from vmferry.agent.own_threads import in_own_thread
from vmferry.agent.restore_definition import Overlay, disk_objections
from vmferry.agent.restore_feed import PAGE_BYTES, Feed, Progress, block_objection
from vmferry.agent.vms import KeptVm, VmDefinition
from vmferry.core import restore as core
from vmferry.core.facts import Fact
from vmferry.core.job import RESTORE, JobStatus, path
from vmferry.core.restore import RestoreFact as F
from vmferry.core.restore import RestoreLog, RestoreWish, Step
from vmferry.errors import PlanRefused, QemuError, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.qmp.codec import Event
from vmferry.vm.ram_blocks import RamBlockLine
from vmferry.vm.runtime import RuntimePaths

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.engine.lazy import Touches
    from vmferry.engine.outgoing import OutgoingOutcome

log = logging.getLogger("vmferry.agent")

CHANNEL_NAME = "vmferry-restore"
CAPABILITIES = ("events", "return-path", "postcopy-ram")
NO_EXIT_SINCE = (9, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestoreWanted:
    """An order, as the journal has it."""

    job: str
    vm: str
    snapshot: str
    name: str
    """The snapshot's name."""
    lazy: bool
    runs: bool
    definition: dict[str, Any]
    directory: str
    overlays: tuple[Overlay, ...] = ()
    notes: tuple[str, ...] = ()
    auto_dismiss: bool = True
    auto_finalize: bool = True
    wanted_s: float = 0.0


class RestoreAttempt:
    """Lives on the agent's loop. `run` is its task."""

    def __init__(self, agent: Agent, wanted: RestoreWanted) -> None:
        self.agent, self.wanted = agent, wanted
        self.log = RestoreLog()
        self.wish = RestoreWish(wanted.lazy, wanted.runs)
        self.machine: Machine | None = None
        self.feed: Feed | None = None
        self.ended = asyncio.Event()
        self.revision = 0
        self.error: VmferryError | None = None
        self.cpu_resumed_s: float | None = None
        """When QEMU says that the guest began to run (wall clock)."""
        self._progress = Progress(0, 0)
        self._outcome: OutgoingOutcome | None = None
        """The numbers of the feed that ended last."""
        self._news = asyncio.Event()
        self._opened: Opened | None = None
        self._is_pinned = False
        self.pinning: asyncio.Task[None] | None = None
        """What puts its pin; it comes to its end whatever becomes of the restore."""
        self.page_bytes: dict[str, int] = {}
        """The host pages of its QEMU's blocks; one that is not named has pages of 4 KiB."""
        self._rejoins = 0
        self.was_restored = False
        """An earlier agent began it."""
        self._touches: Touches | None = None
        """What the guest asked for over connections that broke."""
        self.kept: KeptVm | None = None
        """The guest as this host keeps it."""
        self.was_adopted = False
        """It was among this host's VMs: whoever took it out of them since meant it."""
        self.has_written_starting = False
        """The journal has STARTING of this job."""
        self.images: dict[str, tuple[int, int]] = {}
        """Overlays that this job made: device and inode."""
        self._told_s = 0.0

    @property
    def job(self) -> str:
        """Its id."""
        return self.wanted.job

    @property
    def vm(self) -> str:
        """The name that the guest gets."""
        return self.wanted.vm

    @property
    def has_opened(self) -> bool:
        """It holds its snapshot open."""
        return self._opened is not None

    @property
    def runtime(self) -> RuntimePaths:
        """The directory of its QEMU."""
        return RuntimePaths(self.wanted.directory)

    # --- facts ----------------------------------------------------------------------------------------------

    def note(self, fact: F, *, round_no: int = 0, text: str = "") -> None:
        """Records a fact, tells it, and wakes the loop."""
        before = self.log
        self.log = before.with_fact(fact, round_no=round_no, text=text, at_s=self.agent.clock.wall_s())
        if self.log is before:
            return
        self.revision += 1
        failed = fact in (F.CANCEL, F.FAILED, F.GONE)
        job_events.tell_fact(
            self.agent, RESTORE.name, {"fact": fact.value, "round": round_no, "text": text, "by": "agent"},
            job=self.job, vm=self.vm, revision=self.revision,
            states=path(core.restore_state(before), core.restore_state(self.log), failed=failed),
        )  # fmt: skip
        self.agent.publish("RESTORE", self.brief())
        self._news.set()

    def fail(self, error: VmferryError) -> None:
        """It ends without a guest. The first error counts."""
        self.error = self.error or error
        log.warning("job=%s vm=%s snapshot=%s result=%s", self.job, self.vm, self.wanted.snapshot, error)
        self.note(F.FAILED, text=error.message)

    def use(self, machine: Machine) -> None:
        """This is its QEMU."""
        self.machine = machine
        machine.on_gone = self._on_gone
        machine.on_event = self._on_event

    def _on_gone(self) -> None:
        words = self.agent.tail_log(self.runtime)
        self.error = self.error or QemuError(
            f"the QEMU of {self.vm} ended: {words or 'without a word'}",
            guest="lost" if F.RAN in self.log or F.STARTING in self.log else "unharmed",
        )
        self.note(F.GONE, text=words)
        if self.kept is not None and self.agent.vms.get(self.vm) is self.kept:
            self.agent.vm_gone(self.kept)

    def _on_event(self, event: Event) -> None:
        if event.name == "RESUME" and event.timestamp_us is not None:
            self.cpu_resumed_s = event.timestamp_us / 1e6
            if self.log.stands:  # an order to run whose answer came late, or was lost
                self.note(F.AGAIN, round_no=self.log.rounds(F.STANDS))
        self._news.set()

    def _hear_feed(self) -> None:
        """Threads have news: what is so now becomes facts."""
        feed = self.feed
        if feed is None:
            return
        if feed.has(Fact.PACKAGE_LOADED):
            self.note(F.LOADED)
        if feed.has_rejoined:
            self.note(F.REJOINED, round_no=self.log.rounds(F.LOST))
        if feed.has(Fact.PEER_ACK):
            self.note(F.WHOLE)
        trouble, tries = feed.trouble, self.log.rounds(F.TROUBLE)
        if trouble is not None:
            text = trouble_text(trouble.error, guest_waits=trouble.guest_waits, runs=F.RAN in self.log)
            if not self.log.has_trouble or text != self.log.text(F.TROUBLE):
                self.note(F.MENDED, round_no=tries)
                self.note(F.TROUBLE, round_no=tries + 1, text=text)
                log.warning("job=%s vm=%s snapshot=%s result=%s", self.job, self.vm, self.wanted.snapshot, text)
        elif self.log.has_trouble:
            self.note(F.MENDED, round_no=tries)
        if feed.lost is not None and F.WHOLE not in self.log and not self.log.is_lost:
            self.note(F.LOST, round_no=self.log.rounds(F.LOST) + 1, text=f"the channel to QEMU broke: {feed.lost}")
        if feed.failed is not None and F.WHOLE not in self.log:
            self.fail(self._with_words(feed.failed))
        self._news.set()

    def _with_words(self, error: VmferryError) -> VmferryError:
        """The same with what QEMU wrote about it, which is often the reason."""
        words = self.agent.tail_log(self.runtime)
        return QemuError(f"{self.vm}: {error.message}; QEMU says: {words}", cause=error) if words else error

    # --- what is told ---------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """How far it is."""
        if self.feed is not None and not self.ended.is_set() and F.ENDED not in self.log:
            self._progress = self.feed.progress()
        return self._progress

    def brief(self) -> dict[str, Any]:
        """The short form, for a progress line."""
        moved = self.progress()
        return {
            "job": self.job,
            "vm": self.vm,
            "detail": core.detail(self.log),
            "state": core.restore_state(self.log).value,
            "reason": core.reason(self.log),
            "current_bytes": moved.pages * 4096,
            "whole_bytes": moved.pages_whole * 4096,
            "over": F.ENDED in self.log,
        }

    def wire(self) -> dict[str, Any]:
        """Everything, as it stands or as it ended."""
        found, wanted = self.log, self.wanted
        begun_s, ran_s = found.at_s(F.WANTED), found.at_s(F.RAN)
        resumed_s = self.cpu_resumed_s or ran_s
        outcome = self.feed.outcome() if self.feed is not None else self._outcome
        return {
            **self.brief(),
            "host": self.agent.config.name,
            "status": core.detail(found),
            "snapshot": wanted.snapshot,
            "name": wanted.name,
            "lazy": wanted.lazy,
            "paused": not wanted.runs,
            "sentence": self._sentence(),
            "error": None if self.error is None or core.has_won(found) else self.error.to_wire(),
            "resume_ms": _ms(begun_s, resumed_s) if wanted.runs and F.RAN in found else None,
            "resumed_s": self.cpu_resumed_s,
            "whole_ms": _ms(begun_s, found.at_s(F.WHOLE)),
            "requests": outcome.requests if outcome else 0,
            "fault_p50_us": outcome.request_p50_us if outcome else None,
            "fault_p99_us": outcome.request_p99_us if outcome else None,
            "held_p50_us": outcome.here_p50_us if outcome else None,
            "held_p99_us": outcome.here_p99_us if outcome else None,
            "progress": {"current_bytes": self._progress.pages * 4096, "whole_bytes": self._progress.pages_whole * 4096,
                         "percent": self._percent()},
            "overlays": [overlay.path for overlay in wanted.overlays],
            "notes": list(wanted.notes),
            "timeline": [dataclasses.asdict(entry) | {"fact": entry.fact.value} for entry in found.entries],
        }  # fmt: skip

    def _percent(self) -> int | None:
        whole = self._progress.pages_whole
        return self._progress.pages * 100 // whole if whole else None

    def _sentence(self) -> str:
        vm, name, found = self.vm, self.wanted.name, self.log
        if core.has_won(found):
            return f"{vm} is here, whole, from the snapshot {name}{'' if self.wanted.runs else '; it is paused'}."
        if F.GONE in found and not found.is_given_up:
            return f"{vm} ran from the snapshot {name}, and its QEMU ended; the snapshot is as it was."
        if found.is_given_up:
            why = "cancelled" if F.CANCEL in found else "failed"
            return f"The restore of {name} as {vm} {why}; nothing of it is left, and the snapshot is as it was."
        if core.reason(found):
            return f"{vm} waits: {core.reason(found)}."
        if found.text(F.RAN):
            return f"{vm} is here from the snapshot {name}, and {found.text(F.RAN)}; the rest of its memory follows."
        if F.RAN in found:
            return f"{vm} runs from the snapshot {name}; the rest of its memory follows."
        return f"The snapshot {name} is being restored as {vm}."

    # --- the loop -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is over. Raises nothing but cancellation, which is the agent's end."""
        steps = {
            Step.READ_AND_LAUNCH: self._read_and_launch,
            Step.LOAD: self._load,
            Step.KEEP: self._keep,
            Step.RUN: lambda: restore_start.start_cpus(self),
            Step.REJOIN: self._rejoin,
            Step.UNDO: lambda: restore_start.undo(self),
            Step.END: self._end,
            Step.WAIT: self._wait,
        }
        pause_s = limits.RESTORE_REJOIN_MIN_S
        while F.ENDED not in self.log:
            row = core.next_row(self.log, self.wish)
            log.debug("job=%s vm=%s row=%s", self.job, self.vm, row.label)
            try:
                await steps[row.step]()
                pause_s = limits.RESTORE_REJOIN_MIN_S
            except Exception as error:  # noqa: BLE001  a defect must not leave a guest without anybody
                found = self._told(error, row.label)
                if row.step in (Step.READ_AND_LAUNCH, Step.LOAD, Step.KEEP):
                    self.fail(found)
                    continue
                log.warning("job=%s vm=%s row=%s result=%s", self.job, self.vm, row.label, error)
                await self._until_news(pause_s)
                pause_s = min(pause_s * 2, limits.RESTORE_REJOIN_MAX_S)
        self.ended.set()

    def _told(self, error: Exception, label: str) -> VmferryError:
        """As an error of ours. One that nobody foresaw is a defect of vmferry: it is told, and the table goes on."""
        if isinstance(error, VmferryError):
            return error
        if isinstance(error, OSError):
            return VmferryError(str(error), cause=error)
        log.error("job=%s vm=%s row=%s result=defect", self.job, self.vm, label, exc_info=error)
        found = VmferryError(
            f"{self.vm}: a defect of vmferry at '{label}': {type(error).__name__}: {error}", cause=error
        )
        self.error = self.error or found
        return found

    async def _wait(self) -> None:
        await self._until_news(limits.RESTORE_TICK_S)
        now_s = self.agent.clock.now_s()
        if now_s - self._told_s >= limits.RESTORE_TICK_S:
            self._told_s = now_s
            self._hear_feed()  # a read that hangs tells nothing
            self.agent.publish("RESTORE", self.brief())

    async def _until_news(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        self._news.clear()

    # --- its steps ------------------------------------------------------------------------------------------

    async def _read_and_launch(self) -> None:
        reading = asyncio.create_task(self._read(), name=f"restore-read-{self.job}")
        try:
            await self._launch()
        except BaseException:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            raise
        assert self.machine is not None
        lines = await guest_memory.block_lines(self.machine)
        while not reading.done() and not self.log.is_given_up:
            news = asyncio.create_task(self._until_news(limits.RESTORE_TICK_S))
            await asyncio.wait({reading, news}, return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
        if self.log.is_given_up:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            return
        opened = await reading
        self.note(F.READ)
        self._check(opened, lines)
        await self._write_page_bytes(lines)
        # Once more: 1. the command looks at the stored images  2. somebody writes to one  3. QEMU opens it
        changed = await asyncio.to_thread(disk_objections, opened.disks)
        if changed:
            raise PlanRefused(f"{self.vm}: {'; '.join(changed)}", side="client")
        self.note(F.LAUNCHED)

    async def _read(self) -> Opened:
        """Raises RepositoryError when something is missing or damaged."""
        if self._opened is None:
            self._opened = await self.agent.restores.snapshots.open(self.wanted.snapshot)
        if self.wanted.lazy and not self._is_pinned:
            # 1. a cancel ends this while the pin is being put, in a thread  2. it is taken away, before it is there
            # 3. it lands, and nothing can be pruned any more. So whoever takes it away waits for the task first.
            if self.pinning is None or self.pinning.done():
                self.pinning = asyncio.create_task(self.agent.restores.pin(self.wanted), name=f"pin-{self.job}")
                self.agent.keep_task(self.pinning)
            await asyncio.shield(self.pinning)
            self._is_pinned = True
        return self._opened

    async def _launch(self) -> None:
        definition = VmDefinition.from_wire(self.wanted.definition)
        argv = definition.incoming_argv(self.runtime, self.agent.config.qemu)
        layers = [overlays.Layer(each.path, each.backing, each.backing_format) for each in self.wanted.overlays]
        await overlays.make_all(
            layers, job=self.job, qemu=self.agent.config.qemu, journal=self.agent.journal, made=self.images
        )
        self.use(await self.agent.launch(self.vm, argv, self.runtime))

    def _check(self, opened: Opened, lines: tuple[RamBlockLine, ...]) -> None:
        objection = block_objection(opened.reader.head.blocks, lines)
        if objection:
            raise PlanRefused(f"{self.vm}: {objection}", side="client")

    async def _write_page_bytes(self, lines: tuple[RamBlockLine, ...]) -> None:
        """A QEMU with huge pages takes each in one piece: the next agent, which joins its postcopy again, cannot ask it
        while its main loop waits for one."""
        self.page_bytes = {line.name: line.page_bytes for line in lines if line.page_bytes != PAGE_BYTES}
        if self.page_bytes:
            await self.agent.journal.append(Entry.HOST_PAGES, self.job, dict(self.page_bytes))

    async def _load(self) -> None:
        machine, opened = self.machine, self._opened
        assert machine is not None
        assert opened is not None
        wanted = dict.fromkeys(CAPABILITIES, True) | {"postcopy-ram": self.wanted.lazy}
        states = [{"capability": name, "state": state} for name, state in wanted.items()]
        arguments: dict[str, Any] = {"uri": f"fd:{CHANNEL_NAME}"}
        if machine.version >= NO_EXIT_SINCE:
            arguments["exit-on-error"] = False  # keep the process, so that its words can be read
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                await asyncio.gather(
                    machine.execute("migrate-set-capabilities", {"capabilities": states}),
                    machine.execute("getfd", {"fdname": CHANNEL_NAME}, fds=(theirs.fileno(),)),
                )
            self.note(F.LOADING)
            await machine.execute("migrate-incoming", arguments)
            feed = self.feed = await self._make_feed(
                opened, lazy=self.wanted.lazy, page_bytes=self.page_bytes, order=opened.order,
                name=f"restore-{self.job[:6]}",
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        feed.start(ours)

    async def _make_feed(self, opened: Opened, **more: Any) -> Feed:
        loop = asyncio.get_running_loop()
        return await in_own_thread(
            f"{more['name']}-maps",
            lambda: Feed(opened.reader, opened.state, loop=loop, on_news=self._hear_feed, **more),
        )

    async def _keep(self) -> None:
        machine = self.machine
        assert machine is not None
        self.kept = KeptVm(
            definition=VmDefinition.from_wire(self.wanted.definition),
            generation=1,
            identity=machine.identity,
            qmp_path=machine.qmp_path,
            directory=self.wanted.directory,
            machine=machine,
        )
        await self.agent.journal.append(Entry.KEPT, self.vm, self.kept.to_journal())
        self.note(F.KEPT)

    async def _rejoin(self) -> None:
        """QEMU listens again, out of band because its main loop may wait for a page, and gets what it lacks."""
        machine = self.machine
        assert machine is not None
        await self.drop_feed()
        opened = await self._read()
        self._rejoins += 1
        path_there = self.runtime.recovery_path(self._rejoins)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path_there)
        await machine.execute("migrate-recover", {"uri": f"unix:{path_there}"}, oob=True)
        ours = socket.socket(socket.AF_UNIX)
        try:
            await asyncio.to_thread(ours.connect, path_there)
            feed = self.feed = await self._make_feed(
                opened, lazy=True, page_bytes=self.page_bytes, order=opened.order, broken=True,
                name=f"restore-{self.job[:6]}-{self._rejoins}",
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        feed.rejoin(ours)
        until_s = self.agent.clock.now_s() + limits.ENGINE_STAND_IN_SILENCE_S
        while self.log.is_lost and feed.lost is None and self.agent.clock.now_s() < until_s and F.GONE not in self.log:
            await self._until_news(limits.RESTORE_TICK_S)
        if self.log.is_lost:
            raise QemuError(f"{self.vm}: its QEMU did not take the channel up again: {feed.lost or 'no answer'}")

    async def drop_feed(self) -> None:
        """Its threads end."""
        feed, self.feed = self.feed, None
        if feed is not None:
            self._progress, self._outcome = feed.progress(), feed.outcome()
            self._touches = touch_orders.joined(self._touches, feed.touches)
            await feed.stop()

    async def _end(self) -> None:
        feed = self.feed
        if feed is not None and core.has_won(self.log):
            self._progress = feed.progress()
            feed.outgoing.saw_running()
            await self._options_back()
            await self._remember_touches(feed)
        elif F.KEPT in self.log and F.GONE in self.log and not self.was_adopted:
            self.agent.restores.adopt(self)  # as any VM of this host whose QEMU has ended
        result = self.wire() | {"over": True, "state": JobStatus.CONCLUDED.value}
        await self.agent.journal.append(Entry.ENDED, self.job, result)
        await self.drop_feed()
        self.note(F.ENDED)
        await self.agent.restores.over(self, result)

    async def _remember_touches(self, feed: Feed) -> None:
        """Not with an order that was known: what was read ahead in it was never asked for. Nor after a restart: how the
        guest began is known to nobody any more."""
        if not self.was_restored and self._opened is not None and self._opened.order is None:
            touches = touch_orders.joined(self._touches, feed.touches)
            await self.agent.restores.remember_touches(self.wanted, touches)

    async def _options_back(self) -> None:
        """The next migration of this QEMU begins with nothing of this one. Trouble is a line in the log: it sets its
        own options in any case."""
        assert self.machine is not None
        off = [{"capability": name, "state": False} for name in CAPABILITIES]
        try:
            # QEMU says that it has everything a moment before it has cleaned up; until then it refuses.
            await rescue.settled(self.machine)
            await self.machine.execute("migrate-set-capabilities", {"capabilities": off})
        except QemuError as error:
            log.warning("job=%s vm=%s effect=options-back result=%s", self.job, self.vm, error)


def trouble_text(error: VmferryError, *, guest_waits: bool, runs: bool) -> str:
    """Why pages do not come, what that means for the guest, and what can be done."""
    if guest_waits:
        means = "the guest waits for one of these pages"
    else:
        means = "the guest runs until it needs one of these pages" if runs else "the guest has not begun to run"
    way = error.hint if error.retry == "no" and error.hint else "it is asked again and again, and goes on by itself"
    return f"{error.message}; {means}; {way}"


def _ms(begun_s: float | None, then_s: float | None) -> float | None:
    return None if begun_s is None or then_s is None else round((then_s - begun_s) * 1000, 2)


def status_of(attempt: RestoreAttempt) -> JobStatus:
    """The state of its job."""
    return core.restore_state(attempt.log)


OnNews = Callable[[], None]
