"""The way back of a save: the rows of `core.saving`, carried out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from vmferry import limits
from vmferry.core.saving import (
    Back,
    BackRow,
    BackView,
    Guest,
    Halted,
    Owed,
    Qemu,
    SaveFact,
    Word,
    did,
    guest_of,
    halted,
    row_of,
    word_of,
)
from vmferry.errors import GuestHeld, QemuError

if TYPE_CHECKING:
    from vmferry.agent.save import SaveJob

log = logging.getLogger("vmferry.agent")

RETRY_FIRST_S, RETRY_LAST_S = 0.02, 2.0
CONT_S = 10.0


async def walk(job: SaveJob) -> tuple[str, BackRow]:
    """Walks the rows until one is the last. That one, and what kept QEMU from starting the guest, if it stands."""
    until_s = job.agent.clock.now_s() + limits.SAVE_RETURN_S
    pause_s, trouble = RETRY_FIRST_S, ""
    while True:
        job.heard.clear()
        row: BackRow | None = None
        try:
            row = row_of(await _look(job))
            if row.do in (Back.DONE, Back.LEAVE):
                return trouble, row
            await _do(job, row.do)
        except Exception as error:  # noqa: BLE001 - a defect is no reason to leave a guest where it is
            trouble = str(error)
            label = "none" if row is None else row.label
            log.warning("job=%s vm=%s save row=%s result=%r", job.job, job.vm, label, error)
        if job.agent.clock.now_s() >= until_s and row is not None and row.do is Back.CONT:
            return trouble, row
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await job.heard.wait()
        pause_s = min(pause_s * 2, RETRY_LAST_S)


async def _do(job: SaveJob, what: Back) -> None:
    match what:
        case Back.CANCEL:
            await job.kept.require_machine().execute("migrate_cancel")
        case Back.CONT:
            await job.kept.require_machine().execute("cont", deadline_s=CONT_S)
        case Back.WAIT | Back.DONE | Back.LEAVE:
            pass


def tell(job: SaveJob, row: BackRow, trouble: str) -> None:
    """Records how it ended."""
    match row.do:
        case Back.DONE:
            job.note(SaveFact.RESUMED, text=row.why)
        case Back.LEAVE:
            state = halted(job.facts)
            was = f" (its run state was {state})" if state else ""
            job.notes.append(f"the save left {job.vm} as it is: {row.why}{was}")
            job.note(SaveFact.LEFT, text=job.hands_off or row.why)
        case _:
            error = _stands(job, trouble)
            job.note(SaveFact.HELD, text=error.message)
            job.fail(error)


def _stands(job: SaveJob, trouble: str) -> GuestHeld:
    return GuestHeld(
        f"{job.vm} is whole and stands still, and QEMU does not start it: {trouble or 'it does not say why'}",
        side="source",
        retry="no",
        hint=f"free the disk that is locked elsewhere, then: vmferry rescue {job.vm} throw-away --run --never-ran",
    )


async def _look(job: SaveJob) -> BackView:
    machine = job.kept.machine
    owed, done = Owed.YES if job.wanted.running_before else Owed.NO, did(job.facts)
    if not job.is_ours():
        return BackView(Qemu.NOT_OURS, Word.IDLE, Guest.OTHER, owed, done)
    if machine is None or machine.is_gone:
        return BackView(Qemu.GONE, Word.IDLE, Guest.OTHER, owed, done)
    try:
        word = word_of((await machine.migration()).get("status"))
        state = guest_of(await machine.run_state())
    except QemuError:
        return BackView(Qemu.GONE if machine.is_gone else Qemu.SILENT, Word.IDLE, Guest.OTHER, owed, done)
    return BackView(Qemu.ANSWERS, word, state, owed, done, Halted.YES if halted(job.facts) else Halted.NO)
