"""Chores of one agent: its jobs about a repository (verify, prune, export, import), at work or over.

Theory of operation
-------------------
A command checks what can be checked, journals the chore and returns it; its work is done in a thread of its own
(`snapshot_works`), whoever is connected. The thread and the event loop meet in a `Watch`: the thread tells how far it
is, and hears between two steps that it was cancelled, or that a person gave leave.

Rule 1: a chore ends with its agent. The next one removes what is half there, looks whether it was done after all, and
        tells it as failed if not: to begin anew is as good as to go on.
Rule 2: a cancel is therefore no want in the journal: an agent that dies has cancelled it, too.
Rule 3: nobody waits for a thread whose store hangs; it is told to end, and ends when it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from vmferry import limits
from vmferry.agent import job_events, job_ids
from vmferry.agent.job_book import JobInfo
from vmferry.agent.own_threads import in_own_thread
from vmferry.agent.wants import ChoreWanted
from vmferry.core.chores import ChoreFact, ChoreLog, awaits_leave, chore_job, chore_status
from vmferry.core.job import KINDS, Answer, JobStatus, Verb, answer, path
from vmferry.errors import Busy, CancelRefused, MigrationCancelled, MigrationFailed, VmferryError
from vmferry.jobs.journal import Entry, JobState

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")

_RETRY_FIRST_S: Final = 0.1
_RETRY_LAST_S: Final = 5.0


class Watch:
    """Between a chore's thread and the event loop. Any thread."""

    def __init__(self, chore: Chore, loop: asyncio.AbstractEventLoop) -> None:
        self.done_bytes = self.whole_bytes = 0
        self._chore, self._loop = chore, loop
        self._changed = threading.Condition()
        self._is_cancelled = self._has_leave = self._is_late = False

    # --- the chore's thread -------------------------------------------------------------------------------

    def tell(self, done: int, whole: int) -> None:
        """So many bytes of so many are done. Raises MigrationCancelled: end, and leave nothing that is half there."""
        self.done_bytes, self.whole_bytes = done, whole
        if self._is_cancelled:
            raise self._cancelled()

    def ask(self, plan: dict[str, Any], text: str) -> None:
        """Shows the plan, and waits for leave if the chore is to. Raises MigrationCancelled, Busy if nobody gave it."""
        self._note(ChoreFact.PLANNED, text, plan)
        if self._chore.wanted.auto_finalize:
            return self.tell(0, 0)
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._has_leave or self._is_cancelled, limits.PRUNE_HOLD_S)
            if self._is_cancelled:
                raise self._cancelled()
        if not in_time:
            raise Busy("nobody gave leave to do what was planned", side="client", hint="plan anew: 'vmferry prune'")
        return None

    def no_return(self) -> None:
        """What follows is not to be cancelled. Raises MigrationCancelled if it was before."""
        with self._changed:
            if self._is_cancelled:
                raise self._cancelled()
            self._is_late = True
        self._note(ChoreFact.WHOLE)

    # --- the event loop -----------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """The thread hears of it at its next step. False: it is too late."""
        with self._changed:
            if not self._is_late:
                self._is_cancelled = True
                self._changed.notify_all()
            return self._is_cancelled

    def give_leave(self) -> None:
        """What was planned may be done."""
        with self._changed:
            self._has_leave = True
            self._changed.notify_all()

    def _note(self, fact: ChoreFact, text: str = "", plan: dict[str, Any] | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._chore.hear, fact, text, plan)

    def _cancelled(self) -> MigrationCancelled:
        return MigrationCancelled(f"the {self._chore.kind} was cancelled", guest="unharmed", hint="")


