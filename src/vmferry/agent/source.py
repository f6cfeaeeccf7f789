"""The source's side of one migration: what is known, what is published. Acting is in `source_act`.

Theory of operation
-------------------
A `SourceAttempt` is made when a migration is wanted (or found unfinished in the journal at start) and lives
until its CLEAN_UP row has been carried out. Inputs arrive in four ways, each ending in a fact or a reading:
QEMU's events (`on_qemu_event`), the end of its process (`on_qemu_gone`), what the destination's agent says
(`hear_target`), and wants of people (`want_cancel`, `want_postcopy`).

Rule 1: the public status is computed (`core.status`) when somebody asks or a fact came; it is never kept.
Rule 2: QEMU's words pass through `agent.observe` only.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.agent import fences, job_events, source_disks, source_report
from vmferry.agent.channel import ChannelEnd, cut_what_was_let_go
from vmferry.agent.context import Context
from vmferry.agent.guest_memory import Memory
from vmferry.agent.loop import AttemptLoop
from vmferry.agent.machine import Machine
from vmferry.agent.observe import PROOF_VERSION, arrival, holds_back, source_findings
from vmferry.agent.tracking import Tracking
from vmferry.agent.vms import KeptVm
from vmferry.agent.wants import Mirror, RecoveryWay, Wanted
from vmferry.core.decide import decide_source, source_allows
from vmferry.core.effects import Effect
from vmferry.core.facts import Fact, FactLog, awaits_leave, wants_pause
from vmferry.core.job import MIGRATE
from vmferry.core.options import Mode
from vmferry.core.policy import FailurePolicy
from vmferry.core.report import Measured
from vmferry.core.status import cancel_refusal, derive_source
from vmferry.core.table import Outcome, Row
from vmferry.core.view import (
    Cpus,
    Readings,
    Source,
    SourceView,
    Step,
    Target,
    Want,
    cpus_from,
    source_view,
    source_word,
)
from vmferry.errors import (
    CancelRefused,
    GuestHeld,
    HostUnreachable,
    MigrationFailed,
    NotTrusted,
    QemuError,
    Unfit,
    VmferryError,
)
from vmferry.jobs.journal import Entry
from vmferry.pki.job_credentials import JobCredentials
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpTimeout

if TYPE_CHECKING:
    from vmferry.agent.plan import Plan

log = logging.getLogger("vmferry.agent")

POLL_S = 0.5
"""How often QEMU is asked for its counters while memory moves: 1 ms of work each."""
SILENT_S = 2.0
"""A QMP that has not answered for so long counts as silent; QEMU's main loop may well hang for a second."""

INTERRUPTIBLE = frozenset(
    {
        Effect.CHECK_PLAN,
        Effect.PREPARE,
        Effect.CONFIGURE,
        Effect.MAKE_SURE,
        Effect.ASK_TARGET,
        Effect.RELEASE_TARGET,
        Effect.RECONNECT,
    }
)


