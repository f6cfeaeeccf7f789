"""Joining the two QEMUs of a broken postcopy again: one try, from the destination's side (`reconnect` has the other).

Theory of operation
-------------------
The source's agent asks (`peer-reconnect`), connects, and asks whether QEMU has taken the connection
(`peer-recovering`). There are two ways to give it to QEMU:

    QEMU answers        getfd, then migrate-recover with `fd:`, once the source's QEMU has begun to speak
    it does not         migrate-pause and migrate-recover with `unix:`, out of band, and a relay (`agent.relayed`)
                        from that address to the connection

It does not where its main loop waits for a page of the guest: the emulation of a device touches one, or a `stop`
waits for a CPU that touches one. Nothing but pages ends that, so a recovery that has to ask first would never begin
(P19). Out-of-band commands are carried out by the monitor's own thread, and so is, then, everything until the channel
is up, TLS too: an accepted connection is a blocking one, and QEMU does not go back to its main loop to wait for the
handshake's next step (seen with 7.2 and 11.1).

Rule 1: without QEMU's answer its events must have said that it is in postcopy and has lost its channel.
Rule 2: whatever goes wrong before QEMU has the connection cuts it: the source's QEMU would wait for a peer in vain.
Rule 3: QEMU gets no connection on which nobody speaks (`core.hazards`: an old one dies of a recovery that breaks off).
        What waits for a first byte keeps no newer try waiting, and is of no use to QEMU any more once there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from vmferry import limits
from vmferry.agent.channel import ChannelDoor, ChannelEnd
from vmferry.agent.destination import DestinationAttempt
from vmferry.core.facts import Fact, open_round, waits_for_channel
from vmferry.errors import Busy, HostUnreachable, QemuError
from vmferry.qmp.errors import QmpCommandError, QmpTimeout

log = logging.getLogger("vmferry.agent")

ARRIVE_S = 30.0
"""From the offer to the source's connection; the source configures its QEMU in between."""
PAUSE_S = 3.0
SPEAK_S = 15.0
"""From the word that the connection is here until the source's QEMU, told to resume, says something."""


async def reconnect(attempt: DestinationAttempt, *, after: int | None = None) -> dict[str, Any]:
    """Makes the QEMU of a broken postcopy wait for a new channel. `after`: the newest round of which the source had
    heard when it asked. Raises QemuError or Busy; nothing is changed then.

    1. the source asks over the link, which holds the message back  2. it gives up, calls at the door (`standing`), and
    the two are joined  3. the message comes after all: what it would cut is the channel that has just been made."""
    if attempt.joining.locked():
        raise Busy(f"{attempt.vm}: its QEMU is being given a channel at this moment", side="destination")
    if after is not None and after < attempt.called_round:
        raise Busy(f"{attempt.vm}: an order of before round {attempt.called_round} came late", side="source")
    async with attempt.joining:
        return await _offer(attempt)


async def _offer(attempt: DestinationAttempt) -> dict[str, Any]:
    machine, config = attempt.machine, attempt.context.config
    assert machine is not None
    for channel in attempt.channels:
        channel.cut()
    answers = await pause(attempt)
    if attempt.place.multifd:
        return {"uri": await listen_inside(attempt, "migrate-recover", oob=True), "cut_off": open_round(attempt.facts)}
    first, last = config.migration_ports
    listener = await attempt.context.host.open_channels(attempt.job, config.data_addresses, range(first, last + 1))
    if attempt.listener is not None:
        await attempt.listener.close()
    attempt.listener = listener
    attempt.rounds += 1
    name = f"vmferry-round-{attempt.rounds}"
    attempt.recovering = asyncio.get_running_loop().create_future()
    ticket = listener.expect(name)
    attempt.context.keep_task(asyncio.create_task(_accept_again(attempt, listener, name, answers=answers), name=name))
    addresses = [list(address) for address in listener.addresses]
    return {
        "channel": name,
        "token": ticket.token.hex(),
        "addresses": addresses,
        "round": attempt.rounds,
        "cut_off": open_round(attempt.facts),
    }


async def listen_inside(attempt: DestinationAttempt, command: str = "migrate-incoming", *, oob: bool = False) -> str:
    """Several connections, which `fd:` does not carry: QEMU listens by itself, at the first port that is free. Where.
    Raises QmpCommandError when none is."""
    machine, config = attempt.machine, attempt.context.config
    assert machine is not None
    host = f"[{config.data_address}]" if ":" in config.data_address else config.data_address
    first, last = config.migration_ports
    failure: QmpCommandError | None = None
    for port in range(first, last + 1):
        try:
            await machine.execute(command, {"uri": f"tcp:{host}:{port}"}, oob=oob)
        except QmpCommandError as error:
            failure = error
            continue
        return f"tcp:{host}:{port}" if port else uri_of(await machine.migration())
    assert failure is not None
    raise failure


def uri_of(info: dict[str, Any]) -> str:
    """Where QEMU itself says that it listens (query-migrate)."""
    address = info["socket-address"][0]
    host = f"[{address['host']}]" if ":" in address["host"] else address["host"]
    return f"tcp:{host}:{address['port']}"


