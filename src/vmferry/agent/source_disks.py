"""The source's side of disks that go with the guest: one mirror each in the source's QEMU.

Theory of operation
-------------------
`start` gives QEMU a node for each export of the destination and a `blockdev-mirror` job that copies the guest's disk
to it and then keeps the two equal. The jobs are QEMU's own: it goes on with them without an agent, and a new one finds
them by their names (`look`). None ends by itself (`auto-finalize` off): at the pause before the switchover `drain`
asks all of them for their end, waits until each has written everything (`pending`), and only then lets them end. So
they end together or not at all.

A concluded job stays in QEMU until the attempt is over (`auto-dismiss` off): that it ended without an error while the
guest was paused is the proof that its disk is equal, also for an agent that was started since.

How a guest's write gets to the destination: at first in the background, behind the bulk; once all disks are ready the
guest's own write waits for it (`write-blocking`), so that next to nothing is left when the guest is paused. A QEMU
before 8.2 cannot change that while the job runs, and does the second from the beginning.

A disk that goes back to where its guest came from goes in rounds (`source_rounds`), which look like a mirror here.

Rule 1: no mirror is ended by us but in `drain`, under its guard, and in `drop`.
Rule 2: whatever goes wrong with a mirror is the copy's trouble: the guest's own disk reports no error for it. Nothing
        here waits for a connection to come back, since a guest's write would wait with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from vmferry import limits
from vmferry.agent import mirror_jobs, source_rounds
from vmferry.agent.images import Stamp
from vmferry.agent.observe import Finding, mirror_findings
from vmferry.agent.plan_disks import counted, inserted_by_path
from vmferry.agent.wants import Mirror
from vmferry.core.disks import tried_name
from vmferry.core.effects import Effect
from vmferry.core.facts import Fact
from vmferry.core.job import JobStatus
from vmferry.core.view import Disks, disks_of
from vmferry.errors import MigrationFailed, QemuError, Unfit
from vmferry.jobs.journal import Entry
from vmferry.pki import job_credentials
from vmferry.pki.job_credentials import tag
from vmferry.qmp.errors import QmpCommandError, QmpTimeout

if TYPE_CHECKING:
    from vmferry.agent.source import SourceAttempt

log = logging.getLogger("vmferry.agent")

POLL_S = 0.5
"""How often QEMU is asked how far the mirrors are; what changes their status it tells by itself."""
ASK_S = 2.0
OPEN_S = 10.0
"""QEMU connects with its main loop: a host that is not there holds it up, and is cut off after so long."""
DRAIN_S = 8.0
"""The guest is paused meanwhile: what a destination does not take within this time it will not take."""
DRAIN_POLL_S = 0.002
"""While the guest is paused for it; QEMU tells of each change, and an event may be lost."""
VERIFY_S = 3600.0
"""Both sides read their images once; the guest is paused for it, as it was asked for."""
BANDWIDTH: Final = "max-bandwidth"
VERIFY_POLL_S = 0.2
"""A guest that goes back stands still for so long more."""
DROP_S = 1.0
"""How long mirrors may take to obey before the connection that they hang in is cut."""
OBEY_S = 3.0
"""How long those that were cancelled may take to end before it is tried again."""
CHANGES_MODE_SINCE: Final = (8, 2)
"""QEMU's block-job-change."""
KNOWS_ZERO_SINCE: Final = (10, 1)
"""QEMU's target-is-zero: a fresh image is not read to find out that it is empty."""
GOING_ON = (Disks.COPYING, Disks.READY)
LIVE = (*GOING_ON, Disks.FAILED)


