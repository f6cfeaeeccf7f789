"""The rescue tools as effects of the source's table: what leads the guest's own QEMU back to where it can start.

Theory of operation
-------------------
The tools are those that a person has (`rescue`); here the table asks for them, and the proof that they need is the
guard of the effect, asked at each step on a fresh view. What they achieved is heard from QEMU's own word, like
everything else, so the row that follows is an ordinary one.

A fence is the third way to be sure of the other side, beside its own word and the grant that was never sent: see
`fences`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vmferry.agent import fences, reconnect, rescue
from vmferry.agent.fences import Verdict
from vmferry.agent.source import SourceAttempt
from vmferry.core import hazards
from vmferry.core.decide import source_allows
from vmferry.core.effects import Effect
from vmferry.core.facts import Fact
from vmferry.core.rescue import Evidence, NeverRan, Tool, has_settled
from vmferry.core.view import Grant, Source, source_view
from vmferry.errors import HostUnreachable, NotTrusted, RescueRefused, VmferryError

log = logging.getLogger("vmferry.agent")

PACE = "max-postcopy-bandwidth"
SLOWEST = 10
"""Bytes per second: QEMU then sends a page in each tenth of one. Less is rounded to 0, which is no limit at all."""
RATE_WINDOW_S = 0.12
"""What is left of the tenth in which the limit was set still goes at the old pace."""
MARGIN_BYTES = 256 << 10
"""At ten pages a second this lasts six of them: longer than a destination takes to end."""
RESULT_S = 3.0


def proof_of(attempt: SourceAttempt, effect: Effect) -> NeverRan:
    """What the effect's own guard proves of the destination; it is asked again at each step."""
    host, vm = attempt.wanted.destination, attempt.vm

    def stands() -> bool:
        return source_allows(effect, source_view(attempt.facts, attempt.readings))

    if source_view(attempt.facts, attempt.readings).grant is not Grant.SENT:
        return NeverRan(
            evidence=Evidence.NEVER_GRANTED, text=f"{host} was never given the right to run {vm}", stands=stands
        )
    if Fact.FENCED in attempt.facts:
        return NeverRan(evidence=Evidence.FENCED, text=f"{host} is fenced off from {vm}", stands=stands)
    return NeverRan(evidence=Evidence.RENOUNCED, text=f"{host} gave {vm} up without having run it", stands=stands)


async def bring_back(attempt: SourceAttempt) -> None:
    """Raises as `rescue.bring_back`; the guest is then whole and paused as before, and it is tried again."""
    for channel in attempt.channels:
        channel.cut()  # a recovery that hangs half-way ends, and with it what would refuse the tool
    await _lead_out(attempt, Effect.BRING_BACK, Tool.BRING_BACK, attempt.context.host.rescue.bring_back)


async def throw_away(attempt: SourceAttempt) -> None:
    """Raises as `rescue.throw_away`; the guest is then whole and paused as before, and it is tried again."""
    await _lead_out(attempt, Effect.THROW_AWAY, Tool.THROW_AWAY, attempt.context.host.rescue.throw_away)


async def _lead_out(
    attempt: SourceAttempt, effect: Effect, tool: Tool, work: Callable[..., Awaitable[rescue.RescueReport]]
) -> None:
    """A refusal says that QEMU is in another state than the row thought: it is looked at anew, and not an error."""
    attempt.note(Fact.STAND_IN, text=tool.value, by="agent")
    try:
        report = await work(attempt.machine, proof_of(attempt, effect), then_run=False, tell=rescue.tell_nobody)
    except RescueRefused as error:
        log.info("job=%s vm=%s result=%s", attempt.job, attempt.vm, error)
        attempt.trouble = str(error)
    else:
        attempt.note(Fact.BROUGHT_BACK, text=f"{report.tool}, {report.ms:.0f} ms", by="stand-in")
    finally:
        attempt.refresh()


