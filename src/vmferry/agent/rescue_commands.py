"""Commands of people for the rescue tools: `rescue-bring-back`, `rescue-throw-away`, `rescue-feed`.

Theory of operation
-------------------
A VM whose migration this agent conducts has an attempt; its facts are the proof, and its loop is what starts the guest
when the tool has led QEMU to where that is possible. While a tool is at work the loop does nothing (`hold_back`): to it
the words of a QEMU that is being rescued would look like those of a migration that goes on.

A VM without one (adopted in trouble, or an agent that lost its journal) needs a person's word that the other side
never ran the guest and is gone: `never-ran`. Then the tool itself starts it, if it is told to.

Rule 1: what is known here always counts more than a person's word.
Rule 2: one tool at a time for a VM.
Rule 3: progress is told as RESCUE events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.agent import channel as channels
from vmferry.agent import fences, guest_memory, rescue_feed
from vmferry.agent.guest_memory import Memory
from vmferry.agent.source import SourceAttempt
from vmferry.core import hazards
from vmferry.core.facts import Fact
from vmferry.core.rescue import Evidence, NeverRan, Tool
from vmferry.core.table import Remedy
from vmferry.core.view import Grant, Source, Target, source_view
from vmferry.errors import Busy, RescueRefused, UnknownVm, UsageError, VmferryError
from vmferry.pki import job_credentials

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")

DIAL_S = 5.0
RECONNECT_S = 30.0
UNSERVED = (Source.BACK, Source.ENDING, Source.BROKEN, Source.SILENT, Source.GONE)
"""What the source's QEMU must be for its memory to be served by somebody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueArguments:
    """`rescue-bring-back` and `rescue-throw-away`."""

    vm: str
    run: bool = False
    """Start the guest as soon as that is possible (a VM with a migration of ours is started by that anyway)."""
    never_ran: bool = False
    """A person's word that the other side never ran the guest and is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedArguments:
    """`rescue-feed` and `vm-recover`."""

    vm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveArguments:
    """`vm-resolve`."""

    vm: str
    other_side_is_dead: bool = False


def attempt_of(agent: Agent, vm: str) -> SourceAttempt | None:
    """The VM's migration that is not settled, or None."""
    attempt = agent.attempts.get(vm)
    return attempt if attempt is not None and not attempt.ended.is_set() else None


def proof_for(agent: Agent, vm: str, tool: Tool, *, never_ran: bool) -> NeverRan:
    """What proves that the guest may be had back here. Raises RescueRefused when nothing does."""
    attempt = attempt_of(agent, vm)
    if attempt is None:
        if never_ran:
            return NeverRan(evidence=Evidence.PERSON, text="a person's word", stands=lambda: True)
        raise RescueRefused(
            f"{vm} has no migration here that is not settled, so nothing proves that it runs nowhere else",
            guest="unknown",
            hint="make sure that the other side's QEMU never ran it and is gone; then say so with --never-ran",
        )
    found = source_view(attempt.facts, attempt.readings)
    host = attempt.wanted.destination
    has_run = found.target in (Target.RAN, Target.DIED)
    # A throw-away starts nothing by itself: that the right was never given is enough. Who claims pages ends the other
    # side's hope of them for good, so it must be gone.
    if tool is Tool.THROW_AWAY and found.target is not Target.GONE and found.grant is not Grant.SENT:
        return NeverRan(
            evidence=Evidence.NEVER_GRANTED,
            text=f"{host} was never given the right to run {vm}",
            stands=lambda: source_view(attempt.facts, attempt.readings).grant is not Grant.SENT,
            has_run=has_run,
        )
    return NeverRan(
        evidence=Evidence.RENOUNCED,
        text=f"{host} gave {vm} up without having run it",
        stands=lambda: source_view(attempt.facts, attempt.readings).target is Target.GONE,
        has_run=has_run,
    )


