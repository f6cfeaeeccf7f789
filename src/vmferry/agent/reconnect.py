"""Joining the two QEMUs of a broken postcopy again: one try, from the source's side.

Theory of operation
-------------------
A recovery needs both QEMUs at once, and one that breaks half-way is worse than none: as a source a QEMU before 8.0
never leaves it, as a destination it dies of it. So the source's QEMU is told to resume only when the destination's
agent has said that its QEMU waits and this very connection is there; and the destination's QEMU gets that only when the
source's has begun to speak on it:

    1. the source's side is in postcopy-paused, its old channels are cut
    2. the destination's agent puts its QEMU into postcopy-paused and listens (`peer-reconnect`)
    3. the source dials; the destination's agent says that the connection is there (`peer-recovering`)
    4. the source's QEMU: migrate resume, and its first bytes
    5. the destination's agent hands the connection to its QEMU: migrate-recover. From here on it is theirs, and it is
       waited for

Where the destination's agent does not answer over the agents' link, but its host does on the way of the guest's
memory, one call there does 2 to 4 (`standing`): the word "taken" on the very connection is what `peer-recovering` would
have said. Which way it is, is asked before anything else: a question that needs no QEMU, and an answer within half a
second or none for this try.

Rule 1: whatever breaks off, also this try's own end, cuts the channel: nobody waits in a handshake without a peer.
        Only a channel on which the two are joined already is left alone.
Rule 2: nobody is connected to a QEMU that is not known to live: no `migrate resume` before the destination's agent has
        said, over its link or on the connection itself, that its QEMU waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from vmferry import limits
from vmferry.agent import channel as channels
from vmferry.agent import rescue
from vmferry.agent.channel import ChannelEnd
from vmferry.agent.source import SourceAttempt
from vmferry.core.effects import Effect
from vmferry.core.facts import Fact
from vmferry.core.view import Source
from vmferry.errors import GuestHeld, HostUnreachable, QemuError, VmferryError
from vmferry.qmp.errors import QmpCommandError

log = logging.getLogger("vmferry.agent")

OFFER_S = 10.0
TARGET_S = 1.5
DIAL_S = 5.0
TAKEN_S = 10.0
HANDSHAKE_S = 20.0
"""The bitmaps of a large guest cross the line: 32 KiB for a GiB."""
UNMOVED_S = 2.0
"""From the order to resume until QEMU has left postcopy-paused: where it connects or greets by itself, it answers
before that is done. One that still says so later has failed at it, and stays there."""
_JOINED = frozenset({"postcopy-active", "completed"})
_HALF_WAY = frozenset({"postcopy-recover"})
_OVER = _JOINED | {"failed", "cancelled"}


async def reconnect(attempt: SourceAttempt) -> None:
    """One try. Raises when it did not come to that; both sides then stay as they are, paused or degraded, and it is
    tried again."""
    await _let_go(attempt)
    if attempt.recovery_way is None:
        await _over_the_link(attempt)
        return
    try:
        await _ask_over_the_link(attempt)
    except HostUnreachable as error:
        log.info("job=%s vm=%s link=down result=%s", attempt.job, attempt.vm, error)
        await call(attempt)
        return
    if attempt.row().do is Effect.RECONNECT:
        await _over_the_link(attempt)


async def _ask_over_the_link(attempt: SourceAttempt) -> None:
    """Hears what the destination's agent says. Raises HostUnreachable when it says nothing within a moment.

    The question is not taken back then: where the link is up and slow (a session that has to be made anew takes several
    round trips) its answer is there at a later try."""
    question = attempt.question
    if question is None:
        asking = attempt.ask_facts("peer-target", deadline_s=OFFER_S)
        question = attempt.question = asyncio.create_task(asking, name=f"{attempt.job}-link")
        question.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # a later try may not come
        attempt.context.keep_task(question)
    await asyncio.wait({question}, timeout=limits.RECOVERY_LINK_S)
    if not question.done():
        raise HostUnreachable("the destination's agent has not answered yet", side="destination", guest="unknown")
    attempt.question = None
    attempt.hear_target(question.result())


async def without_the_link(attempt: SourceAttempt) -> None:
    """One try that asks nobody over the agents' link. Raises as `call`."""
    await _let_go(attempt)
    await call(attempt)


async def _let_go(attempt: SourceAttempt) -> None:
    machine = attempt.machine
    for channel in attempt.channels:
        channel.cut()
    if (await machine.migration()).get("status") != "postcopy-paused":
        # A try that hangs half-way must give up before a new one can begin; out of band, as QMP may hang too.
        await _give_up(attempt)


