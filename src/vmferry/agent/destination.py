"""The destination's side of one migration: a place for a guest that must not run before it is told to.

Theory of operation
-------------------
A `DestinationAttempt` is made when the source's agent asks for a place (or found unfinished in the journal at
start) and lives until the guest is this host's own, or has provably never run here and never will.

Facts about this side go to the source's agent as answers and as pushed events (`facts_wire`), always whole, so
a lost or repeated message changes nothing.

Rule 1: `cont` is written in START_CPUS only, under its guard; nothing else here starts CPUs.
Rule 2: before `cont` is written the newer generation is durable (`grant`).
Rule 3: the QEMU is killed in RENOUNCE only, under its guard: `cont` was never written, or was refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from vmferry.agent import job_events
from vmferry.agent.channel import ChannelDoor, ChannelEnd, cut_what_was_let_go
from vmferry.agent.context import Context
from vmferry.agent.host import Freezes
from vmferry.agent.images import Stamp
from vmferry.agent.knock import KnockDoor
from vmferry.agent.loop import AttemptLoop
from vmferry.agent.machine import Machine
from vmferry.agent.observe import destination_findings
from vmferry.agent.wants import Place
from vmferry.core.decide import destination_allows, destination_row
from vmferry.core.effects import DestinationEffect
from vmferry.core.facts import Fact, FactLog, open_round
from vmferry.core.job import INCOMING
from vmferry.core.report import place_wire
from vmferry.core.status import derive_destination
from vmferry.core.table import Outcome, Row
from vmferry.core.view import DestinationView, Halt, Incoming, Ran, destination_view
from vmferry.errors import Busy, HostUnreachable, QemuError, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.pki.job_credentials import JobCredentials
from vmferry.qmp.client import QmpClient
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpTimeout
from vmferry.vm.runtime import RuntimePaths

log = logging.getLogger("vmferry.agent")

LOAD_POLL_S = 0.002
"""Between a status that may mean 'loaded' and the run state that proves it; QEMU has no event for that."""
CUT_OFF = ("postcopy-paused",)
ORPHAN_S = 30.0
"""A place whose source says nothing and sends nothing for so long asks the source whether it is still wanted."""
ORPHAN_RESTORED_S = 2.0
"""The same for one that an agent found when it began: the source may have given it up when nobody was there to hear."""


class DestinationAttempt(AttemptLoop[DestinationEffect]):
    """One place for one guest."""

    def __init__(self, context: Context, place: Place) -> None:
        super().__init__(job=place.job, vm=place.vm, clock=context.clock)
        self.context, self.place = context, place
        self.runtime = RuntimePaths(place.directory)
        self.machine: Machine | None = None
        self.credentials: JobCredentials | None = None
        self.peer_ca: bytes | None = None
        self.listener: ChannelDoor | None = None
        self.channels: list[ChannelEnd] = []
        self.offer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.policy = place.policy
        self.images: dict[str, tuple[int, int]] = {}
        """Files that this job made: path to device and inode; journalled."""
        self.image_stamps: dict[str, Stamp | None] = {}
        """What the place's images looked like when its QEMU ended under our eyes."""
        self.has_whole_copies = False
        """The source has said that every disk was copied once; what a next try can begin with, should this one fail."""
        self.freezer: Freezes | None = None
        """While it is there the guest's CPUs are stopped from outside."""
        self.is_renounced = False
        """It is durable that the guest never ran here and never will; its QEMU may still be there."""
        self.unanswered: QmpClient | None = None
        """The session in which `cont` was written and not answered in time."""
        self.cpu_threads: tuple[int, ...] = ()
        """The vCPUs' thread ids: asked for while QEMU answers, needed when it does not."""
        self.rounds = 0
        """How often the channel was made anew."""
        self.recovering: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when QEMU has taken the newest of them to recover on."""
        self.joining = asyncio.Lock()
        """Held while QEMU is given a channel to recover on: one try at a time."""
        self.door: KnockDoor | None = None
        """Where the source may call when the agents' link is down."""
        self.called_round = 0
        """The newest round that a caller there began: orders that are older come late."""
        self.error_text = ""
        self.error: VmferryError | None = None
        self.resume_s: float | None = None
        self.changed = asyncio.Event()
        """Set at each new fact; the answers to the source wait on it."""
        self.heard_source_s = context.clock.now_s()
        self.orphan_s = ORPHAN_S
        self._word: str | None = None
        self._run_state: str | None = None
        self._answers = True
        self._asked_s = float("-inf")
        self.note(Fact.PREPARE, by=place.source)

    # --- the loop's questions ---

    def incoming(self) -> Incoming:
        """What this side's QEMU says, as one of the table's answers."""
        if self.machine is None:
            if self.facts.last_round(Fact.START_SENT):
                return Incoming.GONE  # an earlier agent may have started it, and it is not there any more
            # After a spawn that failed there is no machine, and there never will be one in this attempt.
            return Incoming.FAILED if Fact.ERROR in self.facts else Incoming.NONE
        if self.machine.is_gone:
            return Incoming.GONE
        if not self._answers:
            return Incoming.UNKNOWN
        if self._word == "failed" or (Fact.ERROR in self.facts and Fact.LOADED not in self.facts):
            return Incoming.FAILED
        if self._run_state == "running":
            return Incoming.RUNNING
        return Incoming.LOADED if Fact.LOADED in self.facts else Incoming.LOADING

    def row(self) -> Row[DestinationEffect]:
        return destination_row(self.view())

    def view(self) -> DestinationView:
        """The table's questions, answered now."""
        return destination_view(
            self.facts, self.incoming(), pauses=self.policy.pauses, is_frozen=self.freezer is not None
        )

    def allows(self, effect: DestinationEffect) -> bool:
        return destination_allows(effect, self.view())

    def interruptible(self, effect: DestinationEffect) -> bool:
        # Only a release ends it half-way: the row changes as soon as the QEMU is there, long before the offer is made.
        return effect is DestinationEffect.SPAWN and Fact.RELEASE in self.facts

    async def act(self, effect: DestinationEffect) -> None:
        await self.context.destination_hands(self, effect)

    def on_trouble(self, effect: DestinationEffect, error: Exception) -> None:
        """A spawn that failed ends the attempt; everything else is looked at again."""
        self._asked_s = float("-inf")
        if effect is DestinationEffect.SPAWN:
            self.fail(error)

    def on_facts(self, before: FactLog, after: FactLog) -> None:
        self.changed.set()
        self.revision += 1
        was, now = derive_destination(before), derive_destination(after)
        job_events.tell(
            self.context, INCOMING, job=self.job, vm=self.vm, revision=self.revision, before=before, after=after
        )
        if was.status is not now.status:
            data = {
                "vm": self.vm,
                "job": self.job,
                "role": "destination",
                "status": now.status.value,
                "cause": after.entries[-1].fact.value,
                "because": [f.value for f in now.because],
                "seq": len(after),
            }
            self.context.publish("MIGRATION", data)
        self.context.publish("TARGET", self.facts_wire())

    def on_row(self, row: Row[DestinationEffect]) -> None:
        self.revision += 1
        job_events.tell_change(self.context, self.brief(), revision=self.revision)

    # --- inputs ---

    def fail(self, error: Exception) -> None:
        """Records what makes this place impossible; the first one counts."""
        if Fact.ERROR not in self.facts:
            self.error_text = str(error)
            self.error = error if isinstance(error, VmferryError) else QemuError(str(error), side="destination")
        self.note(Fact.ERROR, text=str(error))
        if not self.offer.done():
            self.offer.set_exception(self.error or error)
            self.offer.exception()  # whoever asked for the place reads it; it may have gone away

    def use(self, machine: Machine) -> None:
        """The QEMU of this place is there."""
        self.machine = machine
        machine.on_event = self.on_qemu_event
        machine.on_gone = self.on_qemu_gone

    def on_qemu_gone(self) -> None:
        """The kernel said that this QEMU is gone. Our descriptors would keep the source's stream open."""
        for channel in self.channels:
            channel.cut()
        # At once: what comes to these images from now on is not this place's.
        paths = [disk.path for disk in self.place.disks]
        self.image_stamps = {path: self.context.host.image_stamp(path) for path in paths}
        self.wake()

    def on_qemu_event(self, event: Event) -> None:
        """An event of the destination's QEMU."""
        at_s = event.timestamp_us / 1e6 if event.timestamp_us is not None else self.clock.wall_s()
        match event.name:
            case "MIGRATION":
                self._word = str(event.data.get("status"))
                self._run_state = None
                self._asked_s = float("-inf")
                # What the word proves by itself, now: it may be another one before anybody looks.
                self._note_findings(self._word, None)
            case "RESUME":
                self.resume_s = at_s
                self._run_state = "running"
                self.note(Fact.TARGET_RAN, text="RESUME", by="destination QEMU")
            case "STOP":
                self._run_state = None
        self.wake()

    async def grant(self, generation: int) -> None:
        """The source's agent gives the right to run. Durable before anything follows from it.

        Raises Busy for another generation than this place was made for: an order of an older attempt.
        """
        if generation != self.place.generation:
            raise Busy(
                f"{self.vm}: a grant for generation {generation} came to a place of generation {self.place.generation}",
                side="source",
            )
        if Fact.RELEASE in self.facts or Fact.TARGET_GONE in self.facts:
            return  # renounced: the answer says so
        if Fact.COMMITTED not in self.facts:
            await self.context.journal.append(Entry.COMMITTED, self.job, {"generation": generation})
            self.note(Fact.COMMITTED, by=self.place.source)
        orders = self.facts.last_round(Fact.GRANTED)
        if orders <= self.facts.last_round(Fact.START_REFUSED):  # the same order twice is one order
            self.note(Fact.GRANTED, round_no=orders + 1, by=self.place.source)

    async def until_cut_off(self, *, deadline_s: float) -> None:
        """Hears from QEMU itself that it has lost the channel. Raises QemuError when it does not say so in time."""
        assert self.machine is not None
        end_s = self.clock.now_s() + deadline_s
        while (word := (await self.machine.migration(deadline_s=deadline_s)).get("status")) not in CUT_OFF:
            if self.clock.now_s() >= end_s:
                raise QemuError(f"{self.vm}: the destination's QEMU is still in {word}", side="destination")
            await asyncio.sleep(LOAD_POLL_S)
        self._note_findings(word, self._run_state or "paused")

    async def change_policy(self, changes: dict[str, Any]) -> None:
        """The job's policies from now on. Durable first. Raises Unfit; nothing is changed then."""
        await self.context.journal.append(Entry.POLICY, self.job, changes)
        self.policy = self.policy.changed(changes)
        self.wake()

    # --- looking ---

    async def look(self) -> None:
        """Asks QEMU for its word and run state whenever an answer may have changed."""
        machine = self.machine
        if machine is None or machine.is_gone:
            self.note_exit()
            return
        cut_what_was_let_go(self.channels, machine.pid)
        await self.context.tend_door(self)
        await self._ask_source_if_orphaned()
        settled = Fact.LOADED in self.facts and Fact.COMMITTED not in self.facts
        due = self.clock.now_s() - self._asked_s >= (1.0 if settled or self._word is None else 0.5)
        if not due or self.view().halt is Halt.WANTED:
            return  # a QEMU that is to be frozen may hang: first the effect, which asks it nothing that it must answer
        try:
            await self._ask(machine)
            self._answers = True
        except QmpTimeout:
            self._answers = False
            self._asked_s = float("-inf")
        except QemuError as error:
            self._asked_s = float("-inf")
            log.info("job=%s vm=%s look result=%s", self.job, self.vm, error)

    async def _ask(self, machine: Machine) -> None:
        # 1. the question is sent  2. QEMU answers "active"  3. its event "completed" comes before we go on: the
        # answer is old. So the moment of asking counts, and an event since then makes it due again.
        self._asked_s = self.clock.now_s()
        info = await machine.migration(deadline_s=2.0)
        self._word = info.get("status")
        self._run_state = await machine.run_state(deadline_s=2.0)
        while self._word in ("completed", "postcopy-active") and self._run_state == "inmigrate":
            # The status is told a moment before the guest is startable; there is no event for the latter.
            await asyncio.sleep(LOAD_POLL_S)
            self._run_state = await machine.run_state(deadline_s=2.0)
            info = await machine.migration(deadline_s=2.0)
            self._word = info.get("status")
        self._note_findings(self._word, self._run_state)
        self._note_late_answer(machine)
        if self._word == "failed":
            self.fail(self._why_loading_failed(info))

    def _why_loading_failed(self, info: dict[str, Any]) -> QemuError:
        """QEMU's error, and what it has written besides: the one says where in the stream, the other why."""
        error, words = info.get("error-desc"), self.context.tail_log(self.runtime)
        text = "; ".join(dict.fromkeys(filter(None, (error, words)))) or "loading failed"  # often it is the same
        return QemuError(text, side="destination")

    async def look_for_error(self, *, deadline_s: float) -> None:
        """Gives an error of this side's QEMU, its end, or that it has loaded, the time to be seen."""
        if Fact.LOADED not in self.facts:
            self._asked_s = float("-inf")
            self.wake()
            seen = (Fact.LOADED, Fact.ERROR, Fact.TARGET_GONE, Fact.TARGET_RAN)
            await self.until(*seen, deadline_s=deadline_s)

    def _note_findings(self, word: str | None, run_state: str | None) -> None:
        for fact, round_no, text in destination_findings(word, run_state, self.facts):
            self.note(fact, round_no=round_no, text=text, by="destination QEMU")

    def _note_late_answer(self, machine: Machine) -> None:
        """QEMU carries the commands of a session out in their order. So once a later question was answered, a `cont`
        whose own answer came too late has been carried out: a guest that does not run, and did not, was refused."""
        tries = self.facts.last_round(Fact.START_SENT)
        if self.unanswered is None or self.unanswered is not machine.client or tries == 0:
            return
        if self._run_state == "paused" and self.facts.stamp(Fact.START_REFUSED, tries) is None:
            self.unanswered = None
            self.note(Fact.START_REFUSED, round_no=tries, text="cont had no effect, and was answered late", by="agent")

    def note_exit(self) -> None:
        """Why the QEMU ended, if it ended by itself."""
        is_gone = self.machine is not None and self.machine.is_gone
        if is_gone and Fact.ERROR not in self.facts and Fact.TARGET_RAN not in self.facts:
            words = self.context.tail_log(self.runtime)
            self.fail(QemuError(f"the destination's QEMU ended: {words or 'no reason given'}", side="destination"))

    async def _ask_source_if_orphaned(self) -> None:
        """A place that waits in vain asks whether it is still wanted."""
        if self.clock.now_s() - self.heard_source_s >= self.orphan_s:
            await self.ask_source()

    async def ask_source(self) -> None:
        """Asks the source whether this place is still wanted; only a clear no ends it, and none once the guest may have
        run here. An order to start that QEMU refused leaves it waiting; a source that was fenced meanwhile says no."""
        if self.view().ran is not Ran.NO:
            return
        self.heard_source_s = self.clock.now_s()
        try:
            link = self.context.peers.link(self.place.source)
            answer = await link.call("peer-wanted", {"job": self.job}, deadline_s=2.0)
        except (HostUnreachable, VmferryError) as error:
            log.info("job=%s vm=%s command=peer-wanted result=%s", self.job, self.vm, error)
            return
        if not answer.get("wanted", True) or (answer.get("over") and self._nothing_came()):
            self.note(Fact.RELEASE, text="the source's agent does not want it any more", by="source agent")

    def _nothing_came(self) -> bool:
        """QEMU itself says that no stream has begun, and it has not been started: whatever became of the guest, nothing
        of it is here. (A place for a guest with disks has no door until they are copied, so nobody comes too late.)"""
        is_fresh = self._answers and self._asked_s > float("-inf")
        return is_fresh and Fact.HEADER_SEEN not in self.facts and self.incoming() is Incoming.LOADING

    async def is_given_up(self, *, deadline_s: float) -> bool:
        """Whether this place is over. One that its source could not release, as this agent or the link was away, ends
        here and not only when it has waited in vain: who was told to try again may do so at once."""
        if not self.ended.is_set():
            await self.ask_source()
        if Fact.RELEASE in self.facts:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):
                    await self.ended.wait()
        return self.ended.is_set()

    # --- outputs ---

    def outcome(self) -> Outcome:
        """As seen from here."""
        return self.row().outcome

    def facts_wire(self) -> dict[str, Any]:
        """Everything that the source's agent may conclude from; whole each time."""
        view = self.view()
        refused = self.facts.last_round(Fact.START_REFUSED)
        refused_entry = self.facts.entry(Fact.START_REFUSED, refused) if refused else None
        gone_entry = self.facts.entry(Fact.TARGET_GONE)
        return {
            "job": self.job,
            "vm": self.vm,
            "generation": self.place.generation,
            "loaded": Fact.LOADED in self.facts,
            "whole": Fact.ALL_SENT in self.facts and Fact.LOADED in self.facts,
            "committed": Fact.COMMITTED in self.facts,
            # Told only once this host keeps the guest durably: who hears it may ask for the guest here at once.
            "ran": Fact.RUN_ACKED in self.facts,
            "in_doubt": view.ran is Ran.UNKNOWN or (view.ran is Ran.YES and Fact.RUN_ACKED not in self.facts),
            "refused": refused,
            "refused_text": refused_entry.text if refused_entry else "",
            "gone": gone_entry is not None,
            "died": Fact.TARGET_DIED in self.facts,
            # Which loss of the channel is not healed, 0 for none: the source's QEMU may not have noticed.
            "cut_off": 0 if Fact.ALL_SENT in self.facts else open_round(self.facts),
            "frozen": self.freezer is not None,
            "resume_s": self.resume_s,
            "text": self.error_text or (gone_entry.text if gone_entry else ""),
            "status": derive_destination(self.facts).status.value,
            "row": self.row().label,
        }

    def brief(self) -> dict[str, Any]:
        """The short form for events and `ls`."""
        row = self.row()
        return {
            "vm": self.vm,
            "job": self.job,
            "role": "destination",
            "source": self.place.source,
            "status": derive_destination(self.facts).status.value,
            "outcome": row.outcome.value,
            "row": row.label,
            "over": self.ended.is_set(),
            "action": row.action,
        }

    def wire(self) -> dict[str, Any]:
        """What this side alone knows of the migration, for when the source's agent does not answer. Same names as in
        the source's own words; what only the source measures is None."""
        return place_wire(
            job=self.job,
            vm=self.vm,
            source=self.place.source,
            destination=self.context.config.name,
            log=self.facts,
            row=self.row(),
            error=self.error.to_wire() if self.error is not None else None,
            over=self.ended.is_set(),
        )

    def result_wire(self, outcome: Outcome) -> dict[str, Any]:
        """How this side ended, for the journal and for who reads the ended job."""
        ran, host = outcome is Outcome.DESTINATION, self.context.config.name
        why = f": {self.error_text}" if self.error_text else ""
        sentence = f"{self.vm} runs on {host}." if ran else f"{host} gave its place for {self.vm} up{why}."
        if outcome is Outcome.LOST:
            sentence = f"{self.vm} ran on {host}, and its QEMU is gone."
        total = int(self.place.definition.get("memory_bytes", 0))
        moved = {"current_bytes": total if ran else 0, "whole_bytes": total, "percent": 100 if ran else 0}
        more: dict[str, Any] = {
            "outcome": outcome.value,
            "over": True,
            "notes": [],
            "sentence": sentence,
            "progress": moved,
        }
        return {**self.wire(), **self.brief(), **more}

    async def until(self, *facts: Fact, deadline_s: float) -> None:
        """Waits until one of the facts is recorded or the deadline has passed; says nothing about which."""
        try:
            async with asyncio.timeout(deadline_s):
                while not any(fact in self.facts for fact in facts):
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            return

    async def until_change(self, *, deadline_s: float) -> None:
        """Waits for the next new fact, or the deadline."""
        self.changed.clear()
        try:
            async with asyncio.timeout(deadline_s):
                await self.changed.wait()
        except TimeoutError:
            return