@contextlib.asynccontextmanager
async def at_work(agent: Agent, vm: str) -> AsyncIterator[Callable[[dict[str, Any]], None]]:
    """The VM is being rescued; gives what tells the progress. Raises Busy when it is already, is being saved, or lacks
    pages that a restore brings."""
    save = agent.saves.active(vm)
    if save is not None:
        raise Busy(f"{vm} is being saved (job {save.job}), which gives its guest back by itself")
    back = agent.restores.active(vm)
    if back is not None:
        raise Busy(f"{vm} is being restored (job {back.job}), and gets the pages that it lacks from there")
    with agent.claims.hold(vm, "rescued", side="source"):
        attempt = attempt_of(agent, vm)
        if attempt is not None:
            await attempt.hold_back()
        try:
            yield lambda progress: agent.publish("RESCUE", {"vm": vm, **progress})
        finally:
            if attempt is not None:
                attempt.go_on()
                attempt.refresh()


async def bring_back(agent: Agent, arguments: RescueArguments) -> dict[str, Any]:
    """Leads a source out of postcopy whose destination is gone and never ran. Raises as `rescue.bring_back`."""
    return await _lead_out(agent, arguments, Tool.BRING_BACK)


async def throw_away(agent: Agent, arguments: RescueArguments) -> dict[str, Any]:
    """Leads a source out of finish-migrate. Raises as `rescue.throw_away`."""
    return await _lead_out(agent, arguments, Tool.THROW_AWAY)


async def _lead_out(agent: Agent, arguments: RescueArguments, tool: Tool) -> dict[str, Any]:
    vm = arguments.vm
    if vm not in agent.vms:
        raise UnknownVm(f"{agent.config.name} has no VM named {vm}")
    machine = agent.vms[vm].require_machine()
    tools = agent.host.rescue
    body = tools.bring_back if tool is Tool.BRING_BACK else tools.throw_away
    async with at_work(agent, vm) as tell:
        proof = proof_for(agent, vm, tool, never_ran=arguments.never_ran)
        # With an attempt its table starts the guest, once the tool is done: it knows whether it ran before.
        attempt = attempt_of(agent, vm)
        then_run = arguments.run and attempt is None
        if attempt is not None:
            attempt.note(Fact.STAND_IN, text=tool.value, by="person")
        report = await body(machine, proof, then_run=then_run, tell=tell)
    return report.to_wire()


async def feed(agent: Agent, arguments: FeedArguments) -> dict[str, Any]:
    """Gives the destination the pages that it lacks, out of the memory that the source's QEMU has or left behind.

    Raises RescueRefused (nothing was done) or GuestHeld (it waits as before; may be tried again).
    """
    vm = arguments.vm
    attempt = attempt_of(agent, vm)
    if attempt is None:
        raise RescueRefused(f"{vm} has no migration of this host that is not settled", guest="unknown", retry="no")
    async with at_work(agent, vm) as tell:
        _require_unserved(attempt)
        _require_one_connection(attempt)
        memory, is_ours = await _memory_of(attempt)
        try:
            report = await _feed(agent, attempt, memory, tell)
        finally:
            if is_ours:
                memory.close()
        attempt.note_arrival(text="fed from the source's memory", by="stand-in")
    return report


async def recover(agent: Agent, arguments: FeedArguments) -> dict[str, Any]:
    """Takes the named action of the row that the VM's migration is in. Raises UsageError where there is no migration
    that is not settled, and what the action raises; `did` is empty where nothing has to be done by hand."""
    attempt = attempt_of(agent, arguments.vm)
    if attempt is None:
        raise UsageError(f"{arguments.vm} has no migration here that is not settled: there is nothing to recover")
    row = attempt.row()
    did = ""
    match row.remedy:
        case Remedy.TRY_AGAIN:
            did = await attempt.try_again()
        case Remedy.FEED:
            report = await feed(agent, arguments)
            did = f"the destination was given {report['pages']} pages out of the source's memory"
        case None:
            pass
    log.info("job=%s vm=%s row=%s command=recover did=%r", attempt.job, attempt.vm, row.label, did)
    return {**attempt.brief(), "did": did, "was_in": row.label, "action": "" if did else row.action}