@dataclass(slots=True)
class Copying:
    """What was last seen of an attempt's mirrors. Nothing of it is needed by an agent that begins anew."""

    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What QEMU said of each of their jobs, by its id."""
    is_stale: bool = True
    polled_s: float = float("-inf")
    at_switch: dict[str, Stamp | None] = field(default_factory=dict)
    """What the images looked like when QEMU had given them away, and before the destination was told to start."""
    differs: bool = False
    """Both sides were read, and are not equal."""
    speed: int = 0
    """Bytes per second that each of them may send; 0: no limit."""
    sent_in_rounds: dict[str, int] = field(default_factory=dict)
    """By mirror: the bytes of all rounds that are over, as far as this agent has seen them."""
    told: dict[str, JobStatus] = field(default_factory=dict)
    """By mirror: the state of its job that was told last."""
    dismissed: set[str] = field(default_factory=set)
    """Mirrors that are not listed any more."""


def mirrors_of(attempt: SourceAttempt) -> tuple[Mirror, ...]:
    """The mirrors that the plan wants, with the names that they have in QEMU."""
    assert attempt.plan is not None, "a plan comes before the mirrors"
    word = tag(attempt.job)
    return tuple(
        Mirror(
            id=disk.id,
            path=disk.path,
            node=disk.node,
            job=f"vmferry-{word}-{disk.id}",
            target=f"vmferry-{word[:10]}-t{number}",
            number=number,
            size_bytes=disk.virtual_bytes,
            since=attempt.plan.bitmap(disk),
            format=disk.format,
        )
        for number, disk in enumerate(attempt.plan.copies, start=1)
    )


async def start(attempt: SourceAttempt) -> None:
    """Raises QemuError or Unfit; what was begun until then is DROP_MIRRORS' to end."""
    plan = attempt.plan
    assert plan is not None, "a plan comes before the mirrors"
    attempt.mirrors = mirrors_of(attempt)
    body = {
        "mirrors": msgspec.to_builtins(attempt.mirrors),
        "mode": plan.mode.value,
        "why": plan.why,
        "stops_first": plan.stops_first,
        "multifd": plan.multifd,
    }
    await attempt.context.journal.append(Entry.MIRRORS, attempt.job, body)
    attempt.note(Fact.DISKS_STARTED)  # before the first command: from here on something may be there
    for mirror in attempt.mirrors:
        try:
            await attempt.machine.execute("blockdev-add", _target(attempt, mirror), deadline_s=OPEN_S)
        except QmpTimeout:
            await _yank(attempt, [mirror])
            raise
    attempt.copying.speed = speed(attempt)
    for mirror in attempt.mirrors:
        if mirror.since:
            await source_rounds.start(attempt, mirror)
        else:
            await _count_for_next_try(attempt, mirror)
            await attempt.machine.execute("blockdev-mirror", _job(attempt, mirror, attempt.copying.speed))
    attempt.copying.is_stale = True
    mirror_jobs.tell(attempt)


async def _count_for_next_try(attempt: SourceAttempt, mirror: Mirror) -> None:
    """Before the mirror: what is written from here on is all that a copy can lack once it was whole. Only for images of
    plain bytes: of others a QEMU that was killed may have had something in its memory that its file does not have.
    Raises QemuError."""
    if mirror.format != "raw":
        return
    await _forget_tries(attempt, mirror)
    name = tried_name(attempt.job, attempt.wanted.destination)
    add = {"node": mirror.node, "name": name, "granularity": limits.DISK_BITMAP_BYTES}
    await attempt.machine.execute("block-dirty-bitmap-add", add)


def stamp_images(attempt: SourceAttempt) -> None:
    """QEMU has given its images away, and the destination does not run the guest yet: what comes to them from here on
    is somebody else's."""
    attempt.copying.at_switch = {m.path: attempt.context.host.image_stamp(m.path) for m in attempt.mirrors}


def are_copies_of_use(attempt: SourceAttempt) -> bool:
    """Every disk was copied once, what was written since is counted, and somebody may try again. Not where the copy was
    found to differ: what is wrong with it nobody knows."""
    facts = attempt.facts
    is_wanted = Fact.CANCEL not in facts and not attempt.machine.is_gone
    return Fact.DISKS_READY in facts and is_wanted and not attempt.copying.differs


async def _forget_tries(attempt: SourceAttempt, mirror: Mirror) -> None:
    """Nobody counts any more for a copy on that host that was tried."""
    inserted = (await inserted_by_path(attempt.machine)).get(mirror.path, {})
    for each in counted(inserted):
        if not each.is_origin and each.host == attempt.wanted.destination:
            gone = {"node": mirror.node, "name": each.name}
            await source_rounds.unless_gone(attempt, "block-dirty-bitmap-remove", gone)


