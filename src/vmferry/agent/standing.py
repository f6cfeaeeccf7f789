"""A place that needs its source listens for it by itself: a broken postcopy heals while the agents cannot talk.

Theory of operation
-------------------
From the proof that the guest's device state is here until its last page is, the destination's agent has a door
(`knock`) at a port that the source was told at the set-up. A source whose agent cannot reach this one calls there. One
call is one try, and ends in one word:

    1. the caller has shown the token
    2. QEMU is put into postcopy-paused, as by `peer-reconnect` (or listens by itself, where it needs several)
    3. "taken" is said on the connection, with the facts of this side; from then on it is the QEMUs' to speak on
    4. the source's QEMU has begun to: this side's takes this very connection, migrate-recover
    otherwise a refusal with its reason and the same facts, and the connection is cut

So a source that has heard "taken" knows what `peer-recovering` would have said: its peer lives, and waits for what
comes on the other end of what it holds.

Rule 1: one try at a time, whoever asks for it: a second one is refused while QEMU is being given a channel.
Rule 2: a connection on which anything went wrong is cut. A caller that has hung up meanwhile gets no QEMU: one that
        takes a connection which is over already would be in a recovery that broke half-way.
Rule 3: the door says nothing of the guest to anybody without the token, and decides nothing: who may run the guest is
        the agents' to settle when they can talk.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from vmferry.agent import knock, recovery
from vmferry.agent.destination import DestinationAttempt
from vmferry.agent.knock import Caller
from vmferry.core.facts import Fact, open_round
from vmferry.errors import Busy, HostUnreachable, QemuError, Unfit, VmferryError

log = logging.getLogger("vmferry.agent")

REASON_MAX = 2000
"""Characters: QEMU's own words may be in it."""


async def tend(attempt: DestinationAttempt) -> None:
    """Opens the door when the place needs one, closes it when not. A port that is not to be had is tried again at the
    next look: nothing depends on it while the agents can talk."""
    if not _needs_door(attempt):
        await close(attempt)
        return
    if attempt.door is not None:
        return
    config, place = attempt.context.config, attempt.place
    ports = knock.ports_of(attempt.job, *config.migration_ports)
    if not ports or not place.recovery_token:
        return

    async def called(caller: Caller) -> None:
        await answer(attempt, caller)

    try:
        attempt.door = await attempt.context.host.open_door(
            attempt.job, place.recovery_token, config.data_addresses, ports, called
        )
    except Unfit as error:
        log.info("job=%s vm=%s door=none result=%s", attempt.job, attempt.vm, error)


def _needs_door(attempt: DestinationAttempt) -> bool:
    """A postcopy that has loaded and lacks pages, as far as is known, and is not given up."""
    facts = attempt.facts
    is_over = attempt.ended.is_set() or Fact.RELEASE in facts or Fact.TARGET_GONE in facts or Fact.ALL_SENT in facts
    return Fact.PACKAGE_LOADED in facts and Fact.LOADED in facts and not is_over


async def close(attempt: DestinationAttempt) -> None:
    """Nobody is listened for any more. A call that is under way ends by itself."""
    door, attempt.door = attempt.door, None
    if door is not None:
        await door.close()


async def answer(attempt: DestinationAttempt, caller: Caller) -> None:
    """One call, to its word. Never raises for trouble of the world's; the connection is QEMU's then, or cut."""
    try:
        await _take(attempt, caller)
    except VmferryError as error:
        log.warning("job=%s vm=%s command=recovery-call result=%s", attempt.job, attempt.vm, error)
        try:
            with contextlib.suppress(HostUnreachable, OSError):
                caller.answer({"taken": False, "reason": str(error)[:REASON_MAX], "facts": attempt.facts_wire()})
        finally:
            knock.close_quietly(caller.channel)
    except BaseException:
        knock.close_quietly(caller.channel)
        raise


async def _take(attempt: DestinationAttempt, caller: Caller) -> None:
    """Gives QEMU the caller's connection and says so. Raises VmferryError; QEMU is paused then, or as it was."""
    machine = attempt.machine
    if attempt.joining.locked():
        raise Busy(f"{attempt.vm}: its QEMU is being given a channel at this moment", side="destination")
    if machine is None or machine.is_gone or not _needs_door(attempt):
        raise QemuError(f"{attempt.vm}: this place waits for no channel", side="destination")
    async with attempt.joining:
        for channel in attempt.channels:
            channel.cut()
        answers = await recovery.pause(attempt)
        if caller.has_hung_up():
            raise HostUnreachable("the source hung up meanwhile", side="source")
        if attempt.listener is not None:
            await attempt.listener.close()  # an offer that was made over the link counts no more
        attempt.rounds += 1
        attempt.called_round = attempt.rounds
        name = f"vmferry-round-{attempt.rounds}"
        word: dict[str, Any] = {"taken": True, "channel": name, "uri": "", "round": attempt.rounds}
        if attempt.place.multifd:
            word["uri"] = await recovery.listen_inside(attempt, "migrate-recover", oob=True)
            _say(attempt, caller, word)
            caller.channel.close()
    if not attempt.place.multifd:
        caller.channel.name = name
        await recovery.give(attempt, caller.channel, name, answers=answers, say=lambda: _say(attempt, caller, word))
    attempt.heard_source_s = attempt.clock.now_s()
    log.info("job=%s vm=%s channel=%s result=taken the source called", attempt.job, attempt.vm, name)


def _say(attempt: DestinationAttempt, caller: Caller, word: dict[str, Any]) -> None:
    caller.answer({**word, "cut_off": open_round(attempt.facts), "facts": attempt.facts_wire()})
