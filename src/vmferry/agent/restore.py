"""What a starting agent knows: the journal, the processes that live, nothing else. Then the ordinary loop runs.

Theory of operation
-------------------
For every VM that the journal says is kept here, the QEMU is attached again (by process identity, never by name).
For every job that has no end, an attempt is made with the facts that the journal proves:

* a commit without a known answer counts as sent, so only the destination's word leads back;
* QEMU's own status word tells how far the rest got, through the same funnel as its events (`observe`);
* a job that QEMU never began ends as failed ("the agent restarted"), and its place is released;
* a QEMU that ended meanwhile is a fact (SOURCE_GONE), as if it had ended just now.

Rule 1: nothing is started, stopped or killed here, but for a QEMU whose guest the journal gave away for good (exactly
        that process, by its identity); everything else is the first tick's to decide.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry.agent import machine as machines
from vmferry.agent import pins_after, restore_after, source_disks
from vmferry.agent.destination import ORPHAN_RESTORED_S, DestinationAttempt
from vmferry.agent.directories import holds_only_logs, prune_logs, remove_directory
from vmferry.agent.machine_options import read_options
from vmferry.agent.plan import taken_over
from vmferry.agent.source import SourceAttempt
from vmferry.agent.vms import KeptVm
from vmferry.agent.wants import Mirror, Place, RecoveryWay, Wanted
from vmferry.core import hazards
from vmferry.core.facts import Fact
from vmferry.core.job import INCOMING, MIGRATE
from vmferry.errors import MigrationFailed, QemuError
from vmferry.jobs.journal import Entry, JobState, Replayed, replay
from vmferry.pki import job_credentials
from vmferry.vm.spawn import ProcessIdentity

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")

NOT_BEGUN = frozenset({None, "none", "failed", "cancelled"})
"""QEMU's words that do not show whether they belong to the unfinished job."""

ARRIVED = frozenset({"completed"})
"""QEMU says it of the guest's way here for ever, and also of a source that has sent everything …"""
GIVEN_AWAY = frozenset({"postmigrate", "finish-migrate"})
"""… whose run state is then one of these."""


async def restore(agent: Agent) -> None:
    """Makes the agent hold again what it held. Raises Unfit when the journal cannot be read."""
    state = replay(agent.journal.read())
    for identity in state.retired:
        # Journalled after the destination ran the guest and had every page; the agent died before it ended this one.
        if agent.host.kill(ProcessIdentity(**identity)):
            log.warning("pid=%d result=ended: its guest runs elsewhere", identity["pid"])
    await asyncio.gather(*(_attach(agent, KeptVm.from_journal(body)) for body in state.vms.values()))
    for vm, held in state.blockers.items():
        agent.blockers.restore(vm, held.values())
    agent.left_images.restore(state.left)
    # At once: a QEMU that waits for a page answers nothing, and each would be waited for.
    await asyncio.gather(*(restore_after.take_up(agent, job) for job in state.jobs.values() if job.role == "restore"))
    for job in state.jobs.values():
        if job.role == "source":
            await _source(agent, job)
        elif job.role == "restore":
            continue
        elif job.role == "save":
            await agent.saves.restore(job, state.jobs.values())
        elif job.role == "chore":
            agent.chores.restore(job)
        else:
            await _destination(agent, job, state)
    agent.left_images.tend()  # not before: a place may be what an image is kept for
    _remove_left_overs(agent)
    pins_after.begin(agent, state.jobs.values())


async def _attach(agent: Agent, kept: KeptVm) -> None:
    kept.machine = agent.host.attach(kept.name, kept.identity, kept.qmp_path, clock=agent.clock)
    if kept.machine is None:
        log.warning("vm=%s pid=%d result=gone since the agent last ran", kept.name, kept.identity.pid)
    else:
        try:
            await kept.machine.attach(deadline_s=2.0)
        except QemuError as error:
            log.warning("vm=%s pid=%d command=attach result=%s", kept.name, kept.identity.pid, error)
    agent.vms[kept.name] = kept
    agent.hold(kept)