class Chore:
    """One that is at work. Made when it is journalled, or from the journal (`was_restored`: then it only ends)."""

    def __init__(self, agent: Agent, wanted: ChoreWanted, *, was_restored: bool = False) -> None:
        self.agent, self.wanted, self.was_restored = agent, wanted, was_restored
        self.facts = ChoreLog()
        self.revision = 0
        self.error: VmferryError | None = None
        self.shown: dict[str, Any] = {}
        """What is known of its result: a plan, then all."""
        self.started_s = agent.clock.wall_s()
        self.ended_s: float | None = None
        self.ended = asyncio.Event()
        self.watch = Watch(self, asyncio.get_running_loop())

    @property
    def job(self) -> str:
        """The job's id."""
        return self.wanted.job

    @property
    def kind(self) -> str:
        """`verify`, `prune`, `export` or `import`."""
        return self.wanted.kind

    @property
    def state(self) -> JobStatus:
        """The job's state."""
        return chore_job(self.facts)

    def note(self, fact: ChoreFact, *, text: str = "", by: str = "") -> None:
        """Records a fact (once) and tells it, with each state that it led the job through."""
        before, was = self.facts, self.state
        self.facts = before.with_fact(fact, text=text, at_s=self.agent.clock.wall_s(), by=by)
        if self.facts is before:
            return
        self.revision += 1
        log.info("job=%s %s fact=%s by=%s text=%r", self.job, self.kind, fact, by, text)
        failed = ChoreFact.DONE not in self.facts and (self.error is not None or ChoreFact.CANCEL in self.facts)
        job_events.tell_fact(
            self.agent, self.kind, {"fact": fact.value, "round": 0, "text": text, "by": by},
            job=self.job, vm="", revision=self.revision, states=path(was, self.state, failed=failed),
        )  # fmt: skip

    def hear(self, fact: ChoreFact, text: str, plan: dict[str, Any] | None) -> None:
        """Its thread says so."""
        if plan is not None:
            self.shown = plan
        self.note(fact, text=text)

    def cancel(self) -> None:
        """It ends, and leaves nothing that is half there. A second one changes nothing. Raises CancelRefused."""
        if ChoreFact.CANCEL in self.facts or self.ended.is_set():
            return
        if not self.watch.cancel():
            raise CancelRefused(
                f"the {self.kind} cannot be cancelled any more: it is being kept",
                hint="a snapshot can be forgotten: vmferry forget",
            )
        self.note(ChoreFact.CANCEL, by="person")

    def finalize(self) -> None:
        """A person has seen the plan and gives leave."""
        self.note(ChoreFact.FINALIZE, by="person")
        self.watch.give_leave()

    async def run(self) -> None:
        """To the end, whatever happens. Only the agent's own end stops it in between."""
        from vmferry.agent import snapshot_works

        self.note(ChoreFact.WANTED, by="journal" if self.was_restored else "person")
        if not self.wanted.auto_finalize:
            self.note(ChoreFact.HOLD, by="person")
        work = snapshot_works.after if self.was_restored else snapshot_works.work
        self.note(ChoreFact.RESTARTED if self.was_restored else ChoreFact.BEGUN)
        store, host = self.agent.snapshot_store, self.agent.config.name
        body = functools.partial(work, store.open_repository, self.wanted, host, self.watch)
        try:
            self.shown |= await in_own_thread(f"{self.kind}-{self.job[:8]}", body)
            self.error = None
            self.note(ChoreFact.DONE)
        except asyncio.CancelledError:
            self.watch.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the job has an end
            self._fail(error)
        await self._end()

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError):
            error = VmferryError(str(error), cause=error)
        if not isinstance(error, VmferryError):
            log.error("job=%s %s result=defect", self.job, self.kind, exc_info=error)
            error = VmferryError(f"a defect of vmferry ended the {self.kind}: {error!r}", retry="no", cause=error)
        log.warning("job=%s %s result=%s", self.job, self.kind, error)
        self.error = error
        if not isinstance(error, MigrationCancelled):
            self.note(ChoreFact.ERROR, text=str(error))

    async def _end(self) -> None:
        self.ended_s = self.agent.clock.wall_s()
        self.note(ChoreFact.CLEANUP)
        wire, pause_s = self.wire(), _RETRY_FIRST_S
        while True:
            try:
                await self.agent.journal.append(Entry.ENDED, self.job, wire)
                break
            except VmferryError as error:
                log.error("job=%s %s effect=ended result=%s", self.job, self.kind, error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_LAST_S)
        self.ended.set()
        self.agent.chores.is_over(self, wire)

    # --- what others see ----------------------------------------------------------------------------------

    def progress(self) -> dict[str, int]:
        """As a migration's."""
        done, whole = self.watch.done_bytes, self.watch.whole_bytes
        return {"current_bytes": done, "whole_bytes": whole, "percent": done * 100 // whole if whole else 0}

    def wire(self) -> dict[str, Any]:
        """Everything about it, as plain values; what it found or did stands beside the rest."""
        status = chore_status(self.facts)
        is_over = ChoreFact.CLEANUP in self.facts
        done = "done" if ChoreFact.DONE in self.facts else "none"
        return {
            "job": self.job,
            "kind": self.kind,
            "vm": "",
            "name": self.wanted.name,
            "file": self.wanted.file,
            "host": self.agent.config.name,
            "repository": self.agent.snapshot_store.place,
            "status": status,
            "coarse": status,
            "outcome": done if is_over else "pending",
            "over": is_over,
            "sentence": self._sentence(),
            "total_ms": None if self.ended_s is None else round((self.ended_s - self.started_s) * 1000, 3),
            "progress": self.progress(),
            "error": None if self.error is None else self.error.to_wire(),
            "timeline": [self._row(entry) for entry in self.facts.entries],
            **self.shown,
        }

    def _sentence(self) -> str:
        what = " ".join(filter(None, (self.kind, self.wanted.name)))
        if awaits_leave(self.facts):
            return f"The {what} waits for leave to do what it planned ('vmferry job finalize {self.job}')."
        if self.error is not None:
            return f"The {what} was not done: {self.error.message}."
        return f"The {what} is {'done' if ChoreFact.DONE in self.facts else 'on its way'}."

    def _row(self, entry: Any) -> dict[str, Any]:
        row: dict[str, Any] = {"at_ms": round((entry.at_s - self.started_s) * 1000, 3), "what": entry.fact.value}
        return row | {name: text for name, text in (("text", entry.text), ("by", entry.by)) if text}

    def info(self) -> JobInfo:
        """It as a job."""
        state, progress = self.state, self.progress()
        return JobInfo(
            id=self.job,
            type=self.kind,
            status=state,
            current_progress=progress["current_bytes"],
            total_progress=progress["whole_bytes"],
            error=None if self.error is None else self.error.message,
            detail=chore_status(self.facts),
            reason="its plan waits for leave" if awaits_leave(self.facts) else "",
            auto_finalize=self.wanted.auto_finalize,
            auto_dismiss=self.wanted.auto_dismiss,
            percent=progress["percent"],
            percent_error=0,
            verbs=[verb.value for verb in Verb if answer(KINDS[self.kind], verb, state).answer is Answer.DOES],
            revision=self.revision,
        )


class Chores:
    """Owned by the agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._jobs: dict[str, Chore] = {}
        """Those at work."""
        self.results: dict[str, dict[str, Any]] = {}
        """The newest ended ones, by job, and those that wait to be dismissed."""

    def by_id(self, job: str) -> Chore | None:
        """The chore with this id that is at work, or None."""
        return self._jobs.get(job)

    def at_work(self) -> Iterator[Chore]:
        """Every chore that is not over."""
        return iter(self._jobs.values())

    def has(self, job: str) -> bool:
        """Whether a chore has this id, or had it."""
        return job in self._jobs or job in self.results

    def status(self, *, job: str) -> dict[str, Any] | None:
        """A chore by its id, as it stands or as it ended."""
        found = self._jobs.get(job)
        # Not over before that is durable: whoever hears so may dismiss it.
        return self.results.get(job) if found is None else {**found.wire(), "over": False}

    def infos(self) -> Iterator[JobInfo]:
        """Those at work, as jobs."""
        return (chore.info() for chore in self._jobs.values())

    def check(self, job: str, *, auto_dismiss: bool) -> None:
        """Before one is journalled. Raises UsageError, Busy."""
        agent = self._agent
        job_ids.require_new(agent, job)
        agent.jobs.make_room(auto_dismiss=auto_dismiss)
        if len(self._jobs) >= limits.CHORES_MAX:
            raise Busy(
                f"{len(self._jobs)} jobs about the repository are on their way already",
                side="client",
                hint="'vmferry jobs' lists them",
            )

    async def begin(self, wanted: ChoreWanted) -> dict[str, Any]:
        """Journals it and runs it. Raises Unfit: then it was not begun."""
        chore = self._jobs[wanted.job] = Chore(self._agent, wanted)  # asked twice it is one
        try:
            await self._agent.journal.append(Entry.CHORE_WANTED, wanted.job, msgspec.to_builtins(wanted))
        except BaseException:
            del self._jobs[wanted.job]
            raise
        self._run(chore)
        return chore.wire()

    def restore(self, state: JobState) -> None:
        """What the journal says of one: its result, or that it was on its way when its agent ended."""
        if state.ended is not None:
            self.results[state.job] = state.ended
            self._agent.jobs.remember(str(state.body["kind"]), state)
            return
        wanted = msgspec.convert(state.body, ChoreWanted)
        chore = self._jobs[wanted.job] = Chore(self._agent, wanted, was_restored=True)
        chore.error = MigrationFailed(
            f"the agent restarted during the {wanted.kind}", guest="unharmed", hint="begin it anew"
        )
        self._run(chore)

    def is_over(self, chore: Chore, wire: dict[str, Any]) -> None:
        """It has ended, and its end is in the journal."""
        del self._jobs[chore.job]
        self.results[chore.job] = wire
        self._agent.jobs.ended(
            chore.kind, chore.job, wire, auto_dismiss=chore.wanted.auto_dismiss,
            auto_finalize=chore.wanted.auto_finalize,
        )  # fmt: skip
        self._agent.jobs.forget_old(self.results)

    def _run(self, chore: Chore) -> None:
        self._agent.keep_task(asyncio.create_task(chore.run(), name=f"chore-{chore.job}"))
