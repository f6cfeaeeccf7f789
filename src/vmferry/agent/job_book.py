"""The jobs of one agent: those at work are read from their attempts, those that are over from what was kept of them.

Theory of operation
-------------------
A job that ends is dismissed at once (auto-dismiss, the default, as in QEMU): it leaves `query-jobs`, and its result is
history, which `job-status` and `vmferry status` show. One without auto-dismiss stays listed as concluded, with its
result, until somebody dismisses it, however often the agent restarts: what is listed is in the journal.

Rule 1: nothing is listed twice, and nothing that was dismissed is shown again.
Rule 2: what an ended job proves to another agent outlives its dismissal (`Agent.results`, `Agent.known_jobs`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.agent import job_events, mirror_jobs
from vmferry.agent.destination import DestinationAttempt
from vmferry.agent.mirror_jobs import MirrorJob
from vmferry.agent.source import SourceAttempt
from vmferry.core.facts import Fact, awaits_leave
from vmferry.core.job import (
    INCOMING,
    KINDS,
    MIGRATE,
    MIRROR,
    MIRROR_REASONS,
    Answer,
    JobStatus,
    Verb,
    answer,
    destination_job,
    pause_reason,
    source_job,
)
from vmferry.core.migration_status import coarse
from vmferry.core.status import destination_status, source_status
from vmferry.errors import Busy, UnknownJob
from vmferry.jobs import journal
from vmferry.jobs.journal import Entry, JobState

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """One job as `query-jobs` lists it: QEMU's members, and what is known beyond them. Progress is in bytes."""

    id: str
    type: str
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | None = None
    """Why it failed, or is about to; None: it did not."""
    vm: str = ""
    peer: str = ""
    """The host that has the other job of the same id."""
    detail: str = ""
    """QEMU's migration status, which the job's state is coarser than; of a mirror the image that is copied."""
    coarse: str = ""
    reason: str = ""
    """Why it is paused or pending."""
    auto_finalize: bool = True
    auto_dismiss: bool = True
    percent: int | None = None
    percent_error: int | None = None
    """By how many points the percentage may be wrong."""
    left_ms_min: float | None = None
    left_ms_max: float | None = None
    """How long it still takes, at least and at most; None: not known, or without bound."""
    guest_paused_ms: float | None = None
    """How long the guest stands still by now, for a job that waits for leave to go on."""
    verbs: list[str] = field(default_factory=list)
    """What it takes now."""
    revision: int = 0
    result: dict[str, Any] | None = None
    """Of a concluded job: everything, as `job-status` tells it."""

    def to_wire(self) -> dict[str, Any]:
        """Plain values under QMP's names; what is None is left out."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name.replace("_", "-"): value for name, value in values if value is not None}


@dataclass(slots=True)
class Ended:
    """A concluded job that is listed until it is dismissed."""

    kind: str
    job: str
    result: dict[str, Any]
    auto_finalize: bool = True


class JobBook:
    """Owned by the agent."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.dismissed: set[str] = set()
        """Ids of jobs of this host, as a source or of one that is saved, whose results are not shown any more."""
        self._ended: dict[tuple[str, str], Ended] = {}

    # --- what is listed ---

    def infos(self) -> list[JobInfo]:
        """Every job that is listed, the oldest first as far as that is known."""
        listed = [self._ended_info(ended) for ended in self._ended.values()]
        for attempt in self._sources():
            listed += [self._source_info(attempt), *(mirror_info(each) for each in mirror_jobs.listed(attempt))]
        listed += self.agent.restores.infos()
        listed += self.agent.saves.infos()
        listed += self.agent.chores.infos()
        return listed + [self._incoming_info(place) for place in self._places()]

    def info(self, job: str) -> JobInfo:
        """One job by its id, the source's before the destination's. Raises UnknownJob."""
        found = [info for info in self.infos() if info.id == job]
        if not found:
            raise UnknownJob(f"{self.agent.config.name} lists no job {job!r}")
        return min(found, key=lambda info: info.type != MIGRATE.name)

    def attempt(self, job: str) -> SourceAttempt | None:
        """The running migration away from here with this id."""
        return next((attempt for attempt in self._sources() if attempt.job == job), None)

    def mirror(self, job: str) -> MirrorJob | None:
        """The mirror with this id, of a migration that is at work."""
        listed = (each for attempt in self._sources() for each in mirror_jobs.listed(attempt))
        return next((each for each in listed if each.id == job), None)

    def _sources(self) -> Iterator[SourceAttempt]:
        return (attempt for attempt in self.agent.attempts.values() if not attempt.ended.is_set())

    def _places(self) -> Iterator[DestinationAttempt]:
        return (place for place in self.agent.places.values() if not place.ended.is_set())

    # --- their ends ---

    def make_room(self, *, auto_dismiss: bool) -> None:
        """Raises Busy when a job is wanted that would wait to be dismissed, and too many do so already."""
        if not auto_dismiss and len(self._ended) >= limits.JOBS_UNDISMISSED_MAX:
            raise Busy(
                f"{len(self._ended)} concluded jobs wait to be dismissed",
                side="client",
                hint="read and dismiss them ('vmferry jobs', 'vmferry job dismiss ID'), or leave auto-dismiss on",
            )

    def ended(self, kind: str, job: str, result: dict[str, Any], *, auto_dismiss: bool, auto_finalize: bool) -> None:
        """A job is over, and its end is in the journal."""
        if auto_dismiss:
            job_events.tell_state(self.agent, kind, job=job, vm=str(result["vm"]), state=JobStatus.NULL)
        else:
            self._ended[kind, job] = Ended(kind, job, result, auto_finalize)

    def forget_old(self, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Takes the oldest of these results of ended jobs away, and returns them: so many are kept as the journal keeps
        at its start, not counting those that wait to be dismissed."""
        waiting = {job for _, job in self._ended}
        old = [job for job in results if job not in waiting][: -journal.KEEP_ENDED_JOBS]
        # The newest attempt of a VM is shown as long as there is no newer one, unless it was dismissed.
        self.dismissed -= set(old) - {attempt.job for attempt in self.agent.attempts.values()}
        return {job: results.pop(job) for job in old}

    def remember(self, kind: str, state: JobState) -> None:
        """The same of one that the journal tells of, when the agent begins."""
        if state.dismissed:
            self._hide(kind, state.job)
        elif state.ended is not None and state.body.get("auto_dismiss") is False:
            is_automatic = bool(state.body.get("auto_finalize", True))
            self._ended[kind, state.job] = Ended(kind, state.job, state.ended, is_automatic)

    async def dismiss(self, info: JobInfo) -> None:
        """The result is not shown any more; durable first. Raises Unfit: then it still is."""
        await self.agent.journal.append(Entry.DISMISSED, info.id)
        self._hide(info.type, info.id)
        if self._ended.pop((info.type, info.id), None) is not None:
            job_events.tell_state(self.agent, info.type, job=info.id, vm=info.vm, state=JobStatus.NULL)

    def _hide(self, kind: str, job: str) -> None:
        if kind != INCOMING.name:  # of an incoming job the source tells how it ended
            self.dismissed.add(job)

    # --- one of each ---

    def _source_info(self, attempt: SourceAttempt) -> JobInfo:
        facts, wanted, state = attempt.facts, attempt.wanted, source_job(attempt.facts)
        status, stop_s = source_status(facts), attempt.measured.stop_s
        moved = attempt.tracking.wire()
        waits = state is JobStatus.PENDING and awaits_leave(facts)
        return JobInfo(
            id=attempt.job,
            type=MIGRATE.name,
            status=state,
            current_progress=moved["current_bytes"],
            total_progress=moved["whole_bytes"],
            error=None if attempt.cause is None else str(attempt.cause["message"]),
            vm=attempt.vm,
            peer=wanted.destination,
            detail=status.value,
            coarse=coarse(status).value,
            reason=_reason(state, attempt, waits=waits),
            auto_finalize=wanted.auto_finalize,
            auto_dismiss=wanted.auto_dismiss,
            percent=moved["percent"],
            percent_error=moved["percent_error"],
            left_ms_min=moved["left_ms_min"],
            left_ms_max=moved["left_ms_max"],
            guest_paused_ms=(attempt.clock.wall_s() - stop_s) * 1000 if waits and stop_s is not None else None,
            verbs=_verbs(MIGRATE.name, state),
            revision=attempt.revision,
        )

    def _incoming_info(self, place: DestinationAttempt) -> JobInfo:
        state, status = destination_job(place.facts), destination_status(place.facts)
        total = int(place.place.definition.get("memory_bytes", 0))
        return JobInfo(
            id=place.job,
            type=INCOMING.name,
            status=state,
            # What is on its way is counted where it is sent.
            current_progress=total if Fact.ALL_SENT in place.facts else 0,
            total_progress=total,
            error=place.error_text or None,
            vm=place.vm,
            peer=place.place.source,
            detail=status.value,
            coarse=coarse(status).value,
            reason=pause_reason(place.facts) if state is JobStatus.PAUSED else "",
            auto_dismiss=place.place.auto_dismiss,
            verbs=_verbs(INCOMING.name, state),
            revision=place.revision,
        )

    def _ended_info(self, ended: Ended) -> JobInfo:
        result = ended.result
        error, progress = result.get("error") or {}, result.get("progress") or {}
        peer = result.get("destination" if ended.kind == MIGRATE.name else "source")
        return JobInfo(
            id=ended.job,
            type=ended.kind,
            status=JobStatus.CONCLUDED,
            current_progress=int(progress.get("current_bytes", 0)),
            total_progress=int(progress.get("whole_bytes", 0)),
            error=str(error["message"]) if error else None,
            vm=str(result["vm"]),
            peer=str(peer or ""),
            detail=str(result["status"]),
            coarse=str(result.get("coarse", "")),
            auto_finalize=ended.auto_finalize,
            auto_dismiss=False,
            percent=progress.get("percent"),
            percent_error=0,
            verbs=_verbs(ended.kind, JobStatus.CONCLUDED),
            result=result,
        )


def mirror_info(job: MirrorJob) -> JobInfo:
    """One disk's job, also when it is not listed any more."""
    attempt, state, word = job.attempt, job.state, job.word
    failed = attempt.facts.entry(Fact.DISK_FAILED)
    is_of_this = failed is not None and failed.text.startswith(f"{job.mirror.id} ")
    return JobInfo(
        id=job.id,
        type=MIRROR.name,
        status=state,
        current_progress=int(word.get("current-progress", 0)),
        total_progress=int(word.get("total-progress", job.mirror.size_bytes)),
        error=str(word.get("error", "")) or (failed.text if failed is not None and is_of_this else None),
        vm=attempt.vm,
        peer=attempt.wanted.destination,
        detail=job.mirror.path,
        reason=MIRROR_REASONS.get(state, ""),
        auto_finalize=False,
        verbs=_verbs(MIRROR.name, state),
        revision=attempt.revision,
    )


def _reason(state: JobStatus, attempt: SourceAttempt, *, waits: bool) -> str:
    if state is JobStatus.PAUSED:
        return pause_reason(attempt.facts)
    if waits:
        return "the guest is paused and waits for leave to be handed over"
    return attempt.row().why if state is JobStatus.PENDING else ""


def _verbs(kind: str, state: JobStatus) -> list[str]:
    return [verb.value for verb in Verb if answer(KINDS[kind], verb, state).answer is Answer.DOES]