async def _source(agent: Agent, job: JobState) -> None:
    wanted = msgspec.convert(job.body, Wanted)
    if job.ended is not None:
        agent.jobs.remember(MIGRATE.name, job)
        agent.results[job.job] = job.ended
        return
    kept = agent.vms.get(wanted.vm)
    if kept is None:
        await _given_away(agent, job, wanted)
        return
    if kept.machine is None:
        # It died while no agent ran. What the destination has may be the only copy: it is asked, as in any attempt.
        kept.machine = machines.ended(kept.name, kept.identity, kept.qmp_path, clock=agent.clock)
    attempt = SourceAttempt(agent, wanted, kept)
    attempt.saved_options = job.options_before
    attempt.was_restored = True
    if job.recovery_way is not None:
        attempt.recovery_way = msgspec.convert(job.recovery_way, RecoveryWay)
    attempt.apply_policy(wanted.policy.changed(job.policy))
    if job.cancel_wanted:
        attempt.note(Fact.CANCEL, text="asked before the restart", by="journal")
    word, info = None, dict[str, Any]()
    try:
        if kept.machine.is_gone:
            raise QemuError("its process is gone", side="source", guest="unknown")
        info = await kept.machine.migration(deadline_s=2.0)
        word = info.get("status")
        if word in ARRIVED and await kept.machine.run_state(deadline_s=2.0) not in GIVEN_AWAY:
            word = None
        if (await read_options(kept.machine)).get("switchover-ack"):
            attempt.note(Fact.SWITCHOVER_ACK, by="source QEMU")
    except QemuError as error:
        log.warning("job=%s vm=%s command=query-migrate result=%s", job.job, wanted.vm, error)
    attempt.note(Fact.PREPARE, by="journal")
    attempt.note(Fact.PAUSE_CAP, by="journal")
    still_copies = _take_mirrors_over(attempt, job, word)
    # STARTED in any case: then a guest that was stopped for the move and never left is started again.
    for fact in (Fact.PLANNED, Fact.PREPARED, Fact.CONFIGURED, *(() if still_copies else (Fact.STARTED,))):
        attempt.note(fact, by="QEMU's status" if job.committed_generation is None else "journal")
    if hazards.waits_for_ever_after_last_page(kept.machine.version):
        attempt.note(Fact.SLOWED, text="it may have been", by="journal")
    if job.finalize_wanted:
        attempt.note(Fact.FINALIZE, text="given before the restart", by="journal")
    if job.paused:
        attempt.note(Fact.PAUSE, round_no=1, text="before the restart", by="journal")
    if job.postcopy_wanted:
        attempt.note(Fact.START_POSTCOPY, text="by hand, before the restart", by="journal")
    if job.committed_generation is not None:
        attempt.note(Fact.COMMITTED, by="journal")
        attempt.note(Fact.GRANT_SENT, text="it may have been sent before the restart", by="journal")
        if job.fenced:
            attempt.note(Fact.FENCED, round_no=1, text=job.fenced, by="journal")
            attempt.note(Fact.STAND_IN, text="it may have been used behind the fence", by="journal")
    elif word in NOT_BEGUN and not kept.machine.is_gone and not job.turned_back and not still_copies:
        attempt.fail(MigrationFailed("the source's agent restarted before the migration had begun", side="source"))
    if job.turned_back:
        attempt.fail(MigrationFailed("the guest was going back when the agent restarted", side="source"))
        attempt.note(Fact.SOURCE_RESUMED, text="it may have been, before the restart", by="journal")
        attempt.has_turned_back = True
    if kept.machine.is_gone:
        # Not known here: whether it began. If it did, the destination knows; if not, that never loads, and says so.
        attempt.note(Fact.SOURCE_GONE, text="it ended while no agent ran", by="kernel")
        attempt.set_readings(target_answers=False)
    else:
        attempt.hear_word(word)
        if word not in NOT_BEGUN:
            attempt.count(info)  # progress goes on from where it was, and is not told from the start again
    agent.run_attempt(attempt)


def _take_mirrors_over(attempt: SourceAttempt, job: JobState, word: str | None) -> bool:
    """Finds the mirrors of the job again, which went on in QEMU. True while the disks are on their way and the memory
    is not: then the attempt goes on from there."""
    if not job.mirrors:
        return False
    attempt.mirrors = msgspec.convert(job.mirrors["mirrors"], tuple[Mirror, ...])
    attempt.plan = taken_over(job.mirrors)
    names = ", ".join(mirror.id for mirror in attempt.mirrors)
    attempt.note(Fact.DISKS_WANTED, text=names, by="journal")
    attempt.copying.speed = source_disks.speed(attempt)
    attempt.note(Fact.DISKS_STARTED, by="journal")
    return word in NOT_BEGUN and job.committed_generation is None and not attempt.machine.is_gone


