"""The rescue tool `feed`: a destination gets the pages that it lacks out of the memory of its source's process.

Theory of operation
-------------------
The source's QEMU is dead and left its RAM file behind, or it lives and does not serve any more (failed, stuck). Its
guest was stopped before the destination's began, so its memory is what the destination lacks, unless it ran again:
QEMU 10.2 and newer start it by themselves when a postcopy breaks behind its last page. `serve` speaks
the source's part on connections that somebody made; `feed` makes them to a QEMU of this host.

Rule 1: only a destination in postcopy-paused is fed: QEMU itself says that nobody serves it.
Rule 2: the memory of a living source is read only while its guest stands still, and has done so since the switchover.
Rule 3: nothing is taken from the source: reading changes nothing, and the same memory may be read again.
Rule 4: the number of RAM's section is tried out when nobody knows the source's version: a destination that does not
        know a section pauses again, and keeps what it has.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmferry import limits
from vmferry.agent import rescue
from vmferry.agent.guest_memory import Memory
from vmferry.agent.machine import Machine
from vmferry.agent.rescue import OnProgress, RescueReport
from vmferry.core.rescue import Tool, ended_well
from vmferry.errors import GuestHeld, QemuError, RescueRefused, Unfit

if TYPE_CHECKING:
    from vmferry.engine.errand import ErrandOutcome

log = logging.getLogger("vmferry.agent")

RAM_SECTIONS = (1, 2, 3, 0)
"""Which numbers RAM's section may have, the likely ones first."""
SECTION_CHANGED = (9, 1)
"""The first QEMU whose RAM has the first number (see `engine.stand_in_sender`)."""

_STILL = frozenset({"finish-migrate", "postmigrate"})
"""Run states of a guest that QEMU stopped at the switchover. Nothing leads back to them: whoever ran since and was
stopped again is "paused"."""

Dial = Callable[[], socket.socket]


@dataclass(frozen=True, slots=True)
class Tls:
    """The source's side of the job's encryption: it is the TLS client."""

    context: ssl.SSLContext
    server_name: str


def job_tls(directory: Path, server_name: str) -> Tls:
    """From the files that the source's QEMU was given. Raises Unfit when they are not there any more."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=directory / "ca-cert.pem")
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    except OSError as error:
        raise Unfit(f"the job's credentials in {directory} cannot be read: {error}", cause=error) from error
    return Tls(context, server_name)


async def require_still(source: Machine | None, *, was_paused: bool = False) -> None:
    """Raises RescueRefused when the source's process lives and its guest runs, or may have run since the switchover.

    `was_paused`: it was paused when its memory began to move, so QEMU never starts it by itself, and "paused" is where
    a failure leaves it. Raises QemuError when QEMU does not say.
    """
    if source is None or source.is_gone:
        return
    state = await source.run_state()
    if state in _STILL or (was_paused and state == "paused"):
        return
    raise ran_again(source.vm, "runs" if state == "running" else f"is {state}, so it has run since the switchover")


def ran_again(vm: str, what: str) -> RescueRefused:
    """The source's guest did not stay as it was at the switchover."""
    return RescueRefused(
        f"{vm}: the source's guest {what}; its memory is not what the destination lacks",
        guest="unknown",
        retry="no",
        hint="two copies of this guest have run: find out which one is right, and end the other",
    )


async def serve(
    memory: Memory,
    dial: Dial,
    *,
    ram_section: int,
    preempt: bool = False,
    machine_type: str = "",
    tls: Tls | None = None,
    tell: OnProgress,
    deadline_s: float,
) -> ErrandOutcome:
    """Speaks the source's part of a recovery once. The outcome tells how it ended; nothing escapes but cancellation."""
    from vmferry.engine.stand_in_sender import StandInSender, add_absent_block

    image = memory.image()
    for name in memory.missing:
        add_absent_block(image, name, memory.sizes[name])
    over, on_end = rescue.waker()
    sender = StandInSender(
        image,
        ram_section=ram_section,
        preempt=preempt,
        machine=machine_type,
        tls=None if tls is None else tls.context,
        server_name=None if tls is None else tls.server_name,
        on_end=on_end,
    )
    try:
        sender.start(dial)
        return await rescue.finish(sender, over, tell=tell, tool=Tool.FEED, deadline_s=deadline_s)
    finally:
        image.close()