async def resolve(agent: Agent, arguments: ResolveArguments) -> dict[str, Any]:
    """A person's word that the other side is dead, for a guest of which nobody knows whether it runs there. Raises
    RescueRefused where something speaks against it: then nothing was done."""
    vm = arguments.vm
    attempt = attempt_of(agent, vm)
    if attempt is None:
        raise UsageError(f"{vm} has no migration here that is not settled: there is nothing to resolve")
    if not arguments.other_side_is_dead:
        raise UsageError(f"it must be said what is so: vmferry resolve {vm} --other-side-is-dead")
    host = attempt.wanted.destination
    view = source_view(attempt.facts, attempt.readings)
    if view.target is not Target.UNKNOWN or view.grant is not Grant.SENT:
        raise RescueRefused(
            f"{vm} is not in doubt ({attempt.row().label}): no word of a person is needed",
            guest="unknown",
            retry="no",
            hint=f"'vmferry inspect {vm}' says how it stands",
        )
    async with at_work(agent, vm):
        question = {"job": attempt.job, "generation": attempt.wanted.generation, "granted": True}
        theirs = await fences.GenerationFence(agent.peers.link(host), question).ask()
        busy = await asyncio.to_thread(fences.busy_image, attempt.kept.definition.writable_paths())
        against = theirs.text if theirs.verdict is fences.Verdict.RUNS else busy
        found = await fences.PersonFence(says_dead=True, against=against).ask()
        if found.verdict is not fences.Verdict.FENCED:
            raise RescueRefused(
                f"{host} is not dead for {vm}: {found.text}",
                side="destination",
                guest="unknown",
                hint=f"look on {host}; end its QEMU there, or bring the link back",
            )
        await attempt.fence(found.text, by="person")
    return {**attempt.brief(), "did": f"{host} is fenced off; the guest goes on here"}


def _require_unserved(attempt: SourceAttempt) -> None:
    found = source_view(attempt.facts, attempt.readings)
    # A destination that never ran is worth it only when there is no way back any more.
    waits = (Target.RAN, Target.LOADED, Target.REFUSED) if found.source is Source.GONE else (Target.RAN,)
    if found.target not in waits:
        raise RescueRefused(
            f"{attempt.vm} does not run on {attempt.wanted.destination}: nobody there waits for pages",
            hint="'vmferry rescue bring-back' is for a destination that never ran the guest",
        )
    if found.source not in UNSERVED:
        raise RescueRefused(f"{attempt.vm}: its source's QEMU still serves the pages itself", retry="no")


def _require_one_connection(attempt: SourceAttempt) -> None:
    """A QEMU with these capabilities takes no descriptor for its recovery, and agents give it nothing else."""
    wanted = attempt.wanted
    several = "multifd" if wanted.multifd_channels else "postcopy-preempt"
    if wanted.multifd_channels or wanted.options.get("postcopy-preempt") is True:
        raise RescueRefused(
            f"{attempt.vm}: with {several} its destination waits for several connections, which is not done between "
            "hosts",
            guest="unknown",
            retry="no",
            hint="nothing was done: the destination waits as before and keeps what it has",
        )


def _was_paused(attempt: SourceAttempt) -> bool:
    """Whether its guest stood still before the switchover, so that no end of the attempt starts it."""
    if not attempt.wanted.running_before or (attempt.plan is not None and attempt.plan.stops_first):
        return True
    return Fact.POSTCOPY_TOLD in attempt.facts and hazards.goes_back_after_grant(attempt.machine.version)