async def _given_away(agent: Agent, job: JobState, wanted: Wanted) -> None:
    """The VM is not kept here any more: its QEMU was retired after the destination ran it with every page."""
    ended = {
        "job": job.job,
        "vm": wanted.vm,
        "source": agent.config.name,
        "destination": wanted.destination,
        "mode": wanted.mode,
        "status": "completed",
        "outcome": "destination",
        "over": True,
        "downtime_ms": None,
        "total_ms": None,
        "timeline": [],
        "error": None,
        "sentence": f"{wanted.vm} runs on {wanted.destination}.",
        "notes": ["the source's agent restarted on the way; times are not known"],
    }
    await agent.journal.append(Entry.ENDED, job.job, ended)
    agent.results[job.job] = job.ended = ended
    agent.jobs.remember(MIGRATE.name, job)


async def _destination(agent: Agent, job: JobState, state: Replayed) -> None:
    place = msgspec.convert(job.body, Place)
    if job.renounced or job.ended is not None:
        ran = job.ended is not None and job.ended.get("outcome") == "destination"
        agent.known_jobs[job.job] = {
            "job": job.job, "vm": place.vm, "generation": place.generation, "gone": job.renounced, "ran": ran,
            "loaded": ran, "whole": ran, "died": job.ended is not None and job.ended.get("outcome") == "lost",
        }  # fmt: skip
        agent.jobs.remember(INCOMING.name, job)
        left = agent.host.find_qemu(place.directory) if job.renounced and job.ended is None else None
        if left is not None and agent.host.kill(left):
            # The agent died between the promise and its keeping.
            log.warning("job=%s vm=%s pid=%d result=ended: it was given up", job.job, place.vm, left.pid)
        return
    attempt = DestinationAttempt(agent, place)
    attempt.heard_source_s = float("-inf")  # nobody knows how long its source has waited: it is asked at once
    attempt.orphan_s = ORPHAN_RESTORED_S
    attempt.policy = place.policy.changed(job.policy)
    attempt.images = msgspec.convert(job.images, dict[str, tuple[int, int]])
    if place.disks:
        attempt.note(Fact.DISKS_SERVED, text="they may be", by="journal")
    identity = agent.host.find_qemu(place.directory)
    kept = agent.vms.get(place.vm)
    if kept is not None and kept.generation == place.generation:
        # Without a process it died while no agent ran; it had run the guest all the same.
        attempt.use(kept.machine or machines.ended(kept.name, kept.identity, kept.qmp_path, clock=agent.clock))
        attempt.note(Fact.COMMITTED, by="journal")
        attempt.note(Fact.LOADED, by="journal")
        attempt.note(Fact.TARGET_RAN, by="journal")
        attempt.note(Fact.RUN_ACKED, by="journal")
    elif identity is not None:
        machine = agent.host.attach(place.vm, identity, attempt.runtime.qmp_path, clock=agent.clock)
        if machine is not None:
            attempt.use(machine)
    if job.committed_generation is not None:
        attempt.note(Fact.COMMITTED, by="journal")
        attempt.note(Fact.GRANTED, round_no=1, by="journal")
        if kept is None and await _may_have_run(attempt):
            attempt.note(Fact.START_SENT, round_no=1, text="it may have been written before the restart", by="journal")
    if attempt.machine is None:
        attempt.fail(MigrationFailed("the destination's agent restarted and its QEMU is gone", side="destination"))
    agent.run_place(attempt)


async def _may_have_run(attempt: DestinationAttempt) -> bool:
    """Whether `cont` may have taken effect before the restart: it stands in no journal, so only a QEMU that lives,
    answers, and has not begun to run says no. (What the earlier agent wrote was read before this question.)"""
    if attempt.machine is None or attempt.machine.is_gone:
        return True
    try:
        return await attempt.machine.run_state(deadline_s=2.0) not in ("inmigrate", "paused", "prelaunch")
    except QemuError as error:
        log.warning("job=%s vm=%s command=query-status result=%s", attempt.job, attempt.vm, error)
        return True


def _remove_left_overs(agent: Agent) -> None:
    """Left by an agent that died: credentials of jobs that are over, sockets of QEMUs that are; and old logs."""
    used = {kept.directory for kept in agent.vms.values()} | {p.place.directory for p in agent.places.values()}
    for directory in agent.vm_directory.iterdir():
        if str(directory) in used or holds_only_logs(directory):
            continue  # the kernel's list of processes is not read for each guest that was ever here
        if agent.host.find_qemu(str(directory)) is None:
            remove_directory(directory, keep_logs=True)
    prune_logs(agent.vm_directory)
    running = {a.job for a in agent.attempts.values()} | set(agent.places)
    for path in job_credentials.remove_left_overs(agent.job_directory, keep=running):
        log.info("result=removed left-over=%s", path.name)
