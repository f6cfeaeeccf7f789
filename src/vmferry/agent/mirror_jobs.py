"""The mirrors of a migration as jobs of their own: what is told of them, and what may be asked of one.

Theory of operation
-------------------
A mirror is a job of the source's QEMU under a name of ours, and a job of the agent under its migration's id with the
disk's number (`public_id`). Its state is QEMU's own word, as it was heard last (`source_disks.look`); for people it is
listed for as long as its migration is at work, and its result stands in that one's result.

Rule 1: a mirror never ends alone: to cancel one is to cancel its migration, and that one completes all of them.
Rule 2: what a person asks of a mirror QEMU holds, not the agent: a mirror that is paused stays so when the agent dies.
        A pause may come too late, when the disk has just become ready: `source_disks.drain` takes it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vmferry.agent import job_events, source_rounds
from vmferry.core.job import MIRROR, JobStatus, mirror_job, path
from vmferry.core.view import Disks, disks_of
from vmferry.errors import JobRefused

if TYPE_CHECKING:
    from vmferry.agent.source import SourceAttempt
    from vmferry.agent.wants import Mirror


class MirrorJob(NamedTuple):
    """One mirror, and the migration that it belongs to."""

    attempt: SourceAttempt
    mirror: Mirror

    @property
    def id(self) -> str:
        """Its name for people."""
        return public_id(self.attempt.job, self.mirror)

    @property
    def state(self) -> JobStatus:
        """As it was heard last."""
        return state_of(self.attempt, self.mirror)

    @property
    def word(self) -> Mapping[str, Any]:
        """What QEMU said of it last; empty before and after it was there."""
        return self.attempt.copying.states.get(self.mirror.job, {})


def public_id(job: str, mirror: Mirror) -> str:
    """The mirror's id for people: `<job>-disk-<n>`, n from 0 as in the disk's own id."""
    return f"{job}-{mirror.id.replace('disk', 'disk-', 1)}"


def qemu_jobs(mirror: Mirror) -> tuple[str, str]:
    """What QEMU's jobs of it are called."""
    return mirror.job, source_rounds.last_job(mirror)


def state_of(attempt: SourceAttempt, mirror: Mirror) -> JobStatus:
    """As it was heard last; `null` for one that was dismissed."""
    if mirror.job in attempt.copying.dismissed:
        return JobStatus.NULL
    return mirror_job(attempt.copying.states.get(mirror.job, {}).get("status"), attempt.facts)


def listed(attempt: SourceAttempt) -> list[MirrorJob]:
    """Those of a migration that is at work."""
    found = [MirrorJob(attempt, mirror) for mirror in attempt.mirrors]
    return [each for each in found if each.state not in (JobStatus.UNDEFINED, JobStatus.NULL)]


def tell(attempt: SourceAttempt) -> None:
    """Publishes each state that a mirror came to since the last time. It was asked now and then, so it may have passed
    more of them than were seen: those are told too."""
    for mirror in attempt.mirrors:
        state, before = state_of(attempt, mirror), attempt.copying.told.get(mirror.job, JobStatus.UNDEFINED)
        if state in (before, JobStatus.UNDEFINED):
            continue
        attempt.copying.told[mirror.job] = state
        for each in _way(before, state, failed=bool(attempt.copying.states.get(mirror.job, {}).get("error"))):
            job_events.tell_state(
                attempt.context, MIRROR.name, job=public_id(attempt.job, mirror), vm=attempt.vm, state=each
            )


def _way(before: JobStatus, after: JobStatus, *, failed: bool) -> tuple[JobStatus, ...]:
    try:
        return path(before, after, failed=failed)
    except ValueError:  # an agent that began anew finds it anywhere; and rounds end and begin
        return (after,)


def tell_ended(attempt: SourceAttempt) -> None:
    """The migration is over: none of its mirrors is listed any more."""
    attempt.copying.dismissed |= {mirror.job for mirror in attempt.mirrors}
    tell(attempt)


# --- what is asked of one -----------------------------------------------------------------------------------


async def pause(job: MirrorJob) -> None:
    """Raises JobRefused for a disk that goes in rounds, and when the disks are all copied by now; QemuError."""
    _require_mirror(job, "paused")
    if disks_of(job.attempt.facts) is not Disks.COPYING:
        raise JobRefused(f"job {job.id} of {job.attempt.vm} cannot be paused any more: all disks are copied")
    await _say(job, "job-pause")


async def resume(job: MirrorJob) -> None:
    """Raises QemuError."""
    await _say(job, "job-resume")


async def change_speed(job: MirrorJob, bytes_per_s: int) -> None:
    """0: no limit. Raises JobRefused for a disk that goes in rounds; QemuError."""
    _require_mirror(job, "slowed down alone")
    await job.attempt.machine.execute("block-job-set-speed", {"device": job.mirror.job, "speed": bytes_per_s})


def dismiss(job: MirrorJob) -> None:
    """It is not listed any more. QEMU's own job stays until its migration is over: its end is the proof that the disk
    is equal."""
    job.attempt.copying.dismissed.add(job.mirror.job)
    tell(job.attempt)


def _require_mirror(job: MirrorJob, what: str) -> None:
    if job.mirror.since:
        raise JobRefused(
            f"job {job.id} of {job.attempt.vm} cannot be {what}: its disk goes in rounds, each a job of QEMU's own",
            hint="change max-bandwidth of its migration",
        )


async def _say(job: MirrorJob, command: str) -> None:
    machine, copying = job.attempt.machine, job.attempt.copying
    await machine.execute(command, {"id": job.mirror.job})
    words = {str(each["id"]): each for each in await machine.execute("query-jobs")}
    if job.mirror.job in words:  # what is told at once; a job that is at work pauses a moment later
        copying.states[job.mirror.job] = words[job.mirror.job]
        tell(job.attempt)
    copying.is_stale = True
    job.attempt.wake()