def sections_to_try(source_version: tuple[int, int] | None) -> tuple[int, ...]:
    """The numbers that RAM's section may have in a stream of this QEMU, the likeliest first."""
    if source_version is not None and source_version != (0, 0) and source_version < SECTION_CHANGED:
        return (2, *(each for each in RAM_SECTIONS if each != 2))
    return RAM_SECTIONS


def is_worth_another_number(outcome: ErrandOutcome) -> bool:
    """Whether a wrong number of RAM's section may have ended it, so that another one should be tried."""
    return outcome.is_acknowledged and (outcome.error is None or outcome.error.retry != "no")


def unfed(vm: str, destination: str, outcome: ErrandOutcome) -> GuestHeld:
    """The destination did not get every page; it waits as before, and nothing is lost."""
    return GuestHeld(
        f"{vm}: {destination} did not get every page and waits as before",
        side="destination",
        guest="unknown",
        retry="no" if outcome.error is not None and outcome.error.retry == "no" else "yes",
        hint="nothing is lost by that; the same command may be given again",
        cause=outcome.error,
    )


@rescue.told_as("unknown")
async def feed(
    destination: Machine,
    memory: Memory,
    *,
    source: Machine | None = None,
    source_version: tuple[int, int] | None = None,
    machine_type: str = "",
    tell: OnProgress = rescue.tell_nobody,
    deadline_s: float = limits.RESCUE_S,
) -> RescueReport:
    """Gives a destination of this host every page that it lacks. Afterwards its migration is completed.

    Raises RescueRefused (nothing was done) or GuestHeld (it did not get everything: it waits as before, nothing is
    lost, and the same may be tried again). `memory` stays the caller's.
    """
    outcome = None
    for section in sections_to_try(source_version):
        await require_still(source)
        if (await rescue.ask(Tool.FEED, destination)).pause_first:
            await rescue.pause(destination, Tool.FEED)
        on = await rescue.capabilities(destination)
        preempt = bool(on.get("postcopy-preempt"))
        begun_s = destination.clock.now_s()
        async with _waiting(destination, several=preempt or bool(on.get("multifd"))) as dial:
            outcome = await serve(
                memory, dial, ram_section=section, preempt=preempt, machine_type=machine_type, tell=tell,
                deadline_s=deadline_s,
            )  # fmt: skip
        word = await rescue.settled(destination)
        if ended_well(word):
            ms = (destination.clock.now_s() - begun_s) * 1000
            log.info("vm=%s tool=feed result=completed ms=%.1f pages=%d", destination.vm, ms, outcome.pages)
            state = await destination.run_state()
            return RescueReport("feed", destination.vm, str(word), state, ms, outcome.bytes, outcome.pages)
        log.warning("vm=%s tool=feed section=%d result=%s", destination.vm, section, outcome.error)
        if not is_worth_another_number(outcome):
            break
    assert outcome is not None, "there is a number to try"
    raise unfed(destination.vm, "the destination", outcome)


@contextlib.asynccontextmanager
async def _waiting(destination: Machine, *, several: bool) -> AsyncIterator[Dial]:
    """A destination that was told to recover, and how to connect to it. Out of band: a CPU that waits for a missing
    page can hold QEMU's main loop; `getfd` alone is in band. Raises QemuError; it then waits as before."""
    if several:
        with tempfile.TemporaryDirectory(prefix="vmferry-") as directory:
            path = os.path.join(directory, "rescue")
            await destination.execute("migrate-recover", {"uri": f"unix:{path}"}, oob=True)
            yield lambda: _connected(path)
        return
    ours, theirs = socket.socketpair()
    name = "vmferry-feed"
    try:
        with theirs:
            await destination.execute("getfd", {"fdname": name}, fds=(theirs.fileno(),))
        await destination.execute("migrate-recover", {"uri": f"fd:{name}"}, oob=True)
    except BaseException:
        ours.close()
        with contextlib.suppress(QemuError):
            await destination.execute("closefd", {"fdname": name})
        raise
    yield lambda: ours


def _connected(path: str) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    try:
        found.settimeout(limits.ENGINE_STAND_IN_SILENCE_S)
        found.connect(path)
    except BaseException:
        found.close()
        raise
    return found
