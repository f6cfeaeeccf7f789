"""The line of no return of a restore: the order to run its guest, and taking everything away while it was not given.

Theory of operation
-------------------
    1. KEPT is durable               2. STARTING is durable, while QEMU gets ready
    3. was it given up meanwhile?    4. STARTING is a fact, and `cont` is sent: nothing is awaited between the two
    5. the guest was seen running: RAN is durable, and the VM is people's

A cancel that is accepted before 4 is obeyed, one that comes later is refused. An agent that dies before 2 leaves proof
that the guest never ran. One that dies after 2 leaves none, unless it wrote RENOUNCED before it took anything away: an
agent that has not passed 4 knows that it sent no order.

What QEMU says after 4 never leads to UNDO: "I/O error" is what a guest that runs meets when its disk is full, and a
`cont` that was refused may have been the second one.

Rule 1: after 4 nothing is killed and no file is removed.
Rule 2: only files with the device and inode that the journal has as made by this job are removed.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmferry import limits
from vmferry.agent import images
from vmferry.agent.directories import remove_directory
from vmferry.core.restore import RestoreFact as F
from vmferry.errors import QemuError, Unfit
from vmferry.jobs.journal import Entry
from vmferry.qmp.errors import QmpCommandError

if TYPE_CHECKING:
    from vmferry.agent.restoring import RestoreAttempt

log = logging.getLogger("vmferry.agent")

NOT_BEGUN: Final = frozenset({"inmigrate", "prelaunch", "paused"})
"""QEMU's run states in which a guest may be that has not executed an instruction. All others follow from running."""
NEVER_RAN: Final = frozenset({"inmigrate", "prelaunch"})
"""Those that a guest which ran does not come back to."""
_POLL_S: Final = 0.002


async def start_cpus(attempt: RestoreAttempt) -> None:
    """The guest runs (RAN), or stands and says why (STANDS), or was given up meanwhile and is as before.

    Raises QemuError when QEMU does not answer: whether the guest runs is not known, and it is asked again."""
    machine = attempt.machine
    assert machine is not None
    state, _ = await asyncio.gather(_ready(attempt), _write_starting(attempt))
    if attempt.log.is_given_up:
        return
    attempt.note(F.STARTING)
    why = "cont had no effect"
    if attempt.wanted.runs and state in NOT_BEGUN:
        try:
            await machine.execute("cont", deadline_s=limits.RESTORE_CONT_S)
        except QmpCommandError as error:
            why = f"QEMU cannot start it: {error.desc}"
        state = await machine.run_state(deadline_s=limits.RESTORE_CONT_S)
    if attempt.wanted.runs and state in NOT_BEGUN and attempt.cpu_resumed_s is None:
        attempt.agent.restores.adopt(attempt)  # people see it, and can end it
        number = attempt.log.rounds(F.STANDS) + 1
        text = (
            f"{attempt.vm} stands ({state}): {why}; 'vmferry job resume {attempt.job}' tries again, "
            f"'vmferry stop --force {attempt.vm}' ends it"
        )
        log.warning("job=%s vm=%s effect=start result=%s", attempt.job, attempt.vm, text)
        attempt.note(F.STANDS, round_no=number, text=text)
        return
    await write_ran(attempt)
    attempt.agent.restores.adopt(attempt)
    is_as_wished = state == ("running" if attempt.wanted.runs else "paused")
    attempt.note(F.RAN, text="" if is_as_wished else f"its QEMU says {state}")


async def _ready(attempt: RestoreAttempt) -> str:
    """The run state of a QEMU that has taken the device state in. Raises QemuError when it does not get there."""
    machine = attempt.machine
    assert machine is not None
    until_s = attempt.agent.clock.now_s() + limits.RESTORE_CONT_S
    while (state := await machine.run_state(deadline_s=limits.RESTORE_CONT_S)) == "inmigrate":
        if attempt.agent.clock.now_s() >= until_s:
            raise QemuError(f"{attempt.vm}: QEMU has the device state and does not stand ready")
        await asyncio.sleep(_POLL_S)
    return state


async def _write_starting(attempt: RestoreAttempt) -> None:
    if not attempt.has_written_starting:
        await attempt.agent.journal.append(Entry.STARTING, attempt.job)
        attempt.has_written_starting = True


async def write_ran(attempt: RestoreAttempt) -> None:
    """From now on whether the guest runs is people's. Without this entry (a full disk) the next agent may start a guest
    that a person stopped; nothing is lost by it, and the guest does not wait for the disk."""
    try:
        await attempt.agent.journal.append(Entry.RAN, attempt.job)
    except Unfit as error:
        log.warning("job=%s vm=%s entry=ran result=%s", attempt.job, attempt.vm, error)


async def undo(attempt: RestoreAttempt) -> None:
    """Nothing of it is left: no QEMU, no directory, no overlay. Only for a guest that never ran.

    Raises QemuError, Unfit: some of it is left, and it is tried again."""
    assert F.STARTING not in attempt.log, "what may have run is never taken away"
    agent, wanted = attempt.agent, attempt.wanted
    await attempt.drop_feed()
    if F.KEPT in attempt.log or attempt.has_written_starting:
        # 1. the QEMU is killed  2. the agent dies  3. the next one reads KEPT, and takes it for a guest that ran
        await agent.journal.append(Entry.RENOUNCED, attempt.job)
    if attempt.machine is None:  # found again by a restarted agent, or never started
        identity = agent.host.find_qemu(wanted.directory)
        if identity is not None:
            agent.host.kill(identity)
    elif not await attempt.machine.kill():
        raise QemuError(f"{attempt.vm}: its QEMU (process {attempt.machine.pid}) does not end")
    else:
        await attempt.machine.close()
    if F.KEPT in attempt.log:
        await agent.journal.append(Entry.FORGOTTEN, attempt.vm)
        agent.restores.disown(attempt)
    await asyncio.to_thread(_remove_files, attempt)
    attempt.note(F.UNDONE)


def _remove_files(attempt: RestoreAttempt) -> None:
    """In a thread: a folder may be on a network."""
    remove_directory(Path(attempt.wanted.directory), keep_logs=False)
    for overlay in attempt.wanted.overlays:
        if not images.remove(overlay.path, attempt.images.get(overlay.path), job=attempt.job):
            log.warning("job=%s image=%s result=left: it is not this job's", attempt.job, overlay.path)