def _target(attempt: SourceAttempt, mirror: Mirror) -> dict[str, Any]:
    served = attempt.offer["disks"]
    node: dict[str, Any] = {
        "driver": "nbd",
        "node-name": mirror.target,
        "server": {"type": "inet", "host": str(served["host"]), "port": str(served["port"])},
        "export": str(served["exports"][mirror.id]),
        # Holes stay holes: what is all zeroes is sent as such, and the other side gives its blocks back.
        "discard": "unmap",
        "detect-zeroes": "unmap",
    }
    if attempt.credentials is not None:
        node["tls-creds"] = f"vmferry-tls-{tag(attempt.job)}"
        node["tls-hostname"] = job_credentials.tls_hostname(attempt.job)
    return node


def _job(attempt: SourceAttempt, mirror: Mirror, speed: int) -> dict[str, Any]:
    version = attempt.machine.version
    job: dict[str, Any] = {
        "job-id": mirror.job,
        "device": mirror.node,
        "target": mirror.target,
        "sync": "full",
        "filter-node-name": f"vmferry-{tag(attempt.job)[:10]}-f{mirror.number}",
        "copy-mode": "background" if version >= CHANGES_MODE_SINCE else "write-blocking",
        "on-source-error": "report",
        "on-target-error": "report",
        "auto-finalize": False,
        "auto-dismiss": False,
    }
    if speed:
        job["speed"] = speed
    if version >= KNOWS_ZERO_SINCE:
        job["target-is-zero"] = True
    return job


def speed(attempt: SourceAttempt) -> int:
    """Each mirror's share of what the job may send, in bytes per second; 0: no limit."""
    return _share(attempt, int(attempt.wanted.options.get(BANDWIDTH, 0)))


def memory_share(attempt: SourceAttempt, bytes_per_s: int) -> int:
    """What of this the memory may send. The bulk of the disks has gone by the time that it begins: what is left of them
    is what the guest writes."""
    shares = attempt.mirrors and Fact.STARTED in attempt.facts
    return bytes_per_s - bytes_per_s // limits.DISKS_SHARE if shares else bytes_per_s