class SourceAttempt(AttemptLoop[Effect]):
    """One attempt to move one guest away from this host."""

    def __init__(self, context: Context, wanted: Wanted, kept: KeptVm) -> None:
        super().__init__(job=wanted.job, vm=wanted.vm, clock=context.clock)
        self.context, self.wanted, self.kept = context, wanted, kept
        assert kept.machine is not None, "a VM that is kept was started, here or before"
        self.machine: Machine = kept.machine  # its process may be gone, which the loop then finds
        self.readings = Readings()
        self.measured = Measured(started_s=wanted.wanted_s or context.clock.wall_s())
        self.plan: Plan | None = None
        self.cause: dict[str, Any] | None = None
        """The wire form of the error that made the attempt turn back."""
        self.trouble = ""
        """Why the effect that is tried again and again does not succeed."""
        self.fix = ""
        """What a person can do about the trouble, where that is another thing than the row's action."""
        self.outcome_at_end: Outcome | None = None
        self._view: SourceView | None = None
        self.credentials: JobCredentials | None = None
        self.offer: dict[str, Any] = {}
        self.channels: list[ChannelEnd] = []
        self.saved_options: dict[str, Any] = {}
        """What QEMU had before under every name of an option that was changed; journalled."""
        self.media: dict[str, str] | None = None
        """What the guest's devices had for disks when the move was planned; None: not known to this agent."""
        self.mirrors: tuple[Mirror, ...] = ()
        self.copying = source_disks.Copying()
        self.tracking = Tracking(context.clock, context.clock.now_s())
        self.cancel_tries = 0
        self.memory: Memory | None = None
        """What would outlive the source's QEMU, kept while a destination that runs needs it."""
        self.policy = wanted.policy
        self.locks: fences.LocksFence | None = None
        """The fence that is held, while it is."""
        self.stamps: dict[str, fences.ImageStamp] = {}
        """The guest's writable images as they were when the order to start was sent; see `fences`."""
        self.locked_images: frozenset[str] = frozenset()
        """Those whose write locks QEMU held when the attempt began, until it has taken them back for sure."""
        self.healed_round = 0
        """The newest loss of the channel, as the destination counts them, that was healed from here."""
        self.recovery_way: RecoveryWay | None = None
        """Where the destination may be called when the agents' link is down; journalled."""
        self.question: asyncio.Task[dict[str, Any]] | None = None
        """Asked over the link by a try to recover, and not answered yet."""
        self.heard_round: int | None = None
        """The newest round of recoveries of which the destination told; None: not known."""
        self.broken_since_s: float | None = None
        """Since when the newest broken channel is tried again, and a person has not said to try it anew."""
        self._memory_asked = False
        self.was_restored = False
        """Made by an agent that began anew: what it did not see is asked for."""
        self.has_turned_back = False
        """The journal says that the commit will not be sent."""
        self.has_run_since = False
        """The guest was seen running here after the switchover: its memory is not what the destination lacks."""
        self.fd_given = False
        """The channel's descriptor may be in QEMU's hands under its name."""
        self._qemu_word: str | None = None
        self._word_is_kept = False
        """Its word says more once it is known what became of the destination."""
        self._run_state: str | None = None
        self._events_heard = 0
        self._stale = True
        self._polled_s = float("-inf")
        self.apply_policy(wanted.policy)
        self.note(Fact.MIGRATE, by="person")
        if not wanted.auto_finalize:
            self.note(Fact.HOLD, text="auto-finalize is off", by="person")
        self.machine.on_event = self.on_qemu_event
        self.machine.on_gone = self.on_qemu_gone

    # --- the loop's questions ---

    def row(self) -> Row[Effect]:
        return decide_source(self.facts, self.readings)

    def allows(self, effect: Effect) -> bool:
        return source_allows(effect, source_view(self.facts, self.readings))

    def interruptible(self, effect: Effect) -> bool:
        # A dial may hang for seconds; once QEMU was told to migrate the effect is nearly over.
        return effect in INTERRUPTIBLE or (effect is Effect.START and Fact.STARTED not in self.facts)

    def pause_last_s(self, effect: Effect) -> float:
        return limits.RECOVERY_PAUSE_S if effect is Effect.RECONNECT else super().pause_last_s(effect)

    async def act(self, effect: Effect) -> None:
        from_hands = self.context.source_hands
        await from_hands(self, effect)

    def on_trouble(self, effect: Effect, error: Exception) -> None:
        """Which errors end the attempt, which only mean that the destination is silent, which are retried."""
        self.trouble = str(error)
        self.fix = error.hint if isinstance(error, Unfit | GuestHeld) else ""
        match effect:
            case Effect.START if source_disks.are_copied(self) and isinstance(error, HostUnreachable):
                # The disks are there, and the mirrors keep them equal: the destination's agent is waited for.
                self.set_readings(target_answers=False)
            case Effect.CHECK_PLAN | Effect.PREPARE | Effect.CONFIGURE | Effect.START_MIRRORS | Effect.START:
                self.fail(error)
            case Effect.CONTINUE | Effect.COMMIT | Effect.START_POSTCOPY:
                self._stale = True
                if not isinstance(error, QemuError):
                    self.fail(error)  # the journal cannot be written: nobody may be told to run
            case _ if isinstance(error, HostUnreachable | NotTrusted):
                self.set_readings(target_answers=False)
            case _:
                self._stale = True

    def on_facts(self, before: FactLog, after: FactLog) -> None:
        self.revision += 1
        was, now = derive_source(before), derive_source(after)
        job_events.tell(
            self.context, MIGRATE, job=self.job, vm=self.vm, revision=self.revision, before=before, after=after
        )
        if was.status is not now.status:
            self.context.publish(
                "MIGRATION",
                {
                    "vm": self.vm,
                    "job": self.job,
                    "status": now.status.value,
                    "cause": after.entries[-1].fact.value,
                    "because": [f.value for f in now.because],
                    "seq": len(after),
                },
            )
            if Fact.PACKAGE_LOADED in after and Fact.POSTCOPY_ANNOUNCED not in after:
                self.note(Fact.POSTCOPY_ANNOUNCED)

    def note_view(self) -> None:
        if not log.isEnabledFor(logging.DEBUG):
            return
        view = source_view(self.facts, self.readings)
        if view != self._view:
            self._view = view
            words = " ".join(getattr(view, name).value for name in view.__slots__)
            log.debug("job=%s vm=%s view=%s", self.job, self.vm, words)

    def on_row(self, row: Row[Effect]) -> None:
        self.revision += 1
        job_events.tell_change(self.context, self.brief(), revision=self.revision)

    def forget_memory(self) -> None:
        """Nobody needs the source's memory any more."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    # --- inputs ---

    def fail(self, error: Exception) -> None:
        """Records the error that ends the attempt; the first one counts."""
        wire = error.to_wire() if isinstance(error, VmferryError) else None
        if Fact.ERROR not in self.facts:
            self.cause = wire or MigrationFailed(str(error), cause=error).to_wire()
        self.note(Fact.ERROR, text=str(error))

    def want_cancel(self) -> bool:
        """Accepts a cancel (True: newly). Raises CancelRefused with the reason when it is too late."""
        view = source_view(self.facts, self.readings)
        refusal = cancel_refusal(self.facts, was_refused=view.target is Target.REFUSED)
        if refusal is not None:
            raise CancelRefused(f"{self.vm}: {refusal}")
        return Fact.CANCEL not in self.facts

    def on_qemu_event(self, event: Event) -> None:
        """An event of the source's QEMU."""
        self._events_heard += 1
        at_s = event.timestamp_us / 1e6 if event.timestamp_us is not None else self.clock.wall_s()
        match event.name:
            case "MIGRATION":
                self.hear_word(str(event.data.get("status")))
            case "STOP":
                self._run_state = None
                if Fact.STARTED in self.facts:
                    self.measured.stop_s = at_s
                    self.measured.marks.append((at_s, "STOP on the source"))
            case "RESUME":
                self._run_state = "running"
                self._note_running()
                if self._locks_matter():
                    self.refresh()
                else:
                    self._set_cpus()
            case "JOB_STATUS_CHANGE" if any(event.data.get("id") == mirror.job for mirror in self.mirrors):
                self.copying.is_stale = True
            case "MIGRATION_PASS":
                self.measured.passes = int(event.data.get("pass", 0))
                self._polled_s = float("-inf")
        self.wake()

    def on_qemu_gone(self) -> None:
        """The kernel said that the source's QEMU is gone. Our descriptors would keep its stream open."""
        for channel in self.channels:
            channel.cut()
        self.note(Fact.SOURCE_GONE, by="kernel")

    def hear_word(self, word: str | None) -> None:
        """QEMU said its status word: facts follow."""
        if Fact.STARTED not in self.facts:
            return  # it speaks of an earlier attempt
        if word == self._qemu_word and not self._word_is_kept:
            self.set_readings(source=source_word(word))
            return
        self._qemu_word = word
        has_proof = self.machine.version >= PROOF_VERSION
        self._word_is_kept = holds_back(word, self.facts, has_proof=has_proof)
        for fact, round_no, text in source_findings(word, self.facts, has_proof=has_proof):
            self.note(fact, round_no=round_no, text=text, by="source QEMU")
        self._run_state = None
        # What was read of the CPUs before this word is old: an agent that began anew may have seen them run.
        self.set_readings(source=source_word(word), cpus=Cpus.UNKNOWN)

    async def ask(self, command: str, *, deadline_s: float, **more: Any) -> dict[str, Any]:
        """One command of this job to the destination's agent. Raises HostUnreachable or the command's own error."""
        granted = Fact.GRANT_SENT in self.facts
        question = {"job": self.job, "generation": self.wanted.generation, "granted": granted, **more}
        try:
            return dict(
                await self.context.peers.link(self.wanted.destination).call(command, question, deadline_s=deadline_s)
            )
        except VmferryError as error:
            if error.side == "client":  # it is said over there, of that host
                error.side = "destination"
            raise

    async def ask_facts(self, command: str, *, deadline_s: float, **more: Any) -> dict[str, Any]:
        """The same where the answer is what the destination knows of this job. Raises HostUnreachable for one that is
        about nothing, or another job: what cannot be understood proves nothing."""
        answer = await self.ask(command, deadline_s=deadline_s, **more)
        if answer.get("job") != self.job:
            raise HostUnreachable(
                f"{self.wanted.destination} answered {command} with something else", side="destination", guest="unknown"
            )
        return answer

    def note_arrival(self, *, text: str, by: str) -> None:
        """The destination has every page, by another word than QEMU's."""
        for fact, round_no, _ in arrival(self.facts):
            self.note(fact, round_no=round_no, text=text, by=by)

    def hear_target(self, facts: dict[str, Any]) -> None:
        """What the destination's agent says of this job (see `DestinationAttempt.facts_wire`)."""
        # In doubt: the order to start was written to its QEMU and not answered, so it does not know itself.
        self.set_readings(target_answers=not facts.get("in_doubt"))
        self.trouble = self.fix = ""
        if facts.get("loaded"):
            self.note(Fact.LOADED, by="destination agent")
            if Fact.PACKAGE_SENT in self.facts:
                self.note(Fact.PACKAGE_LOADED, text="the destination's agent", by="destination agent")
        refused = int(facts.get("refused", 0))
        if refused > self.facts.last_round(Fact.START_REFUSED):
            self.note(
                Fact.START_REFUSED, round_no=refused, text=str(facts.get("refused_text", "")), by="destination agent"
            )
        if facts.get("ran"):
            if facts.get("resume_s") is not None and self.measured.resume_s is None:
                offset_s = self.context.clock_offset_s(self.wanted.destination)
                self.measured.resume_s = float(facts["resume_s"]) - offset_s
                self.measured.marks.append((self.measured.resume_s, "RESUME on the destination"))
            if not self._memory_asked and Fact.PACKAGE_SENT in self.facts and Fact.ALL_SENT not in self.facts:
                self._memory_asked = True  # once in the life of an agent: the descriptors end with it
                self.context.keep_task(asyncio.create_task(self.context.remember_memory(self), name="remember"))
            self.note(Fact.RUN_ACKED, by="destination agent")
        cut_off = int(facts.get("cut_off", 0))
        self.set_readings(target_is_cut_off=cut_off > self.healed_round)
        if facts.get("whole"):
            self.note(Fact.TARGET_WHOLE, by="destination agent")
            # 1. the last page is over there  2. the channel breaks before QEMU hears so  3. it waits for ever, or calls
            # it a failure. A guest that runs there with every page has arrived all the same: that proves what QEMU's
            # own word would, also what was not heard on the way (of a process that died while no agent ran, nothing).
            if facts.get("ran"):
                self.note_arrival(text="the destination's agent", by="destination agent")
        if facts.get("died"):
            self.note(Fact.TARGET_DIED, text=str(facts.get("text", "")), by="destination agent")
        if facts.get("gone"):
            self.note(Fact.TARGET_GONE, text=str(facts.get("text", "")), by="destination agent")
        if self._word_is_kept:
            self.hear_word(self._qemu_word)
        self.wake()

    def set_readings(self, **changes: Any) -> None:
        """Replaces readings; wakes the loop if anything is new."""
        new = Readings(
            source=changes.get("source", self.readings.source),
            cpus=changes.get("cpus", self.readings.cpus),
            target_answers=changes.get("target_answers", self.readings.target_answers),
            on_refused_start=changes.get("on_refused_start", self.readings.on_refused_start),
            target_is_cut_off=changes.get("target_is_cut_off", self.readings.target_is_cut_off),
            is_patient=changes.get("is_patient", self.readings.is_patient),
        )
        if new != self.readings:
            self.readings = new
            self.wake()

    def apply_policy(self, policy: FailurePolicy) -> None:
        """From now on these policies hold."""
        self.policy = policy
        self.set_readings(on_refused_start=policy.on_refused_start)
        self._count_patience()

    async def change_policy(self, changes: dict[str, Any]) -> None:
        """A person changes what is to be done in trouble: durable here, then told to the destination. Raises Unfit
        (nothing is changed) or HostUnreachable (this side has it, the other one does not)."""
        await self.context.journal.append(Entry.POLICY, self.job, changes)
        self.apply_policy(self.policy.changed(changes))
        if Fact.PREPARED in self.facts:
            await self.ask("peer-policy", deadline_s=2.0, policy=changes)

    async def try_again(self) -> str:
        """A person wants it: what was refused, or tried for long enough. Returns what is tried, in words."""
        refused = self.facts.last_round(Fact.START_REFUSED)
        if refused > self.facts.last_round(Fact.TRY_AGAIN):
            self.note(Fact.TRY_AGAIN, round_no=refused, by="person")
            return "the start is tried again"
        await self.resume_pages()
        self.broken_since_s = None
        self._count_patience()
        self.wake()
        return "the two QEMUs are connected again"

    async def finalize(self) -> None:
        """A person gives the leave to hand the guest over; durable first. Raises Unfit: then nothing is given."""
        if awaits_leave(self.facts):
            await self.context.journal.append(Entry.FINALIZE_WANTED, self.job)
            self.note(Fact.FINALIZE, by="person")

    async def pause_pages(self) -> None:
        """A person wants no page of the postcopy to move, until `resume_pages`; durable first. Raises Unfit."""
        if not wants_pause(self.facts):
            await self.context.journal.append(Entry.PAUSED, self.job, {"paused": True})
            self.note(Fact.PAUSE, round_no=self.facts.last_round(Fact.PAUSE) + 1, by="person")

    async def resume_pages(self) -> None:
        """Ends `pause_pages`: what is broken is joined again. Durable first. Raises Unfit."""
        if wants_pause(self.facts):
            await self.context.journal.append(Entry.PAUSED, self.job, {"paused": False})
            self.note(Fact.PAUSE_OVER, round_no=self.facts.last_round(Fact.PAUSE), by="person")

    async def fence(self, text: str, *, by: str) -> None:
        """The destination is fenced off: durable, then a fact. Raises Unfit; nothing follows from the fence then."""
        await self.context.journal.append(Entry.FENCED, self.job, {"text": text})
        self.note(Fact.FENCED, round_no=self.facts.last_round(Fact.FENCED) + 1, text=text, by=by)

    def _count_patience(self) -> None:
        """How long the newest broken channel was tried again, against what the policy says."""
        if source_view(self.facts, self.readings).source is not Source.BROKEN:
            self.broken_since_s = None
        elif self.broken_since_s is None:
            self.broken_since_s = self.clock.now_s()
        tried_s = 0.0 if self.broken_since_s is None else self.clock.now_s() - self.broken_since_s
        limit_ms = self.policy.retry_for_ms
        self.set_readings(is_patient=limit_ms is None or tried_s * 1000 < limit_ms)

    def _note_running(self) -> None:
        """QEMU 10.2 and newer may set the guest running again when a postcopy breaks behind its last page."""
        if self._run_state == "running" and Fact.PACKAGE_SENT in self.facts:
            self.has_run_since = True
            self.forget_memory()

    def _locks_matter(self) -> bool:
        """QEMU has given its disks away, and may have failed to take them back before it began to run the guest."""
        return bool(self.locked_images) and Fact.CONTINUE in self.facts

    def _set_cpus(self, *, has_locks: bool = True) -> None:
        before, source = self.wanted.running_before, self.readings.source
        self.set_readings(
            cpus=cpus_from(self._run_state, running_before=before, source=source, has_locks=has_locks),
        )

    def refresh(self) -> None:
        """The next look asks QEMU again, of its CPUs too: not every change of theirs has an event.

        1. QEMU says that its migration failed, and is still in finish-migrate: its guest looks stuck  2. it goes on to
        postmigrate and tells nobody  3. what leads a stuck one out finds nothing to do, for ever
        """
        self._stale = True
        self._run_state = None
        self.wake()

    # --- looking ---

    async def look(self) -> None:
        """Asks QEMU what events may have missed: its word when stale or due, its run state when it matters."""
        self._count_patience()
        if self.machine.is_gone:
            self.note(Fact.SOURCE_GONE, by="kernel")
            return
        await source_disks.look(self)
        view = source_view(self.facts, self.readings)
        if view.step is not Step.STARTED:
            return
        cut_what_was_let_go(self.channels, self.machine.pid)
        moving = view.source in (Source.BUSY, Source.POSTCOPY, Source.BROKEN, Source.IDLE)
        due = self.clock.now_s() - self._polled_s >= (POLL_S if moving else 1.0)
        try:
            if self._stale or (due and self._may_ask(view.source)):
                await self.ask_word()
            if self._cpus_matter() and self._run_state is None:
                heard = self._events_heard
                state = await self.machine.run_state(deadline_s=SILENT_S)
                has_locks = state != "running" or await self._has_locks()
                if heard == self._events_heard:  # else it is asked again: the event woke the loop
                    self._run_state = state
                    self._note_running()
                    self._set_cpus(has_locks=has_locks)
        except QmpTimeout:
            self._stale = True
            self.set_readings(source=Source.SILENT)
        except QemuError as error:
            # The session broke; the process lives or its end is on its way (on_qemu_gone).
            self._stale = True
            log.warning("job=%s vm=%s look result=%s", self.job, self.vm, error)

    async def _has_locks(self) -> bool:
        """Whether QEMU has every lock again that it had when the attempt began; True where that is not known."""
        if not self._locks_matter():
            return True
        missing = self.locked_images - await self.context.host.write_locks(self.machine.pid, self.locked_images)
        if missing:
            self.trouble = f"QEMU runs the guest without a lock on {', '.join(sorted(missing))}"
        return not missing

    def _may_ask(self, source: Source) -> bool:
        """In the switchover nothing but events: a query there would only lengthen the pause."""
        return source is not Source.SWITCHING or self.clock.now_s() - self._polled_s >= 1.0

    def _cpus_matter(self) -> bool:
        view = source_view(self.facts, self.readings)
        if view.source not in (Source.BACK, Source.DONE, Source.IDLE, Source.ENDING):
            return False
        turns_back = view.want is Want.BACK or view.target is Target.GONE
        # An agent that begins anew cannot know whether an earlier one let the guest go on here.
        return turns_back or self.was_restored

    async def ask_word(self) -> None:
        """Hears QEMU's word and counters anew. Raises QmpTimeout or QemuError; nothing is known then."""
        # Before the question: what an event or somebody else makes due meanwhile stays due.
        self._polled_s = self.clock.now_s()
        self._stale = False
        heard = self._events_heard
        info = await self.machine.migration(deadline_s=SILENT_S)
        if heard == self._events_heard:  # else an event has said something newer than this answer
            self.hear_word(info.get("status"))
        self.count(info)

    def count(self, info: dict[str, Any]) -> None:
        """Takes QEMU's counters over: what query-migrate said."""
        self.measured.count(info)
        if info.get("ram") and Fact.STARTED in self.facts:
            self.context.converge(self, info)
            self.context.publish("JOB_PROGRESS", self.brief())

    # --- outputs ---

    def outcome(self) -> Outcome:
        """Where the guest runs or will run, by the row that holds (or held at the end)."""
        return self.outcome_at_end or self.row().outcome

    def mode(self) -> str:
        """What it is or was in the end: a postcopy that only stood by was a precopy."""
        if Fact.PACKAGE_SENT in self.facts:
            return Mode.POSTCOPY.value
        if self.plan is None:
            return self.wanted.mode
        return self.plan.mode.value if not self.ended.is_set() else Mode.PRECOPY.value

    def brief(self) -> dict[str, Any]:
        """The short form for events: what a progress line needs."""
        return source_report.brief(self)

    def wire(self) -> dict[str, Any]:
        """Everything about the attempt, for status and for the journal's ENDED entry."""
        return source_report.wire(self)


async def run_attempt(attempt: SourceAttempt) -> None:
    """The attempt's task: the loop, and whatever happens to it, an honest line in the log."""
    try:
        await attempt.run()
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("job=%s vm=%s result=bug: the attempt's loop ended; both QEMUs are kept", attempt.job, attempt.vm)
        raise