async def _over_the_link(attempt: SourceAttempt) -> None:
    """The destination's agent makes its side ready, and says when its QEMU has the connection."""
    more = {} if attempt.heard_round is None else {"after": attempt.heard_round}
    try:
        offer = await attempt.ask("peer-reconnect", deadline_s=OFFER_S, **more)
    except HostUnreachable:
        raise
    except VmferryError:
        # It is there and will not wait for a channel: that it renounced, or has every page, is why, and leads on.
        attempt.hear_target(await attempt.ask_facts("peer-target", deadline_s=TARGET_S))
        raise
    attempt.set_readings(target_answers=True)
    attempt.heard_round = int(offer.get("round", 0))
    if offer.get("uri"):
        await _resume_at(attempt, offer)
        return
    addresses = [(str(host), int(port)) for host, port in offer["addresses"]]
    ticket = channels.Ticket(attempt.job, str(offer["channel"]), bytes.fromhex(offer["token"]))
    channel = await attempt.context.host.dial_channel(addresses, ticket, deadline_s=DIAL_S)

    async def taken() -> None:
        await attempt.ask("peer-recovering", deadline_s=TAKEN_S, channel=channel.name)

    await _resume_on(attempt, channel, offer, taken)


async def call(attempt: SourceAttempt) -> None:
    """The same without the link: one call where the destination's agent listens for it. Raises HostUnreachable when
    nobody said a word there, QemuError with the reason for one that refused; what its side knows was heard then."""
    way = attempt.recovery_way
    assert way is not None, "a place told where it may be called"
    channel, word = await attempt.context.host.call_door(attempt.job, way)
    try:
        facts = word.get("facts")
        if not isinstance(facts, dict) or facts.get("job") != attempt.job:
            raise HostUnreachable("the word of another place", side="destination", guest="unknown")
        attempt.hear_target(facts)
        if not word.get("taken"):
            reason = str(word.get("reason", "no reason given"))
            raise QemuError(f"the destination's agent did not take the call: {reason}", side="destination")
        attempt.heard_round = int(word.get("round", 0))
        channel.name = str(word["channel"])
    except BaseException:
        channel.cut()
        channel.close()
        raise
    if word.get("uri"):
        channel.close()  # it has carried its word; the QEMUs make their own
        await _resume_at(attempt, word)
        return

    async def taken() -> None:
        """It was said already."""

    await _resume_on(attempt, channel, word, taken)


async def _resume_at(attempt: SourceAttempt, offer: dict[str, Any]) -> None:
    """Several connections: the destination's QEMU listens, and the source's connects to it by itself."""
    await attempt.machine.execute("migrate", {"uri": str(offer["uri"]), "resume": True})
    await _until_joined(attempt, offer)
    attempt.refresh()


async def _resume_on(
    attempt: SourceAttempt, channel: ChannelEnd, offer: dict[str, Any], taken: Callable[[], Awaitable[None]]
) -> None:
    """The source's QEMU has the connection, the destination's `taken` it, and they are joined on it; or it is cut."""
    machine = attempt.machine
    attempt.channels.append(channel)
    is_told = False
    try:
        await machine.execute("getfd", {"fdname": channel.name}, fds=(channel.fileno(),))
        channel.entrust(machine.pid)
        await taken()
        await machine.execute("migrate", {"uri": f"fd:{channel.name}", "resume": True})
        is_told = True
        await _until_joined(attempt, offer)
    except BaseException:
        # 1. QEMU's event says that it is joined  2. so nothing is broken any more, and the loop ends this effect before
        # it has heard the same by asking  3. what it would cut is the channel that has just been made.
        if is_told and attempt.readings.source in (Source.POSTCOPY, Source.DONE):
            _note_joined(attempt, offer)
        else:
            channel.cut()
        raise
    finally:
        attempt.refresh()


async def _give_up(attempt: SourceAttempt) -> None:
    """Ends a recovery that hangs. Raises QemuError; where an old QEMU never leaves it, with the way that is left."""
    try:
        await attempt.machine.execute("migrate-pause", oob=True)
    except QmpCommandError as error:
        word = (await attempt.machine.migration()).get("status")
        if word not in _HALF_WAY:
            raise  # it pauses by itself in a moment
        raise GuestHeld(
            f"{attempt.vm}: its source's QEMU never leaves the recovery that broke off: {error.desc}",
            side="source",
            guest="paused",
            hint=f"give the destination the pages out of its memory: vmferry rescue {attempt.vm} feed",
            cause=error,
        ) from error


async def _until_joined(attempt: SourceAttempt, offer: dict[str, Any]) -> None:
    """Returns when the two QEMUs are joined again. Raises QemuError when that broke off."""
    losses, unmoved_s = attempt.facts.last_round(Fact.LINK_LOST), attempt.clock.now_s() + UNMOVED_S

    def is_over(word: str | None) -> bool:
        if word != "postcopy-paused":
            return word in _OVER
        is_another_loss = attempt.facts.last_round(Fact.LINK_LOST) > losses
        return is_another_loss or attempt.clock.now_s() >= unmoved_s

    word = await rescue.until_word(attempt.machine, is_over, deadline_s=HANDSHAKE_S)
    if word not in _JOINED:
        raise QemuError(f"{attempt.vm}: the recovery broke off, QEMU is in {word} again", guest="paused")
    _note_joined(attempt, offer)


def _note_joined(attempt: SourceAttempt, offer: dict[str, Any]) -> None:
    attempt.healed_round = int(offer.get("cut_off", 0))
    attempt.question = None  # what it would say is of before
    attempt.set_readings(target_is_cut_off=False)