def _share(attempt: SourceAttempt, bytes_per_s: int) -> int:
    """Until the memory goes the disks have all of it."""
    disks = bytes_per_s - memory_share(attempt, bytes_per_s) or bytes_per_s
    return max(1, disks // max(1, len(attempt.mirrors))) if bytes_per_s else 0


async def share_with_memory(attempt: SourceAttempt) -> None:
    """The memory is about to go: from here on both share what the job may send. Raises QemuError."""
    bytes_per_s = int(attempt.wanted.options.get(BANDWIDTH, 0))
    if attempt.mirrors and bytes_per_s:
        told = {BANDWIDTH: memory_share(attempt, bytes_per_s)}
        await attempt.machine.execute("migrate-set-parameters", told)
        await change_speed(attempt, bytes_per_s)


def are_copied(attempt: SourceAttempt) -> bool:
    """The disks are on their way and the memory is not: what the job may send is the mirrors' to share."""
    return disks_of(attempt.facts) in GOING_ON and Fact.STARTED not in attempt.facts


async def change_speed(attempt: SourceAttempt, bytes_per_s: int) -> None:
    """The job may send so much from now on. Raises QemuError."""
    if disks_of(attempt.facts) not in GOING_ON:
        return
    attempt.copying.speed = share = _share(attempt, bytes_per_s)
    for mirror in attempt.mirrors:
        try:
            await attempt.machine.execute("block-job-set-speed", {"device": mirror.job, "speed": share})
        except QmpCommandError:
            if not mirror.since:  # between two rounds there is no job: the next one has it from its beginning
                raise


# --- looking ------------------------------------------------------------------------------------------------


async def look(attempt: SourceAttempt) -> None:
    """Asks QEMU how the mirrors stand, when that is due: facts follow. Trouble is a line in the log."""
    stands = disks_of(attempt.facts)
    if stands not in GOING_ON:
        return
    if not attempt.copying.is_stale and attempt.clock.now_s() - attempt.copying.polled_s < POLL_S:
        return
    attempt.copying.polled_s = attempt.clock.now_s()
    attempt.copying.is_stale = False
    try:
        _hear(attempt, await _jobs(attempt, at_pause=Fact.SWITCHOVER in attempt.facts))
        if stands is not Disks.READY and disks_of(attempt.facts) is Disks.READY:
            await _block_writes(attempt)
    except QemuError as error:
        attempt.copying.is_stale = True
        log.info("job=%s vm=%s command=query-jobs result=%s", attempt.job, attempt.vm, error)
    attempt.context.publish("JOB_PROGRESS", attempt.brief())


async def _jobs(attempt: SourceAttempt, *, at_pause: bool) -> list[dict[str, Any]]:
    """QEMU's jobs, one for each disk among them. Raises QemuError."""
    jobs = await attempt.machine.execute("query-jobs", deadline_s=ASK_S)
    return await source_rounds.look(attempt, jobs, at_pause=at_pause)


def _hear(attempt: SourceAttempt, jobs: Iterable[dict[str, Any]]) -> None:
    said = {str(job["id"]): job for job in jobs}
    attempt.copying.states = {m.job: said[m.job] for m in attempt.mirrors if m.job in said}
    states = attempt.copying.states.values()
    attempt.tracking.disks_are_at(
        sum(int(job["current-progress"]) for job in states),
        sum(int(job["total-progress"]) for job in states),
        guest_bytes=attempt.kept.definition.memory_bytes,
    )
    words: list[tuple[int, str, str | None, str]] = []
    for mirror in attempt.mirrors:
        job = said.get(mirror.job, {})
        name = f"{mirror.id} ({mirror.path})"
        words.append((mirror.number, name, job.get("status"), str(job.get("error", ""))))
    _note(attempt, mirror_findings(words, attempt.facts))
    mirror_jobs.tell(attempt)


def _note(attempt: SourceAttempt, findings: Iterable[Finding]) -> None:
    for fact, round_no, text in findings:
        attempt.note(fact, round_no=round_no, text=text, by="source QEMU")


async def _block_writes(attempt: SourceAttempt) -> None:
    """From here on the guest's writes wait for the destination's, where QEMU can change that now."""
    if attempt.machine.version < CHANGES_MODE_SINCE:
        return
    for mirror in (each for each in attempt.mirrors if not each.since):
        change = {"id": mirror.job, "type": "mirror", "copy-mode": "write-blocking"}
        try:
            await attempt.machine.execute("block-job-change", change)
        except QmpCommandError as error:
            # It is only slower at the pause: what is left then is written then.
            log.warning("job=%s vm=%s command=block-job-change result=%s", attempt.job, attempt.vm, error)


# --- ending -------------------------------------------------------------------------------------------------


async def drain(attempt: SourceAttempt) -> None:
    """The guest is paused: every mirror writes what is left and ends, or none does. Raises QemuError; it is tried
    again then, from where each one stands.

    1. all are asked to end and come to `pending`, in which nothing is left to write  2. one fails instead: the others
    still wait, and are given up with it  3. all are there: they are let go, which cannot fail any more."""
    machine, waiting = attempt.machine, {"pending", "concluded"}
    fast = [{"device": mirror.job, "speed": 0} for mirror in attempt.mirrors]  # what is left goes as it can
    await asyncio.gather(*(source_rounds.unless_gone(attempt, "block-job-set-speed", each) for each in fast))
    statuses, asked = await _statuses(attempt), set[str]()
    end_s = attempt.clock.now_s() + DRAIN_S
    while not all(statuses.get(m.job) in waiting for m in attempt.mirrors):
        if not attempt.allows(Effect.DRAIN_MIRRORS):
            return  # one of them failed, or the guest goes back
        if attempt.clock.now_s() >= end_s:
            raise QemuError(f"{attempt.vm}: its disks were not written to the end within {DRAIN_S:g} s", side="both")
        for mirror in attempt.mirrors:
            if statuses.get(mirror.job) in ("ready", "standby") and mirror.job not in asked:
                asked.add(mirror.job)
                await _ask_for_end(attempt, mirror)
        await asyncio.sleep(DRAIN_POLL_S)
        statuses = await _statuses(attempt)
    if attempt.wanted.verify_disks:
        await _verify(attempt)
    for mirror in attempt.mirrors:
        if not attempt.allows(Effect.DRAIN_MIRRORS):
            return
        if statuses[mirror.job] == "pending":
            if mirror.since:
                await source_rounds.flush(attempt, mirror)
            await machine.execute("job-finalize", {"id": _ending_job(mirror)})
    while attempt.allows(Effect.DRAIN_MIRRORS):  # until the findings say that all have ended well, or one has not
        await _statuses(attempt)
        if attempt.allows(Effect.DRAIN_MIRRORS):
            await asyncio.sleep(DRAIN_POLL_S)
    if Fact.DISKS_DRAINED in attempt.facts:
        attempt.measured.marks.append((attempt.clock.wall_s(), "disks are equal"))
        await _close_targets(attempt)


async def _ask_for_end(attempt: SourceAttempt, mirror: Mirror) -> None:
    if mirror.since:
        try:
            await source_rounds.begin_last(attempt, mirror)
        except QmpCommandError as error:  # it would be refused again, and the guest stands meanwhile
            attempt.note(Fact.DISK_FAILED, text=f"{mirror.id} ({mirror.path}): {error}", by="source QEMU")
        return
    if attempt.copying.states[mirror.job]["status"] == "standby":
        # 1. a person pauses it  2. it has just become ready, and stands by  3. all are ready, the guest is paused
        await source_rounds.unless_gone(attempt, "job-resume", {"id": mirror.job})
    await attempt.machine.execute("block-job-cancel", {"device": mirror.job})


def _ending_job(mirror: Mirror) -> str:
    """QEMU's job whose end is the end of the disk's copy."""
    return source_rounds.last_job(mirror) if mirror.since else mirror.job


async def _verify(attempt: SourceAttempt) -> None:
    """Every mirror has written all and still waits: what both sides hold is read and compared. Raises HostUnreachable,
    Unfit, and it is tried again; a difference is the disk's failure, and leads all back. It ends at once when the guest
    goes back: that one is paused, and reading may take an hour."""
    began_s = attempt.clock.now_s()
    theirs = asyncio.create_task(attempt.ask("peer-digests", deadline_s=VERIFY_S), name=f"digests-{attempt.job}")
    ours = asyncio.create_task(_digests(attempt), name=f"own-digests-{attempt.job}")
    tasks = {theirs, ours}
    try:
        while pending := {task for task in tasks if not task.done()}:
            done, _ = await asyncio.wait(pending, timeout=VERIFY_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await _statuses(attempt)  # a mirror whose destination dies fails meanwhile
            if not attempt.allows(Effect.DRAIN_MIRRORS):
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for mirror in attempt.mirrors:
        if theirs.result().get(mirror.id) != ours.result()[mirror.id]:
            attempt.copying.differs = True
            text = f"{mirror.id} ({mirror.path}): the copy differs"
            attempt.note(Fact.DISK_FAILED, text=text, by="agent")
    took_ms = (attempt.clock.now_s() - began_s) * 1000
    attempt.measured.marks.append((attempt.clock.wall_s(), f"disks were read and compared in {took_ms:.0f} ms"))


async def _digests(attempt: SourceAttempt) -> dict[str, str]:
    """This side's checksum of each disk. Raises Unfit."""
    try:
        return {mirror.id: await attempt.context.host.image_digest(mirror.path) for mirror in attempt.mirrors}
    except OSError as error:
        raise Unfit(f"a disk cannot be read: {error}", side="source", cause=error) from error


async def _statuses(attempt: SourceAttempt) -> dict[str, str]:
    _hear(attempt, await _jobs(attempt, at_pause=True))
    return {name: str(job["status"]) for name, job in attempt.copying.states.items()}


async def drop(attempt: SourceAttempt) -> None:
    """Gives the mirrors up. Raises QemuError when QEMU does not answer; it is tried again then.

    The connections are cut first: to cancel a job QEMU waits for what it has under way, with its main loop, and a
    destination that stands still would hold up the guest's whole QEMU."""
    await _yank(attempt, attempt.mirrors)
    await _cancel(attempt)
    await forget(attempt)
    if not are_copies_of_use(attempt):
        for mirror in attempt.mirrors:
            if not mirror.since:
                await _forget_tries(attempt, mirror)
            elif attempt.copying.differs:  # what the bitmap says of that image was just shown to be wrong
                gone = {"node": mirror.node, "name": mirror.since}
                await source_rounds.unless_gone(attempt, "block-dirty-bitmap-remove", gone)
    attempt.note(Fact.DISKS_DROPPED)


async def _cancel(attempt: SourceAttempt) -> None:
    """Every mirror is concluded, or not there any more. Raises QemuError when QEMU does not answer, or one does not
    end: a read of the guest's own image may hang in its storage."""
    machine, end_s = attempt.machine, attempt.clock.now_s() + OBEY_S
    jobs = await machine.execute("query-jobs", deadline_s=DROP_S)
    while left := _unfinished(attempt, jobs):
        if attempt.clock.now_s() >= end_s:
            raise QemuError(f"{attempt.vm}: the mirrors {', '.join(left)} do not end", side="source")
        for name in left:
            try:
                await machine.execute("job-cancel", {"id": name}, deadline_s=DROP_S)
            except QmpCommandError as error:  # it has just ended
                log.info("job=%s vm=%s command=job-cancel result=%s", attempt.job, attempt.vm, error)
        await asyncio.sleep(DRAIN_POLL_S)
        jobs = await machine.execute("query-jobs", deadline_s=DROP_S)
    ours = {mirror.job for mirror in attempt.mirrors}
    attempt.copying.states |= {str(job["id"]): job for job in jobs if job["id"] in ours}
    mirror_jobs.tell(attempt)


def _unfinished(attempt: SourceAttempt, jobs: Iterable[dict[str, Any]]) -> list[str]:
    ours = {name for mirror in attempt.mirrors for name in (mirror.job, _ending_job(mirror))}
    return [str(job["id"]) for job in jobs if job["id"] in ours and job["status"] not in ("concluded", "null")]


async def cut(attempt: SourceAttempt) -> None:
    """Cuts the mirrors that are there, out of band: QEMU may hang in one."""
    if disks_of(attempt.facts) in LIVE:
        await _yank(attempt, attempt.mirrors)


async def _yank(attempt: SourceAttempt, mirrors: Iterable[Mirror]) -> None:
    """Cuts the connections of the targets, out of band: whatever waits for them ends with an error of its own."""
    instances = [{"type": "block-node", "node-name": mirror.target} for mirror in mirrors]
    for instance in instances:
        try:
            await attempt.machine.execute("yank", {"instances": [instance]}, oob=True, deadline_s=DROP_S)
        except QemuError as error:
            log.info("job=%s vm=%s command=yank result=%s", attempt.job, attempt.vm, error)


async def forget(attempt: SourceAttempt) -> None:
    """Nothing of the mirrors is left in QEMU: results are dismissed, targets closed. Raises QemuError other than that
    something is gone already."""
    for mirror in attempt.mirrors:
        await source_rounds.unless_gone(attempt, "job-dismiss", {"id": mirror.job})
        if mirror.since:
            await source_rounds.forget(attempt, mirror)
    await _close_targets(attempt)


async def _close_targets(attempt: SourceAttempt) -> None:
    for mirror in attempt.mirrors:
        if mirror.since:
            await source_rounds.unless_gone(attempt, "blockdev-del", {"node-name": source_rounds.reader(mirror)})
        await source_rounds.unless_gone(attempt, "blockdev-del", {"node-name": mirror.target})


def note_error(attempt: SourceAttempt) -> None:
    """Records why the disks cannot go, with the disk's name."""
    failed = attempt.facts.entry(Fact.DISK_FAILED)
    if failed is not None:
        text = f"a disk could not be copied: {failed.text}"
    else:
        text = "the source went on to the switchover before its disks were equal"
    attempt.fail(MigrationFailed(text, side="both"))


# --- what people see ----------------------------------------------------------------------------------------


def wire(attempt: SourceAttempt) -> list[dict[str, Any]]:
    """Each mirror as a job of its own, in QEMU's words; bytes."""
    rows = []
    for mirror in attempt.mirrors:
        job = attempt.copying.states.get(mirror.job, {})
        rows.append(
            {
                "id": mirror_jobs.public_id(attempt.job, mirror),
                "disk": mirror.id,
                "path": mirror.path,
                "type": "backup" if mirror.since else "mirror",
                "status": str(job.get("status", "null")),
                "current-progress": int(job.get("current-progress", 0)),
                "total-progress": int(job.get("total-progress", 0)),
                "error": str(job.get("error", "")),
            }
        )
    return rows