async def pause(attempt: DestinationAttempt) -> bool:
    """Leads QEMU into postcopy-paused. Whether it answers in band. Raises QemuError when it does not get there."""
    machine = attempt.machine
    assert machine is not None
    try:
        word = (await machine.migration(deadline_s=limits.RECOVERY_ANSWER_S)).get("status")
        if word in ("postcopy-active", "postcopy-recover"):
            await machine.execute("migrate-pause", oob=True)
        elif word != "postcopy-paused":
            raise QemuError(f"{attempt.vm}: the destination's QEMU is in {word}, not in postcopy", side="destination")
        await attempt.until_cut_off(deadline_s=PAUSE_S)
    except QmpTimeout:
        await _pause_unheard(attempt)
        return False
    return True


async def _pause_unheard(attempt: DestinationAttempt) -> None:
    """The same without an answer in band. Raises QemuError unless its events say that it has lost its channel."""
    machine = attempt.machine
    assert machine is not None
    if not (Fact.PACKAGE_LOADED in attempt.facts and Fact.LOADED in attempt.facts):
        raise QemuError(
            f"{attempt.vm}: the destination's QEMU does not answer, and nothing says that it is in postcopy",
            side="destination",
        )
    log.warning("job=%s vm=%s result=silent its main loop waits: it is recovered out of band", attempt.job, attempt.vm)
    try:
        await machine.execute("migrate-pause", oob=True)
    except QmpCommandError as error:
        log.info("job=%s vm=%s command=migrate-pause result=%s", attempt.job, attempt.vm, error)  # it is so already
    end_s = attempt.clock.now_s() + PAUSE_S
    while not waits_for_channel(attempt.facts):
        left_s = end_s - attempt.clock.now_s()
        if left_s <= 0:
            raise QemuError(
                f"{attempt.vm}: the destination's QEMU does not answer, and has not said that it lost its channel",
                side="destination",
            )
        await attempt.until_change(deadline_s=left_s)


async def _accept_again(attempt: DestinationAttempt, listener: ChannelDoor, name: str, *, answers: bool) -> None:
    recovering = attempt.recovering
    channel: ChannelEnd | None = None
    try:
        channel = await listener.arrived(name, deadline_s=ARRIVE_S)
        await give(attempt, channel, name, answers=answers, say=lambda: _tell(recovering))
    except (HostUnreachable, QemuError) as error:
        log.warning("job=%s vm=%s command=migrate-recover result=%s", attempt.job, attempt.vm, error)
        if channel is not None:
            channel.cut()  # the source's QEMU would wait in the handshake for a peer that is not there
        if not recovering.done():
            recovering.set_exception(error)
            recovering.exception()  # whoever asks reads it; nobody may
    finally:
        if channel is not None and channel not in attempt.channels:
            channel.close()  # nobody has it, also when this task was ended while it waited for a word
        await listener.close()


async def give(
    attempt: DestinationAttempt, channel: ChannelEnd, name: str, *, answers: bool, say: Callable[[], None]
) -> None:
    """Has QEMU take this connection to recover on, once the source's QEMU speaks on it. `say` is called when all is
    ready for that, while the connection is still ours to speak on. Raises VmferryError, or what `say` raises: the
    caller cuts the channel then."""
    machine, number = attempt.machine, attempt.rounds
    assert machine is not None
    if answers:
        say()
        if not await channel.spoken(deadline_s=SPEAK_S):
            raise HostUnreachable(f"nobody spoke on {name}: the source has given this try up", side="source")
    async with attempt.joining:
        if attempt.rounds != number:
            raise HostUnreachable(f"{name} is not the newest try any more", side="source")
        if answers:
            await hand_over(attempt, channel, name)
            try:
                await machine.execute("migrate-recover", {"uri": f"fd:{name}"}, oob=True)
            except QmpCommandError:
                with contextlib.suppress(QmpCommandError):  # it may have been used up
                    await machine.execute("closefd", {"fdname": name})
                raise
            return
        # Each try has a path of its own: QEMU takes the one before away when it listens anew.
        path = attempt.runtime.recovery_path(number)
        await machine.execute("migrate-recover", {"uri": f"unix:{path}"}, oob=True)
        say()  # the relay connects to QEMU when the first byte is there
        attempt.channels.append(attempt.context.host.relay(channel, path))


def _tell(recovering: asyncio.Future[None]) -> None:
    if not recovering.done():
        recovering.set_result(None)


async def hand_over(attempt: DestinationAttempt, channel: ChannelEnd, name: str) -> None:
    """Gives QEMU the connection under this name; from then on it is QEMU's alone. Raises QemuError."""
    machine = attempt.machine
    assert machine is not None
    try:
        await machine.execute("getfd", {"fdname": name}, fds=(channel.fileno(),))
        channel.entrust(machine.pid)
    finally:
        # Not before: 1. the descriptor is on its way to QEMU  2. the loop looks, and finds a channel of this attempt
        # that QEMU does not hold  3. it cuts it, as one that QEMU has let go.
        attempt.channels.append(channel)
