"""A restore that an earlier agent began: what the journal and its QEMU prove, as facts. Then the ordinary loop runs.

Theory of operation
-------------------
    RENOUNCED, or no STARTING      it never ran. Without KEPT, or with an accepted cancel, it is taken away; else the
                                   loop goes on with the order to run
    STARTING                       it may have run: nothing of it is taken away, whatever its QEMU says now. Only a
                                   QEMU that is still `inmigrate` or `prelaunch` proves that it did not
    RAN                            it ran, and whether it runs now is not the restore's: a guest that a person stopped
                                   is not started

Rule 1: the name alone proves nothing: the VM of that name may be another one by now, or none (`vmferry stop`).
Rule 2: a cancel that was accepted is obeyed where the guest is proved not to have run; where that is not proved, it is
        not started either, and a person decides.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from vmferry import limits
from vmferry.agent import restore_start
from vmferry.agent.restoring import RestoreAttempt, RestoreWanted
from vmferry.core.job import RESTORE
from vmferry.core.restore import RestoreFact as F
from vmferry.errors import QemuError
from vmferry.jobs.journal import Entry, JobState

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.vms import KeptVm

log = logging.getLogger("vmferry.agent")

BEFORE = "before the restart"


async def take_up(agent: Agent, state: JobState) -> None:
    """One that the journal has: ended, or to be gone on with, or to be taken away."""
    if state.ended is not None:
        agent.restores.results[state.job] = state.ended
        agent.jobs.remember(RESTORE.name, state)
        await agent.restores.disks.take_up(state)
        return
    wanted = msgspec.convert(state.body, RestoreWanted)
    attempt = RestoreAttempt(agent, wanted)
    attempt.images = msgspec.convert(state.images, dict[str, tuple[int, int]])
    attempt.was_restored = True
    attempt.page_bytes = msgspec.convert(state.host_pages, dict[str, int])
    attempt.has_written_starting = state.starting
    attempt.note(F.WANTED)
    found = agent.vms.get(wanted.vm)
    kept = found if found is not None and found.directory == wanted.directory else None
    if kept is not None:
        attempt.kept, attempt.was_adopted = kept, True
        for fact in (F.READ, F.LAUNCHED, F.LOADING, F.LOADED, F.KEPT):
            attempt.note(fact, text=BEFORE)
        if not wanted.lazy:
            attempt.note(F.WHOLE, text=BEFORE)
        if kept.machine is not None:
            attempt.use(kept.machine)
    if state.renounced or (kept is None and not state.starting):
        attempt.fail(QemuError(f"the agent restarted before {wanted.vm} was there; nothing of it is left"))
    elif kept is None:
        _without_its_name(agent, attempt)
    else:
        await _look(attempt, kept, state)
    agent.restores.begin(attempt)


def _without_its_name(agent: Agent, attempt: RestoreAttempt) -> None:
    """It may have run, and this host does not keep it any more. A QEMU that is there all the same is left alone."""
    vm, there = attempt.vm, agent.host.find_qemu(attempt.wanted.directory)
    words = f"the agent restarted, and its host does not keep {vm} any more; its disks are as they were left"
    if there is not None:
        words += f"; its QEMU (process {there.pid}) is there and may run it: 'vmferry adopt' takes it over"
    attempt.note(F.STARTING, text=BEFORE)
    attempt.error = QemuError(words, guest="unknown" if there is not None else "lost")
    attempt.note(F.GONE, text=words)


async def _look(attempt: RestoreAttempt, kept: KeptVm, state: JobState) -> None:
    """How far a VM is that this host keeps."""
    machine, job = kept.machine, attempt.job
    if machine is None or machine.is_gone:
        if state.starting:
            attempt.note(F.STARTING, text="it may have been started before the restart")
        attempt.error = QemuError(
            f"the QEMU of {attempt.vm} ended while no agent ran", guest="lost" if state.starting else "unharmed"
        )
        attempt.note(F.GONE, text="it ended while no agent ran")
        return
    run_state, word = await _ask(attempt, kept)
    has_run = run_state not in restore_start.NOT_BEGUN and run_state != "unknown"
    may_have_run = has_run or (state.starting and run_state not in restore_start.NEVER_RAN)
    if state.cancel_wanted and not may_have_run:
        attempt.note(F.CANCEL, text="asked before the restart")
        return
    if word == "completed":
        attempt.note(F.WHOLE, text=BEFORE)
    elif attempt.wanted.lazy:
        attempt.note(F.LOST, round_no=1, text="the agent that sent its memory is gone")
    if not may_have_run:
        return
    attempt.note(F.STARTING, text="it may have been started before the restart")
    if state.ran or has_run:
        if not state.ran:
            await restore_start.write_ran(attempt)
        attempt.note(F.RAN, text="" if run_state in ("running", "unknown") else f"its QEMU says {run_state}")
    if state.cancel_wanted:
        await attempt.agent.journal.append(Entry.CANCEL_REFUSED, job)
        if F.RAN not in attempt.log:
            text = (
                f"{attempt.vm} stands: it was cancelled as it was being started, and nobody knows whether it ran; "
                f"'vmferry job resume {job}' starts it, 'vmferry stop --force {attempt.vm}' ends it"
            )
            attempt.note(F.STANDS, round_no=1, text=text)


async def _ask(attempt: RestoreAttempt, kept: KeptVm) -> tuple[str, str | None]:
    """(run state, status of its migration); 'unknown' and None of one that does not answer: it waits for a page."""
    machine = kept.require_machine()
    try:
        run_state = await machine.run_state(deadline_s=limits.RECOVERY_ANSWER_S)
        found = (await machine.migration(deadline_s=limits.RECOVERY_ANSWER_S)).get("status")
    except QemuError as error:
        log.warning("job=%s vm=%s command=query-status result=%s", attempt.job, attempt.vm, error)
        return "unknown", None
    return run_state, None if found is None else str(found)