async def keep_pages_left(attempt: SourceAttempt) -> None:
    """Before a destination in postcopy is ended: makes sure that its source is not just waiting for its result, where
    that source would wait for ever (`core.hazards`). Returns when pages are left and stay so, or when it has completed.

    Raises QemuError when neither is so: the destination must be left alone, and this is tried again."""
    machine = attempt.machine
    if machine.is_gone or not hazards.waits_for_ever_after_last_page(machine.version):
        return
    if source_view(attempt.facts, attempt.readings).source is not Source.POSTCOPY:
        return
    await machine.execute("migrate-set-parameters", {PACE: SLOWEST})
    await asyncio.sleep(RATE_WINDOW_S)
    left = await _remaining(attempt)
    if left is not None and left < MARGIN_BYTES:
        # Too near to the end to be sure: then it shall have its end. The destination has what it needs for that.
        await machine.execute("migrate-set-parameters", {PACE: 0})
        await rescue.until_word(machine, has_settled, deadline_s=RESULT_S)
    attempt.refresh()


async def let_pages_go(attempt: SourceAttempt) -> None:
    """The pace that the user's options, or QEMU's own, allow. Raises QemuError; it is tried again then."""
    wanted = None
    while (now := attempt.wanted.options.get(PACE, 0)) != wanted:  # a person may change it while QEMU is told
        wanted = now
        await attempt.machine.execute("migrate-set-parameters", {PACE: wanted})
    attempt.note(Fact.PACED)


async def _remaining(attempt: SourceAttempt) -> int | None:
    """Bytes of memory that the source has still to send; None when it is in postcopy no more."""
    info = await attempt.machine.migration()
    if has_settled(info.get("status")):
        return None
    return int((info.get("ram") or {}).get("remaining", 0))


async def fence(attempt: SourceAttempt) -> None:
    """Makes sure that a silent destination does not run the guest and never will, where that can be proved.

    Raises HostUnreachable where it cannot: nothing is known then, and nothing was done."""
    try:
        attempt.hear_target(await attempt.ask_facts("peer-target", deadline_s=fences.ASK_S))
        return
    except (HostUnreachable, NotTrusted) as error:
        silence = error
    if attempt.machine.is_gone:
        raise silence  # there is nothing to go back to
    if attempt.recovery_way is not None and source_view(attempt.facts, attempt.readings).source is Source.BROKEN:
        try:
            await reconnect.without_the_link(attempt)  # it may be that only the agents cannot talk
        except VmferryError as error:
            log.info("job=%s vm=%s call=none result=%s", attempt.job, attempt.vm, error)
        if not attempt.allows(Effect.FENCE_TARGET):
            return  # it spoke
    if not attempt.wanted.running_before:
        raise HostUnreachable(  # a guest that stays paused is taken over without a lock
            f"{silence}; no fence: the guest is paused, and locks say nothing of who has it",
            side=silence.side, guest="unknown", cause=silence,
        )  # fmt: skip
    locks = fences.LocksFence(attempt.stamps)
    found = await locks.ask()
    if found.verdict is not Verdict.FENCED:
        log.info(
            "job=%s vm=%s fence=%s verdict=%s text=%s", attempt.job, attempt.vm, locks.name, found.verdict, found.text
        )
        raise HostUnreachable(f"{silence}; no fence: {found.text}", side=silence.side, guest="unknown", cause=silence)
    attempt.locks = locks
    try:
        await attempt.fence(found.text, by=locks.name)
    except BaseException:
        attempt.locks = None
        locks.release()
        raise


async def fence_again(attempt: SourceAttempt, locks: fences.LocksFence) -> None:
    """QEMU could not take the disks that the fence had just given back. If somebody over there has them, there is no
    fence any more."""
    found = await locks.ask()
    if found.verdict is Verdict.FENCED:
        attempt.locks = locks
        return
    attempt.note(Fact.FENCE_BROKEN, round_no=attempt.facts.last_round(Fact.FENCED), text=found.text, by=locks.name)