async def _memory_of(attempt: SourceAttempt) -> tuple[Memory, bool]:
    """The memory to serve from, and whether the caller has to close it."""
    machine = attempt.machine
    if attempt.has_run_since:
        raise rescue_feed.ran_again(attempt.vm, "has run since the switchover")
    if machine.is_gone:
        if attempt.memory is None:
            raise RescueRefused(
                f"the QEMU of {attempt.vm} is gone and nothing of its memory was kept",
                guest="lost",
                retry="no",
                hint="only memory in a shared file (memory-backend-memfd or -file, share=on) outlives its process",
            )
        return attempt.memory, False
    await rescue_feed.require_still(machine, was_paused=_was_paused(attempt))
    found = await guest_memory.find(machine)
    return await asyncio.to_thread(guest_memory.read_living, found), True


async def _feed(
    agent: Agent, attempt: SourceAttempt, memory: Memory, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    tls = None
    if not attempt.wanted.clear_text:
        directory = job_credentials.job_directory(attempt.job, "source", agent.job_directory)
        tls = rescue_feed.job_tls(directory, job_credentials.tls_hostname(attempt.job))
    outcome = None
    version = attempt.machine.version
    for section in rescue_feed.sections_to_try(version):
        _require_unserved(attempt)  # asked again: each try makes the destination give its connection up
        if not attempt.machine.is_gone:
            await rescue_feed.require_still(attempt.machine, was_paused=_was_paused(attempt))
        begun_s = agent.clock.now_s()
        dial = _giving(await _dial(attempt))
        outcome = await rescue_feed.serve(
            memory, dial, ram_section=section, tls=tls, tell=tell, deadline_s=limits.RESCUE_S
        )
        if outcome.is_complete:
            ms = (agent.clock.now_s() - begun_s) * 1000
            log.info("job=%s vm=%s tool=feed result=completed pages=%d", attempt.job, attempt.vm, outcome.pages)
            return {
                "tool": Tool.FEED.value,
                "vm": attempt.vm,
                "status": "completed",
                "run_state": "running",
                "ms": ms,
                "bytes": outcome.bytes,
                "pages": outcome.pages,
                "notes": [],
            }
        log.warning("job=%s vm=%s tool=feed section=%d result=%s", attempt.job, attempt.vm, section, outcome.error)
        if not rescue_feed.is_worth_another_number(outcome):
            break
    assert outcome is not None, "there is a number to try"
    raise rescue_feed.unfed(attempt.vm, attempt.wanted.destination, outcome)


def _giving(sock: socket.socket) -> rescue_feed.Dial:
    return lambda: sock


async def _dial(attempt: SourceAttempt) -> socket.socket:
    """A fresh channel to a destination that was told to wait for it. Raises HostUnreachable, QemuError …"""
    offer = await attempt.ask("peer-reconnect", deadline_s=RECONNECT_S)
    ticket = channels.Ticket(attempt.job, str(offer["channel"]), bytes.fromhex(offer["token"]))
    addresses = [(str(host), int(port)) for host, port in offer["addresses"]]
    channel = await channels.dial(addresses, ticket, deadline_s=DIAL_S)
    try:
        return socket.socket(fileno=os.dup(channel.fileno()))
    finally:
        channel.close()


async def remember(attempt: SourceAttempt) -> None:
    """Keeps what of the source's memory would outlive its QEMU, while that still answers. Changes nothing.

    Called when the destination runs and pages are still here: from now on both sides are needed. Also when an agent
    began anew in the middle of that, when the guest may have run here meanwhile: then there is nothing to keep.
    Trouble is a line in the log: the migration does not need this.
    """
    try:
        await rescue_feed.require_still(attempt.machine, was_paused=_was_paused(attempt))
        found = await guest_memory.find(attempt.machine)
        memory = await asyncio.to_thread(guest_memory.remember, found)
    except (VmferryError, OSError) as error:
        log.info("job=%s vm=%s effect=remember-memory result=%s", attempt.job, attempt.vm, error)
        return
    if attempt.ended.is_set() or attempt.has_run_since or attempt.memory is not None:
        memory.close()
        return
    attempt.memory = memory
    log.info("job=%s vm=%s effect=remember-memory missing=%s", attempt.job, attempt.vm, ",".join(memory.missing))
